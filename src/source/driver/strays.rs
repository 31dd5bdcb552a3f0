//! What comes for the process while it is on its way: kept here, passed on after the commit, or given back.

use std::collections::HashSet;

use super::Driver;
use crate::engine::lock::{self, Connection, LockError};
use crate::engine::reason::{Reason, chain};
use crate::engine::strays::{self, Keeps, Strays, StraysError};
use crate::proto::control;
use crate::wire::{Body, Control};

/// What is kept.
#[derive(Default)]
pub(super) struct Kept {
    tap: Option<Strays>,
    /// Keeps requests for connections from the time when the doors were closed.
    requests: Option<Strays>,
    /// What it is kept for.
    wanted: Vec<Connection>,
    packets: Vec<Vec<u8>>,
    /// How many of them the destination has.
    passed: usize,
}

impl Driver<'_> {
    /// While the process runs. Without it the peers repeat what they have sent.
    pub(super) fn prepare_strays(&mut self) {
        let with_connections = self.config.allowed.files.tcp_established;
        if !with_connections && self.config.allowed.move_ips.is_empty() {
            return;
        }
        let prepare = || -> Result<Kept, StraysError> {
            let mut wanted = lock::connections(&lock::socket_inodes(self.config.pid)?)?;
            wanted.retain(|end| with_connections || end.remote.is_none());
            let tap = Strays::prepare(&wanted, Keeps::All)?;
            Ok(Kept { tap: Some(tap), wanted, ..Kept::default() })
        };
        match prepare() {
            Ok(kept) => self.state.kept = kept,
            Err(error) => self.cannot_keep(&error),
        }
    }

    /// To be called while the process runs, before it is kept from hearing of requests for connections to where
    /// these sockets listen.
    pub(super) fn keep_requests(&mut self, inodes: &HashSet<u64>) -> Result<(), LockError> {
        let kept = &mut self.state.kept;
        if kept.tap.is_none() {
            return Ok(());
        }
        let places = lock::listeners(inodes)?;
        match Strays::prepare(&places, Keeps::Requests).and_then(|tap| tap.listen().map(|()| tap)) {
            Ok(tap) => kept.requests = Some(tap),
            Err(error) => self.cannot_keep(&error),
        }
        Ok(())
    }

    /// To be called before anything is taken away.
    pub(super) fn keep_strays(&mut self) {
        if let Some(Err(error)) = self.state.kept.tap.as_ref().map(Strays::listen) {
            self.state.kept.tap = None;
            self.cannot_keep(&error);
        }
    }

    fn cannot_keep(&mut self, error: &StraysError) {
        let why = format!("what comes while the process moves is not kept, and sent again: {}", chain(error));
        self.report.notes.push(Reason::new("TCP connections", why, ""));
    }

    /// These are locked: the connections of the process, and where it listens.
    pub(super) fn expect_strays(&mut self, locked: Vec<Connection>) {
        self.state.kept.wanted = locked;
    }

    fn take_strays(&mut self) {
        let kept = &mut self.state.kept;
        let mut requests = Vec::new();
        if let Some(mut tap) = kept.requests.take() {
            requests = tap.take(&kept.wanted);
        }
        if let Some(tap) = kept.tap.as_mut() {
            // For a moment both have listened.
            let taken = tap.take(&kept.wanted);
            kept.packets.extend(taken.into_iter().filter(|packet| !requests.contains(packet)));
        }
        kept.packets.extend(requests);
    }

    /// The process is the destination's, or will be. A connection that is lost shows elsewhere.
    pub(super) fn pass_strays(&mut self) {
        self.take_strays();
        let kept = &mut self.state.kept;
        let packets = kept.packets.get(kept.passed..).unwrap_or_default().to_vec();
        if packets.is_empty() {
            return;
        }
        kept.passed = kept.packets.len();
        tracing::debug!(count = packets.len(), "passing strays on");
        let message = Control {
            message: Some(Body::Strays(control::Strays { migration_id: self.id.to_string(), packets })),
        };
        if let Some(link) = &self.link {
            let _ = link.send_control(&message);
        }
    }

    /// The process goes on here, and is reached again.
    pub(super) fn give_strays_back(&mut self) {
        self.take_strays();
        let kept = std::mem::take(&mut self.state.kept);
        match strays::put_in(&kept.packets, &kept.wanted) {
            Ok(count) => tracing::debug!(count, of = kept.packets.len(), "strays are back"),
            Err(error) => tracing::warn!(error = chain(&error), "strays are lost"),
        }
    }

    /// Nobody needs them any more.
    pub(super) fn forget_strays(&mut self) {
        self.state.kept = Kept::default();
    }
}
