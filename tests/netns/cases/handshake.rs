//! Connections that begin while the process moves. The other end is the test's own, so it decides when each segment of
//! a handshake goes.

use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use migrate::testbed::Lan;

use super::hooks::Hold;
use crate::case::{Case, Result, ensure};
use crate::grid::packet::{ACK, Options, PSH, SYN, Segment};
use crate::grid::wire::{Arrival, MOVE_IP, Running, Side};
use crate::workload::Workload;

const PORT: u16 = 7;
const MOVE: Duration = Duration::from_secs(60);
const PATIENCE: Duration = Duration::from_secs(30);
/// A request that is not answered for so long finds the doors closed,
const SILENCE: Duration = Duration::from_millis(10);
/// if it happens to so many. A slow machine may be silent as well, or lose a request: but not most of them.
const LATE: usize = 5;

/// More segments than are kept of all that comes while a process moves.
const MANY: usize = 2500;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("tcp/half_open_when_the_doors_close", half_open),
        Case::new("tcp/not_accepted_and_talking", not_accepted),
        Case::new("tcp/handshakes_slower_than_the_move", |lan| slower(lan, true)),
        Case::new("tcp/handshakes_and_a_move_that_fails", |lan| slower(lan, false)),
    ]
}

/// One end of ours.
struct Client<'w> {
    wire: &'w Running,
    inbox: Receiver<Arrival>,
    port: u16,
    /// What it has sent and got, with the SYNs.
    next: u32,
    heard: u32,
    /// The server's answer to its request: where it came from, and its options.
    answer: Option<(Side, Options)>,
    /// It asks for all options that there are; the server's clock, as heard last.
    with_options: bool,
    clock: u32,
}

impl<'w> Client<'w> {
    /// Asks for a connection.
    fn ask(wire: &'w Running, port: u16) -> Result<Self> {
        Self::ask_with(wire, port, false)
    }

    fn ask_with(wire: &'w Running, port: u16, with_options: bool) -> Result<Self> {
        let inbox = wire.open(port);
        let client = Self { wire, inbox, port, next: 1000, heard: 0, answer: None, with_options, clock: 0 };
        client.send(SYN, &[])?;
        Ok(Self { next: 1001, ..client })
    }

    /// Asks for the same connection, or from the same port for another one.
    fn ask_again(&mut self, first: u32) -> Result {
        self.next = first;
        self.send(SYN, &[])?;
        self.next = first.wrapping_add(1);
        Ok(())
    }

    fn send(&self, flags: u8, payload: &[u8]) -> Result {
        let asks = flags & SYN != 0;
        let segment = Segment {
            from: self.port,
            to: PORT,
            seq: self.next,
            ack: if asks { 0 } else { self.heard },
            flags,
            window: 8000,
            options: Options {
                mss: asks.then_some(1000),
                scale: (asks && self.with_options).then_some(4),
                selective: asks && self.with_options,
                stamps: self.with_options.then_some((7000, if asks { 0 } else { self.clock })),
                ..Options::default()
            },
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
            if arrival.segment.flags == SYN | ACK && arrival.segment.ack == self.next {
                self.heard = arrival.segment.seq.wrapping_add(1);
                self.clock = arrival.segment.options.stamps.map_or(0, |(clock, _)| clock);
                self.answer = Some((arrival.side, arrival.segment.options));
                return true;
            }
        }
        false
    }

    /// Sends what it has to say, once, and waits until it is echoed.
    fn is_echoed(&mut self, text: &[u8]) -> Result {
        self.say(text)?;
        self.hears(text)
    }

    fn say(&mut self, text: &[u8]) -> Result {
        self.send(ACK | PSH, text)?;
        self.next += u32::try_from(text.len())?;
        Ok(())
    }

    fn hears(&mut self, text: &[u8]) -> Result {
        let (mut echo, limit) = (Vec::new(), Instant::now() + PATIENCE);
        while echo.len() < text.len() {
            let arrival = self
                .inbox
                .recv_timeout(limit.saturating_duration_since(Instant::now()))
                .map_err(|_| format!("port {}: no echo", self.port))?;
            let segment = arrival.segment;
            // What it says goes on by the clock of the answer.
            if let Some((clock, echoed)) = segment.options.stamps {
                let back = self.clock.wrapping_sub(clock).cast_signed() > 0;
                ensure(!back && echoed == 7000, || format!("port {}: {clock} {echoed}", self.port))?;
                self.clock = clock;
            }
            if segment.seq == self.heard && !segment.payload.is_empty() {
                self.heard = self.heard.wrapping_add(u32::try_from(segment.payload.len())?);
                echo.extend(segment.payload);
                self.send(ACK, &[])?;
            }
        }
        ensure(echo == text, || format!("port {}: {echo:?}", self.port))
    }
}

/// Those of `late` that have got their answer go on at once, as any client does.
fn let_in<'w>(late: &mut Vec<Client<'w>>, clients: &mut Vec<Client<'w>>) -> Result {
    for mut client in std::mem::take(late) {
        if client.is_answered(Duration::from_millis(1)) {
            client.send(ACK, &[])?;
            clients.push(client);
        } else {
            late.push(client);
        }
    }
    Ok(())
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

    let hold = Hold::at(lan, "pre-freeze", 0);
    let options = ["--tcp-established", "--mode", "precopy", "--move-ip", MOVE_IP, "--hook", &hold.command];
    let job = lan.start_move(&lan.a, &service.address, workload.pid(), &options)?;
    hold.until_held(&job)?;
    hold.let_go()?;
    let (mut clients, mut late) = (Vec::new(), Vec::new());
    for port in 3000.. {
        let mut client = Client::ask(&wire, port)?;
        if client.is_answered(SILENCE) {
            // The next one asks when this one is accepted: the server's queue must not overflow.
            client.is_echoed(b"through the doors")?;
            clients.push(client);
        } else {
            late.push(client);
        }
        if late.len() == LATE {
            break;
        }
    }
    half.is_echoed(b"behind closed doors")?;

    let limit = Instant::now() + MOVE;
    while !late.is_empty() && lan.a.exit_of(job.pid).is_none() && Instant::now() < limit {
        let_in(&mut late, &mut clients)?;
    }
    lan.finish_move(&lan.a, &job, MOVE)?.expect_moved()?;
    let limit = Instant::now() + PATIENCE;
    while late.len() > LATE / 2 && Instant::now() < limit {
        let_in(&mut late, &mut clients)?;
    }
    ensure(late.len() <= LATE / 2, || format!("{} of {LATE} late requests were not answered", late.len()))?;
    for client in clients.iter_mut().chain([&mut half]) {
        client.is_echoed(b"at the destination")?;
    }
    wire.settle()?;
    let wrong = wire.complaints();
    ensure(wrong.is_empty(), || wrong.join(", "))?;
    println!("    {} connections began before the doors were closed", clients.len());
    workload.check(&lan.b)
}

/// Clients that nobody has accepted go on to talk while the process moves, and say nothing twice. Nobody resets them.
fn not_accepted(lan: &Lan) -> Result {
    let wire = Running::start(lan, false)?;
    wire.allow(&[Side::A, Side::B]);
    let mut workload = Workload::start(&lan.a, "tcp_echo", &[&PORT.to_string(), "16"])?;
    lan.share_identity()?;
    let service = lan.serve(&lan.b)?;
    let mut clients = Vec::new();
    for port in 2000..2008 {
        let mut client = Client::ask(&wire, port)?;
        ensure(client.is_answered(PATIENCE), || format!("no answer to request {port}"))?;
        client.send(ACK, &[])?;
        client.say(b"before, ")?;
        clients.push(client);
    }
    let hold = Hold::at(lan, "network-lock", 0);
    let options = ["--tcp-established", "--move-ip", MOVE_IP, "--hook", &hold.command];
    let job = lan.start_move(&lan.a, &service.address, workload.pid(), &options)?;
    hold.until_held(&job)?;
    for client in &mut clients {
        client.say(b"meanwhile, ")?;
    }
    hold.let_go()?;
    lan.finish_move(&lan.a, &job, MOVE)?.expect_moved()?;
    lan.b.signal(workload.pid(), libc::SIGUSR2)?;
    for client in &mut clients {
        client.hears(b"before, meanwhile, ")?;
        client.is_echoed(b"afterwards")?;
    }
    wire.settle()?;
    let wrong = wire.complaints();
    ensure(wrong.is_empty(), || wrong.join(", "))?;
    workload.check(&lan.b)
}

/// Peers whose last word in a handshake comes when the process is elsewhere, or when the move has failed; one that has not
/// heard the answer, one that nobody has heard, one that has forgotten its request, one whose word comes in the freeze.
fn slower(lan: &Lan, moves: bool) -> Result {
    let wire = Running::start(lan, false)?;
    wire.allow(&[Side::A, Side::B]);
    let mut workload = Workload::start(&lan.a, "tcp_echo", &[&PORT.to_string()])?;
    lan.share_identity()?;
    let service = lan.serve(&lan.b)?;
    let mut clients = Vec::new();
    for (port, with_options) in (2000..).zip([false, false, true, true, false, true]) {
        let mut client = Client::ask_with(&wire, port, with_options)?;
        ensure(client.is_answered(PATIENCE), || format!("no answer to request {port}"))?;
        clients.push(client);
    }
    let asked: Vec<_> = clients.iter().map(|client| (client.heard, client.answer.clone())).collect();
    let hold = Hold::at(lan, "network-lock", u8::from(!moves));
    let options = ["--tcp-established", "--move-ip", MOVE_IP, "--hook", &hold.command];
    let job = lan.start_move(&lan.a, &service.address, workload.pid(), &options)?;
    hold.until_held(&job)?;
    let mut in_freeze = clients.pop().ok_or("no clients")?;
    in_freeze.send(ACK, &[])?;
    in_freeze.say(b"in the freeze")?;
    hold.let_go()?;
    let outcome = lan.finish_move(&lan.a, &job, MOVE)?;
    ensure(outcome.moved() == moves, || outcome.stderr.clone())?;
    let (side, host) = if moves { (Side::B, &lan.b) } else { (Side::A, &lan.a) };
    in_freeze.hears(b"in the freeze")?;
    let [late, at_once, unheard, silent, forgetful] = clients.as_mut_slice() else {
        return Err("other clients".into());
    };
    late.send(ACK, &[])?;
    late.is_echoed(b"a moment later")?;
    // What a connection says that is whole does not keep the others from being heard.
    for _ in 0..MANY {
        late.send(ACK, &[])?;
    }
    at_once.is_echoed(b"with its first words")?;
    // The answer is repeated to who asks again, and to who is silent.
    unheard.ask_again(1000)?;
    for (client, (first, answer)) in [unheard, silent].into_iter().zip(&asked[2..]) {
        // What the kernel at the source has repeated may be there still.
        while client.answer.as_ref().is_none_or(|(from, _)| *from != side) || client.answer == *answer {
            ensure(client.is_answered(PATIENCE), || format!("no second answer to {}", client.port))?;
            if !moves {
                break;
            }
        }
        let options = |answer: &Option<(Side, Options)>| {
            let plain =
                |o: &Options| Options { stamps: o.stamps.map(|(_, echoed)| (0, echoed)), ..o.clone() };
            answer.as_ref().map(|(_, o)| plain(o))
        };
        ensure(client.heard == *first && options(&client.answer) == options(answer), || {
            format!("{:?} is not {answer:?}, or {} not {first}", client.answer, client.heard)
        })?;
        client.send(ACK, &[])?;
        client.is_echoed(b"heard at last")?;
    }
    if moves {
        // The answer to the first request tells it nothing, and it asks once more.
        for _ in 0..2 {
            forgetful.ask_again(900_000)?;
        }
        ensure(forgetful.is_answered(PATIENCE), || "no answer to another request".to_owned())?;
        forgetful.send(ACK, &[])?;
    }
    forgetful.is_echoed(b"another one")?;
    for client in clients.iter_mut().chain([&mut in_freeze]) {
        client.is_echoed(b"and all go on")?;
    }
    wire.settle()?;
    let wrong = wire.complaints();
    ensure(wrong.is_empty(), || wrong.join(", "))?;
    workload.check(host)
}
