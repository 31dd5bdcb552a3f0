//! Pairs of connected unix sockets, both ends inside the process (or one of them closed everywhere): unread
//! data, shutdown, options, names.
//!
//! The pair is made by a call in the process itself, because it is its `SO_PEERCRED`; we then fill it. Whether
//! it came from socketpair(2) or from connecting to a name does not show afterwards, but for that name: that
//! end gets it, without a file.

use std::ffi::c_int;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use libc::SOL_SOCKET;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, Shutdown, send, shutdown};

use super::options::{self, COMMON};
use super::scan::Open;
use super::unix_diag::UnixState;
use super::unix_names::{NAME_BYTES, UnixNames};
use super::{Stop, Trouble, filter};
use crate::engine::remote::Tid;
use crate::engine::sys::{fds, socket};
use crate::proto::files::{Credentials, UnixMessage, UnixName, UnixPair, UnixSocket};

/// Most bytes that we take into one queue from a peer: no socket buffer is larger.
pub(super) const QUEUE_BYTES: usize = 256 << 20;
/// Bytes of stream taken at a time; datagrams are at most as large as a send buffer.
const PEEK_BYTES: usize = 256 << 10;

const SO_PASSPIDFD: c_int = 76;
const SO_PASSRIGHTS: c_int = 83;
/// The kinds of unix sockets.
pub(super) const TYPES: [c_int; 3] = [libc::SOCK_STREAM, libc::SOCK_DGRAM, libc::SOCK_SEQPACKET];
/// What a unix socket has beyond [`COMMON`].
pub(super) const UNIX: &[(c_int, c_int)] = &[(SOL_SOCKET, SO_PASSPIDFD), (SOL_SOCKET, SO_PASSRIGHTS)];

/// The type of a socket and the process that made it.
pub(super) fn capture_pair(pid: Tid, a: &Open) -> Result<UnixPair, Stop> {
    let failed = Stop::failed;
    let kind = socket::int_option(a.fd(), SOL_SOCKET, libc::SO_TYPE)
        .map_err(failed("asking for a socket's type"))?;
    let creator =
        socket::option(a.fd(), SOL_SOCKET, libc::SO_PEERCRED).map_err(failed("asking for SO_PEERCRED"))?;
    let word = |i: usize| Some(u32::from_ne_bytes(*creator.get(4 * i..)?.first_chunk()?));
    let (Some(by), Some(uid), Some(gid)) = (word(0), word(1), word(2)) else {
        return Err(Stop::Failed { step: "understanding SO_PEERCRED", errno: Errno::EPROTO });
    };
    if by != u32::try_from(pid).unwrap_or(0) {
        return Err(Stop::refuse(format!(
            "is a unix socket pair that pid {by} made, and SO_PEERCRED shows that"
        )));
    }
    Ok(UnixPair { r#type: kind, ends: Vec::new(), uid, gid })
}

/// One end. `contents` also reads its queue, which only a stopped process allows: the peek offset is
/// moved for it and put back.
pub(super) fn capture_end(
    pid: Tid,
    open: &Open,
    state: UnixState,
    kind: c_int,
    contents: bool,
) -> Result<UnixSocket, Stop> {
    let fd = open.fd();
    let mut options = options::capture(fd, &[UNIX, COMMON])?;
    options.extend(options::capture_buffers(fd)?);
    let mut end = UnixSocket { shutdown: state.shutdown & 3, options, ..UnixSocket::default() };
    if contents {
        end.reset = has_error(fd)?;
        end.queue = peek_queue(pid, fd, kind, end.reset)?;
    }
    if filter::capture(fd)?.is_some() {
        return Err(Stop::refuse("is a connected unix socket with a packet filter"));
    }
    Ok(end)
}

/// The unread messages of a datagram socket that is not one of a pair.
pub(super) fn unread(pid: Tid, fd: BorrowedFd<'_>, kind: c_int) -> Result<Vec<UnixMessage>, Stop> {
    let unread = peek_queue(pid, fd, kind, has_error(fd)?)?;
    if unread.iter().any(|message| message.credentials.is_some()) {
        return Err(Stop::refuse("is a unix socket with unread datagrams that carry credentials"));
    }
    Ok(unread)
}

fn has_error(fd: BorrowedFd<'_>) -> Result<bool, Stop> {
    polls(fd, libc::POLLERR)
}

fn polls(fd: BorrowedFd<'_>, events: i16) -> Result<bool, Stop> {
    Ok(fds::poll_now(fd, events).map_err(Stop::failed("polling a unix socket"))? & events != 0)
}

fn peek_queue(pid: Tid, fd: BorrowedFd<'_>, kind: c_int, has_error: bool) -> Result<Vec<UnixMessage>, Stop> {
    let failed = Stop::failed;
    let unread = fds::readable_bytes(fd).map_err(failed("asking for a unix socket's contents"))?;
    // A pending error is reported once, by streams behind the data, by others before it: it must stay.
    if has_error && unread > 0 && kind != libc::SOCK_STREAM {
        return Err(Stop::refuse("is a unix socket with unread messages behind a connection reset"));
    }
    if unread == 0 && (has_error || kind == libc::SOCK_STREAM) {
        return Ok(Vec::new());
    }
    let offset =
        socket::int_option(fd, SOL_SOCKET, fds::SO_PEEK_OFF).map_err(failed("asking for the peek offset"))?;
    if offset >= 0 {
        return Err(Stop::refuse("is a unix socket that uses SO_PEEK_OFF, which cannot be carried yet"));
    }
    let urgent = socket::peek(fd, &mut [0], libc::MSG_OOB, false);
    if urgent.is_ok() {
        return Err(Stop::refuse(
            "is a unix socket with unread out-of-band data, which cannot be carried yet",
        ));
    }
    socket::set_int_option(fd, SOL_SOCKET, fds::SO_PEEK_OFF, 0).map_err(failed("setting the peek offset"))?;
    let queue = walk(pid, fd, kind, unread);
    socket::set_int_option(fd, SOL_SOCKET, fds::SO_PEEK_OFF, offset)
        .map_err(failed("restoring the peek offset"))?;
    queue
}

/// Peeks at one message after the other; the kernel moves the peek offset along.
fn walk(pid: Tid, fd: BorrowedFd<'_>, kind: c_int, unread: usize) -> Result<Vec<UnixMessage>, Stop> {
    let stream = kind == libc::SOCK_STREAM;
    let is_set = |name| socket::int_option(fd, SOL_SOCKET, name).is_ok_and(|value| value != 0);
    let asks = is_set(libc::SO_PASSCRED);
    let asks_more = is_set(libc::SO_PASSSEC) || is_set(SO_PASSPIDFD);
    let flags = if stream { 0 } else { libc::MSG_TRUNC };
    let mut queue = Vec::new();
    let mut total = 0;
    let first = if stream { PEEK_BYTES } else { longest_message(fd)? };
    let mut buffer = vec![0u8; first];
    loop {
        let peeked = match socket::peek(fd, &mut buffer, flags, asks) {
            Ok(peeked) => peeked,
            Err(Errno::EAGAIN) => break,
            Err(errno) => return Err(Stop::Failed { step: "peeking at a unix socket", errno }),
        };
        if peeked.ancillary && !asks_more {
            return Err(Stop::refuse("is a unix socket with unread descriptors in its queue"));
        }
        let Some(message) = buffer.get(..peeked.len) else {
            return Err(Stop::Failed { step: "peeking at a whole message", errno: Errno::EMSGSIZE });
        };
        // For ever after a shutdown, a peek returns nothing. An empty datagram looks the same, but only
        // while there is something to read.
        if message.is_empty() && (stream || is_shut(fd)?) {
            break;
        }
        total += message.len();
        if total > QUEUE_BYTES || queue.len() > 1 << 20 {
            return Err(Stop::Failed { step: "peeking at a queue of moderate length", errno: Errno::EFBIG });
        }
        if asks_more {
            return Err(Stop::refuse(
                "is a unix socket with unread data that carries its sender's pidfd or security label",
            ));
        }
        let credentials = match peeked.credentials {
            Some([by, uid, gid]) if i32::try_from(by) == Ok(pid) => Some(Credentials { uid, gid }),
            Some([by, ..]) => {
                return Err(Stop::refuse(format!(
                    "is a unix socket with unread data that carries the credentials of pid {by}"
                )));
            }
            None => None,
        };
        let from = peeked.from.get(2..).unwrap_or_default().to_vec();
        queue.push(UnixMessage { data: message.to_vec(), from, credentials });
        // A stream ends here: one look more would report, and clear, a pending error.
        if stream && total >= unread {
            break;
        }
    }
    if queue.is_empty() && !is_shut(fd)? && polls(fd, libc::POLLIN)? {
        return Err(Stop::refuse("is a unix socket with a message that cannot be looked at"));
    }
    Ok(queue)
}

fn is_shut(fd: BorrowedFd<'_>) -> Result<bool, Stop> {
    polls(fd, libc::POLLRDHUP | libc::POLLHUP)
}

/// No datagram is longer than the send buffer of its sender; ours has the same limits.
fn longest_message(fd: BorrowedFd<'_>) -> Result<usize, Stop> {
    let own =
        socket::int_option(fd, SOL_SOCKET, libc::SO_SNDBUF).map_err(Stop::failed("asking for SO_SNDBUF"))?;
    Ok(usize::try_from(own).unwrap_or(0).max(4 << 20))
}

/// Checks what a peer sent about a pair, before anything is made of it.
pub(super) fn validate(pair: &UnixPair) -> Result<(), Trouble> {
    if pair.ends.len() != 2 || !TYPES.contains(&pair.r#type) {
        return Err(Trouble::Invalid("a unix socket pair"));
    }
    let bytes = |e: &UnixSocket| e.queue.iter().map(|m| m.data.len()).sum::<usize>();
    if pair.ends.iter().any(|e| bytes(e) > QUEUE_BYTES || e.shutdown > 3 || e.name.len() > NAME_BYTES) {
        return Err(Trouble::Invalid("a unix socket's queue or state"));
    }
    Ok(())
}

/// Fills a new pair, sets its options and shuts down what was shut down. Ends that were closed everywhere
/// are closed; the others are given back.
pub(super) fn fill(pid: Tid, pair: &UnixPair, made: [OwnedFd; 2]) -> Result<[Option<OwnedFd>; 2], Trouble> {
    let [first, second] = &pair.ends[..] else { return Err(Trouble::Invalid("a unix socket pair")) };
    let [a, b] = made;
    for (fd, image) in [(&a, first), (&b, second)] {
        if !image.name.is_empty() {
            let name = UnixName { name: image.name.clone(), ..UnixName::default() };
            UnixNames::default().bind(fd.as_fd(), &name)?;
        }
    }
    send_all(pid, b.as_fd(), &first.queue)?;
    send_all(pid, a.as_fd(), &second.queue)?;
    if first.reset && second.gone || second.reset && first.gone {
        // An unread byte in an end that is closed is what makes the other one report ECONNRESET.
        let to = if second.gone { &a } else { &b };
        send_all(pid, to.as_fd(), &[UnixMessage { data: vec![0], ..UnixMessage::default() }])?;
    } else if first.reset || second.reset {
        return Err(Trouble::Invalid("a unix socket's pending error"));
    }
    for (fd, image) in [(&a, first), (&b, second)] {
        if image.gone {
            continue;
        }
        options::apply(fd.as_fd(), &image.options, &[UNIX, COMMON])?;
        options::apply_buffers(fd.as_fd(), &image.options)?;
        let Some(how) = how(image.shutdown) else { continue };
        // The other end's closing does this by itself; doing it twice changes nothing.
        if !(first.gone || second.gone) {
            shutdown(fd.as_raw_fd(), how).map_err(Trouble::step("shutting down a unix socket"))?;
        }
    }
    Ok([(!first.gone).then_some(a), (!second.gone).then_some(b)])
}

/// The directions that were shut down, as the call takes them.
pub(super) fn how(ended: u32) -> Option<Shutdown> {
    match ended {
        0 => None,
        1 => Some(Shutdown::Read),
        2 => Some(Shutdown::Write),
        _ => Some(Shutdown::Both),
    }
}

/// Sends without blocking, into a send buffer that is made large enough for it.
fn send_all(pid: Tid, fd: BorrowedFd<'_>, messages: &[UnixMessage]) -> Result<(), Trouble> {
    if messages.is_empty() {
        return Ok(());
    }
    let step = Trouble::step;
    let usual = socket::int_option(fd, SOL_SOCKET, libc::SO_SNDBUF).map_err(step("asking for SO_SNDBUF"))?;
    // Each message is charged with its bookkeeping too.
    let charged = messages.iter().map(|m| 2 * m.data.len() + 4096).sum::<usize>();
    let room = c_int::try_from(charged).unwrap_or(c_int::MAX / 4).max(usual);
    socket::set_int_option(fd, SOL_SOCKET, libc::SO_SNDBUFFORCE, room)
        .map_err(step("sizing a unix socket"))?;
    for message in messages {
        let mut rest = message.data.as_slice();
        loop {
            let sent = match &message.credentials {
                Some(by) => socket::send_as(fd, rest, [pid.unsigned_abs(), by.uid, by.gid]),
                None => send(fd.as_raw_fd(), rest, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL),
            };
            let sent = sent.map_err(step("filling a unix socket"))?;
            rest = rest.get(sent..).unwrap_or_default();
            if rest.is_empty() {
                break;
            }
        }
    }
    socket::set_int_option(fd, SOL_SOCKET, libc::SO_SNDBUFFORCE, usual / 2)
        .map_err(step("sizing a unix socket"))
}

/// The inode by which the kernel knows a socket.
pub(super) fn inode(open: &Open) -> u64 {
    open.stat.ino()
}
