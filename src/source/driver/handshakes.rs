//! Handshakes that are half open when the process leaves: they go along with its state, where the destination can put
//! connections into queues. They stay where they are, too, until the process is gone.

use std::collections::HashMap;
use std::time::Instant;

use super::Driver;
use crate::engine::handshake::{MOST, ReadError, Reader};
use crate::engine::lock::{self, Connection};
use crate::engine::reason::{Reason, chain};
use crate::proto::files::Handshake;

/// What is known of them.
#[derive(Default)]
pub(super) struct Handshakes {
    read: HashMap<Connection, Handshake>,
    /// When that was: the clocks go on.
    at: Option<Instant>,
    /// Those that go on while the process stands still.
    left: Vec<Connection>,
    /// That some cannot go along.
    lost: Option<Reason>,
}

impl Driver<'_> {
    /// Makes ready to read some; nothing where they could not be taken along.
    pub(super) fn handshake_reader(&self) -> Option<Reader> {
        let say = |error: &ReadError| tracing::info!(error = chain(error), "handshakes are not taken along");
        if self.state.takes_queued { Reader::prepare().inspect_err(say).ok() } else { None }
    }

    /// To be called while the process runs, when no more of them can begin.
    pub(super) fn read_handshakes(&mut self, reader: &Reader) {
        let at = Some(Instant::now());
        match reader.look() {
            Ok(all) => {
                let named = |one: Handshake| Some((lock::connection_of(one.connection.as_ref()?)?, one));
                let read = all.into_iter().filter_map(named).collect();
                self.state.handshakes = Handshakes { read, at, ..Handshakes::default() };
            }
            Err(error) => tracing::info!(error = chain(&error), "handshakes are not taken along"),
        }
    }

    /// These are locked: they go on, and cannot come to an end here any more. `all` that is the process's: what it asks of
    /// itself it asks again.
    pub(super) fn lock_handshakes(&mut self, mut left: Vec<Connection>, all: &[Connection]) {
        let asks_itself = |one: &Connection| {
            one.is_of_one_host() && one.reversed().is_some_and(|other| all.contains(&other))
        };
        left.retain(|one| !asks_itself(one));
        self.state.handshakes.left = left;
    }

    /// For the state.
    pub(super) fn take_handshakes(&mut self) -> Vec<Handshake> {
        let Handshakes { mut read, at, left, .. } = std::mem::take(&mut self.state.handshakes);
        let passed = at.map_or(0, |at| u32::try_from(at.elapsed().as_millis()).unwrap_or(u32::MAX));
        let (mut taken, mut lost) = (Vec::new(), Vec::new());
        for ends in left {
            let one = read.remove(&ends).filter(|_| !ends.is_of_one_host() && taken.len() < MOST);
            let Some(mut one) = one else {
                lost.push(ends);
                continue;
            };
            if let Some(connection) = &mut one.connection {
                connection.timestamp = connection.timestamp.wrapping_add(passed);
            }
            taken.push(one);
        }
        if let Some(Connection { local, remote }) = lost.first() {
            let of = remote.map_or_else(String::new, |remote| format!(" of {remote}"));
            let others = if lost.len() > 1 {
                format!(", and {} others like it,", lost.len() - 1)
            } else {
                String::new()
            };
            let why = format!("{others} is lost: its handshake was not complete, and cannot be carried");
            self.state.handshakes.lost = Some(Reason::new(format!("connection{of} at {local}"), why, ""));
        }
        tracing::debug!(taken = taken.len(), lost = lost.len(), "handshakes go along");
        taken
    }

    /// The process runs at the destination. Otherwise they go on here, all of them.
    pub(super) fn tell_lost_handshakes(&mut self) {
        self.report.notes.extend(self.state.handshakes.lost.take());
    }
}
