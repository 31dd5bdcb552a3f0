//! A server writes much, closes, and is moved with its address, while its kernel still sends to a client that takes its
//! time. The client gets every byte and the end, or the move is refused by its name.

use std::collections::VecDeque;
use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use migrate::testbed::{Lan, Outcome, STATE, wait_for};

use super::refusals::says;
use super::tcp::{OPTIONS, PORT};
use crate::case::{Case, Result, ensure, fail};
use crate::grid::packet::{ACK, FIN, Options, RST, SYN, Segment};
use crate::grid::wire::{Arrival, MOVE_IP, Running, Side};
use crate::workload::Workload;

const MOVE: Duration = Duration::from_secs(60);
const PATIENCE: Duration = Duration::from_secs(30);
const BYTES: usize = 1 << 20;
/// What the command says while it waits.
const WAITS: &str = "waiting for the peers";

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("orphans/a_client_that_reads", reads),
        Case::new("orphans/a_client_that_does_not_read", does_not_read),
        Case::new("orphans/a_client_that_is_gone", gone),
        Case::new("orphans/a_client_far_away", far_away),
        Case::new("orphans/clients_far_away_all_the_time", far_away_all_the_time),
    ]
}

/// A server, and a client of it that has read nothing; `meanwhile` happens before the server takes note of it. Then
/// it has closed.
fn orphan(lan: &Lan, meanwhile: impl FnOnce() -> Result) -> Result<(Workload, TcpStream)> {
    let workload = Workload::start(&lan.a, "tcp_farewell", &[&PORT.to_string(), &BYTES.to_string()])?;
    lan.a.signal(workload.pid(), libc::SIGSTOP)?;
    let address = SocketAddr::new(Lan::SERVICE.parse()?, PORT);
    let connect = move || TcpStream::connect(address);
    let client = lan.client("connect", connect)?.join().map_err(|_| "the client panicked")???;
    client.set_read_timeout(Some(PATIENCE))?;
    meanwhile()?;
    lan.a.signal(workload.pid(), libc::SIGCONT)?;
    lan.a.wait_line(&workload.job, "closed", 0, PATIENCE)?;
    Ok((workload, client))
}

/// Reads to the end: it must be all.
fn read_all(mut client: &TcpStream) -> Result {
    let mut got = Vec::new();
    if let Err(error) = client.read_to_end(&mut got) {
        return fail(format!("after {} of {BYTES} bytes: {error}", got.len()));
    }
    is_all(&got, BYTES)
}

fn is_all(got: &[u8], bytes: usize) -> Result {
    let right = got.iter().enumerate().all(|(at, byte)| usize::from(*byte) == at % 251);
    ensure(right && got.len() == bytes, || format!("{} of {bytes} bytes, right: {right}", got.len()))
}

/// A client whose segments take a round trip to arrive.
struct Far<'w> {
    wire: &'w Running,
    inbox: Receiver<Arrival>,
    port: u16,
    round_trip: Duration,
    /// What it has sent and heard, with SYN and FIN.
    next: u32,
    heard: u32,
    /// On their way.
    sent: VecDeque<(Instant, Segment)>,
    got: Vec<u8>,
    ended: bool,
}

impl<'w> Far<'w> {
    /// Connects.
    fn connect(wire: &'w Running, port: u16, round_trip: Duration) -> Result<Self> {
        let mut client = Self {
            wire,
            inbox: wire.open(port),
            port,
            round_trip,
            next: 1000,
            heard: 0,
            sent: VecDeque::new(),
            got: Vec::new(),
            ended: false,
        };
        client.say(SYN);
        client.get_on(|client| client.heard != 0 && client.sent.is_empty())?;
        Ok(client)
    }

    fn say(&mut self, flags: u8) {
        let mss = (flags & SYN != 0).then_some(1000);
        let segment = Segment {
            from: self.port,
            to: PORT,
            seq: self.next,
            ack: self.heard,
            flags,
            window: u16::MAX,
            options: Options { mss, ..Options::default() },
            payload: Vec::new(),
        };
        self.next += u32::from(flags & (SYN | FIN) != 0);
        self.sent.push_back((Instant::now() + self.round_trip, segment));
    }

    /// Takes what comes, and acknowledges it, until this holds. A reset is an error before all is said.
    fn get_on(&mut self, holds: impl Fn(&Self) -> bool) -> Result {
        let limit = Instant::now() + PATIENCE;
        while !holds(self) {
            let next = self.sent.front().map_or(limit, |(due, _)| *due);
            match self.inbox.recv_timeout(next.saturating_duration_since(Instant::now())) {
                Ok(arrival) => self.hear(&arrival.segment)?,
                Err(_) if Instant::now() >= limit => {
                    return fail(format!("nothing after {}", self.got.len()));
                }
                Err(_) => {}
            }
            let now = Instant::now();
            while self.sent.front().is_some_and(|(due, _)| *due <= now) {
                let Some((_, segment)) = self.sent.pop_front() else { break };
                // Where the address is not, nobody takes it: on a real wire it would come to one of the two.
                for side in [Side::A, Side::B] {
                    self.wire.send(side, &segment)?;
                }
            }
        }
        Ok(())
    }

    fn hear(&mut self, segment: &Segment) -> Result {
        ensure(self.ended || !segment.has(RST), || format!("a reset after {} bytes", self.got.len()))?;
        if segment.has(SYN) {
            self.heard = segment.seq.wrapping_add(1);
            self.say(ACK);
        } else if segment.seq == self.heard && !self.ended {
            self.got.extend(&segment.payload);
            self.ended = segment.has(FIN);
            self.heard =
                self.heard.wrapping_add(u32::try_from(segment.payload.len())? + u32::from(self.ended));
            if self.ended || !segment.payload.is_empty() {
                // It has nothing to say, and closes when it has heard everything.
                self.say(if self.ended { ACK | FIN } else { ACK });
            }
        }
        Ok(())
    }

    /// Until the end, which must be the end of it all.
    fn hear_all(&mut self, bytes: usize) -> Result {
        let heard = self.get_on(|client| client.ended && client.sent.is_empty());
        heard
            .and_then(|()| is_all(&self.got, bytes))
            .map_err(|error| format!("port {}: {error}", self.port).into())
    }
}

fn notes(outcome: &Outcome) -> String {
    outcome.report["notes"].to_string()
}

/// The client reads while the command waits for it.
fn reads(lan: &Lan) -> Result {
    let (mut workload, client) = orphan(lan, || Ok(()))?;
    lan.share_identity()?;
    let service = lan.serve(&lan.b)?;
    let options = [&OPTIONS[..], &["-v"]].concat();
    let job = lan.start_move(&lan.a, &service.address, workload.pid(), &options)?;
    let waited = wait_for("the command waiting", MOVE, || {
        Ok((lan.a.stderr(&job).contains(WAITS) || lan.a.exit_of(job.pid).is_some()).then_some(()))
    });
    let read = read_all(&client);
    let outcome = lan.finish_move(&lan.a, &job, MOVE)?;
    read.map_err(|error| format!("{error}; {} {}", outcome.report, outcome.stderr))?;
    waited?;
    ensure(outcome.stderr.contains(WAITS), || format!("it did not wait: {}", outcome.stderr))?;
    let outcome = outcome.expect_moved()?;
    ensure(!notes(&outcome).contains("closed"), || notes(&outcome))?;
    workload.check_going_on(&lan.b)
}

/// The client reads nothing before the command has ended.
fn does_not_read(lan: &Lan) -> Result {
    let (mut workload, client) = orphan(lan, || Ok(()))?;
    let name = client.local_addr()?.to_string();
    lan.share_identity()?;
    let service = lan.serve(&lan.b)?;
    let pid = workload.pid().to_string();
    let words = ["check", &pid, "--to", &service.address, "--state-dir", STATE, "--json"];
    let checked = lan.run(&lan.a, &[&words[..], &OPTIONS].concat(), PATIENCE)?;
    ensure(notes(&checked).contains(&name), || format!("{} {}", checked.report, checked.stderr))?;
    let outcome = lan.move_to(&lan.a, &service, workload.pid(), &OPTIONS, MOVE)?;
    read_all(&client).map_err(|error| format!("{error}; {} {}", outcome.report, outcome.stderr))?;
    says(&outcome, &[&name, "closed"])?;
    ensure(lan.has_service(&lan.a)?, || "the address has left".to_owned())?;
    workload.check_going_on(&lan.a)?;
    // Now nothing is in the way.
    lan.move_to(&lan.a, &service, workload.pid(), &OPTIONS, MOVE)?.expect_moved()?;
    workload.check_going_on(&lan.b)
}

/// The client is cut off for ever: that is no reason to stay, but it is told.
fn gone(lan: &Lan) -> Result {
    let leave = || {
        let address = format!("{}/24", Lan::CLIENT);
        Ok(lan.middle.net(&["ip", "address", "del", &address, "dev", "br0"]).map(drop)?)
    };
    let (mut workload, client) = orphan(lan, leave)?;
    let name = client.local_addr()?.to_string();
    lan.share_identity()?;
    let service = lan.serve(&lan.b)?;
    let outcome = lan.move_to(&lan.a, &service, workload.pid(), &OPTIONS, MOVE)?.expect_moved()?;
    ensure(notes(&outcome).contains(&name) && notes(&outcome).contains("lost"), || notes(&outcome))?;
    workload.check_going_on(&lan.b)
}

/// What it was told takes many round trips to arrive. The command waits for that.
fn far_away(lan: &Lan) -> Result {
    let wire = Running::start(lan, false)?;
    wire.allow(&[Side::A, Side::B]);
    let mut workload = Workload::start(&lan.a, "tcp_farewell", &[&PORT.to_string(), &BYTES.to_string()])?;
    lan.a.signal(workload.pid(), libc::SIGSTOP)?;
    let mut client = Far::connect(&wire, 2000, Duration::from_millis(100))?;
    lan.share_identity()?;
    let service = lan.serve(&lan.b)?;
    lan.a.signal(workload.pid(), libc::SIGCONT)?;
    lan.a.wait_line(&workload.job, "closed", 0, PATIENCE)?;
    let options = ["--tcp-established", "--move-ip", MOVE_IP, "-v"];
    let job = lan.start_move(&lan.a, &service.address, workload.pid(), &options)?;
    let heard = client.hear_all(BYTES);
    let outcome = lan.finish_move(&lan.a, &job, MOVE)?;
    heard.map_err(|error| format!("{error}; {} {}", outcome.report, outcome.stderr))?;
    ensure(outcome.stderr.contains(WAITS), || format!("it did not wait: {}", outcome.stderr))?;
    let outcome = outcome.expect_moved()?;
    ensure(!notes(&outcome).contains("closed"), || notes(&outcome))?;
    workload.check_going_on(&lan.b)?;
    wire.settle()?;
    let wrong = wire.complaints();
    ensure(wrong.is_empty(), || wrong.join(", "))
}

/// A server that closes connections all the time: at every moment, that of the freeze as well, some of its clients have
/// a round trip to go until they have acknowledged everything.
fn far_away_all_the_time(lan: &Lan) -> Result {
    const CLIENTS: u16 = 150;
    /// Many of these are a round trip, so that a busy machine does not make it a few.
    const PAUSE_MS: &str = "30";
    const ROUND_TRIP: Duration = Duration::from_millis(400);
    /// The kernel sends as much at once.
    const BYTES: usize = 8000;
    let wire = Running::start(lan, false)?;
    let words = [&PORT.to_string(), &BYTES.to_string(), PAUSE_MS];
    let mut workload = Workload::start(&lan.a, "tcp_farewell", &words)?;
    lan.a.signal(workload.pid(), libc::SIGSTOP)?;
    lan.share_identity()?;
    let service = lan.serve(&lan.b)?;
    std::thread::scope(|scope| {
        let ports = 2000..2000 + CLIENTS;
        let connect = |port| Far::connect(&wire, port, ROUND_TRIP).map_err(|error| error.to_string());
        let connecting: Vec<_> = ports.map(|port| scope.spawn(move || connect(port))).collect();
        let clients: Vec<_> = connecting.into_iter().map(|client| client.join()).collect();
        lan.a.signal(workload.pid(), libc::SIGCONT)?;
        let mut hearing = Vec::new();
        for client in clients {
            let mut client = client.map_err(|_| "a client panicked")??;
            let hear = move || client.hear_all(BYTES).map_err(|error| error.to_string());
            hearing.push(scope.spawn(hear));
        }
        let options = ["--tcp-established", "--move-ip", MOVE_IP];
        let outcome = lan.move_to(&lan.a, &service, workload.pid(), &options, MOVE)?;
        let heard: Vec<_> = hearing.into_iter().map(|client| client.join()).collect();
        for client in heard {
            client
                .map_err(|_| "a client panicked")?
                .map_err(|error| format!("{error}; {} {}", outcome.report, outcome.stderr))?;
        }
        let outcome = outcome.expect_moved()?;
        ensure(notes(&outcome).contains("was closed"), || {
            format!("nobody was on the way: {}", outcome.report)
        })?;
        workload.check_going_on(&lan.b)
    })
}
