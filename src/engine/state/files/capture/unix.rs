//! Unix sockets: ends of one connection put together, the others each on its own.

use std::ffi::OsString;

use super::super::scan::Open;
use super::super::unix_diag::UnixState;
use super::super::{Stop, unix, unix_diag, unix_single};
use super::{Collector, index, left_behind};
use crate::engine::sys::socket;
use crate::proto::files::description::Kind;
use crate::proto::files::{UnixEnd, UnixSocket};

impl Collector<'_> {
    pub(super) fn unix_end(&mut self, open: &Open, kind: i32) -> Result<Kind, Stop> {
        let inode = unix::inode(open);
        if let Some(known) = self.unix_index.get(&inode) {
            return known.clone().map(|(pair, end)| Kind::UnixEnd(UnixEnd { pair, end }));
        }
        let ask = |i| unix_diag::ask(i).map_err(Stop::failed("asking the kernel about a unix socket"));
        let state = ask(inode)?;
        let peer = unix_single::peer_name(open)?;
        // A datagram socket counts as connected by whoever connected to it.
        let is_single = match kind {
            libc::SOCK_DGRAM => state.named || peer.as_ref().is_none_or(|name| !name.is_empty()),
            _ => !state.connected,
        };
        if is_single {
            return self.single(open, kind, &state, peer);
        }
        if state.named {
            return Err(Stop::refuse("is a unix connection with a name, which cannot be carried yet"));
        }
        let other = self
            .table
            .opens
            .iter()
            .find(|o| o.link_starts_with("socket:[") && unix::inode(o) == state.peer && state.peer != 0);
        let named_peer = socket::peer_has_name(open.fd()).unwrap_or(true);
        if other.is_none() && state.peer != 0 || named_peer {
            let peer = OsString::from(format!("socket:[{}]", state.peer));
            return self.outside(open, &peer, "a unix socket");
        }
        for end in [Some(open), other].into_iter().flatten() {
            if let Some(pids) = self.holders.others(&end.link) {
                return self.held_too(open, &pids);
            }
        }
        let made = (|| {
            let mut pair = unix::capture_pair(self.table.pid, open)?;
            pair.ends.push(unix::capture_end(open, state, kind, self.contents)?);
            pair.ends.push(match other {
                Some(other) => unix::capture_end(other, ask(state.peer)?, kind, self.contents)?,
                None => UnixSocket { gone: true, ..UnixSocket::default() },
            });
            self.pairs.push(pair);
            Ok(index(self.pairs.len() - 1))
        })();
        if let Some(other) = other {
            self.unix_index.insert(unix::inode(other), made.clone().map(|pair| (pair, 1)));
        }
        self.unix_index.insert(inode, made.clone().map(|pair| (pair, 0)));
        made.map(|pair| Kind::UnixEnd(UnixEnd { pair, end: 0 }))
    }

    fn held_too(&self, open: &Open, pids: &str) -> Result<Kind, Stop> {
        if self.is_left(open) {
            return Ok(left_behind());
        }
        Err(Stop::refuse(format!("is a unix socket that another process holds too ({pids})")))
    }

    fn single(
        &mut self,
        open: &Open,
        kind: i32,
        state: &UnixState,
        peer: Option<Vec<u8>>,
    ) -> Result<Kind, Stop> {
        if let Some(pids) = self.holders.others(&open.link) {
            return self.held_too(open, &pids);
        }
        unix_single::capture(self.table.pid, open, kind, state, peer, self.contents).map(Kind::UnixSingle)
    }
}
