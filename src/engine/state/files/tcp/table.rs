//! The socket options of a TCP connection: read as bytes, set where a new socket's differ. A connection
//! has them by the thousand, so what a new socket has is asked for once.

use std::ffi::c_int;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::LazyLock;

use libc::{AF_INET, IPPROTO_IP, IPPROTO_IPV6, IPPROTO_TCP, SOL_SOCKET};

use super::super::options::{COMMON, TCP};
use super::super::{Stop, Trouble, options};
use crate::engine::sys::socket;
use crate::proto::files::SocketOption;

/// `SO_BUF_LOCK`: which buffer sizes the program has set, bit 0 send, bit 1 receive.
pub(super) const SO_BUF_LOCK: c_int = 72;
/// The bits of IP_TOS that belong to the kernel (ECN).
const KERNELS_BITS: u8 = 3;
const CLASSES: [Name; 2] = [(IPPROTO_IP, libc::IP_TOS), (IPPROTO_IPV6, libc::IPV6_TCLASS)];

/// Longest option value that we take from a peer.
const VALUE_BYTES: usize = 256;

type Name = (c_int, c_int);

/// What is not simply set on a new socket: what a connection has of its own, what the kernel changes all
/// the time, what only a listening socket may be given, and what is set when the connection is live.
const NOT_SET: &[Name] = &[
    (SOL_SOCKET, libc::SO_REUSEADDR),
    (SOL_SOCKET, libc::SO_INCOMING_CPU),
    (IPPROTO_IP, libc::IP_TRANSPARENT),
    (IPPROTO_TCP, libc::TCP_MAXSEG),
    (IPPROTO_TCP, libc::TCP_WINDOW_CLAMP),
    (IPPROTO_TCP, libc::TCP_QUICKACK),
    (IPPROTO_TCP, libc::TCP_FASTOPEN),
    (IPPROTO_TCP, libc::TCP_FASTOPEN_CONNECT),
    (IPPROTO_TCP, libc::TCP_FASTOPEN_NO_COOKIE),
];

/// Carried, but set at their own time.
const LATER: &[Name] = &[
    (SOL_SOCKET, libc::SO_REUSEADDR),
    (IPPROTO_IP, libc::IP_TRANSPARENT),
    (SOL_SOCKET, SO_BUF_LOCK),
    (SOL_SOCKET, libc::SO_SNDBUF),
    (SOL_SOCKET, libc::SO_RCVBUF),
];

/// The options that are set on a new socket, in this order: IP_TOS changes SO_PRIORITY.
static SET: LazyLock<Vec<Name>> =
    LazyLock::new(|| TCP.iter().chain(COMMON).copied().filter(|name| !NOT_SET.contains(name)).collect());
/// Those that IPv4 has.
static SET_IPV4: LazyLock<Vec<Name>> =
    LazyLock::new(|| SET.iter().copied().filter(|(level, _)| *level != IPPROTO_IPV6).collect());

fn names(family: c_int) -> &'static [Name] {
    if family == AF_INET { &SET_IPV4 } else { &SET }
}

/// Reads the options that this connection has.
pub(super) fn capture(fd: BorrowedFd<'_>, family: c_int) -> Result<Vec<SocketOption>, Stop> {
    let mut options = options::capture(fd, &[names(family), LATER])?;
    for option in &mut options {
        if CLASSES.contains(&(option.level, option.name))
            && let Some(first) = option.value.first_mut()
        {
            *first &= !KERNELS_BITS;
        }
    }
    Ok(options)
}

/// The value of an option that is an `int`.
pub(super) fn value_of(options: &[SocketOption], level: c_int, name: c_int) -> Option<c_int> {
    let option = options.iter().rev().find(|o| (o.level, o.name) == (level, name))?;
    Some(c_int::from_ne_bytes(*option.value.first_chunk::<4>()?))
}

/// What sockets have that nobody has set anything of.
#[derive(Debug, Default)]
pub(in super::super) struct NewSockets {
    /// IPv4 and IPv6, once asked for.
    families: [Option<NewSocket>; 2],
}

/// A socket of one family.
#[derive(Debug, Default)]
pub(super) struct NewSocket {
    pub(super) options: Vec<SocketOption>,
    pub(super) receive_buffer: c_int,
    /// To which size the kernel lets a receive buffer grow (`tcp_rmem`); 0 if it cannot be told.
    pub(super) largest_buffer: usize,
}

impl NewSockets {
    pub(super) fn of(&mut self, family: c_int) -> Result<&NewSocket, Trouble> {
        let [v4, v6] = &mut self.families;
        let slot = if family == AF_INET { v4 } else { v6 };
        if slot.is_none() {
            *slot = Some(NewSocket::of(family)?);
        }
        slot.as_ref().ok_or(Trouble::Invalid("the family of a TCP socket"))
    }
}

impl NewSocket {
    fn of(family: c_int) -> Result<Self, Trouble> {
        let fd = super::new_socket(family, 0)?;
        let mut options = Vec::new();
        for &(level, name) in names(family) {
            if let Ok(value) = socket::option(fd.as_fd(), level, name) {
                options.push(SocketOption { level, name, value });
            }
        }
        let receive_buffer = socket::int_option(fd.as_fd(), SOL_SOCKET, libc::SO_RCVBUF)
            .map_err(Trouble::step("asking for a socket's buffer"))?;
        let limits = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_rmem").unwrap_or_default();
        let largest_buffer = limits.split_whitespace().nth(2).and_then(|w| w.parse().ok()).unwrap_or(0);
        Ok(Self { options, receive_buffer, largest_buffer })
    }
}

/// Sets those of `wanted` that `new`, the options of a new socket, has otherwise. Both are in our order.
pub(super) fn apply(
    fd: BorrowedFd<'_>,
    wanted: &[SocketOption],
    new: &[SocketOption],
) -> Result<(), Trouble> {
    let mut left = new;
    let mut disturbed = false;
    for option in wanted {
        let name = (option.level, option.name);
        if LATER.contains(&name) {
            continue;
        }
        let now = left.iter().position(|n| (n.level, n.name) == name);
        let now = now.and_then(|at| {
            let now = left.get(at);
            left = left.get(at + 1..).unwrap_or_default();
            now
        });
        if now.is_none() && !SET.contains(&name) {
            return Err(Trouble::Invalid("a socket option, or their order"));
        }
        let priority = name == (SOL_SOCKET, libc::SO_PRIORITY);
        if now.is_some_and(|now| now.value == option.value) && !(priority && disturbed) {
            continue;
        }
        if option.value.len() > VALUE_BYTES {
            return Err(Trouble::Invalid("a socket option's length"));
        }
        socket::set_option(fd, option.level, option.name, &option.value)
            .map_err(Trouble::step("setting an option of a TCP connection"))?;
        if !socket::option(fd, option.level, option.name).is_ok_and(|now| now == option.value) {
            return Err(Trouble::Differs(format!("socket option {} of level {}", name.1, name.0)));
        }
        disturbed |= CLASSES.contains(&name);
    }
    Ok(())
}
