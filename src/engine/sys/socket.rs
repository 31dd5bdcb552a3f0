//! Raw socket calls: options as bytes, addresses, peeking into queues, descriptors as messages.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "lengths of small buffers made here, as the kernel's argument types want them"
)]

use std::ffi::c_int;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;

/// Most descriptors that one message carries (the kernel's `SCM_MAX_FD`).
pub const MAX_FDS_PER_MESSAGE: usize = 253;

/// A control message with `struct ucred`: 16 bytes of header, 12 of value, padding.
const CREDENTIALS_BYTES: usize = 32;

/// Makes a socket (close-on-exec).
pub fn socket(family: c_int, kind: c_int, protocol: c_int) -> Result<OwnedFd, Errno> {
    // SAFETY: no pointers.
    let fd = Errno::result(unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) })?;
    Ok(super::owned_fd(fd))
}

/// Bytes that the longest value of a socket option has which is not cut off.
pub const VALUE_BYTES: usize = 256;

/// The value of a socket option, at most 256 bytes of it. Packet filters are read by
/// [`super::datagram::filter`]: their length is not in bytes.
pub fn option(fd: BorrowedFd<'_>, level: c_int, name: c_int) -> Result<Vec<u8>, Errno> {
    let mut room = [0; VALUE_BYTES];
    read_option(fd, level, name, &mut room).map(<[u8]>::to_vec)
}

/// The same into `room`, for those that are read by the thousand.
pub fn read_option<'a>(
    fd: BorrowedFd<'_>,
    level: c_int,
    name: c_int,
    room: &'a mut [u8],
) -> Result<&'a [u8], Errno> {
    if (level, name) == (libc::SOL_SOCKET, libc::SO_GET_FILTER) {
        return Err(Errno::EINVAL);
    }
    let mut len = room.len() as libc::socklen_t;
    // SAFETY: `room` is writable for `len` bytes; the kernel writes no more and stores how many in `len`. The
    // one option whose length counts something longer than bytes was turned away.
    let rc = unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, room.as_mut_ptr().cast(), &raw mut len) };
    Errno::result(rc)?;
    let len = room.len().min(len as usize);
    Ok(room.get(..len).unwrap_or_default())
}

/// The value of an option that is an `int`.
pub fn int_option(fd: BorrowedFd<'_>, level: c_int, name: c_int) -> Result<c_int, Errno> {
    let mut room = [0; 8];
    let bytes = read_option(fd, level, name, &mut room)?.first_chunk::<4>().ok_or(Errno::EINVAL)?;
    Ok(c_int::from_ne_bytes(*bytes))
}

/// Sets a socket option.
pub fn set_option(fd: BorrowedFd<'_>, level: c_int, name: c_int, value: &[u8]) -> Result<(), Errno> {
    // SAFETY: `value` is readable for the length passed.
    let rc = unsafe {
        libc::setsockopt(fd.as_raw_fd(), level, name, value.as_ptr().cast(), value.len() as libc::socklen_t)
    };
    Errno::result(rc).map(drop)
}

/// Sets an option that is an `int`.
pub fn set_int_option(fd: BorrowedFd<'_>, level: c_int, name: c_int, value: c_int) -> Result<(), Errno> {
    set_option(fd, level, name, &value.to_ne_bytes())
}

/// The local address of an IP socket: address, port and IPv6 scope.
pub fn local_address(fd: BorrowedFd<'_>) -> Result<(IpAddr, u16, u32), Errno> {
    let mut raw = [0u8; size_of::<libc::sockaddr_in6>()];
    let mut len = raw.len() as libc::socklen_t;
    // SAFETY: `raw` is writable for `len` bytes; the kernel writes no more than that.
    let rc = unsafe { libc::getsockname(fd.as_raw_fd(), raw.as_mut_ptr().cast(), &raw mut len) };
    Errno::result(rc)?;
    // sockaddr_in: family 2, port 2, address 4; sockaddr_in6: family 2, port 2, flow 4, address 16, scope 4.
    let family = c_int::from(u16::from_ne_bytes([raw[0], raw[1]]));
    let port = u16::from_be_bytes([raw[2], raw[3]]);
    if family == libc::AF_INET {
        return Ok((IpAddr::V4(Ipv4Addr::new(raw[4], raw[5], raw[6], raw[7])), port, 0));
    }
    let address = raw[8..].first_chunk::<16>().ok_or(Errno::EAFNOSUPPORT)?;
    let scope = u32::from_ne_bytes([raw[24], raw[25], raw[26], raw[27]]);
    Ok((IpAddr::V6(Ipv6Addr::from(*address)), port, scope))
}

/// Binds an IP socket.
pub fn bind(fd: BorrowedFd<'_>, address: IpAddr, port: u16) -> Result<(), Errno> {
    let mut raw = [0u8; size_of::<libc::sockaddr_in6>()];
    raw[2..4].copy_from_slice(&port.to_be_bytes());
    let len = match address {
        IpAddr::V4(v4) => {
            raw[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
            raw[4..8].copy_from_slice(&v4.octets());
            size_of::<libc::sockaddr_in>()
        }
        IpAddr::V6(v6) => {
            raw[..2].copy_from_slice(&(libc::AF_INET6 as u16).to_ne_bytes());
            raw[8..24].copy_from_slice(&v6.octets());
            raw.len()
        }
    };
    // SAFETY: `raw` is a socket address of `len` bytes, readable for the whole call.
    Errno::result(unsafe { libc::bind(fd.as_raw_fd(), raw.as_ptr().cast(), len as libc::socklen_t) })
        .map(drop)
}

/// Starts to listen.
pub fn listen(fd: BorrowedFd<'_>, backlog: c_int) -> Result<(), Errno> {
    // SAFETY: no pointers.
    Errno::result(unsafe { libc::listen(fd.as_raw_fd(), backlog) }).map(drop)
}

/// Takes the next connection of a listening socket.
pub fn accept(fd: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let none = std::ptr::null_mut();
    // SAFETY: no address is asked for, so the kernel writes nothing.
    let rc = unsafe { libc::accept4(fd.as_raw_fd(), none, std::ptr::null_mut(), libc::SOCK_CLOEXEC) };
    Ok(super::owned_fd(Errno::result(rc)?))
}

/// What one look into a queue found.
#[derive(Debug)]
pub struct Peeked {
    /// Bytes taken; less than `message_len` if the buffer was short.
    pub len: usize,
    /// Whether descriptors (or other ancillary data) travel with it.
    pub ancillary: bool,
    /// The sender's name in the kernel's form; empty for none.
    pub from: Vec<u8>,
    /// The sender's process, user and group, where they were asked for.
    pub credentials: Option<[u32; 3]>,
}

/// Looks at the next data of a unix socket without consuming it. Never blocks. Descriptors that travel
/// with it are not taken over: there is no room for them, and the kernel says so. `credentials` may be asked
/// for only of a socket with `SO_PASSCRED`, where they come first: they fill the room.
pub fn peek(fd: BorrowedFd<'_>, buffer: &mut [u8], flags: c_int, credentials: bool) -> Result<Peeked, Errno> {
    let mut name = [0u8; size_of::<libc::sockaddr_storage>()];
    let mut iov = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: all-zero is a valid msghdr.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_name = name.as_mut_ptr().cast();
    header.msg_namelen = name.len() as libc::socklen_t;
    header.msg_iov = &raw mut iov;
    header.msg_iovlen = 1;
    let mut control = [0u64; CREDENTIALS_BYTES / 8];
    if credentials {
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = CREDENTIALS_BYTES;
    }
    let flags = flags | libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: `header`, `name`, `control` and `iov` live for the whole call; `name`, `control` and `buffer`
    // are writable for the lengths given.
    let rc = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut header, flags) };
    let len = Errno::result(rc)? as usize;
    let from = name.get(..header.msg_namelen as usize).unwrap_or_default().to_vec();
    // A cmsghdr (length 8, level 4, type 4), then process, user, group.
    let [_, what, process_user, group, ..] = control;
    let is_credentials = what == libc::SOL_SOCKET as u64 | (libc::SCM_CREDENTIALS as u64) << 32;
    let credentials =
        is_credentials.then_some([process_user as u32, (process_user >> 32) as u32, group as u32]);
    Ok(Peeked { len, ancillary: header.msg_flags & libc::MSG_CTRUNC != 0, from, credentials })
}

/// Sends a message to the other end, as this process, user and group. Never blocks.
pub fn send_as(fd: BorrowedFd<'_>, data: &[u8], credentials: [u32; 3]) -> Result<usize, Errno> {
    let [process, user, group] = credentials.map(u64::from);
    let kind = libc::SOL_SOCKET as u64 | (libc::SCM_CREDENTIALS as u64) << 32;
    let mut control = [28, kind, process | user << 32, group];
    let mut iov = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
    // SAFETY: all-zero is a valid msghdr.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut iov;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = CREDENTIALS_BYTES;
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: `header`, `iov`, `data` and `control` live for the whole call with the lengths given; the kernel
    // only reads what they point to.
    let rc = unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const header, flags) };
    Errno::result(rc).map(|sent| sent as usize)
}

/// Sends one byte with these descriptors. Never blocks.
pub fn send_fds(channel: BorrowedFd<'_>, fds: &[BorrowedFd<'_>]) -> Result<(), Errno> {
    if fds.len() > MAX_FDS_PER_MESSAGE {
        return Err(Errno::EINVAL);
    }
    let mut byte = 0u8;
    let mut iov = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    // A cmsghdr (length 8, level 4, type 4), then the descriptors; u64 keeps it aligned.
    let len = 16 + 4 * fds.len();
    let mut control = vec![0u64; len.div_ceil(8)];
    control[0] = len as u64;
    control[1] = libc::SOL_SOCKET as u64 | (libc::SCM_RIGHTS as u64) << 32;
    for (i, fd) in fds.iter().enumerate() {
        control[2 + i / 2] |= (fd.as_raw_fd() as u64) << (32 * (i % 2));
    }
    // SAFETY: all-zero is a valid msghdr.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut iov;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = len;
    // SAFETY: `header`, `iov`, `byte` and `control` live for the whole call, and `control` has `len` bytes.
    let rc = unsafe {
        libc::sendmsg(channel.as_raw_fd(), &raw const header, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL)
    };
    Errno::result(rc).map(drop)
}
