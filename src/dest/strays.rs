//! Segments that came for the process while it was on its way, at the source and here: they are put in when its
//! sockets are live.

use super::driver::Driver;
use crate::engine::lock::Connection;
use crate::engine::reason::chain;
use crate::engine::strays::{self, Keeps, MAX_BYTES, MAX_PACKETS, Strays};
use crate::wire::{Body, Control};

/// What may still be put in, and for what.
#[derive(Default)]
pub(super) struct Waiting {
    tap: Option<Strays>,
    wanted: Vec<Connection>,
    live: bool,
    /// What the source has sent, packets and bytes. It may send twice what one side keeps.
    packets: usize,
    bytes: usize,
}

impl Driver {
    /// Its sockets are about to be made, and peers may reach this host already.
    pub(super) fn keep_strays(&mut self, sockets: Vec<Connection>) {
        if !self.begin.tcp_established && self.begin.move_ips.is_empty() {
            return;
        }
        self.strays.wanted = sockets;
        match Strays::prepare(&self.strays.wanted, Keeps::All).and_then(|tap| tap.listen().map(|()| tap)) {
            Ok(tap) => self.strays.tap = Some(tap),
            Err(error) => tracing::warn!(error = chain(&error), "what comes meanwhile is not kept"),
        }
    }

    /// The sockets are live: what has come here so far goes in.
    pub(super) fn put_own_strays_in(&mut self) {
        self.strays.live = true;
        if let Some(mut tap) = self.strays.tap.take() {
            let packets = tap.take(&self.strays.wanted);
            self.put_in(&packets);
            self.queued.keep(&packets, Some(tap));
        }
    }

    /// Takes a message with strays, or with connections not accepted yet, if it is one; gives any other back.
    pub(super) fn without_strays(&mut self, message: Box<Control>) -> Option<Box<Control>> {
        let strays = match message.message {
            Some(Body::Strays(strays)) => strays,
            Some(Body::Queued(queued)) => {
                self.queued.take(queued);
                return None;
            }
            _ => return Some(message),
        };
        let seen = &mut self.strays;
        seen.packets = seen.packets.saturating_add(strays.packets.len());
        seen.bytes = seen.bytes.saturating_add(strays.packets.iter().map(Vec::len).sum());
        if seen.live && seen.packets <= 2 * MAX_PACKETS && seen.bytes <= 2 * MAX_BYTES {
            self.put_in(&strays.packets);
            self.queued.keep(&strays.packets, None);
        }
        None
    }

    fn put_in(&self, packets: &[Vec<u8>]) {
        match strays::put_in(packets, &self.strays.wanted) {
            Ok(count) => tracing::debug!(count, of = packets.len(), "strays are in"),
            Err(error) => tracing::warn!(error = chain(&error), "strays are lost"),
        }
    }
}
