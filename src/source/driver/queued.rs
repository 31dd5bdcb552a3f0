//! Connections that the process has not accepted yet. They stay in the queues of its sockets until the destination has
//! said that the process runs there: so whatever happens before, they are where they were.

use std::collections::VecDeque;

use super::Driver;
use crate::engine::address::octets;
use crate::engine::lock::{self, Connection};
use crate::engine::reason::{Reason, chain};
use crate::engine::state::files::{self, FilesOptions};
use crate::proto::control;
use crate::proto::files::TcpConnection;
use crate::wire::{Body, Control};

/// Bytes of such connections in one message, beyond which another one begins.
const MESSAGE_BYTES: usize = 256 << 10;

impl Driver<'_> {
    /// Whether those that wait now can be carried.
    pub(super) fn carries_queued(&self) -> bool {
        self.state.takes_queued && self.state.against_queued.is_empty()
    }

    /// What may be carried of descriptors.
    pub(super) fn files_options(&self) -> FilesOptions {
        let allowed = self.config.allowed.files;
        FilesOptions { tcp_queued: allowed.tcp_established && self.carries_queued(), ..allowed }
    }

    /// Their names, for the state: what comes for them must not be answered at the destination before they are there.
    pub(super) fn queued_ends(&self) -> Vec<TcpConnection> {
        self.state.queued.iter().filter(|_| self.carries_queued()).filter_map(ends).collect()
    }

    /// The process runs at the destination: they follow. Those that cannot are ended with the process here.
    pub(super) fn pass_queued(&mut self) {
        if self.state.queued.is_empty() || !self.carries_queued() {
            return;
        }
        let Some(link) = &self.link else { return };
        let expected = std::mem::take(&mut self.state.queued).len();
        let taken = files::take_queued(&self.state.closing, expected);
        tracing::debug!(count = taken.connections.len(), expected, "connections not accepted yet follow");
        for (fd, reason) in taken.lost {
            self.report.notes.push(reason);
            self.state.closing.push(fd);
        }
        let mut left = VecDeque::from(taken.connections);
        loop {
            let (mut connections, mut bytes) = (Vec::new(), 0);
            while let Some(next) = left.pop_front() {
                bytes += next.received.len();
                connections.push(next);
                if bytes > MESSAGE_BYTES {
                    break;
                }
            }
            let last = left.is_empty();
            let names: Vec<_> = connections.iter().filter_map(lock::connection_of).collect();
            let message = |connections| {
                let queued = control::Queued { migration_id: self.id.to_string(), connections, last };
                Control { message: Some(Body::Queued(queued)) }
            };
            if let Err(error) = link.send_control(&message(connections)) {
                // One with more than fits into a message, or the link is gone.
                let why = format!("is lost: {}", chain(&error));
                let named = |c: &Connection| format!("connection not accepted yet at {}", c.local);
                self.report.notes.extend(names.iter().map(|name| Reason::new(named(name), why.as_str(), "")));
                if last {
                    let _ = link.send_control(&message(Vec::new()));
                }
            }
            if last {
                break;
            }
        }
    }
}

fn ends(connection: &Connection) -> Option<TcpConnection> {
    let (local, remote) = (connection.local, connection.remote?);
    Some(TcpConnection {
        local: octets(local.ip()),
        local_port: local.port().into(),
        remote: octets(remote.ip()),
        remote_port: remote.port().into(),
        ..TcpConnection::default()
    })
}
