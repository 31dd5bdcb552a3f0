//! Socket options: read as bytes at the source, set at the destination where a new socket's differ, and
//! read back to see that they took.

use std::ffi::c_int;
use std::os::fd::BorrowedFd;

use libc::{IPPROTO_IP, IPPROTO_IPV6, IPPROTO_TCP, SOL_SOCKET};
use nix::errno::Errno;

use super::{Stop, Trouble};
use crate::engine::sys::socket;
use crate::proto::files::SocketOption;

/// `SO_BUF_LOCK`: which buffer sizes the program has set, bit 0 send, bit 1 receive.
const SO_BUF_LOCK: c_int = 72;
const SO_TXREHASH: c_int = 74;
const SO_PREFER_BUSY_POLL: c_int = 69;
const SO_RESERVE_MEM: c_int = 73;
const SO_TIMESTAMP_NEW: c_int = 63;
const SO_TIMESTAMPNS_NEW: c_int = 64;
const IP_LOCAL_PORT_RANGE: c_int = 51;
const TCP_TX_DELAY: c_int = 37;

type Name = (c_int, c_int);

/// What any socket has. To be applied after the tables of a family: `IP_TOS` changes `SO_PRIORITY`.
pub(super) const COMMON: &[Name] = &[
    (SOL_SOCKET, libc::SO_RCVLOWAT),
    (SOL_SOCKET, libc::SO_RCVTIMEO),
    (SOL_SOCKET, libc::SO_SNDTIMEO),
    (SOL_SOCKET, libc::SO_PASSCRED),
    (SOL_SOCKET, libc::SO_PASSSEC),
    (SOL_SOCKET, libc::SO_PRIORITY),
    (SOL_SOCKET, libc::SO_MARK),
    (SOL_SOCKET, libc::SO_LINGER),
    (SOL_SOCKET, libc::SO_KEEPALIVE),
    (SOL_SOCKET, libc::SO_BROADCAST),
    (SOL_SOCKET, libc::SO_DONTROUTE),
    (SOL_SOCKET, libc::SO_OOBINLINE),
    (SOL_SOCKET, libc::SO_TIMESTAMP),
    (SOL_SOCKET, libc::SO_TIMESTAMPNS),
    (SOL_SOCKET, SO_TIMESTAMP_NEW),
    (SOL_SOCKET, SO_TIMESTAMPNS_NEW),
    (SOL_SOCKET, libc::SO_TIMESTAMPING),
    (SOL_SOCKET, libc::SO_BUSY_POLL),
    (SOL_SOCKET, SO_PREFER_BUSY_POLL),
    (SOL_SOCKET, SO_RESERVE_MEM),
];

/// What a TCP socket that listens, or may come to, passes on to its connections.
pub(super) const TCP: &[Name] = &[
    (IPPROTO_IPV6, libc::IPV6_V6ONLY),
    (SOL_SOCKET, libc::SO_REUSEADDR),
    (SOL_SOCKET, libc::SO_REUSEPORT),
    (SOL_SOCKET, libc::SO_BINDTODEVICE),
    (SOL_SOCKET, libc::SO_ZEROCOPY),
    (SOL_SOCKET, SO_TXREHASH),
    (SOL_SOCKET, libc::SO_INCOMING_CPU),
    (SOL_SOCKET, libc::SO_MAX_PACING_RATE),
    (IPPROTO_IP, libc::IP_TOS),
    (IPPROTO_IP, libc::IP_TTL),
    (IPPROTO_IP, libc::IP_MINTTL),
    (IPPROTO_IP, libc::IP_TRANSPARENT),
    (IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT),
    (IPPROTO_IP, libc::IP_MTU_DISCOVER),
    (IPPROTO_IP, libc::IP_RECVERR),
    (IPPROTO_IP, libc::IP_RECVTOS),
    (IPPROTO_IP, libc::IP_RECVTTL),
    (IPPROTO_IP, libc::IP_PKTINFO),
    (IPPROTO_IP, IP_LOCAL_PORT_RANGE),
    (IPPROTO_IPV6, libc::IPV6_TCLASS),
    (IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS),
    (IPPROTO_IPV6, libc::IPV6_MINHOPCOUNT),
    (IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER),
    (IPPROTO_IPV6, libc::IPV6_DONTFRAG),
    (IPPROTO_IPV6, libc::IPV6_RECVERR),
    (IPPROTO_IPV6, libc::IPV6_RECVTCLASS),
    (IPPROTO_IPV6, libc::IPV6_RECVPKTINFO),
    (IPPROTO_IPV6, libc::IPV6_RECVHOPLIMIT),
    (IPPROTO_IPV6, libc::IPV6_AUTOFLOWLABEL),
    (IPPROTO_IPV6, libc::IPV6_ADDR_PREFERENCES),
    (IPPROTO_TCP, libc::TCP_CONGESTION),
    (IPPROTO_TCP, libc::TCP_NODELAY),
    (IPPROTO_TCP, libc::TCP_CORK),
    (IPPROTO_TCP, libc::TCP_MAXSEG),
    (IPPROTO_TCP, libc::TCP_KEEPIDLE),
    (IPPROTO_TCP, libc::TCP_KEEPINTVL),
    (IPPROTO_TCP, libc::TCP_KEEPCNT),
    (IPPROTO_TCP, libc::TCP_SYNCNT),
    (IPPROTO_TCP, libc::TCP_LINGER2),
    (IPPROTO_TCP, libc::TCP_DEFER_ACCEPT),
    (IPPROTO_TCP, libc::TCP_WINDOW_CLAMP),
    (IPPROTO_TCP, libc::TCP_QUICKACK),
    (IPPROTO_TCP, libc::TCP_USER_TIMEOUT),
    (IPPROTO_TCP, libc::TCP_THIN_LINEAR_TIMEOUTS),
    (IPPROTO_TCP, libc::TCP_THIN_DUPACK),
    (IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT),
    (IPPROTO_TCP, libc::TCP_SAVE_SYN),
    (IPPROTO_TCP, libc::TCP_INQ),
    (IPPROTO_TCP, TCP_TX_DELAY),
    (IPPROTO_TCP, libc::TCP_FASTOPEN_NO_COOKIE),
    (IPPROTO_TCP, libc::TCP_FASTOPEN_CONNECT),
    (IPPROTO_TCP, libc::TCP_FASTOPEN),
];

/// What still means something on a TCP socket whose connection is gone.
pub(super) const TCP_DEAD: &[Name] = &[
    (SOL_SOCKET, libc::SO_REUSEADDR),
    (SOL_SOCKET, libc::SO_KEEPALIVE),
    (SOL_SOCKET, libc::SO_LINGER),
    (SOL_SOCKET, libc::SO_RCVTIMEO),
    (SOL_SOCKET, libc::SO_SNDTIMEO),
    (IPPROTO_IPV6, libc::IPV6_V6ONLY),
    (IPPROTO_TCP, libc::TCP_NODELAY),
    (IPPROTO_TCP, libc::TCP_KEEPIDLE),
    (IPPROTO_TCP, libc::TCP_KEEPINTVL),
    (IPPROTO_TCP, libc::TCP_KEEPCNT),
    (IPPROTO_TCP, libc::TCP_USER_TIMEOUT),
];

/// Longest option value that we take from a peer.
const VALUE_BYTES: usize = 256;

/// Reads the options of a table that this socket knows.
pub(super) fn capture(fd: BorrowedFd<'_>, tables: &[&[Name]]) -> Result<Vec<SocketOption>, Stop> {
    let mut options = Vec::new();
    for &(level, name) in tables.iter().copied().flatten() {
        match socket::option(fd, level, name) {
            Ok(value) => options.push(SocketOption { level, name, value }),
            // Not an option of this family, type or kernel.
            Err(Errno::ENOPROTOOPT | Errno::EOPNOTSUPP | Errno::EINVAL | Errno::ENOTCONN) => {}
            Err(errno) => return Err(Stop::Failed { step: "reading a socket option", errno }),
        }
    }
    Ok(options)
}

/// Reads the buffer sizes. `always` carries them even where the program has not set them.
pub(super) fn capture_buffers(fd: BorrowedFd<'_>) -> Result<Vec<SocketOption>, Stop> {
    capture(fd, &[&[(SOL_SOCKET, SO_BUF_LOCK), (SOL_SOCKET, libc::SO_SNDBUF), (SOL_SOCKET, libc::SO_RCVBUF)]])
}

/// Sets those of `options` that are in the tables and differ from what the socket has.
pub(super) fn apply(fd: BorrowedFd<'_>, options: &[SocketOption], tables: &[&[Name]]) -> Result<(), Trouble> {
    // By the order of our table, not the peer's: some options change others.
    for &(level, name) in tables.iter().copied().flatten() {
        let Some(wanted) = options.iter().find(|o| (o.level, o.name) == (level, name)) else { continue };
        if wanted.value.len() > VALUE_BYTES {
            return Err(Trouble::Invalid("a socket option's length"));
        }
        if socket::option(fd, level, name).is_ok_and(|now| now == wanted.value) {
            continue;
        }
        let step = Trouble::step("setting a socket option");
        socket::set_option(fd, level, name, &wanted.value).map_err(step)?;
        if !socket::option(fd, level, name).is_ok_and(|now| now == wanted.value) {
            return Err(Trouble::Differs(format!("socket option {name} of level {level}")));
        }
    }
    Ok(())
}

/// Sets the buffer sizes that the program had set; the others stay what this machine gives.
pub(super) fn apply_buffers(fd: BorrowedFd<'_>, options: &[SocketOption]) -> Result<(), Trouble> {
    let wanted = |name: c_int| {
        let option = options.iter().find(|o| (o.level, o.name) == (SOL_SOCKET, name))?;
        Some(c_int::from_ne_bytes(*option.value.first_chunk::<4>()?))
    };
    let locked = wanted(SO_BUF_LOCK).unwrap_or(0) & 3;
    let both = [
        (1, libc::SO_SNDBUF, libc::SO_SNDBUFFORCE, "send buffer"),
        (2, libc::SO_RCVBUF, libc::SO_RCVBUFFORCE, "receive buffer"),
    ];
    for (bit, name, force, what) in both {
        let Some(size) = wanted(name).filter(|_| locked & bit != 0) else { continue };
        // The kernel doubles what it is given.
        socket::set_int_option(fd, SOL_SOCKET, force, size / 2)
            .map_err(Trouble::step("sizing a socket's buffer"))?;
        if socket::int_option(fd, SOL_SOCKET, name) != Ok(size) {
            return Err(Trouble::Differs(what.to_owned()));
        }
    }
    let step = Trouble::step("locking a socket's buffer sizes");
    socket::set_int_option(fd, SOL_SOCKET, SO_BUF_LOCK, locked).map_err(step)
}
