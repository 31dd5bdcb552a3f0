//! Raw calls of sockets that keep message boundaries: names and peers, looking at messages with where
//! they came from, packet filters, who is subscribed to what.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "lengths of small buffers made here, as the kernel's argument types want them"
)]

use std::ffi::c_int;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;

/// Longest socket address of any family.
const NAME_BYTES: usize = size_of::<libc::sockaddr_storage>();
/// Room for what travels with a message; descriptors are not asked for (see [`look`]).
const CONTROL_BYTES: usize = 1024;
/// `MSG_PROBE`: everything but the sending.
const MSG_PROBE: c_int = 0x10;
/// Most instructions of a classic filter (the kernel's `BPF_MAXINSNS`).
pub const FILTER_INSTRUCTIONS: usize = 4096;
/// Bytes of one instruction (`struct sock_filter`).
pub const INSTRUCTION_BYTES: usize = 8;

type Getter = unsafe extern "C" fn(c_int, *mut libc::sockaddr, *mut libc::socklen_t) -> c_int;

fn name_by(fd: BorrowedFd<'_>, getter: Getter) -> Result<Vec<u8>, Errno> {
    let mut raw = [0u8; NAME_BYTES];
    let mut len = raw.len() as libc::socklen_t;
    // SAFETY: both getters write at most `len` bytes to `raw`, and the whole length to `len`.
    Errno::result(unsafe { getter(fd.as_raw_fd(), raw.as_mut_ptr().cast(), &raw mut len) })?;
    Ok(raw.get(..len as usize).unwrap_or(&raw).to_vec())
}

/// The socket's own address, as the kernel writes it.
pub fn raw_name(fd: BorrowedFd<'_>) -> Result<Vec<u8>, Errno> {
    name_by(fd, libc::getsockname)
}

/// The address of the other end, as the kernel writes it; `None` without one.
pub fn raw_peer(fd: BorrowedFd<'_>) -> Result<Option<Vec<u8>>, Errno> {
    match name_by(fd, libc::getpeername) {
        Ok(raw) => Ok(Some(raw)),
        Err(Errno::ENOTCONN) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// Binds to an address in the kernel's form.
pub fn bind_raw(fd: BorrowedFd<'_>, name: &[u8]) -> Result<(), Errno> {
    // SAFETY: `name` is readable for the length passed.
    Errno::result(unsafe { libc::bind(fd.as_raw_fd(), name.as_ptr().cast(), name.len() as _) }).map(drop)
}

/// Connects to an address in the kernel's form.
pub fn connect_raw(fd: BorrowedFd<'_>, name: &[u8]) -> Result<(), Errno> {
    // SAFETY: `name` is readable for the length passed.
    Errno::result(unsafe { libc::connect(fd.as_raw_fd(), name.as_ptr().cast(), name.len() as _) }).map(drop)
}

/// Gives connection and address up, as far as the program had not chosen the latter.
pub fn disconnect(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    // AF_UNSPEC is 0.
    connect_raw(fd, &[0; 16])
}

/// An IP address and port in the kernel's form.
pub fn raw_of(address: SocketAddr) -> Vec<u8> {
    let mut raw = Vec::with_capacity(28);
    match address {
        SocketAddr::V4(v4) => {
            raw.extend_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
            raw.extend_from_slice(&v4.port().to_be_bytes());
            raw.extend_from_slice(&v4.ip().octets());
            raw.extend_from_slice(&[0; 8]);
        }
        SocketAddr::V6(v6) => {
            raw.extend_from_slice(&(libc::AF_INET6 as u16).to_ne_bytes());
            raw.extend_from_slice(&v6.port().to_be_bytes());
            raw.extend_from_slice(&[0; 4]);
            raw.extend_from_slice(&v6.ip().octets());
            raw.extend_from_slice(&v6.scope_id().to_ne_bytes());
        }
    }
    raw
}

/// The IP address and port in the kernel's form; `None` for other families.
pub fn address_of(raw: &[u8]) -> Option<SocketAddr> {
    let family = c_int::from(u16::from_ne_bytes(*raw.first_chunk()?));
    let port = u16::from_be_bytes(*raw.get(2..)?.first_chunk()?);
    if family == libc::AF_INET {
        let octets: [u8; 4] = *raw.get(4..)?.first_chunk()?;
        return Some(SocketAddrV4::new(Ipv4Addr::from(octets), port).into());
    }
    if family != libc::AF_INET6 {
        return None;
    }
    let octets: [u8; 16] = *raw.get(8..)?.first_chunk()?;
    let scope = u32::from_ne_bytes(*raw.get(24..)?.first_chunk()?);
    Some(SocketAddrV6::new(Ipv6Addr::from(octets), port, 0, scope).into())
}

/// What one look at the next message found.
#[derive(Debug)]
pub struct Looked {
    /// Its length, which may be more than the buffer took.
    pub len: usize,
    /// Where it came from, in the kernel's form; empty without an address.
    pub from: Vec<u8>,
    /// What travels with it: level, type, value.
    pub control: Vec<(c_int, c_int, Vec<u8>)>,
    /// Not all of that fitted.
    pub control_cut: bool,
}

/// Looks at the next message with its sender and what travels with it, without consuming it. Never blocks.
/// Only for sockets that cannot receive descriptors: those would be made ours.
pub fn look(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<Looked, Errno> {
    receive(fd, buffer, libc::MSG_PEEK)
}

/// Likewise, and consumes it.
pub fn take(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<Looked, Errno> {
    receive(fd, buffer, 0)
}

fn receive(fd: BorrowedFd<'_>, buffer: &mut [u8], flags: c_int) -> Result<Looked, Errno> {
    let mut name = [0u8; NAME_BYTES];
    let mut control = [0u64; CONTROL_BYTES / 8];
    let mut iov = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: all-zero is a valid msghdr.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_name = name.as_mut_ptr().cast();
    header.msg_namelen = name.len() as libc::socklen_t;
    header.msg_iov = &raw mut iov;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = CONTROL_BYTES;
    let flags = flags | libc::MSG_DONTWAIT | libc::MSG_TRUNC;
    // SAFETY: `header`, `name`, `iov`, `buffer` and `control` live for the whole call and are writable for
    // the lengths in `header`.
    let rc = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut header, flags) };
    let len = Errno::result(rc)? as usize;
    let control: Vec<u8> = control.iter().flat_map(|w| w.to_ne_bytes()).collect();
    let control = control.get(..header.msg_controllen).unwrap_or_default();
    Ok(Looked {
        len,
        from: name.get(..header.msg_namelen as usize).unwrap_or_default().to_vec(),
        control: control_messages(control),
        control_cut: header.msg_flags & libc::MSG_CTRUNC != 0,
    })
}

/// Splits a control buffer: a `cmsghdr` is a length of 8 bytes, level and type, then the value.
fn control_messages(mut bytes: &[u8]) -> Vec<(c_int, c_int, Vec<u8>)> {
    let mut messages = Vec::new();
    while let Some(header) = bytes.first_chunk::<16>() {
        let [l0, l1, l2, l3, l4, l5, l6, l7, v0, v1, v2, v3, t0, t1, t2, t3] = *header;
        let len = u64::from_ne_bytes([l0, l1, l2, l3, l4, l5, l6, l7]);
        let Some(value) = usize::try_from(len).ok().and_then(|len| bytes.get(16..len)) else { break };
        let level = c_int::from_ne_bytes([v0, v1, v2, v3]);
        messages.push((level, c_int::from_ne_bytes([t0, t1, t2, t3]), value.to_vec()));
        bytes = bytes.get((16 + value.len()).next_multiple_of(8)..).unwrap_or_default();
    }
    messages
}

/// Whether a UDP socket holds the beginning of a datagram (`UDP_CORK`, `MSG_MORE`). Asked by appending
/// nothing to it: with one begun, the kernel does not look at the control message, which is none that it
/// knows; without, it refuses the call before anything is changed.
pub fn holds_half_a_datagram(fd: BorrowedFd<'_>) -> bool {
    const UNKNOWN: u64 = 9999;
    let mut control = [16u64, libc::SOL_UDP as u64 | UNKNOWN << 32];
    // SAFETY: all-zero is a valid msghdr.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = 16;
    let flags = MSG_PROBE | libc::MSG_MORE | libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: `header` and `control` live for the whole call; there are no bytes to send.
    unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const header, flags) == 0 }
}

/// Whether a socket finds a way for a datagram from `source` to an IPv4 multicast group of the local network. Nothing
/// is sent (`MSG_PROBE`), nor added to a datagram begun (`MSG_MORE`). With `icmp`, there is the header of an echo
/// request, without which sockets of ICMP do not look.
pub fn multicast_way(fd: BorrowedFd<'_>, source: Ipv4Addr, icmp: bool) -> Result<(), Errno> {
    let mut to = raw_of(SocketAddrV4::new(Ipv4Addr::new(224, 0, 0, 1), 9).into());
    let mut echo = [8u8, 0, 0, 0, 0, 0, 0, 0];
    let mut iov =
        libc::iovec { iov_base: echo.as_mut_ptr().cast(), iov_len: if icmp { echo.len() } else { 0 } };
    // A cmsghdr (length 8, level 4, type 4), then `in_pktinfo`: no device, the source address, nothing.
    let kind = libc::IPPROTO_IP as u64 | (libc::IP_PKTINFO as u64) << 32;
    let source = u64::from(u32::from_ne_bytes(source.octets()));
    let mut control = [28u64, kind, source << 32, 0];
    // SAFETY: all-zero is a valid msghdr.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_name = to.as_mut_ptr().cast();
    header.msg_namelen = to.len() as libc::socklen_t;
    header.msg_iov = &raw mut iov;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&control);
    let flags = MSG_PROBE | libc::MSG_CONFIRM | libc::MSG_MORE | libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: `header`, `to`, `iov`, `echo` and `control` live for the whole call with the lengths given; the kernel
    // only reads what they point to.
    Errno::result(unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const header, flags) }).map(drop)
}

/// The classic packet filter of a socket, empty without one. `EACCES` if it has one of another kind.
pub fn filter(fd: BorrowedFd<'_>) -> Result<Vec<u8>, Errno> {
    // Most have none, and a server has sockets by the thousand: first only how many instructions there are.
    let mut value = Vec::new();
    let count = read_filter(fd, &mut value)?;
    if count > 0 {
        value.resize(FILTER_INSTRUCTIONS * INSTRUCTION_BYTES, 0);
        let count = read_filter(fd, &mut value)?;
        value.truncate(count * INSTRUCTION_BYTES);
    }
    Ok(value)
}

/// How many instructions the filter has; they are stored if there is any room.
fn read_filter(fd: BorrowedFd<'_>, room: &mut [u8]) -> Result<usize, Errno> {
    // The length is in instructions, not in bytes.
    let mut len = (room.len() / INSTRUCTION_BYTES) as libc::socklen_t;
    // SAFETY: `room` is writable for `len` instructions; the kernel writes no more and stores how many there
    // are. With a length of zero it writes nothing else.
    let rc = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_GET_FILTER,
            room.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    Errno::result(rc)?;
    Ok(len as usize)
}

/// Attaches a classic packet filter.
pub fn attach_filter(fd: BorrowedFd<'_>, filter: &[u8]) -> Result<(), Errno> {
    let count = filter.len() / INSTRUCTION_BYTES;
    if count > FILTER_INSTRUCTIONS || !filter.len().is_multiple_of(INSTRUCTION_BYTES) {
        return Err(Errno::EINVAL);
    }
    let program = libc::sock_fprog { len: count as u16, filter: filter.as_ptr().cast_mut().cast() };
    // SAFETY: `program` and the instructions it points to, `count` of them, are readable for the whole call;
    // the kernel does not write to them and copies them bytewise, whatever their alignment.
    let rc = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    Errno::result(rc).map(drop)
}

/// An option whose value also says what is asked: filled in, as far as the kernel does.
pub fn ask_option(fd: BorrowedFd<'_>, level: c_int, name: c_int, value: &mut [u8]) -> Result<(), Errno> {
    let mut len = value.len() as libc::socklen_t;
    // SAFETY: `value` is readable and writable for `len` bytes; the kernel writes no more.
    let rc =
        unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &raw mut len) };
    Errno::result(rc).map(drop)
}
