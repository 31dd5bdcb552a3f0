//! Unix sockets: ends of one connection put together, the others each on its own.

use std::ffi::OsString;

use super::super::scan::Open;
use super::super::unix_diag::UnixState;
use super::super::unix_names::path_of;
use super::super::{Stop, unix, unix_diag, unix_single};
use super::{Collector, index, left_behind};
use crate::proto::files::description::Kind;
use crate::proto::files::{UnixEnd, UnixPair, UnixSocket};

impl Collector<'_> {
    pub(super) fn unix_end(&mut self, open: &Open, kind: i32) -> Result<Kind, Stop> {
        let inode = unix::inode(open);
        if let Some(known) = self.unix_index.get(&inode) {
            return known.clone().map(|(pair, end)| Kind::UnixEnd(UnixEnd { pair, end }));
        }
        let ask = |i| unix_diag::ask(i).map_err(Stop::failed("asking the kernel about a unix socket"));
        let state = ask(inode)?;
        let name = unix_single::own_name(open)?;
        let peer = unix_single::peer_name(open)?;
        let other = self
            .table
            .opens
            .iter()
            .find(|o| o.link_starts_with("socket:[") && unix::inode(o) == state.peer && state.peer != 0);
        let is_single = match (kind, &peer) {
            (libc::SOCK_DGRAM, None) => true,
            // A pair that was made at once has no files; and a connection to a name need not be mutual.
            (libc::SOCK_DGRAM, Some(peer)) => {
                let mutual = other.is_some() && ask(state.peer)?.peer == inode;
                let without_files = path_of(&name).is_none() && path_of(peer).is_none();
                !(mutual && without_files || name.is_empty() && peer.is_empty())
            }
            _ => !state.connected,
        };
        if is_single {
            return self.single(open, kind, &state, peer);
        }
        if other.is_none() && state.peer != 0 {
            let peer = OsString::from(format!("socket:[{}]", state.peer));
            return self.outside(open, &peer, "a unix socket");
        }
        for end in [Some(open), other].into_iter().flatten() {
            if let Some(pids) = self.holders.others(&end.link) {
                return self.held_too(open, "a unix socket", &pids);
            }
        }
        let made = (|| {
            let mut pair = unix::capture_pair(self.table.pid, open)?;
            let pid = self.table.pid;
            let end = unix::capture_end(pid, open, state, kind, self.contents)?;
            pair.ends.push(UnixSocket { name: name.clone(), ..end });
            let name = peer.clone().unwrap_or_default();
            pair.ends.push(match other {
                Some(other) => {
                    let end = unix::capture_end(pid, other, ask(state.peer)?, kind, self.contents)?;
                    let creator = unix::capture_pair(pid, other)?;
                    if (creator.uid, creator.gid) != (pair.uid, pair.gid) {
                        return Err(Stop::refuse("is a unix connection whose ends were made by two users"));
                    }
                    UnixSocket { name, ..end }
                }
                None => UnixSocket { name, gone: true, ..UnixSocket::default() },
            });
            self.refuse_shared_names(&pair)?;
            self.pairs.push(pair);
            Ok(index(self.pairs.len() - 1))
        })();
        if let Some(other) = other {
            self.unix_index.insert(unix::inode(other), made.clone().map(|pair| (pair, 1)));
        }
        self.unix_index.insert(inode, made.clone().map(|pair| (pair, 0)));
        made.map(|pair| Kind::UnixEnd(UnixEnd { pair, end: 0 }))
    }

    pub(super) fn held_too(&self, open: &Open, what: &str, pids: &str) -> Result<Kind, Stop> {
        if self.is_left(open) {
            return Ok(left_behind());
        }
        Err(Stop::refuse(format!("is {what} that another process holds too ({pids})")))
    }

    fn single(
        &mut self,
        open: &Open,
        kind: i32,
        state: &UnixState,
        peer: Option<Vec<u8>>,
    ) -> Result<Kind, Stop> {
        if let Some(pids) = self.holders.others(&open.link) {
            return self.held_too(open, "a unix socket", &pids);
        }
        unix_single::capture(self.table.pid, open, kind, state, peer, self.contents).map(Kind::UnixSingle)
    }

    /// An abstract name is given to an end by binding it, and only one socket can be bound to it.
    fn refuse_shared_names(&self, pair: &UnixPair) -> Result<(), Stop> {
        let abstract_names =
            pair.ends.iter().map(|end| &end.name).filter(|name| !name.is_empty() && path_of(name).is_none());
        for name in abstract_names {
            let has_it = |o: &&Open| {
                o.link_starts_with("socket:[") && unix_single::own_name(o).is_ok_and(|own| own == *name)
            };
            let mut inodes: Vec<u64> = self.table.opens.iter().filter(has_it).map(unix::inode).collect();
            inodes.dedup();
            if inodes.len() > 1 {
                let why =
                    "is a unix connection to an abstract name that other sockets of the process have too";
                return Err(Stop::refuse(why));
            }
        }
        Ok(())
    }
}
