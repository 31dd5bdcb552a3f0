//! What the kernel says about one unix socket (`sock_diag`), found by its inode.

use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};

use crate::engine::sys::socket;

const NETLINK_SOCK_DIAG: i32 = 4;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLMSG_ERROR: u16 = 2;
const HEADER: usize = 16;
const ANSWER: usize = 16;
/// Attributes: a name, its file, the peer's inode, lengths of queues, shutdown.
const ATTR_NAME: u16 = 0;
const ATTR_VFS: u16 = 1;
const ATTR_PEER: u16 = 2;
const ATTR_RQLEN: u16 = 4;
const ATTR_SHUTDOWN: u16 = 6;
const SHOW_NAME: u32 = 1;
const SHOW_VFS: u32 = 2;
const SHOW_PEER: u32 = 4;
const SHOW_RQLEN: u32 = 16;
/// `TCP_ESTABLISHED`: connected, also for unix sockets.
const CONNECTED: u8 = 1;
const LISTENS: u8 = 10;

/// A unix socket as the kernel sees it.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct UnixState {
    pub(super) connected: bool,
    pub(super) listening: bool,
    pub(super) named: bool,
    /// Inode of the file that its name made.
    pub(super) file: Option<u64>,
    /// Of one that listens: connections that wait, and how many may.
    pub(super) waiting: u32,
    pub(super) backlog: u32,
    /// Inode of the other end; 0: closed everywhere.
    pub(super) peer: u64,
    /// 1: no more reading, 2: no more writing.
    pub(super) shutdown: u32,
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}
fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// Asks about the unix socket with this inode, in our network namespace.
pub(super) fn ask(inode: u64) -> Result<UnixState, Errno> {
    let inode = u32::try_from(inode).map_err(|_| Errno::ENOENT)?;
    let fd = socket::socket(libc::AF_NETLINK, libc::SOCK_RAW, NETLINK_SOCK_DIAG)?;
    // nlmsghdr: length, type, flags (request), sequence, port; then unix_diag_req: family, protocol, pad,
    // states, inode, what to show, cookie (any).
    let mut request = Vec::with_capacity(40);
    request.extend_from_slice(&40u32.to_ne_bytes());
    request.extend_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    request.extend_from_slice(&1u16.to_ne_bytes());
    request.extend_from_slice(&[0; 8]);
    request.extend_from_slice(&[1, 0, 0, 0]);
    request.extend_from_slice(&u32::MAX.to_ne_bytes());
    request.extend_from_slice(&inode.to_ne_bytes());
    request.extend_from_slice(&(SHOW_NAME | SHOW_VFS | SHOW_PEER | SHOW_RQLEN).to_ne_bytes());
    request.extend_from_slice(&[0xff; 8]);
    send(fd.as_fd().as_raw_fd(), &request, MsgFlags::empty())?;
    let mut answer = [0u8; 4096];
    let len = recv(fd.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    parse(answer.get(..len).unwrap_or_default())
}

fn parse(answer: &[u8]) -> Result<UnixState, Errno> {
    let short = Errno::EPROTO;
    let kind = u16_at(answer, 4).ok_or(short)?;
    if kind == NLMSG_ERROR {
        let code = u32_at(answer, HEADER).ok_or(short)?;
        return Err(Errno::from_raw(i32::from_ne_bytes(code.to_ne_bytes()).wrapping_neg()));
    }
    if kind != SOCK_DIAG_BY_FAMILY {
        return Err(short);
    }
    let state = *answer.get(HEADER + 2).ok_or(short)?;
    let mut unix =
        UnixState { connected: state == CONNECTED, listening: state == LISTENS, ..UnixState::default() };
    let mut at = HEADER + ANSWER;
    while let (Some(len), Some(kind)) = (u16_at(answer, at), u16_at(answer, at + 2)) {
        if len < 4 {
            return Err(short);
        }
        match kind {
            ATTR_NAME => unix.named = len > 4,
            ATTR_VFS => unix.file = u32_at(answer, at + 4).map(u64::from),
            ATTR_RQLEN => {
                unix.waiting = u32_at(answer, at + 4).ok_or(short)?;
                unix.backlog = u32_at(answer, at + 8).ok_or(short)?;
            }
            ATTR_PEER => unix.peer = u32_at(answer, at + 4).ok_or(short)?.into(),
            ATTR_SHUTDOWN => unix.shutdown = u32::from(*answer.get(at + 4).ok_or(short)?),
            _ => {}
        }
        at += usize::from(len).next_multiple_of(4);
    }
    Ok(unix)
}
