//! Connections that begin while the process moves. The other end is the test's own, so it decides when each segment of
//! a handshake goes.

use std::collections::HashMap;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use migrate::testbed::{Lan, SHARED, wait_for};

use crate::case::{Case, Result, ensure};
use crate::grid::packet::{ACK, Options, PSH, SYN, Segment};
use crate::grid::wire::{Arrival, MOVE_IP, Running, Side};
use crate::workload::Workload;

const PORT: u16 = 7;
const MOVE: Duration = Duration::from_secs(60);
const PATIENCE: Duration = Duration::from_secs(30);
/// A request that is not answered for so long finds the doors closed.
const SILENCE: Duration = Duration::from_millis(10);

pub(crate) fn cases() -> Vec<Case> {
    vec![Case::new("tcp/half_open_when_the_doors_close", half_open)]
}

/// One end of ours.
struct Client<'w> {
    wire: &'w Running,
    inbox: Receiver<Arrival>,
    port: u16,
    /// What it has sent and got, with the SYNs.
    next: u32,
    heard: u32,
}

impl<'w> Client<'w> {
    /// Asks for a connection.
    fn ask(wire: &'w Running, port: u16) -> Result<Self> {
        let client = Self { wire, inbox: wire.open(port), port, next: 1000, heard: 0 };
        client.send(SYN, &[])?;
        Ok(Self { next: 1001, ..client })
    }

    fn send(&self, flags: u8, payload: &[u8]) -> Result {
        let mss = (flags & SYN != 0).then_some(1000);
        let segment = Segment {
            from: self.port,
            to: PORT,
            seq: self.next,
            ack: self.heard,
            flags,
            window: 8000,
            options: Options { mss, ..Options::default() },
            payload: payload.to_vec(),
        };
        // Where the address is not, nobody takes it: on a real wire it would come to one of the two.
        for side in [Side::A, Side::B] {
            self.wire.send(side, &segment)?;
        }
        Ok(())
    }

    /// The answer to the request, if it comes in time.
    fn is_answered(&mut self, within: Duration) -> bool {
        let limit = Instant::now() + within;
        while let Ok(arrival) = self.inbox.recv_timeout(limit.saturating_duration_since(Instant::now())) {
            if arrival.segment.flags == SYN | ACK {
                self.heard = arrival.segment.seq.wrapping_add(1);
                return true;
            }
        }
        false
    }

    /// Sends what it has to say, once, and waits until it is echoed.
    fn is_echoed(&mut self, text: &[u8]) -> Result {
        self.send(ACK | PSH, text)?;
        self.next += u32::try_from(text.len())?;
        let (mut echo, limit) = (Vec::new(), Instant::now() + PATIENCE);
        while echo.len() < text.len() {
            let arrival = self
                .inbox
                .recv_timeout(limit.saturating_duration_since(Instant::now()))
                .map_err(|_| format!("port {}: no echo", self.port))?;
            let segment = arrival.segment;
            if segment.seq == self.heard && !segment.payload.is_empty() {
                self.heard = self.heard.wrapping_add(u32::try_from(segment.payload.len())?);
                echo.extend(segment.payload);
                self.send(ACK, &[])?;
            }
        }
        ensure(echo == text, || format!("port {}: {echo:?}", self.port))
    }
}

/// A client whose handshake is half done when the doors close is a client like any other, and who asks for a
/// connection behind closed doors gets one, without asking twice.
fn half_open(lan: &Lan) -> Result {
    let wire = Running::start(lan, false)?;
    wire.allow(&[Side::A, Side::B]);
    let mut workload = Workload::start(&lan.a, "tcp_echo", &[&PORT.to_string()])?;
    lan.share_identity()?;
    let service = lan.serve(&lan.b)?;
    let mut half = Client::ask(&wire, 2000)?;
    ensure(half.is_answered(PATIENCE), || "no answer to the first request".to_owned())?;

    let hook = format!(
        "[ $MIGRATE_STAGE = pre-freeze ] || exit 0; touch {SHARED}/held; \
         while [ ! -e {SHARED}/go ]; do sleep 0.001; done"
    );
    let options = ["--tcp-established", "--mode", "precopy", "--move-ip", MOVE_IP, "--hook", &hook];
    let job = lan.start_move(&lan.a, &service.address, workload.pid(), &options)?;
    let shared = |name| lan.a.outside(format!("{SHARED}/{name}"));
    wait_for("the hook", MOVE, || Ok(shared("held").exists().then_some(())))?;
    std::fs::write(shared("go"), "")?;
    let mut clients = HashMap::new();
    let mut late = loop {
        let mut client = Client::ask(&wire, 3000 + u16::try_from(clients.len())?)?;
        if !client.is_answered(SILENCE) {
            break client;
        }
        client.send(ACK, &[])?;
        clients.insert(client.port, client);
    };
    half.is_echoed(b"behind closed doors")?;

    lan.finish_move(&lan.a, &job, MOVE)?.expect_moved()?;
    ensure(late.is_answered(PATIENCE), || "the late request was not answered".to_owned())?;
    late.send(ACK, &[])?;
    for client in clients.values_mut().chain([&mut half, &mut late]) {
        client.is_echoed(b"at the destination")?;
    }
    wire.settle();
    let wrong = wire.complaints();
    ensure(wrong.is_empty(), || wrong.join(", "))?;
    println!("    {} connections began before the doors were closed", clients.len());
    workload.check(&lan.b)
}
