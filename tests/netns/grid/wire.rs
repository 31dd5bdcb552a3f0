//! The wire of the grid: a device on each host, whose other end is a packet socket of ours. What the hosts
//! send comes here and nowhere else; what they get, we have made.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use migrate::testbed::{Host, Lan, wait_for};
use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::sockopt::RcvBufForce;
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, recvfrom, sendto, setsockopt, socket,
};

use super::packet::{Place, RST, Segment};
use crate::case::Result;

/// The name of the device on both hosts.
const DEVICE: &str = "wire0";
/// Where we are, to the hosts.
const OUR_MAC: [u8; 6] = [2, 0, 0, 0, 8, 9];
/// The last numbers of addresses: ours, the one that moves, and that of the first host itself.
const OURS: u8 = 9;
const SERVICE: u8 = 1;
const HOST: u8 = 11;
/// The address that moves, in the form that `--move-ip` takes.
pub(crate) const MOVE_IP: &str = "10.88.0.1/24@wire0";
const MOVE_IPV6: &str = "fd00:88::1/64@wire0";
/// How long the thread waits for a frame before it looks whether it should go on.
const TURN_MS: u16 = 5;
/// How long a host may take to have room for a frame.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long they may talk without a pause.
const SILENCE: Duration = Duration::from_secs(30);

/// One of the two hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    A,
    B,
}

impl Side {
    pub(crate) fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    fn mac(self) -> [u8; 6] {
        [2, 0, 0, 0, 8, 1 + self as u8]
    }
}

/// What carries the segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Version {
    V4,
    V6,
}

impl Version {
    fn address(self, last: u8) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::new(10, 88, 0, last).into(),
            Self::V6 => Ipv6Addr::new(0xfd00, 0x88, 0, 0, 0, 0, 0, last.into()).into(),
        }
    }

    /// The address that moves, in the form that `--move-ip` takes.
    pub(crate) fn move_ip(self) -> &'static str {
        match self {
            Self::V4 => MOVE_IP,
            Self::V6 => MOVE_IPV6,
        }
    }

    /// Gives a host an address, to be used at once.
    fn give(self, host: &Host, last: u8) -> Result {
        let (bits, rest) = if self == Self::V4 { (24, &[][..]) } else { (64, &["nodad"][..]) };
        let address = format!("{}/{bits}", self.address(last));
        host.net(&[&["ip", "address", "add", &address, "dev", DEVICE], rest].concat())?;
        Ok(())
    }
}

/// A segment that has come.
#[derive(Debug, Clone)]
pub(crate) struct Arrival {
    pub(crate) side: Side,
    pub(crate) at: Instant,
    pub(crate) segment: Segment,
}

/// The wire, to be shared by all that have an end of a connection.
pub(crate) struct Wire {
    version: Version,
    socket: OwnedFd,
    ends: [LinkAddr; 2],
    inboxes: Mutex<HashMap<u16, Sender<Arrival>>>,
    may_speak: AtomicU8,
    wrong: Mutex<Vec<String>>,
    asked: AtomicU64,
    settled: AtomicU64,
    stop: AtomicBool,
}

/// The wire and its thread, which ends when this is dropped.
pub(crate) struct Running {
    wire: Arc<Wire>,
    thread: Option<JoinHandle<()>>,
}

impl Deref for Running {
    type Target = Wire;

    fn deref(&self) -> &Wire {
        &self.wire
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.wire.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Running {
    /// Plugs both hosts in, for IPv4; the service address is on `a` or `on_both`.
    pub(crate) fn start(lan: &Lan, on_both: bool) -> Result<Self> {
        Self::with(lan, Version::V4, on_both)
    }

    /// The same for either version.
    pub(crate) fn with(lan: &Lan, version: Version, on_both: bool) -> Result<Self> {
        let inits = [lan.a.init(), lan.b.init()];
        let (ready, made) = channel();
        let thread = std::thread::Builder::new().name("wire".to_owned()).spawn(move || {
            match Wire::new(version, inits) {
                Ok(wire) => {
                    let wire = Arc::new(wire);
                    let _ = ready.send(Ok(Arc::clone(&wire)));
                    wire.carry();
                }
                Err(error) => {
                    let _ = ready.send(Err(error.to_string()));
                }
            };
        })?;
        let wire = made.recv()??;
        let running = Self { wire, thread: Some(thread) };
        for (side, host) in [(Side::A, &lan.a), (Side::B, &lan.b)] {
            set_up(version, side, host)?;
        }
        for host in if on_both { vec![&lan.a, &lan.b] } else { vec![&lan.a] } {
            version.give(host, SERVICE)?;
        }
        Ok(running)
    }
}

fn set_up(version: Version, side: Side, host: &Host) -> Result {
    let mac = |bytes: [u8; 6]| bytes.map(|b| format!("{b:02x}")).join(":");
    // One segment a frame, however much the stack would like to hand over at once.
    host.net(&["ip", "link", "set", DEVICE, "address", &mac(side.mac()), "gso_max_segs", "1", "up"])?;
    version.give(host, HOST + side as u8)?;
    let ours = version.address(OURS).to_string();
    let neighbour = ["lladdr", &mac(OUR_MAC), "dev", DEVICE, "nud", "permanent"];
    host.net(&[&["ip", "neighbour", "replace", &ours], &neighbour[..]].concat())?;
    // Before the move no timer of a host's is to come into it; after it, a new connection has another one.
    host.net(&["ip", "route", "add", &ours, "dev", DEVICE, "rto_min", "20s"])?;
    // What one connection has learned must not change the next, and each segment is to be answered.
    for (name, value) in [("tcp_no_metrics_save", 1), ("tcp_invalid_ratelimit", 0)] {
        host.net(&["sh", "-c", &format!("echo {value} > /proc/sys/net/ipv4/{name}")])?;
    }
    Ok(())
}

impl Wire {
    /// To be called in the thread that will carry: it gets a network of its own.
    fn new(version: Version, inits: [i32; 2]) -> Result<Self> {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)?;
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
        mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::empty(), none)?;
        for (name, init) in ["wire-a", "wire-b"].into_iter().zip(inits) {
            ip(&format!("link add name {name} type veth peer name {DEVICE}"))?;
            for end in [name, DEVICE] {
                // All in one queue of one processor: several would put segments out of order.
                std::fs::write(format!("/sys/class/net/{end}/queues/rx-0/rps_cpus"), "1")?;
            }
            ip(&format!("link set {DEVICE} netns {init}"))?;
            ip(&format!("link set {name} up"))?;
        }
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll)?;
        setsockopt(&socket, RcvBufForce, &(64 << 20))?;
        let end = |name: &str| {
            getifaddrs()?
                .filter(|interface| interface.interface_name == name)
                .find_map(|interface| interface.address?.as_link_addr().copied())
                .ok_or(Errno::ENODEV)
        };
        Ok(Self {
            version,
            socket,
            ends: [end("wire-a")?, end("wire-b")?],
            inboxes: Mutex::default(),
            may_speak: AtomicU8::new(0),
            wrong: Mutex::default(),
            asked: AtomicU64::new(0),
            settled: AtomicU64::new(0),
            stop: AtomicBool::new(false),
        })
    }

    /// Brings what comes to those whom it is for, until told to stop.
    fn carry(&self) {
        let mut frame = vec![0; 1 << 16];
        while !self.stop.load(Ordering::Relaxed) {
            let asked = self.asked.load(Ordering::SeqCst);
            let mut ready = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
            if poll(&mut ready, PollTimeout::from(TURN_MS)) == Ok(0) {
                // All that had come before somebody asked has been brought.
                self.settled.store(asked, Ordering::SeqCst);
                continue;
            }
            match recvfrom::<LinkAddr>(self.socket.as_raw_fd(), &mut frame) {
                Ok((length, Some(from))) => self.bring(&frame[..length], from.ifindex()),
                Ok(_) | Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(errno) => self.complain(format!("the wire is broken: {errno}")),
            }
        }
    }

    fn bring(&self, frame: &[u8], index: usize) {
        let side = if index == self.ends[0].ifindex() { Side::A } else { Side::B };
        let Some(segment) = Segment::parse(frame) else { return };
        let named = || format!("{side:?} {}->{} {:#x}", segment.from, segment.to, segment.flags);
        if segment.has(RST) {
            self.complain(format!("a reset: {}", named()));
        }
        if self.may_speak.load(Ordering::SeqCst) & bit(side) == 0 {
            self.complain(format!("not its turn to speak: {} {} bytes", named(), segment.payload.len()));
        }
        let inboxes = self.inboxes.lock().unwrap();
        match inboxes.get(&segment.to) {
            // Whoever has ended has no more to look for than the two above.
            Some(inbox) => drop(inbox.send(Arrival { side, at: Instant::now(), segment })),
            None => self.complain(format!("for nobody: {}", named())),
        }
    }

    fn complain(&self, what: String) {
        let mut wrong = self.wrong.lock().unwrap();
        if wrong.len() < 50 {
            wrong.push(what);
        }
    }

    /// What was wrong with what the hosts have sent, so far.
    pub(crate) fn complaints(&self) -> Vec<String> {
        std::mem::take(&mut self.wrong.lock().unwrap())
    }

    /// What comes for this port of ours from now on.
    pub(crate) fn open(&self, port: u16) -> Receiver<Arrival> {
        let (sender, inbox) = channel();
        self.inboxes.lock().unwrap().insert(port, sender);
        inbox
    }

    /// Gives a host a segment.
    pub(crate) fn send(&self, to: Side, segment: &Segment) -> std::result::Result<(), String> {
        let ours = Place { mac: OUR_MAC, ip: self.version.address(OURS) };
        let frame = segment.frame(ours, Place { mac: to.mac(), ip: self.version.address(SERVICE) });
        let end = &self.ends[to as usize];
        let limit = Instant::now() + PATIENCE;
        loop {
            match sendto(self.socket.as_raw_fd(), &frame, end, MsgFlags::empty()) {
                Ok(_) => return Ok(()),
                // On a busy machine the host has not taken yet what it was given before.
                Err(Errno::EAGAIN) if Instant::now() < limit => {
                    let _ = poll(&mut [PollFd::new(self.socket.as_fd(), PollFlags::POLLOUT)], TURN_MS);
                }
                Err(errno) => return Err(format!("sending a frame: {errno}")),
            }
        }
    }

    /// Only these hosts may send anything from now on. To be called when what they have sent is here.
    pub(crate) fn allow(&self, sides: &[Side]) {
        self.may_speak.store(sides.iter().fold(0, |all, side| all | bit(*side)), Ordering::SeqCst);
    }

    /// Waits until all that the hosts have sent so far has been brought.
    pub(crate) fn settle(&self) -> Result {
        let ticket = self.asked.fetch_add(1, Ordering::SeqCst) + 1;
        wait_for("the hosts falling silent", SILENCE, || {
            Ok((self.settled.load(Ordering::SeqCst) >= ticket).then_some(()))
        })?;
        Ok(())
    }
}

fn bit(side: Side) -> u8 {
    1 << side as u8
}

fn ip(words: &str) -> Result {
    let output = Command::new("ip").args(words.split(' ')).output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("ip {words}: {}", String::from_utf8_lossy(&output.stderr)).into())
}
