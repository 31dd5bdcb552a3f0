//! Connections that wait to be accepted are put into the queue of a listening socket.
//!
//! Nothing but a handshake puts one there. But the kernel lets a program at the entrance of a device vouch for one
//! (`bpf_sk_assign_tcp_reqsk`, since Linux 6.8; it is meant for balancers that answer requests in the place of their
//! servers): a segment that is handed to a listening socket in this way is taken for the last one of a handshake, with
//! all that the program says was agreed on: how windows are scaled, the clock of the timestamps, the size of
//! segments. The sequence numbers of both ends are those of the segment. So for each connection a segment is put in by
//! the loopback device, as strays are, with a mark that names the connection to a program there. What the peer had sent
//! follows as segments of its stream, and its end.
//!
//! The connection is the peer's from the first moment on: what the process answers goes out at once. Segments from
//! outside are to be kept away from it by the lock until it is whole ([`Lock::release_but`]); ours pass by their mark.
//!
//! [`Lock::release_but`]: crate::engine::lock::Lock::release_but

mod against;
mod closed;
mod program;
pub(super) mod segment;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests;

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixDatagram};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, SockaddrStorage, sendto};

pub use self::against::against;
pub use self::closed::Closed;
use self::program::{Agreed, Outcome, PASSES, PLACES, VALUE_BYTES};
use self::segment::{ACK, FIN, RST, Segment};
use super::address::end_of;
use super::bpf::btf::Btf;
use super::bpf::{KERNEL, LICENCE};
use super::lock;
use super::reason::{Reason, chain};
use super::state::files;
use super::sys::bpf::{self, Array};
use super::sys::{socket, tcp};
use crate::proto::files::TcpConnection;

/// The function of the kernel that we need.
const ASSIGN: &str = "bpf_sk_assign_tcp_reqsk";
/// `LOOPBACK_IFINDEX`
const LOOPBACK: u32 = 1;
/// Without these the kernel refuses, or cannot know how a window is scaled.
const NEEDED: [&str; 2] = ["tcp_syncookies", "tcp_window_scaling"];
/// With this, a connection keeps the mark of its first segment: ours.
const MARKS: &str = "tcp_fwmark_accept";
/// Without these, that option is not used any more.
const TIMESTAMPS_ALLOWED: &str = "tcp_timestamps";
const SELECTIVE_ALLOWED: &str = "tcp_sack";

/// How long the bytes of a connection may find no room in it. In tests it is not the point, and the host is busy.
const PATIENCE: Duration = Duration::from_secs(if cfg!(test) { 20 } else { 2 });
/// Between two looks.
const PAUSE: Duration = Duration::from_micros(500);
/// The first segment: there is room for as much in the smallest buffer that a socket can have.
const FIRST_BYTES: usize = 1 << 10;
/// The others, unless there is less room. With its headers, and what the kernel has to it, one is somewhat less than a
/// power of two: the kernel takes memory by these, and counts what it takes, not what it needs.
const PIECE_BYTES: usize = 15 << 10;
/// Less than the kernel takes for the size of segments, of IPv4 and IPv6, is taken for this.
const LEAST_SEGMENT: [u32; 2] = [536, 1220];
/// `TCPI_OPT_*`
pub(super) const TIMESTAMPS: u32 = 1;
pub(super) const SELECTIVE: u32 = 2;
pub(super) const SCALING: u32 = 4;

/// Why this host cannot put connections into queues.
#[derive(Debug, thiserror::Error)]
pub enum QueuedError {
    /// The kernel refused.
    #[error("{step}")]
    Sys {
        /// What was being done.
        step: &'static str,
        /// The kernel's answer.
        #[source]
        errno: Errno,
    },
    /// The kernel's description of itself cannot be read.
    #[error("reading {KERNEL}")]
    Kernel(#[source] std::io::Error),
    /// The kernel is too old, or built without it.
    #[error("the kernel does not have {ASSIGN}")]
    Missing,
    /// Somebody looks at what comes by the loopback device with a packet socket for one protocol only: the kernel then
    /// takes a copy of it, which has lost what the program has said.
    #[error("a packet socket for IP listens on all devices (/proc/net/packet)")]
    Tapped,
    /// It is switched off.
    #[error("net.ipv4.{0} is off")]
    Off(&'static str),
    /// Another service of this host has not come to an end with its own.
    #[error("waiting for another service of this host")]
    Others(#[source] std::io::Error),
    /// It is switched on.
    #[error("net.ipv4.{0} is on")]
    On(&'static str),
}

fn step(step: &'static str) -> impl Fn(Errno) -> QueuedError {
    move |errno| QueuedError::Sys { step, errno }
}

/// Puts connections into queues.
#[derive(Debug)]
pub struct Placer {
    program: OwnedFd,
    array: Array,
}

/// The programs of several migrations would take each other's segments for their own: one at a time in a network
/// namespace, which is what these names belong to (unix(7)).
const ALONE: &[u8] = b"migrate: connections are being put into queues";

/// And in a process.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// How long others may take.
const OTHERS: Duration = Duration::from_secs(10);

fn alone() -> Result<UnixDatagram, QueuedError> {
    let deadline = Instant::now() + OTHERS;
    loop {
        match UnixAddr::from_abstract_name(ALONE).and_then(|name| UnixDatagram::bind_addr(&name)) {
            Ok(alone) => return Ok(alone),
            Err(error) if error.kind() == ErrorKind::AddrInUse && Instant::now() < deadline => {
                std::thread::sleep(PAUSE);
            }
            Err(error) => return Err(QueuedError::Others(error)),
        }
    }
}

impl Placer {
    /// Makes ready; nothing is changed yet. Takes milliseconds.
    ///
    /// # Errors
    /// If the kernel cannot do it, or we may not.
    pub fn prepare() -> Result<Self, QueuedError> {
        if let Some(off) = NEEDED.into_iter().find(|name| !is_on(name)) {
            return Err(QueuedError::Off(off));
        }
        // It is not there where the kernel does not have it.
        if is_on(MARKS) && setting(MARKS).is_ok() {
            return Err(QueuedError::On(MARKS));
        }
        if is_tapped() {
            return Err(QueuedError::Tapped);
        }
        let assign = assign()?;
        let bytes = u32::try_from(VALUE_BYTES).unwrap_or(0);
        let array = Array::create(bytes, PLACES).map_err(step("making an array for a BPF program"))?;
        let instructions = program::instructions(array.number(), assign);
        let program = bpf::load_classifier(&instructions, LICENCE).map_err(step("loading a BPF program"))?;
        Ok(Self { program, array })
    }

    /// Puts these into the queues of the sockets that listen for them, in this order, as far as the lock lets our segments
    /// pass. Returns those that are lost.
    ///
    /// # Errors
    /// If nothing was put in.
    pub fn place(&self, images: &[TcpConnection]) -> Result<Vec<Reason>, QueuedError> {
        let _alone_here = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let _alone = alone()?;
        if is_tapped() {
            return Err(QueuedError::Tapped);
        }
        let _attached = bpf::attach_at_ingress(self.program.as_fd(), LOOPBACK)
            .map_err(step("attaching a BPF program to the loopback device"))?;
        let sender = Sender::open()?;
        let allowed = (is_on(TIMESTAMPS_ALLOWED), is_on(SELECTIVE_ALLOWED));
        let mut lost = Vec::new();
        for images in images.chunks(PLACES as usize) {
            let mut queue = Vec::with_capacity(images.len());
            for (place, image) in (0..).zip(images) {
                match Waiting::of(image, place, allowed) {
                    Some(waiting) => queue.push(waiting),
                    None => lost.push(Reason::new("connection not accepted yet", "makes no sense", "")),
                }
            }
            lost.extend(self.place_some(&sender, queue));
        }
        Ok(lost)
    }

    /// None is left half, on an error as well.
    fn place_some(&self, sender: &Sender, mut queue: Vec<Waiting<'_>>) -> Vec<Reason> {
        let mut lost = Vec::new();
        if let Err(error) = self.place_all(sender, &mut queue, &mut lost) {
            let why = format!("is lost: {}", chain(&error));
            for waiting in &queue {
                lost.push(Reason::new(waiting.name(), why.as_str(), ""));
                waiting.reset(sender);
            }
        }
        lost
    }

    /// Until the queue is empty.
    fn place_all(
        &self,
        sender: &Sender,
        queue: &mut Vec<Waiting<'_>>,
        lost: &mut Vec<Reason>,
    ) -> Result<(), QueuedError> {
        for waiting in &*queue {
            let value = program::value(waiting.local, waiting.remote, &waiting.agreed);
            self.array.set(waiting.place, &value).map_err(step("filling the array of a BPF program"))?;
        }
        // What is left here of earlier connections would be taken for those that listen.
        let ends: Vec<_> = queue.iter().map(|waiting| (waiting.local, waiting.remote)).collect();
        if let Err(errno) = files::remove_remains(&ends) {
            tracing::debug!(%errno, "removing what is left of earlier connections");
        }
        let deadline = Instant::now() + PATIENCE;
        while !queue.is_empty() {
            for waiting in &*queue {
                waiting.send(sender);
            }
            // Before the look at the connections: what is taken between the two is seen in the next round.
            let outcomes: Vec<Outcome> =
                queue.iter().map(|waiting| self.outcome(waiting.place)).collect::<Result<_, _>>()?;
            let ends: Vec<_> = queue.iter().map(|waiting| (waiting.local, waiting.remote)).collect();
            let seen = files::received_by(&ends).map_err(step("asking for connections"))?;
            let late = Instant::now() > deadline;
            let mut looks = seen.into_iter().zip(outcomes);
            queue.retain_mut(|waiting| {
                let Some((received, outcome)) = looks.next() else { return true };
                match received {
                    // The program has spoken, and the kernel may be on its way with the segment: it is looked at again.
                    None if outcome != Outcome::NotSeen && !waiting.judged => waiting.judged = true,
                    // A process that is fast has closed it already; or there was no room for it in the queue.
                    None if outcome == Outcome::Taken => {
                        tracing::warn!(
                            connection = waiting.name(),
                            "was not accepted yet, and is gone again"
                        );
                        // If it comes yet, nobody would send it the rest.
                        if waiting.total() > FIRST_BYTES {
                            waiting.reset(sender);
                        }
                        return false;
                    }
                    None if outcome == Outcome::Refused || late => {
                        lost.push(Reason::new(waiting.name(), "is lost: nobody listens for it", ""));
                        return false;
                    }
                    None => {}
                    Some(received) if received >= waiting.total() => return false,
                    Some(received) if late => {
                        lost.push(Reason::new(
                            waiting.name(),
                            "was reset: it has no room for what has come",
                            "",
                        ));
                        waiting.note(received);
                        waiting.reset(sender);
                        return false;
                    }
                    Some(received) => waiting.note(received),
                }
                true
            });
            if !queue.is_empty() {
                std::thread::sleep(PAUSE);
            }
        }
        Ok(())
    }

    /// For those that are of this host, once each is where it will be, or is lost: if one end is not there, whoever has the
    /// other is told, who would never hear of it. A reset is said once, and not what was said while nobody heard it.
    pub fn abort_halves(ends: &[lock::Connection]) {
        let both = ends.iter().filter(|one| one.is_of_one_host());
        let both: Vec<_> = both.flat_map(|one| [Some(*one), one.reversed()]).flatten().collect();
        let both: Vec<_> = both.into_iter().filter_map(|one| Some((one.local, one.remote?))).collect();
        match files::abort_half(&both) {
            Ok(0) => {}
            Ok(count) => {
                tracing::warn!(count, "connections of the process to itself had lost their other end")
            }
            Err(errno) => tracing::warn!(%errno, "asking for the ends of connections"),
        }
    }

    fn outcome(&self, place: u32) -> Result<Outcome, QueuedError> {
        let mut value = [0; VALUE_BYTES];
        self.array.read(place, &mut value).map_err(step("reading the array of a BPF program"))?;
        Ok(program::outcome(&value))
    }
}

/// The number of the function, which stays the same as long as the kernel runs.
fn assign() -> Result<i32, QueuedError> {
    static NUMBER: OnceLock<i32> = OnceLock::new();
    if let Some(number) = NUMBER.get() {
        return Ok(*number);
    }
    let btf = std::fs::read(KERNEL).map_err(QueuedError::Kernel)?;
    let number =
        Btf::parse(&btf).and_then(|btf| btf.function(ASSIGN)).and_then(|number| i32::try_from(number).ok());
    number.map(|number| *NUMBER.get_or_init(|| number)).ok_or(QueuedError::Missing)
}

/// A setting of this network namespace.
fn setting(name: &str) -> std::io::Result<String> {
    std::fs::read_to_string(format!("/proc/sys/net/ipv4/{name}"))
}

/// One that is not there is not off.
fn is_on(name: &str) -> bool {
    setting(name).map_or(true, |value| value.trim() != "0")
}

/// Whether there is a packet socket for nothing but IP that hears what comes by the loopback device. For its sake the
/// kernel copies each packet on its way to TCP, and the copy forgets what our program has said.
fn is_tapped() -> bool {
    let text = std::fs::read_to_string("/proc/thread-self/net/packet").unwrap_or_default();
    text.lines().skip(1).any(|line| {
        let mut words = line.split_whitespace().skip(3);
        let protocol = words.next().unwrap_or_default();
        let device = words.next().unwrap_or_default();
        ["0800", "86dd"].contains(&protocol) && ["0", "1"].contains(&device)
    })
}

/// Raw sockets that send whole packets.
pub(super) struct Sender {
    v4: OwnedFd,
    v6: Option<OwnedFd>,
}

impl Sender {
    pub(super) fn open() -> Result<Self, QueuedError> {
        // This protocol has the header written by us.
        let open = |family| socket::socket(family, libc::SOCK_RAW, libc::IPPROTO_RAW);
        let v4 = open(libc::AF_INET).map_err(step("opening a raw socket"))?;
        Ok(Self { v4, v6: open(libc::AF_INET6).ok() })
    }

    /// What does not go out is sent again, as anything that is lost.
    pub(super) fn send(&self, mark: u32, segment: &Segment<'_>) {
        let fd = if segment.to.is_ipv4() { Some(&self.v4) } else { self.v6.as_ref() };
        let (Some(fd), Some(packet)) = (fd, segment.packet()) else { return };
        let marked = socket::set_int_option(fd.as_fd(), libc::SOL_SOCKET, libc::SO_MARK, mark.cast_signed());
        let to = SockaddrStorage::from(SocketAddr::new(segment.to.ip(), 0));
        let sent = marked.and_then(|()| sendto(fd.as_raw_fd(), &packet, &to, MsgFlags::empty()));
        if let Err(errno) = sent {
            tracing::debug!(%errno, to = %segment.to, "a segment of ours did not go out");
        }
    }
}

/// A connection that is to be put in.
struct Waiting<'a> {
    /// In the array.
    place: u32,
    local: SocketAddr,
    remote: SocketAddr,
    agreed: Agreed,
    /// Of the first byte of the peer's stream, and what it has acknowledged of ours.
    start: u32,
    acknowledged: u32,
    window: u16,
    bytes: &'a [u8],
    /// The peer has ended its stream.
    ended: bool,
    /// How much of it has come, once the connection is there; what is put in at a time.
    received: Option<usize>,
    piece: usize,
    /// It was handed to a socket, or there is none, but it is not there.
    judged: bool,
}

impl<'a> Waiting<'a> {
    /// `allowed`: timestamps and selective acknowledgements. `None` for what cannot be the image of one that was not
    /// accepted.
    fn of(image: &'a TcpConnection, place: u32, allowed: (bool, bool)) -> Option<Self> {
        let local = end_of(&image.local, image.local_port)?;
        let remote = end_of(&image.remote, image.remote_port)?;
        let said_something = image.write_ended || !image.sent.is_empty() || !image.unsent.is_empty();
        if local.is_ipv4() != remote.is_ipv4() || said_something || image.connecting {
            return None;
        }
        let window: &[u8; tcp::WINDOW_BYTES] = image.window.as_slice().try_into().ok()?;
        let scaled = image.negotiated & SCALING != 0;
        let scale = |value: u32| u8::try_from(value).ok().filter(|value| *value <= 14);
        let [_, _, _, _, a, b, c, d, ..] = *window;
        let window = u32::from_ne_bytes([a, b, c, d]) >> if scaled { scale(image.send_scale)? } else { 0 };
        let least = LEAST_SEGMENT[usize::from(local.is_ipv6())];
        let (timestamps, selective) = allowed;
        Some(Self {
            place,
            local,
            remote,
            agreed: Agreed {
                clock: Some(image.timestamp).filter(|_| timestamps && image.negotiated & TIMESTAMPS != 0),
                segment_limit: u16::try_from(image.segment_limit.max(least)).unwrap_or(u16::MAX),
                scales: match scaled {
                    true => Some((scale(image.receive_scale)?, scale(image.send_scale)?)),
                    false => None,
                },
                selective: selective && image.negotiated & SELECTIVE != 0,
            },
            // The end that has come is counted.
            start: image.receive_sequence.wrapping_sub(u32::from(image.read_ended)),
            acknowledged: image.send_sequence,
            window: u16::try_from(window).unwrap_or(u16::MAX),
            bytes: &image.received,
            ended: image.read_ended,
            received: None,
            piece: PIECE_BYTES,
            judged: false,
        })
    }

    /// All that has to come: the end counts as a byte.
    fn total(&self) -> usize {
        self.bytes.len() + usize::from(self.ended)
    }

    /// So much has come by now.
    fn note(&mut self, received: usize) {
        if self.received == Some(received) {
            self.piece = (self.piece / 2).max(FIRST_BYTES / 2);
        }
        self.received = Some(received);
    }

    /// The first segment, or what is missing after it.
    fn send(&self, sender: &Sender) {
        let Some(received) = self.received else {
            // Once more would make another connection, if this one has been accepted and closed meanwhile.
            if self.judged {
                return;
            }
            let end = self.bytes.len().min(FIRST_BYTES);
            return sender.send(lock::OUR_MARK | self.place, &self.segment(0, end));
        };
        let mut at = received.min(self.bytes.len());
        loop {
            let end = self.bytes.len().min(at + self.piece);
            sender.send(PASSES, &self.segment(at, end));
            at = end;
            if at == self.bytes.len() {
                break;
            }
        }
    }

    /// These bytes of the stream, with its end if they are the last.
    fn segment(&self, from: usize, to: usize) -> Segment<'_> {
        let last = to == self.bytes.len() && self.ended;
        Segment {
            from: self.remote,
            to: self.local,
            sequence: self.start.wrapping_add(u32::try_from(from).unwrap_or(0)),
            acknowledged: self.acknowledged,
            flags: if last { ACK | FIN } else { ACK },
            window: self.window,
            options: &[],
            payload: self.bytes.get(from..to).unwrap_or_default(),
        }
    }

    /// The process is told that the connection has broken; the peer will be, as soon as it says anything.
    fn reset(&self, sender: &Sender) {
        // Only the number that is expected next counts. Of one that nobody has seen it is that after the first segment.
        let first = self.bytes.len().min(FIRST_BYTES);
        let end = usize::from(self.ended && first == self.bytes.len());
        let at = self.received.unwrap_or(first + end);
        let reset = Segment { flags: RST | ACK, payload: &[], ..self.segment(0, 0) };
        let sequence = self.start.wrapping_add(u32::try_from(at).unwrap_or(0));
        sender.send(PASSES, &Segment { sequence, ..reset });
    }

    fn name(&self) -> String {
        format!("connection {} to {}", self.local, self.remote)
    }
}
