//! The lock: from the freeze to the resume no kernel answers packets of connections whose process is on its
//! way. Without it, a kernel that does not have the socket (any more, or yet) would reset the connection.
//!
//! A [`Lock`] is a table of nf_tables that its netlink socket owns: the kernel removes it with the last holder
//! of the socket, so no lock outlives those who can lift it. At the source the sentinel is a second holder.
//!
//! Packets of a locked connection are dropped in both directions, and so are requests for new ones where the
//! process listens. The peers repeat what was dropped; nothing is lost but time. A process that listens on all
//! addresses of a port has the requests to that port dropped, whosesoever the address is.

mod diag;
mod image;
mod nft;
mod orphans;
mod own;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests;
mod whole;

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};

use nix::errno::Errno;
use nix::sys::socket::SockProtocol;

pub use image::{connection_of, is_at, of_image, places_of, queued_in_image};
pub use orphans::{Concerned, Orphan};
pub use own::{Own, is_connection};

use crate::engine::procfs;
use crate::engine::reason::Reason;
use crate::engine::remote::Tid;
use crate::engine::sys::netlink::Netlink;
use crate::engine::sys::socket;

/// Room for the elements of some 80,000 connections in one batch.
const BATCH_BYTES: usize = 4 << 20;
/// Most connections that one lock takes: a process has no more descriptors.
const MAX_CONNECTIONS: usize = 1 << 20;
/// So many connections are looked for one by one: to list all of the host takes as long as that, and longer.
const ONE_BY_ONE: usize = 64;

/// Packets with this mark, in these bits of theirs, pass every lock: we have put them in ourselves.
pub(in crate::engine) const OUR_MARK: u32 = 0x6d51_0000;
const OUR_MARK_BITS: u32 = 0xffff_0000;

/// A connection to lock, or a place where the process listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Connection {
    /// The end of the process. Addresses as on the wire: never an IPv4 address in the form of IPv6.
    pub local: SocketAddr,
    /// The other end; none for a listening socket.
    pub remote: Option<SocketAddr>,
}

impl Connection {
    /// As the other end has it; none for a listening socket.
    pub fn reversed(self) -> Option<Self> {
        Some(Self { local: self.remote?, remote: Some(self.local) })
    }

    /// Whether its two ends are on one host, as far as their addresses tell.
    pub fn is_of_one_host(self) -> bool {
        self.remote.is_some_and(|remote| remote.ip() == self.local.ip() || remote.ip().is_loopback())
    }
}

/// What a stopped process has by its sockets.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Locked {
    /// Where it listens, its connections, and those on their way to it that it has not accepted.
    pub all: Vec<Connection>,
    /// Those among them that only wait to be accepted.
    pub queued: Vec<Connection>,
    /// Bytes that have come by these.
    pub queued_bytes: u64,
    /// How many of these wait for other processes, which listen at the same places.
    pub of_others: usize,
    /// Those whose handshake goes on.
    pub half_open: Vec<Connection>,
}

/// Connections that are not the process's yet, but will be.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Unfinished {
    /// Their handshake goes on.
    pub half_open: usize,
    /// The same, but the answer had to be repeated: the peer is most likely gone.
    pub unanswered: usize,
    /// They wait to be accepted.
    pub queued: usize,
}

/// Why connections could not be locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// nf_tables said no.
    #[error("{step} the lock of connections")]
    Table {
        /// What was being done.
        step: &'static str,
        /// The kernel's answer.
        #[source]
        errno: Errno,
    },
    /// The sockets of the host could not be listed.
    #[error("listing TCP connections")]
    List(#[source] Errno),
    /// The descriptors of the process could not be listed.
    #[error("listing the sockets of process {pid}")]
    Sockets {
        /// The process.
        pid: Tid,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// More than anybody has.
    #[error("{0} connections are more than {MAX_CONNECTIONS}")]
    TooMany(usize),
}

/// A table of our own, in the network namespace of the thread that made it. Dropping it lifts the lock, once
/// nobody else holds the socket.
#[derive(Debug)]
pub struct Lock {
    netlink: Netlink,
    name: String,
    /// What [`Lock::close_on`] has locked: not done twice.
    closed: HashSet<Connection>,
    /// Local ends that are locked whatever the other end is, likewise.
    whole: HashSet<SocketAddr>,
    /// Local ends of many connections, and whether another process had one there, too: see [`Lock::look_for_others`].
    ends: HashMap<SocketAddr, bool>,
}

impl Lock {
    /// Makes the table, with nothing locked. Takes milliseconds: to be done before the freeze. `name` tells
    /// operators whose it is.
    ///
    /// # Errors
    /// If this kernel has no nf_tables, or we lack the right to use them.
    pub fn open(name: &str) -> Result<Self, LockError> {
        let failed = |errno| LockError::Table { step: "making", errno };
        let netlink = Netlink::open_for(SockProtocol::NetlinkNetFilter).map_err(failed)?;
        netlink.allow_long_messages(BATCH_BYTES).map_err(failed)?;
        let (closed, whole, ends) = (HashSet::new(), HashSet::new(), HashMap::new());
        let mut lock = Self { netlink, name: name.to_owned(), closed, whole, ends };
        lock.transact(&nft::create(name)).map_err(failed)?;
        Ok(lock)
    }

    /// Locks these connections, besides those that are locked.
    ///
    /// # Errors
    /// If there are too many, or the kernel refuses; then none of them is locked.
    pub fn close_on(&mut self, connections: &[Connection]) -> Result<(), LockError> {
        let new: Vec<Connection> = connections.iter().filter(|c| !self.has(c)).copied().collect();
        if new.is_empty() {
            return Ok(());
        }
        let mut whole = whole::crowded(&new);
        if !whole.is_empty() {
            let others = diag::others_at(&whole, connections).map_err(LockError::List)?;
            whole.retain(|local| !others.contains(local));
        }
        self.close(&new, &whole)?;
        self.closed.extend(new);
        self.whole.extend(whole);
        Ok(())
    }

    fn has(&self, connection: &Connection) -> bool {
        let by_end = connection.remote.is_some() && self.whole.contains(&connection.local);
        by_end || self.closed.contains(connection)
    }

    /// The local ends in `whole` are locked whatever the other end is.
    fn close(&mut self, connections: &[Connection], whole: &HashSet<SocketAddr>) -> Result<(), LockError> {
        if connections.len() > MAX_CONNECTIONS {
            return Err(LockError::TooMany(connections.len()));
        }
        self.transact(&nft::add(&self.name, connections, whole))
            .map_err(|errno| LockError::Table { step: "closing", errno })
    }

    /// Locks everything that a stopped process has by these sockets. Returns it all.
    ///
    /// # Errors
    /// If the sockets cannot be listed, or not locked.
    pub fn close_on_process(&mut self, inodes: &HashSet<u64>) -> Result<Locked, LockError> {
        // In this order no new connection can begin after the list of connections was made.
        let listeners = self.close_on_listeners(inodes)?;
        let mut locked = self.close_on_connections(inodes, &listeners)?;
        locked.all.extend(listeners);
        Ok(locked)
    }

    /// The first half of [`Lock::close_on_process`]: nobody can begin a connection any more. Returns where these
    /// sockets listen. (A request that has passed the rules a moment ago is a connection microseconds later.)
    ///
    /// # Errors
    /// If the sockets cannot be listed, or not locked.
    pub fn close_on_listeners(&mut self, inodes: &HashSet<u64>) -> Result<Vec<Connection>, LockError> {
        let listeners = diag::listeners(inodes).map_err(LockError::List)?;
        self.close_on(&listeners)?;
        Ok(listeners)
    }

    /// The second half: the connections of these sockets, and those that wait at `listeners`.
    ///
    /// # Errors
    /// If the sockets cannot be listed, or not locked.
    pub fn close_on_connections(
        &mut self,
        inodes: &HashSet<u64>,
        listeners: &[Connection],
    ) -> Result<Locked, LockError> {
        let (mut locked, others) = diag::connections(inodes, listeners).map_err(LockError::List)?;
        let mut whole = whole::crowded(&locked.all);
        whole.retain(|local| !others.contains(local));
        self.close(&locked.all, &whole)?;
        if !locked.half_open.is_empty() {
            // Until now their peers' last words could come.
            let (left, queued) = diag::settled(&locked.half_open).map_err(LockError::List)?;
            locked.half_open = left;
            locked.queued.extend(queued);
        }
        if !locked.queued.is_empty() {
            let own = diag::waiting_for(inodes).map_err(LockError::List)?;
            locked.of_others = locked.queued.len().saturating_sub(own);
        }
        Ok(locked)
    }

    /// Lets everything pass again, at once. The table is left to go with the socket, because removing chains
    /// takes longer than somebody who waits for a packet should wait.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn release(&mut self) -> Result<(), LockError> {
        self.forget();
        self.transact(&nft::clear(&self.name)).map_err(|errno| LockError::Table { step: "lifting", errno })
    }

    /// Lets everything pass but what comes for the connections among `kept`, and requests for new ones where they listen.
    /// What these connections have to say passes.
    ///
    /// # Errors
    /// If the kernel refuses; then everything is as it was.
    pub fn release_but(&mut self, kept: &[Connection]) -> Result<(), LockError> {
        self.forget();
        let messages = [nft::clear(&self.name), nft::deafen(&self.name, kept)].concat();
        self.transact(&messages).map_err(|errno| LockError::Table { step: "lifting", errno })
    }

    fn forget(&mut self) {
        self.closed.clear();
        self.whole.clear();
    }

    /// Removes the table, although others may hold the socket still.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn remove(mut self) -> Result<(), LockError> {
        self.transact(&nft::remove(&self.name)).map_err(|errno| LockError::Table { step: "removing", errno })
    }

    /// The socket that the table belongs to, for another process to hold.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.netlink.as_fd()
    }

    fn transact(&mut self, messages: &[nft::Message]) -> Result<(), Errno> {
        let frame = nft::batch_frame();
        let (begin, end) = nft::BATCH;
        self.netlink.transact((begin, &frame), messages, (end, &frame))
    }
}

/// Lets go of a lock that this process holds for another one by its standard output, as a sentinel does. Where
/// standard output is anything else it stays as it is.
///
/// # Errors
/// If it cannot be closed.
pub fn let_go() -> Result<(), LockError> {
    let failed = |errno| LockError::Table { step: "letting go of", errno };
    let out = std::io::stdout();
    let protocol = socket::int_option(out.as_fd(), libc::SOL_SOCKET, libc::SO_PROTOCOL);
    let family = socket::int_option(out.as_fd(), libc::SOL_SOCKET, libc::SO_DOMAIN);
    if (family, protocol) != (Ok(libc::AF_NETLINK), Ok(libc::NETLINK_NETFILTER)) {
        return Ok(());
    }
    let null = std::fs::File::options().write(true).open("/dev/null");
    let null = null.map_err(|e| failed(Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO))))?;
    nix::unistd::dup2_stdout(null).map_err(failed)
}

/// Why connections could not be locked here; `None` if they can.
pub fn missing_here() -> Option<Reason> {
    let name = format!("migrate-probe-{}", nix::unistd::gettid());
    let errno = match Lock::open(&name) {
        Ok(_) => return None,
        Err(LockError::Table { errno, .. }) => errno,
        Err(error) => return Some(Reason::new("TCP connections", error.to_string(), "")),
    };
    let (why, remedy) = match errno {
        Errno::EPROTONOSUPPORT | Errno::EOPNOTSUPP | Errno::ENOENT | Errno::EINVAL => {
            ("need nf_tables (family inet) while they move, which this kernel does not have".to_owned(), "")
        }
        Errno::EPERM => {
            ("need CAP_NET_ADMIN while they move, which we do not have".to_owned(), "run it as root")
        }
        errno => (format!("cannot be locked while they move: {errno}"), ""),
    };
    Some(Reason::new("TCP connections", why, remedy))
}

/// Where the processes of these sockets listen, and which connections they have; also those that wait to be
/// accepted. The sockets of a running process change meanwhile.
///
/// # Errors
/// If the kernel does not tell.
pub fn connections(inodes: &HashSet<u64>) -> Result<Vec<Connection>, LockError> {
    let mut all = diag::listeners(inodes).map_err(LockError::List)?;
    let (locked, _) = diag::connections(inodes, &all).map_err(LockError::List)?;
    all.extend(locked.all);
    Ok(all)
}

/// Where these sockets listen.
///
/// # Errors
/// If the kernel does not tell.
pub fn listeners(inodes: &HashSet<u64>) -> Result<Vec<Connection>, LockError> {
    diag::listeners(inodes).map_err(LockError::List)
}

/// How many connections to these places are not the process's yet, but will be.
///
/// # Errors
/// If the kernel does not tell.
pub fn unfinished(places: &[Connection]) -> Result<Unfinished, LockError> {
    diag::unfinished(places).map_err(LockError::List)
}

/// Those of `wanted` that this host has, open or listening, and bound to no device.
///
/// # Errors
/// If the kernel does not tell.
pub fn reachable(wanted: &HashSet<Connection>) -> Result<HashSet<Connection>, LockError> {
    diag::reachable(wanted, ONE_BY_ONE).map_err(LockError::List)
}

/// The inodes of all sockets that a process has open.
///
/// # Errors
/// If its descriptors cannot be listed.
pub fn socket_inodes(pid: Tid) -> Result<HashSet<u64>, LockError> {
    let failed = |source| LockError::Sockets { pid, source };
    let mut inodes = HashSet::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).map_err(failed)? {
        // A descriptor that is closed meanwhile is none.
        inodes.extend(procfs::socket_behind(entry.map_err(failed)?.path()));
    }
    Ok(inodes)
}
