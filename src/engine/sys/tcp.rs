//! Calls that take TCP connections apart and put them together again (`TCP_REPAIR`).

use std::ffi::c_int;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd};

use libc::IPPROTO_TCP;
use nix::errno::Errno;

use super::socket;

/// `SIOCOUTQ`: bytes that the peer has not acknowledged.
const SIOCOUTQ: libc::c_ulong = 0x5411;
/// `SIOCOUTQNSD`: bytes that were never sent.
const SIOCOUTQNSD: libc::c_ulong = 0x894b;
/// `TCP_REPAIR` off without sending a window probe.
pub const REPAIR_OFF_SILENTLY: c_int = -1;
/// `TCP_REPAIR` off, and a window probe, whose answer tells what the peer has.
pub const REPAIR_OFF: c_int = 0;
/// `TCP_REPAIR` on.
pub const REPAIR_ON: c_int = 1;

/// Bytes of `struct tcp_repair_window`.
pub const WINDOW_BYTES: usize = 20;

/// The value of `TCP_REPAIR_QUEUE`: which queue the next calls are about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Queue {
    /// None.
    None = 0,
    /// What has come and was not read.
    Receive = 1,
    /// What was written and not acknowledged.
    Send = 2,
}

/// Goes into or out of `TCP_REPAIR`.
pub fn set_repair(fd: BorrowedFd<'_>, value: c_int) -> Result<(), Errno> {
    socket::set_int_option(fd, IPPROTO_TCP, libc::TCP_REPAIR, value)
}

/// Whether the socket is in `TCP_REPAIR`.
pub fn is_in_repair(fd: BorrowedFd<'_>) -> Result<bool, Errno> {
    Ok(socket::int_option(fd, IPPROTO_TCP, libc::TCP_REPAIR)? == 1)
}

/// Whether the request by which the peer began the connection is kept (`TCP_SAVE_SYN`) and was not asked for
/// yet. Does not take it.
pub fn has_saved_syn(fd: BorrowedFd<'_>) -> Result<bool, Errno> {
    let mut len: libc::socklen_t = 0;
    let none = std::ptr::null_mut();
    // SAFETY: for a length of zero the kernel writes nothing but the length, which lives for the whole call.
    let rc =
        unsafe { libc::getsockopt(fd.as_raw_fd(), IPPROTO_TCP, libc::TCP_SAVED_SYN, none, &raw mut len) };
    match Errno::result(rc) {
        Ok(_) => Ok(false),
        // There is not enough room for it.
        Err(Errno::EINVAL) => Ok(true),
        Err(errno) => Err(errno),
    }
}

/// Whether its segments are signed with TCP-AO.
pub fn has_authentication(fd: BorrowedFd<'_>) -> Result<bool, Errno> {
    const TCP_AO_INFO: c_int = 40;
    let mut info = [0u8; 48];
    let mut len = 48;
    // SAFETY: `info` is readable and writable for `len` bytes; the kernel writes no more.
    let rc = unsafe {
        libc::getsockopt(fd.as_raw_fd(), IPPROTO_TCP, TCP_AO_INFO, info.as_mut_ptr().cast(), &raw mut len)
    };
    match Errno::result(rc) {
        Ok(_) => Ok(true),
        // There is none, or the kernel does not know it.
        Err(Errno::ENOENT | Errno::ENOPROTOOPT | Errno::EOPNOTSUPP) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// Chooses a queue. In `TCP_REPAIR` only.
pub fn choose_queue(fd: BorrowedFd<'_>, queue: Queue) -> Result<(), Errno> {
    socket::set_int_option(fd, IPPROTO_TCP, libc::TCP_REPAIR_QUEUE, queue as c_int)
}

/// The sequence number at the end of the chosen queue.
pub fn sequence(fd: BorrowedFd<'_>) -> Result<u32, Errno> {
    socket::int_option(fd, IPPROTO_TCP, libc::TCP_QUEUE_SEQ).map(c_int::cast_unsigned)
}

/// Sets the sequence number at which the chosen queue begins. Before the connection is made only.
pub fn set_sequence(fd: BorrowedFd<'_>, sequence: u32) -> Result<(), Errno> {
    socket::set_option(fd, IPPROTO_TCP, libc::TCP_QUEUE_SEQ, &sequence.to_ne_bytes())
}

/// Bytes that were written and not acknowledged, with the end of the stream if that was sent.
pub fn unacknowledged(fd: BorrowedFd<'_>) -> Result<u32, Errno> {
    ask(fd, SIOCOUTQ)
}

/// Bytes that were written and never sent, likewise.
pub fn never_sent(fd: BorrowedFd<'_>) -> Result<u32, Errno> {
    ask(fd, SIOCOUTQNSD)
}

fn ask(fd: BorrowedFd<'_>, request: libc::c_ulong) -> Result<u32, Errno> {
    let mut bytes: c_int = 0;
    // SAFETY: both requests write one int to `bytes`, alive for the whole call.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), request, std::ptr::from_mut(&mut bytes)) })?;
    Ok(bytes.cast_unsigned())
}

/// The windows of both directions (`TCP_REPAIR_WINDOW`), as the kernel takes them back. In `TCP_REPAIR` only.
pub fn window(fd: BorrowedFd<'_>) -> Result<[u8; WINDOW_BYTES], Errno> {
    let mut window = [0; WINDOW_BYTES];
    let mut len = 20;
    // SAFETY: `window` is writable for `len` bytes; the kernel writes exactly that many or fails.
    let rc = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            IPPROTO_TCP,
            libc::TCP_REPAIR_WINDOW,
            window.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    Errno::result(rc)?;
    Ok(window)
}

/// The other end of an IP socket: address, port and IPv6 scope.
pub fn remote_address(fd: BorrowedFd<'_>) -> Result<(IpAddr, u16, u32), Errno> {
    let mut raw = [0u8; size_of::<libc::sockaddr_in6>()];
    let mut len = LONGEST_ADDRESS;
    // SAFETY: `raw` is writable for `len` bytes; the kernel writes no more than that.
    let rc = unsafe { libc::getpeername(fd.as_raw_fd(), raw.as_mut_ptr().cast(), &raw mut len) };
    Errno::result(rc)?;
    let family = c_int::from(u16::from_ne_bytes([raw[0], raw[1]]));
    let port = u16::from_be_bytes([raw[2], raw[3]]);
    if family == libc::AF_INET {
        return Ok((Ipv4Addr::new(raw[4], raw[5], raw[6], raw[7]).into(), port, 0));
    }
    let address = raw[8..].first_chunk::<16>().ok_or(Errno::EAFNOSUPPORT)?;
    Ok((Ipv6Addr::from(*address).into(), port, u32::from_ne_bytes([raw[24], raw[25], raw[26], raw[27]])))
}

/// Connects an IP socket. In `TCP_REPAIR` the connection is there at once, and nothing is sent.
pub fn connect(fd: BorrowedFd<'_>, address: IpAddr, port: u16) -> Result<(), Errno> {
    let mut raw = [0u8; size_of::<libc::sockaddr_in6>()];
    raw[2..4].copy_from_slice(&port.to_be_bytes());
    let len = match address {
        IpAddr::V4(v4) => {
            raw[..2].copy_from_slice(&INET.to_ne_bytes());
            raw[4..8].copy_from_slice(&v4.octets());
            ADDRESS
        }
        IpAddr::V6(v6) => {
            raw[..2].copy_from_slice(&INET6.to_ne_bytes());
            raw[8..24].copy_from_slice(&v6.octets());
            LONGEST_ADDRESS
        }
    };
    // SAFETY: `raw` is a socket address of `len` bytes, readable for the whole call.
    Errno::result(unsafe { libc::connect(fd.as_raw_fd(), raw.as_ptr().cast(), len) }).map(drop)
}

/// Takes the connection away from a socket (`connect` to no address). In `TCP_REPAIR` nothing is sent.
pub fn disconnect(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    // `AF_UNSPEC` is zero.
    let raw = [0u8; size_of::<libc::sockaddr_in>()];
    // SAFETY: `raw` is a socket address of the length passed, readable for the whole call.
    Errno::result(unsafe { libc::connect(fd.as_raw_fd(), raw.as_ptr().cast(), ADDRESS) }).map(drop)
}

/// `AF_INET`, `AF_INET6` and the lengths of their addresses, as the structures want them.
const INET: u16 = 2;
const INET6: u16 = 10;
const ADDRESS: libc::socklen_t = 16;
const LONGEST_ADDRESS: libc::socklen_t = 28;
const _: () = assert!(INET as c_int == libc::AF_INET && INET6 as c_int == libc::AF_INET6);
const _: () = assert!(ADDRESS as usize == size_of::<libc::sockaddr_in>());
const _: () = assert!(LONGEST_ADDRESS as usize == size_of::<libc::sockaddr_in6>());
