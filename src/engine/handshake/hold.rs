//! Held where the process runs: what the kernel would do with a request that it had answered itself.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::MOST;
use crate::engine::address::end_of;
use crate::engine::lock::Connection;
use crate::engine::queued::segment::{ACK, SYN, Segment as Outgoing};
use crate::engine::queued::{QueuedError, SCALING, SELECTIVE, Sender, TIMESTAMPS};
use crate::engine::strays::segment::{Numbers, Segment};
use crate::engine::sys::socket;
use crate::engine::sys::tcp::WINDOW_BYTES;
use crate::proto::files::description::Kind;
use crate::proto::files::{Description, Files, Handshake, SocketOption, TcpConnection};

/// The answer is repeated after this time, and then after twice as long each time; so often (tcp(7),
/// `tcp_synack_retries`).
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const REPEATS: u32 = 5;
/// Bytes of both headers without options.
const V4_HEADERS: i32 = 40;
const V6_HEADERS: i32 = 60;
/// The least that every host takes.
const LEAST_SEGMENT: [u16; 2] = [536, 1220];
/// Options, as they are on the wire (RFC 9293, 2018, 7323).
const NOTHING: u8 = 1;
const SEGMENT: [u8; 2] = [2, 4];
const SCALE: [u8; 2] = [3, 3];
const SELECTIVE_ALLOWED: [u8; 2] = [4, 2];
const STAMPS: [u8; 2] = [8, 10];

/// What a segment of the peer's is to a handshake.
#[derive(Debug, Clone, PartialEq)]
pub enum Heard {
    /// Nothing.
    Nothing,
    /// It asks again: it gets the same answer.
    Again,
    /// Its end: this is the connection.
    End(Box<TcpConnection>),
    /// The peer has forgotten it, and asks for another connection.
    Other,
}

/// One of them.
#[derive(Debug)]
struct One {
    local: SocketAddr,
    remote: SocketAddr,
    image: TcpConnection,
    peer_clock: u32,
    offered: u32,
    since: Instant,
    repeated: u32,
    due: Instant,
    /// The socket that listens wants no connection that says nothing (TCP_DEFER_ACCEPT), and the peer has said nothing but
    /// that it has heard.
    deferred: bool,
    acknowledged: bool,
    /// The first number of another request from the same port. It may be an old one that comes late.
    other: Option<u32>,
}

/// Those that are held.
#[derive(Debug, Default)]
pub struct Held(Vec<One>);

impl Held {
    /// What came with the state of the process. What makes no sense is left out.
    pub fn of(files: &Files) -> Self {
        let now = Instant::now();
        let patient = places_that_defer(files);
        let one = |image: &Handshake| {
            let Handshake { connection, peer_clock, receive_window } = image;
            let (image, peer_clock, offered) = (connection.clone()?, *peer_clock, *receive_window);
            let local = end_of(&image.local, image.local_port)?;
            let remote = end_of(&image.remote, image.remote_port)?;
            let is_sound =
                local.is_ipv4() == remote.is_ipv4() && image.send_scale <= 14 && image.receive_scale <= 14;
            let deferred = patient.iter().any(|place| {
                place.port() == local.port() && (place.ip() == local.ip() || place.ip().is_unspecified())
            });
            let (since, due) = (now, now + FIRST_PAUSE);
            let (repeated, acknowledged, other) = (0, false, None);
            is_sound.then_some(One {
                local,
                remote,
                image,
                peer_clock,
                offered,
                since,
                repeated,
                due,
                deferred,
                acknowledged,
                other,
            })
        };
        Self(files.handshakes.iter().take(MOST).filter_map(one).collect())
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Their names.
    pub fn ends(&self) -> Vec<Connection> {
        self.0.iter().map(One::ends).collect()
    }

    /// Only these stay.
    pub fn retain(&mut self, is_kept: impl Fn(&Connection) -> bool) {
        self.0.retain(|one| is_kept(&one.ends()));
    }

    /// What a packet is to one of them, and to which.
    pub fn hear(&mut self, packet: &[u8]) -> Option<(Connection, Heard)> {
        let segment = Segment::of(packet)?;
        let numbers = segment.numbers(packet)?;
        let ends = (segment.local, segment.remote);
        let one = self.0.iter_mut().find(|one| (one.local, one.remote) == ends)?;
        Some((one.ends(), one.judge(segment.opening, numbers)))
    }

    /// When something is to be done next.
    pub fn due(&self) -> Option<Instant> {
        self.0.iter().map(|one| one.due).min()
    }

    /// Repeats the answers whose time has come, and that to `asked`. Gives up those whose peers have not said anything for
    /// too long.
    ///
    /// # Errors
    /// If we may not send segments.
    pub fn answer(&mut self, asked: &[Connection]) -> Result<(), QueuedError> {
        let now = Instant::now();
        let is_due = |one: &One| one.due <= now;
        self.0.retain(|one| !is_due(one) || one.repeated < REPEATS);
        let mut answers = Vec::new();
        for one in &mut self.0 {
            let is_due = is_due(one);
            if is_due {
                one.repeated += 1;
                one.due = now + FIRST_PAUSE * 2u32.saturating_pow(one.repeated);
                // The last time any word will do.
                one.deferred &= one.repeated < REPEATS;
            }
            let waits = one.deferred && one.acknowledged;
            if is_due && !waits || asked.contains(&one.ends()) {
                answers.push(&*one);
            }
        }
        if !answers.is_empty() {
            let sender = Sender::open()?;
            answers.into_iter().for_each(|one| one.send(&sender));
        }
        Ok(())
    }
}

/// Where sockets listen that want no connection that says nothing.
fn places_that_defer(files: &Files) -> Vec<SocketAddr> {
    let defers = |option: &SocketOption| {
        (option.level, option.name) == (libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT)
            && option.value.iter().any(|byte| *byte != 0)
    };
    let place = |description: &Description| match &description.kind {
        Some(Kind::Tcp(socket)) if socket.options.iter().any(defers) => end_of(&socket.address, socket.port),
        _ => None,
    };
    files.descriptions.iter().filter_map(place).collect()
}

impl One {
    fn ends(&self) -> Connection {
        Connection { local: self.local, remote: Some(self.remote) }
    }

    fn judge(&mut self, asks: bool, numbers: Numbers) -> Heard {
        let Numbers { sequence, acknowledged, window, says_something } = numbers;
        let image = &self.image;
        if asks {
            // A peer that has forgotten the first request resets what our answer tells it, and asks once more.
            let is_other = sequence.wrapping_add(1) != image.receive_sequence;
            let again = is_other && self.other.replace(sequence) == Some(sequence);
            return if again { Heard::Other } else { Heard::Again };
        }
        // Its word itself may be lost, and what it says now is more.
        let is_within = sequence.wrapping_sub(image.receive_sequence) <= self.offered;
        if acknowledged != image.send_sequence || !is_within {
            return Heard::Nothing;
        }
        if self.deferred && !says_something {
            self.acknowledged = true;
            return Heard::Nothing;
        }
        let mut image = image.clone();
        image.timestamp = self.clock();
        // struct tcp_repair_window: the second word is the peer's window.
        let sent = u32::from(window) << if image.negotiated & SCALING == 0 { 0 } else { image.send_scale };
        image.window = vec![0; WINDOW_BYTES];
        if let Some(word) = image.window.get_mut(4..8) {
            word.copy_from_slice(&sent.to_ne_bytes());
        }
        Heard::End(Box::new(image))
    }

    /// What the clock of our time stamps says now: milliseconds.
    fn clock(&self) -> u32 {
        let passed = u32::try_from(self.since.elapsed().as_millis()).unwrap_or(u32::MAX);
        self.image.timestamp.wrapping_add(passed)
    }

    fn send(&self, sender: &Sender) {
        let options = self.options(segment_limit(self.remote));
        // The mark is that of nobody: it goes out to the network.
        sender.send(
            0,
            &Outgoing {
                from: self.local,
                to: self.remote,
                sequence: self.image.send_sequence.wrapping_sub(1),
                acknowledged: self.image.receive_sequence,
                flags: SYN | ACK,
                // The window of an answer is never scaled.
                window: u16::try_from(self.offered).unwrap_or(u16::MAX),
                options: &options,
                payload: &[],
            },
        );
    }

    /// The same that the kernel has agreed on, padded to words.
    fn options(&self, segment_limit: u16) -> Vec<u8> {
        let has = |option| self.image.negotiated & option != 0;
        let mut options = SEGMENT.to_vec();
        options.extend(segment_limit.to_be_bytes());
        if has(SELECTIVE) {
            options.extend([NOTHING, NOTHING]);
            options.extend(SELECTIVE_ALLOWED);
        }
        if has(TIMESTAMPS) {
            options.extend([NOTHING, NOTHING]);
            options.extend(STAMPS);
            options.extend(self.clock().to_be_bytes());
            options.extend(self.peer_clock.to_be_bytes());
        }
        if has(SCALING) {
            options.push(NOTHING);
            options.extend(SCALE);
            options.push(u8::try_from(self.image.receive_scale).unwrap_or(0));
        }
        options
    }
}

/// What the way to a peer takes in one segment, as far as its first part is known.
fn segment_limit(remote: SocketAddr) -> u16 {
    let (any, level, option, headers): (IpAddr, _, _, _) = match remote {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED.into(), libc::IPPROTO_IP, libc::IP_MTU, V4_HEADERS),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED.into(), libc::IPPROTO_IPV6, libc::IPV6_MTU, V6_HEADERS),
    };
    let least = LEAST_SEGMENT[usize::from(remote.is_ipv6())];
    // A socket that is connected knows its way; nothing is sent.
    let way = UdpSocket::bind((any, 0)).and_then(|udp| udp.connect(remote).map(|()| udp));
    let whole = way.ok().and_then(|udp| socket::int_option(udp.as_fd(), level, option).ok());
    whole.and_then(|bytes| u16::try_from(bytes - headers).ok()).map_or(least, |bytes| bytes.max(least))
}

#[cfg(test)]
impl Held {
    /// The time of all answers has come.
    pub(super) fn hurry(&mut self) {
        self.0.iter_mut().for_each(|one| one.due = Instant::now());
    }
}
