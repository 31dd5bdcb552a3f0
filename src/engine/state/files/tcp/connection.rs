//! A live TCP connection (`--tcp-established`): read through `TCP_REPAIR`, made again in it.
//!
//! What the two ends have agreed on, the sequence numbers and both queues are carried. What has come out
//! of order is not: the peer still has it, and sends it again. Congestion control starts anew.
//!
//! The ends of the two streams are sequence numbers like bytes, but `TCP_REPAIR` cannot put them into a
//! queue. So the restored connection is always *established* at first:
//! - An end that has come is counted in the receive sequence, so that it stays acknowledged, and reading
//!   is shut down: the process reads what is left, then the end, as before. Its state reads ESTABLISHED
//!   where it was CLOSE_WAIT; nothing on the wire tells the two apart.
//! - An end that was sent is sent again by `shutdown` after the connection is live, with the number that it
//!   had; a peer that has it acknowledges it once more.
//!
//! Leaving `TCP_REPAIR` clears SO_REUSEADDR, which is set anew each time.

use std::ffi::c_int;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};

use libc::{IPPROTO_IP, IPPROTO_TCP, SOL_SOCKET};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};

use super::super::{Stop, Trouble};
use super::buffers::{Room, has_usual_buffers, set_buffers};
use super::list::peer;
use super::recipe::Recipe;
use super::table::Known;
use super::{Captures, address_of};
use crate::engine::address::octets;
use crate::engine::sys::tcp::{self, Queue, REPAIR_OFF_SILENTLY, REPAIR_ON};
use crate::engine::sys::{fds, socket};
use crate::proto::files::TcpConnection;

/// Most bytes in the queues of all connections together: they travel within the final state. As many may be in those that
/// wait to be accepted.
pub const MOST_QUEUED_BYTES: usize = 192 << 20;
/// How often a connection that changes under the look is looked at again.
const LOOKS: usize = 8;
/// Beside what the peer has not acknowledged, the first segment may hold this much that it has.
pub(super) const SEGMENT_BYTES: usize = 128 << 10;
/// Bytes handed over in one call.
const PIECE_BYTES: usize = 1 << 20;

/// What `TCP_MAXSEG` takes.
const LEAST_SEGMENT: u32 = 88;
const LARGEST_SEGMENT: u32 = 32_767;
/// The largest window without scaling.
const UNSCALED_WINDOW: u32 = 65_535;

/// `TCPI_OPT_*`
pub(super) const TIMESTAMPS: u32 = 1;
pub(super) const SELECTIVE: u32 = 2;
pub(super) const SCALING: u32 = 4;
/// Since Linux 6.7.
const IN_MICROSECONDS: u32 = 64;
/// The codes of these options in a header.
const CODE_SEGMENT: u32 = 2;
const CODE_SCALE: u32 = 3;
const CODE_SELECTIVE: u32 = 4;
const CODE_TIMESTAMPS: u32 = 8;

/// The states of the kernel, as far as a connection is in them.
pub(super) const ESTABLISHED: u8 = 1;
pub(super) const SYN_SENT: u8 = 2;
pub(super) const FIN_WAIT1: u8 = 4;
pub(super) const FIN_WAIT2: u8 = 5;
pub(super) const CLOSE_WAIT: u8 = 8;
pub(super) const LAST_ACK: u8 = 9;
pub(super) const CLOSING: u8 = 11;

fn read_step(errno: Errno) -> Stop {
    Stop::failed("reading a TCP connection")(errno)
}

/// In `TCP_REPAIR` as long as it lives; leaves it without a trace.
struct Repair<'a> {
    fd: BorrowedFd<'a>,
    reuse: c_int,
}

impl<'a> Repair<'a> {
    /// `reuse`: its SO_REUSEADDR.
    fn enter(fd: BorrowedFd<'a>, reuse: c_int) -> Result<Self, Errno> {
        tcp::set_repair(fd, REPAIR_ON)?;
        Ok(Self { fd, reuse })
    }
}

impl Drop for Repair<'_> {
    fn drop(&mut self) {
        // The connection may have been ended by the network meanwhile: then there is nothing to undo.
        let _ = tcp::choose_queue(self.fd, Queue::None);
        let _ = tcp::set_repair(self.fd, REPAIR_OFF_SILENTLY);
        // It is off now.
        if self.reuse != 0 {
            let _ = socket::set_int_option(self.fd, SOL_SOCKET, libc::SO_REUSEADDR, self.reuse);
        }
    }
}

/// What is known of a socket by the time that it turns out to be a connection.
pub(super) struct Seen<'a> {
    pub(super) fd: BorrowedFd<'a>,
    pub(super) family: c_int,
    pub(super) state: u8,
    /// TCP_INFO.
    pub(super) info: &'a [u8],
    pub(super) local: (IpAddr, u16),
    /// What poll(2) says, of [`POLLED`] and of errors.
    pub(super) polled: i16,
    /// Its options.
    pub(super) options: Known,
}

/// What is asked of poll(2).
pub(super) const POLLED: i16 = libc::POLLRDHUP | libc::POLLPRI;

/// Reads a connection; its queues only if there is room for them.
pub(super) fn capture(seen: &Seen<'_>, all: &Captures) -> Result<TcpConnection, Stop> {
    let &Seen { fd, family, state, polled, .. } = seen;
    let remote = peer(fd).map_err(|errno| match errno {
        Errno::EADDRNOTAVAIL => {
            Stop::refuse("is a TCP connection of a link-local address, which cannot be carried")
        }
        errno => read_step(errno),
    })?;
    let connecting = state == SYN_SENT;
    if !connecting && ![ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING].contains(&state) {
        return Err(Stop::refuse(format!("is a TCP connection in state {state}, which cannot be carried")));
    }
    if polled & libc::POLLERR != 0 {
        return Err(Stop::refuse("is a TCP connection with an error that was not yet reported"));
    }
    if polled & libc::POLLPRI != 0 {
        return Err(Stop::refuse("is a TCP connection with urgent data not yet read"));
    }
    let read = |level, name| socket::int_option(fd, level, name).map_err(read_step);
    if connecting && read(IPPROTO_TCP, libc::TCP_FASTOPEN_CONNECT)? != 0 {
        return Err(Stop::refuse("is a TCP connection being made with TCP Fast Open"));
    }
    let byte = |at: usize| seen.info.get(at).copied().map_or(0, u32::from);
    let mut image = TcpConnection {
        family,
        local: octets(seen.local.0),
        local_port: seen.local.1.into(),
        remote: octets(remote.ip()),
        remote_port: remote.port().into(),
        connecting,
        read_ended: polled & libc::POLLRDHUP != 0,
        write_ended: [FIN_WAIT1, FIN_WAIT2, LAST_ACK, CLOSING].contains(&state),
        negotiated: byte(5),
        send_scale: byte(6) & 15,
        receive_scale: byte(6) >> 4,
        window_clamp: read(IPPROTO_TCP, libc::TCP_WINDOW_CLAMP)?.cast_unsigned(),
        option_set: seen.options.number,
        send_buffer: read(SOL_SOCKET, libc::SO_SNDBUF)?.cast_unsigned(),
        receive_buffer: read(SOL_SOCKET, libc::SO_RCVBUF)?.cast_unsigned(),
        ..TcpConnection::default()
    };
    let Some(room) = all.room() else { return Ok(image) };
    let reuse = seen.options.value(SOL_SOCKET, libc::SO_REUSEADDR);
    for _ in 0..LOOKS {
        let repair = Repair::enter(fd, reuse).map_err(Stop::failed("entering TCP_REPAIR"))?;
        if look(&repair, state, &mut image, room)? {
            return Ok(image);
        }
    }
    Err(Stop::refuse("is a TCP connection that changes while its process stands still"))
}

/// Bytes that the queues of all connections may still have.
#[derive(Debug)]
pub(super) struct QueueRoom(AtomicUsize);

impl QueueRoom {
    /// All of it.
    pub(super) fn new() -> Self {
        Self(AtomicUsize::new(MOST_QUEUED_BYTES))
    }

    fn take(&self, bytes: usize) -> bool {
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(bytes)).is_ok()
    }

    fn give_back(&self, bytes: usize) {
        self.0.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// What is seen by the socket itself, and cannot be given to a new one. All of it comes by setsockopt(2).
pub(super) fn refuse_rare(fd: BorrowedFd<'_>, options: &Known) -> Result<(), Stop> {
    let refuse =
        |with: &str| Err(Stop::refuse(format!("is a TCP connection {with}, which cannot be carried")));
    if tcp::is_in_repair(fd).map_err(read_step)? {
        return refuse("in TCP_REPAIR");
    }
    // The kernel numbers what it reports as sent, from the beginning of the connection.
    if options.value(SOL_SOCKET, libc::SO_ZEROCOPY) != 0 {
        return refuse("with SO_ZEROCOPY");
    }
    if socket::int_option(fd, SOL_SOCKET, fds::SO_PEEK_OFF).is_ok_and(|offset| offset >= 0) {
        return refuse("with SO_PEEK_OFF");
    }
    if tcp::has_saved_syn(fd).map_err(read_step)? {
        return refuse("with its first segment not yet read (TCP_SAVED_SYN)");
    }
    Ok(())
}

/// One look at sequence numbers and queues; false if they have changed under it.
fn look(repair: &Repair<'_>, state: u8, image: &mut TcpConnection, room: &QueueRoom) -> Result<bool, Stop> {
    let fd = repair.fd;
    tcp::choose_queue(fd, Queue::Send).map_err(read_step)?;
    let end = tcp::sequence(fd).map_err(read_step)?;
    if state == SYN_SENT {
        // The beginning of the stream counts as a byte.
        image.send_sequence = end.wrapping_sub(1);
        return Ok(true);
    }
    let outstanding = tcp::unacknowledged(fd).map_err(read_step)?;
    let unsent = if outstanding == 0 { 0 } else { tcp::never_sent(fd).map_err(read_step)? };
    // An end that the peer has not acknowledged counts as a byte that is not in the queue.
    let end_waits = u32::from([FIN_WAIT1, LAST_ACK, CLOSING].contains(&state));
    let (Some(written), unsent) = (outstanding.checked_sub(end_waits), unsent.saturating_sub(end_waits))
    else {
        return Ok(false);
    };
    let waiting = fds::readable_bytes(fd).map_err(read_step)?;
    let queued = written as usize + waiting;
    if !room.take(queued) {
        let limit = MOST_QUEUED_BYTES >> 20;
        return Err(Stop::refuse(format!(
            "is a TCP connection with {written} bytes not acknowledged and {waiting} not read: more than \
             {limit} MiB with those of the others, which cannot be carried"
        )));
    }
    let whole = unsent <= written
        && look_at_queues(fd, image, (end, outstanding, state), (written, unsent, waiting))?;
    if !whole {
        room.give_back(queued);
    }
    Ok(whole)
}

/// The rest of a look: what the queues hold.
fn look_at_queues(
    fd: BorrowedFd<'_>,
    image: &mut TcpConnection,
    (end, outstanding, state): (u32, u32, u8),
    (written, unsent, waiting): (u32, u32, usize),
) -> Result<bool, Stop> {
    let mut queue = peek(fd, written as usize, SEGMENT_BYTES)?;
    if queue.len() < written as usize {
        return Ok(false);
    }
    queue.drain(..queue.len() - written as usize);
    image.unsent = queue.split_off((written - unsent) as usize);
    image.sent = queue;
    // An end that was acknowledged is to be sent again all the same.
    let acknowledged_end = u32::from(state == FIN_WAIT2);
    image.send_sequence = end.wrapping_sub(outstanding).wrapping_sub(acknowledged_end);
    image.segment_limit =
        socket::int_option(fd, IPPROTO_TCP, libc::TCP_MAXSEG).map_err(read_step)?.cast_unsigned();

    tcp::choose_queue(fd, Queue::Receive).map_err(read_step)?;
    let received = tcp::sequence(fd).map_err(read_step)?;
    image.received = peek(fd, waiting, 0)?;
    image.receive_sequence = received.wrapping_sub(u32::try_from(waiting).unwrap_or(u32::MAX));
    image.window = tcp::window(fd).map_err(read_step)?.to_vec();
    if image.negotiated & TIMESTAMPS != 0 {
        image.timestamp =
            socket::int_option(fd, IPPROTO_TCP, libc::TCP_TIMESTAMP).map_err(read_step)?.cast_unsigned();
    }
    let same = tcp::sequence(fd).map_err(read_step)? == received
        && image.received.len() == waiting
        && tcp::unacknowledged(fd).map_err(read_step)? == outstanding;
    Ok(same)
}

/// The bytes of the chosen queue. `more`: the kernel may have this much in front of them.
fn peek(fd: BorrowedFd<'_>, len: usize, more: usize) -> Result<Vec<u8>, Stop> {
    if len == 0 {
        return Ok(Vec::new());
    }
    let mut buffer = vec![0; len + more];
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    let read = recv(fd.as_raw_fd(), &mut buffer, flags)
        .map_err(Stop::failed("reading the queue of a TCP connection"))?;
    buffer.truncate(read);
    Ok(buffer)
}

/// A socket in `TCP_REPAIR` with one end of a connection; [`complete`] gives it the other. `flags` are those
/// of the description.
pub(super) fn make(image: &TcpConnection, flags: c_int, recipe: &Recipe) -> Result<OwnedFd, Trouble> {
    let step = Trouble::step;
    // Saves setting it later.
    let fd = super::new_socket(image.family, flags & libc::SOCK_NONBLOCK)?;
    recipe.apply(fd.as_fd())?;
    tcp::set_repair(fd.as_fd(), REPAIR_ON).map_err(step("entering TCP_REPAIR"))?;
    // The address may come later.
    socket::set_int_option(fd.as_fd(), IPPROTO_IP, libc::IP_TRANSPARENT, 1)
        .map_err(step("preparing to bind"))?;
    let (local, port) = address_of(&image.local, image.local_port)?;
    for (queue, sequence) in [(Queue::Receive, image.receive_sequence), (Queue::Send, image.send_sequence)] {
        tcp::choose_queue(fd.as_fd(), queue).map_err(step("choosing a queue"))?;
        tcp::set_sequence(fd.as_fd(), sequence).map_err(step("setting a sequence number"))?;
    }
    if !has_usual_buffers(image, recipe) {
        set_buffers(fd.as_fd(), image, Room::ToFill, recipe)?;
    }
    socket::bind(fd.as_fd(), local, port).map_err(step("binding a TCP connection"))?;
    Ok(fd)
}

/// Lets the timestamps go on, where they were agreed on. Since Linux 6.7 the lowest bit chooses a clock that counts
/// microseconds; before, it is one of the time in milliseconds. That may never seem to go back.
pub(super) fn resume_clock(fd: BorrowedFd<'_>, image: &TcpConnection) -> Result<(), Trouble> {
    let step = Trouble::step;
    if image.negotiated & TIMESTAMPS == 0 {
        return Ok(());
    }
    let in_microseconds = image.negotiated & IN_MICROSECONDS != 0;
    let clock = if in_microseconds { image.timestamp | 1 } else { image.timestamp.wrapping_add(1) & !1 };
    socket::set_option(fd, IPPROTO_TCP, libc::TCP_TIMESTAMP, &clock.to_ne_bytes())
        .map_err(step("setting a TCP connection's clock"))?;
    let counts = || {
        socket::option(fd, IPPROTO_TCP, libc::TCP_INFO).map(|info| info.get(5).copied().map_or(0, u32::from))
    };
    if in_microseconds && counts().map_err(step("reading TCP_INFO"))? & IN_MICROSECONDS == 0 {
        return Err(Trouble::Differs("a TCP connection's clock, which counts microseconds".to_owned()));
    }
    Ok(())
}

/// The rest, for which there must be a route to the peer. `Ok(false)` if there is none yet.
pub(super) fn complete(fd: BorrowedFd<'_>, image: &TcpConnection) -> Result<bool, Trouble> {
    let step = Trouble::step;
    let (remote, port): (IpAddr, u16) = address_of(&image.remote, image.remote_port)?;
    if image.negotiated & SCALING == 0 {
        // With room for more the kernel would choose a factor here, and apply it although none was agreed on.
        socket::set_option(fd, IPPROTO_TCP, libc::TCP_WINDOW_CLAMP, &UNSCALED_WINDOW.to_ne_bytes())
            .map_err(step("limiting a TCP connection's window"))?;
    }
    // What is agreed on below changes the limit, but not the size that was derived from it when connecting.
    limit_segments(fd, image.segment_limit)?;
    match tcp::connect(fd, remote, port) {
        Ok(()) => {}
        Err(Errno::ENETUNREACH | Errno::EHOSTUNREACH | Errno::EADDRNOTAVAIL) => return Ok(false),
        Err(errno) => return Err(Trouble::Step("connecting in TCP_REPAIR", errno)),
    }
    limit_segments(fd, 0)?;
    let mut agreed = Vec::with_capacity(32);
    let mut agree = |code: u32, value: u32| {
        agreed.extend(code.to_ne_bytes());
        agreed.extend(value.to_ne_bytes());
    };
    if image.negotiated & SELECTIVE != 0 {
        agree(CODE_SELECTIVE, 0);
    }
    if image.negotiated & SCALING != 0 {
        agree(CODE_SCALE, image.send_scale & 15 | (image.receive_scale & 15) << 16);
    }
    if image.negotiated & TIMESTAMPS != 0 {
        agree(CODE_TIMESTAMPS, 0);
    }
    resume_clock(fd, image)?;
    agree(CODE_SEGMENT, image.segment_limit);
    socket::set_option(fd, IPPROTO_TCP, libc::TCP_REPAIR_OPTIONS, &agreed)
        .map_err(step("setting what a TCP connection has agreed on"))?;
    fill(fd, Queue::Receive, &image.received)?;
    fill(fd, Queue::Send, &image.sent)?;
    if image.window.len() != tcp::WINDOW_BYTES {
        return Err(Trouble::Invalid("a TCP connection's window"));
    }
    socket::set_option(fd, IPPROTO_TCP, libc::TCP_REPAIR_WINDOW, &image.window)
        .map_err(step("setting a TCP connection's window"))?;
    set_clamp(fd, image.window_clamp)?;
    if image.read_ended {
        super::shut(fd, nix::sys::socket::Shutdown::Read)?;
    }
    Ok(true)
}

/// Limits the segments of a connection yet to be made, as far as that is allowed to be asked for; 0 lifts it.
fn limit_segments(fd: BorrowedFd<'_>, bytes: u32) -> Result<(), Trouble> {
    if (1..LEAST_SEGMENT).contains(&bytes) {
        return Ok(());
    }
    let bytes = bytes.min(LARGEST_SEGMENT);
    socket::set_option(fd, IPPROTO_TCP, libc::TCP_MAXSEG, &bytes.to_ne_bytes())
        .map_err(Trouble::step("limiting a TCP connection's segments"))
}

/// First a low clamp, then the one it had: raising it is what makes the kernel offer as much as was offered.
fn set_clamp(fd: BorrowedFd<'_>, clamp: u32) -> Result<(), Trouble> {
    for value in [1, clamp].into_iter().filter(|_| clamp != 0) {
        socket::set_option(fd, IPPROTO_TCP, libc::TCP_WINDOW_CLAMP, &value.to_ne_bytes())
            .map_err(Trouble::step("limiting a TCP connection's window"))?;
    }
    Ok(())
}

/// Puts bytes into a queue, as if they had come or were sent.
fn fill(fd: BorrowedFd<'_>, queue: Queue, bytes: &[u8]) -> Result<(), Trouble> {
    if bytes.is_empty() {
        return Ok(());
    }
    let step = Trouble::step("filling the queue of a TCP connection");
    if let Err(errno) = tcp::choose_queue(fd, queue) {
        return Err(step(errno));
    }
    push(fd, bytes).map_err(step)
}

/// Hands all bytes over, or fails.
pub(super) fn push(fd: BorrowedFd<'_>, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        let piece = bytes.get(..PIECE_BYTES).unwrap_or(bytes);
        let taken = send(fd.as_raw_fd(), piece, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL)?;
        bytes = bytes.get(taken..).unwrap_or_default();
    }
    Ok(())
}
