//! Nobody sends a reset: counted by each kernel, and seen on the bridge between the hosts.

use std::fmt::{self, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use migrate::engine::sys::{datagram, socket};
use migrate::testbed::{Host, Lan, wait_for};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};

use crate::case::{Result, ensure};

/// Room for those that come in a storm of them.
const QUEUE_BYTES: i32 = 4 << 20;
/// Those that are shown.
const SHOWN: usize = 10;
/// How long a connection may take to end.
const ENDS: Duration = Duration::from_secs(60);
/// `AF_PACKET` and `ETH_P_ALL`.
const PACKET: u16 = 17;
const ALL: u16 = 3;
const IPV4: u32 = 0x0800;
const IPV6: u32 = 0x86dd;
const TCP: u32 = 6;
const RST: u32 = 4;
const ACK: u8 = 16;
/// Bytes of the longest IPv4 header, of one of IPv6 (extensions before TCP are not looked for), and of a TCP header up
/// to its flags.
const LONGEST_IP: usize = 60;
const IPV6_HEADER: u32 = 40;
const TCP_PORTS_TO_FLAGS: usize = 14;

/// A reset on the wire.
#[derive(Debug)]
pub(crate) struct Reset {
    pub(crate) from: SocketAddr,
    to: SocketAddr,
    sequence: u32,
    /// Without it the sender knows nothing of the connection: it answers a segment that reached nobody.
    acknowledged: Option<u32>,
}

impl fmt::Display for Reset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to {} (sequence {}, ", self.from, self.to, self.sequence)?;
        match self.acknowledged {
            Some(number) => write!(f, "acknowledges {number})"),
            None => write!(f, "of nobody)"),
        }
    }
}

/// Whether a connection was reset since this was made.
pub(crate) struct Resets {
    counted: [u64; 4],
    capture: OwnedFd,
}

impl Resets {
    /// Watches the connections of a port, from now on.
    pub(crate) fn watch(lan: &Lan, port: u16) -> Result<Self> {
        await_ends(lan, port)?;
        let open = move || -> std::result::Result<OwnedFd, Errno> {
            // It names no protocol, so it receives nothing before it is bound.
            let fd = socket::socket(libc::AF_PACKET, libc::SOCK_DGRAM | libc::SOCK_NONBLOCK, 0)?;
            datagram::attach_filter(fd.as_fd(), &filter(port))?;
            socket::set_int_option(fd.as_fd(), libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, QUEUE_BYTES)?;
            // struct sockaddr_ll: family, protocol, and no device: the bridge with its ports.
            let mut name = [0; 20];
            name[..2].copy_from_slice(&PACKET.to_ne_bytes());
            name[2..4].copy_from_slice(&ALL.to_be_bytes());
            datagram::bind_raw(fd.as_fd(), &name)?;
            Ok(fd)
        };
        let capture = lan.client("capture", open)?.join().map_err(|_| "the capture panicked")???;
        Ok(Self { counted: counted(lan)?, capture })
    }

    /// An error if there was one. To be asked while all clients are connected.
    pub(crate) fn none(&self, lan: &Lan) -> Result {
        let seen: Vec<Reset> = self.seen();
        ensure(seen.is_empty(), || list(&seen))?;
        let now = counted(lan)?;
        ensure(now == self.counted, || {
            format!("resets by a, by b, by the clients, suffered by them: {:?}, {now:?}", self.counted)
        })
    }

    /// An error if there was one that ordinary ends of connections do not bring. To be asked once clients have ended.
    ///
    /// A server that has closed after its client waits for the last acknowledgement (LAST_ACK). On a busy machine it
    /// repeats its end before that has come; then the client's kernel (TIME_WAIT) acknowledges both, and the second
    /// acknowledgement finds no socket any more. It is answered by a reset that acknowledges nothing, which nobody
    /// suffers. So a reset that knows the connection is still an error, and so is any that a client has suffered.
    pub(crate) fn none_but_after_ends(&self, lan: &Lan) -> Result {
        let mut seen = self.seen();
        seen.retain(|reset| reset.acknowledged.is_some());
        ensure(seen.is_empty(), || list(&seen))?;
        let [.., before] = self.counted;
        let [.., now] = counted(lan)?;
        ensure(now == before, || format!("resets suffered by the clients: {before}, {now}"))
    }

    /// Those that the capture has seen since the last time. One that passes the bridge is seen at each of its ports.
    pub(crate) fn seen(&self) -> Vec<Reset> {
        let mut packet = [0; LONGEST_IP + TCP_PORTS_TO_FLAGS];
        let mut seen = Vec::new();
        while recv(self.capture.as_raw_fd(), &mut packet, MsgFlags::empty()).is_ok() {
            let half = |at: usize| u16::from_be_bytes([packet[at], packet[at + 1]]);
            let word = |at: usize| u32::from(half(at)) << 16 | u32::from(half(at + 2));
            let v4 = |at: usize| IpAddr::from(Ipv4Addr::from(word(at)));
            let v6 = |at: usize| {
                IpAddr::from(Ipv6Addr::from(*packet[at..].first_chunk::<16>().unwrap_or(&[0; 16])))
            };
            let (from, to, tcp) = match packet[0] >> 4 {
                6 => (v6(8), v6(24), IPV6_HEADER as usize),
                _ => (v4(12), v4(16), usize::from(packet[0] & 15) * 4),
            };
            seen.push(Reset {
                from: (from, half(tcp)).into(),
                to: (to, half(tcp + 2)).into(),
                sequence: word(tcp + 4),
                acknowledged: (packet[tcp + 13] & ACK != 0).then_some(word(tcp + 8)),
            });
        }
        seen
    }
}

fn list(seen: &[Reset]) -> String {
    let mut text = format!("{} resets, each seen at several places:", seen.len());
    for reset in seen.iter().take(SHOWN) {
        let _ = write!(text, " {reset},");
    }
    text
}

/// Waits until no connection of a port is about to end on a server's host: the end of it could bring a reset, see
/// [`Resets::none_but_after_ends`].
fn await_ends(lan: &Lan, port: u16) -> Result {
    let of_port = format!("sport = :{port}");
    for host in [&lan.a, &lan.b] {
        wait_for("the ends of earlier connections", ENDS, || {
            let left = host.net(&["ss", "-Htan", "state", "last-ack", "state", "closing", &of_port])?;
            Ok(left.trim().is_empty().then_some(()))
        })?;
    }
    Ok(())
}

/// Instructions that pick out resets of a port, from it or to it.
fn filter(port: u16) -> Vec<u8> {
    // Load a byte or a half word, also at the end of the IP header, whose length is loaded as an index.
    const BYTE: u16 = 0x30;
    const HALF: u16 = 0x28;
    const BYTE_BEHIND: u16 = 0x50;
    const HALF_BEHIND: u16 = 0x48;
    const HEADER: u16 = 0xb1;
    const IF_EQUAL: u16 = 0x15;
    const IF_SET: u16 = 0x45;
    const RETURN: u16 = 0x06;
    // What the kernel knows beside the packet (`SKF_AD_OFF`): its protocol.
    const PROTOCOL: u32 = 0xffff_f000;
    // Code, how many to skip if true and if not, value. The last but one refuses, and what follows it accepts.
    let program: [(u16, u8, u8, u32); 23] = [
        (HALF, 0, 0, PROTOCOL),
        (IF_EQUAL, 0, 8, IPV6),
        (BYTE, 0, 0, 6),
        (IF_EQUAL, 0, 18, TCP),
        (BYTE, 0, 0, IPV6_HEADER + 13),
        (IF_SET, 0, 16, RST),
        (HALF, 0, 0, IPV6_HEADER),
        (IF_EQUAL, 15, 0, port.into()),
        (HALF, 0, 0, IPV6_HEADER + 2),
        (IF_EQUAL, 13, 12, port.into()),
        (IF_EQUAL, 0, 11, IPV4),
        (BYTE, 0, 0, 9),
        (IF_EQUAL, 0, 9, TCP),
        (HALF, 0, 0, 6),
        // No later fragment.
        (IF_SET, 7, 0, 0x1fff),
        (HEADER, 0, 0, 0),
        (BYTE_BEHIND, 0, 0, 13),
        (IF_SET, 0, 4, RST),
        (HALF_BEHIND, 0, 0, 0),
        (IF_EQUAL, 3, 0, port.into()),
        (HALF_BEHIND, 0, 0, 2),
        (IF_EQUAL, 1, 0, port.into()),
        (RETURN, 0, 0, 0),
    ];
    let mut bytes = Vec::new();
    for (code, yes, no, value) in program.into_iter().chain([(RETURN, 0, 0, u32::MAX)]) {
        bytes.extend(code.to_ne_bytes());
        bytes.extend([yes, no]);
        bytes.extend(value.to_ne_bytes());
    }
    bytes
}

/// A counter of TCP in `/proc/net/snmp`.
pub(crate) fn tcp_counter(text: &str, name: &str) -> Result<u64> {
    let mut lines = text.lines().filter(|line| line.starts_with("Tcp:"));
    let (names, values) = (lines.next().ok_or("no TCP")?, lines.next().ok_or("no TCP")?);
    let at = names.split(' ').position(|word| word == name).ok_or("no such counter")?;
    Ok(values.split(' ').nth(at).ok_or("no value")?.parse()?)
}

/// Resets sent by each host, and those that the clients suffered. (A source that lets go of a connection in
/// silence counts it as reset.)
fn counted(lan: &Lan) -> Result<[u64; 4]> {
    let count = |host: &Host, name| tcp_counter(&host.net(&["cat", "/proc/net/snmp"])?, name);
    let clients = &lan.middle;
    Ok([
        count(&lan.a, "OutRsts")?,
        count(&lan.b, "OutRsts")?,
        count(clients, "OutRsts")?,
        count(clients, "EstabResets")?,
    ])
}
