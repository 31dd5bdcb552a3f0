//! Live connections: plain clients that never reconnect notice nothing of a move but a pause. Each byte of
//! each stream is known, and nobody may have sent a reset.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, setrlimit};

use migrate::testbed::{Host, Lan, Outcome, SHARED, Service, Spawn, redis, wait_for};

use super::crash::{SETTLE, settled};
use super::limbo::at_state;
use crate::case::{Case, Choices, Need, Result, ensure};
use crate::resets::{Resets, tcp_counter};
use crate::workload::{Workload, build};

pub(super) const PORT: u16 = 7;
const DESCRIPTORS: u64 = 8192;
const MOVE: Duration = Duration::from_secs(120);
/// No client waits longer than this for anything: it has lost its connection then.
const PATIENCE: Duration = Duration::from_secs(30);
/// Connections of each kind: streams, one request after the other, and such that wait.
#[derive(Clone, Copy)]
pub(super) struct Crowd {
    pub(super) streams: usize,
    pub(super) calls: usize,
    pub(super) idle: usize,
}
const FEW: Crowd = Crowd { streams: 4, calls: 2, idle: 100 };
const MANY: Crowd = Crowd { streams: 0, calls: 200, idle: 2000 };
/// What a stream has sent and not got back, at most.
const UNDER_WAY: u64 = 4 << 20;
/// Blows of the kill cases.
const INSTANTS: usize = 12;
const INSTANTS_READING: usize = 6;
/// How long the connections take to be read, from the record on.
const READING_US: u64 = 20_000;
pub(super) const OPTIONS: [&str; 3] = ["--tcp-established", "--move-ip", Lan::MOVE_IP];

pub(crate) fn cases() -> Vec<Case> {
    let modes = ["precopy", "postcopy", "auto"]
        .map(|mode| Case::new(format!("tcp/echo_{mode}"), move |lan| echo(lan, 1, mode, FEW)));
    let mut cases: Vec<Case> = modes.into();
    cases.push(Case::new("tcp/echo_30_times", |lan| echo(lan, 30, "auto", FEW)));
    cases.push(Case::new("tcp/echo_2200_connections", |lan| echo(lan, 2, "auto", MANY)));
    cases.push(Case::new("tcp/source_killed", |lan| source_killed(lan, Blow::Anywhere)));
    cases.push(Case::new("tcp/source_killed_reading", |lan| source_killed(lan, Blow::Reading)));
    cases.push(Case::new("tcp/address_on_both_hosts", address_on_both_hosts));
    cases.push(
        Case::new("tcp/redis_benchmark", redis_benchmark)
            .needs(Need::Program("redis-server"))
            .needs(Need::Program("redis-benchmark")),
    );
    cases
}

fn echo(lan: &Lan, moves: usize, mode: &str, crowd: Crowd) -> Result {
    // The server's and ours.
    setrlimit(Resource::RLIMIT_NOFILE, DESCRIPTORS, DESCRIPTORS)?;
    let (limit, port) = (format!("--nofile={DESCRIPTORS}"), PORT.to_string());
    let server = Spawn::new(["prlimit", &limit, &build("tcp_echo")?, &port]);
    let mut workload = Workload::spawn(&lan.a, &server)?;
    lan.share_identity()?;
    let services = [lan.serve(&lan.a)?, lan.serve(&lan.b)?];
    let clients = Clients::start(lan, Lan::SERVICE, crowd)?;
    let resets = Resets::watch(lan, PORT)?;
    let (mut here, mut downtimes) = (&lan.a, Vec::new());
    for round in 1..=moves {
        clients.get_on()?;
        let options = [&OPTIONS[..], &["--mode", mode]].concat();
        let outcome = lan
            .move_to(here, service_of_other(lan, here, &services), workload.pid(), &options, MOVE)
            .and_then(Outcome::expect_moved)
            .map_err(|error| format!("move {round}: {error}{}", clients.story()))?;
        downtimes.push(outcome.report["downtime_ms"].to_string());
        if std::env::var_os("REPORTS").is_some() {
            println!("    {}", outcome.report["phases"]);
        }
        here = lan.other(here);
        workload.check(here)?;
        clients.get_on().map_err(|error| format!("after move {round}: {error}"))?;
    }
    resets.none(lan).map_err(|error| format!("before the clients end: {error}"))?;
    let longest = clients.finish()?;
    let longest = longest.as_secs_f64() * 1000.0;
    println!("    longest wait of a client {longest:.1} ms, downtimes {} ms", downtimes.join(", "));
    resets.none_but_after_ends(lan)
}

/// When the source command is killed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Blow {
    Anywhere,
    /// While it reads the connections: in TCP_REPAIR nobody else may.
    Reading,
}

/// kill -9 of the source command at random instants: wherever the process is then, its connections are.
fn source_killed(lan: &Lan, blow: Blow) -> Result {
    let mut choices = Choices::new("tcp source");
    let mut workload = Workload::start(&lan.a, "tcp_echo", &[&PORT.to_string()])?;
    lan.share_identity()?;
    let services = [lan.serve(&lan.a)?, lan.serve(&lan.b)?];
    let clients = Clients::start(lan, Lan::SERVICE, FEW)?;
    let resets = Resets::watch(lan, PORT)?;
    let mut here = &lan.a;
    let begin = Instant::now();
    lan.move_to(here, service_of_other(lan, here, &services), workload.pid(), &OPTIONS, MOVE)?
        .expect_moved()?;
    let whole = begin.elapsed();
    here = lan.other(here);
    let mut moved = 0;
    let blows = if blow == Blow::Reading { INSTANTS_READING } else { INSTANTS };
    for round in 1..=blows {
        // Not in the beginning: nothing happens to connections there.
        let micros = u64::try_from(whole.as_micros())?;
        let mut micros = micros * 3 / 10 + choices.below(micros * 7 / 10);
        let job =
            lan.start_move(here, &service_of_other(lan, here, &services).address, workload.pid(), &OPTIONS)?;
        if blow == Blow::Reading {
            // One that is over already does not help, and does no harm.
            let _ = at_state(here, &job, "taking");
            micros = choices.below(READING_US);
        }
        // The instant is the point here: there is no condition to wait for.
        std::thread::sleep(Duration::from_micros(micros));
        let _ = here.signal(job.pid, libc::SIGKILL);
        here.wait_exit(job.pid, SETTLE)?;
        // A process whose tracer was killed may be seen before it has come to its stop.
        let mut last = String::new();
        let found = wait_for("one host having the process", SETTLE, || {
            Ok(settled(lan, workload.pid()).map_err(|error| last = error.to_string()).ok())
        });
        let runner = found.map_err(|error| {
            let what = format!("instant {round}, {micros} of {} µs", whole.as_micros());
            format!("{what}, from {}: {error}, {last}{}", here.name(), story(lan, workload.pid(), &services))
        })?;
        moved += usize::from(runner.name() != here.name());
        here = runner;
        workload.check(here).map_err(|error| {
            let what = format!("instant {round}, {micros} of {} µs", whole.as_micros());
            format!("{what}: {error}{}", story(lan, workload.pid(), &services))
        })?;
        wait_for("the service address", SETTLE, || Ok(lan.has_service(here)?.then_some(())))?;
        clients.get_on().map_err(|error| {
            let what = format!("instant {round}, {micros} of {} µs", whole.as_micros());
            format!("{what}, on {}: {error}{}", here.name(), sockets(lan))
        })?;
    }
    println!("    of {blows} disturbed moves {moved} arrived");
    resets.none(lan).map_err(|error| format!("before the clients end: {error}"))?;
    clients.finish()?;
    resets.none_but_after_ends(lan)
}

/// An address that both hosts have, behind a router.
pub(super) const ON_BOTH: &str = "10.78.0.5";

/// Gives [`ON_BOTH`] to both; it leads to the first.
pub(super) fn give_to_both(lan: &Lan) -> Result {
    for host in [&lan.a, &lan.b] {
        host.net(&["ip", "address", "add", &format!("{ON_BOTH}/32"), "dev", "lo"])?;
    }
    lead_to(lan, &lan.a)
}

/// From now on [`ON_BOTH`] leads to this host.
pub(super) fn lead_to(lan: &Lan, host: &Host) -> Result {
    lan.middle.net(&["ip", "route", "replace", ON_BOTH, "via", lan.address(host)])?;
    Ok(())
}

/// Behind a router, with an address that both hosts have all the time: nothing but the lock keeps the one kernel
/// from answering for a process that is on its way, and the other for one that is not there yet.
fn address_on_both_hosts(lan: &Lan) -> Result {
    give_to_both(lan)?;
    let mut workload = Workload::start(&lan.a, "tcp_echo", &[&PORT.to_string()])?;
    lan.share_identity()?;
    let hook = format!(
        "[ $MIGRATE_STAGE != network-unlock ] || {{ touch {SHARED}/held; \
         while [ ! -e {SHARED}/go ]; do sleep 0.01; done; rm {SHARED}/held {SHARED}/go; }}"
    );
    let hook = ["--hook", &hook];
    let services = [lan.serve_with(&lan.a, &hook)?, lan.serve_with(&lan.b, &hook)?];
    let clients = Clients::start(lan, ON_BOTH, FEW)?;
    let resets = Resets::watch(lan, PORT)?;
    let repeated = || tcp_counter(&lan.middle.net(&["cat", "/proc/net/snmp"])?, "RetransSegs");
    let repeat = || -> Result {
        let before = repeated()?;
        wait_for("something repeated", PATIENCE, || {
            Ok(repeated().is_ok_and(|now| now > before + 1).then_some(()))
        })?;
        Ok(())
    };
    // A reset explains the rest.
    let quiet = |result: Result| resets.none(lan).and(result);
    let mut here = &lan.a;
    for _ in 0..4 {
        quiet(clients.get_on())?;
        let to = &service_of_other(lan, here, &services).address;
        let job = lan.start_move(here, to, workload.pid(), &["--tcp-established"])?;
        let shared = |name| lan.a.outside(format!("{SHARED}/{name}"));
        wait_for("the hook", MOVE, || {
            Ok((shared("held").exists() || here.exit_of(job.pid).is_some()).then_some(()))
        })?;
        let held = shared("held").exists();
        quiet(ensure(held, || format!("no hook: {}{}", here.stdout(&job), here.stderr(&job))))?;
        // Nobody answers, neither the host that it comes from nor the one that it goes to.
        quiet(repeat())?;
        lead_to(lan, lan.other(here))?;
        quiet(repeat())?;
        std::fs::write(shared("go"), "")?;
        lan.finish_move(here, &job, MOVE)?.expect_moved()?;
        here = lan.other(here);
        workload.check(here)?;
        quiet(clients.get_on())?;
    }
    resets.none(lan).map_err(|error| format!("before the clients end: {error}"))?;
    clients.finish()?;
    resets.none_but_after_ends(lan)
}

/// More requests than there is time for: the client is to be at work as long as it is needed.
const ENDLESS: &str = "2000000000";

/// Pipelining from 20 connections, unbroken.
fn redis_benchmark(lan: &Lan) -> Result {
    let job = lan.a.spawn(&redis::server())?;
    let address = SocketAddr::new(Lan::SERVICE.parse()?, redis::PORT);
    let port = redis::PORT.to_string();
    lan.client("connect", move || {
        wait_for("redis answering", PATIENCE, || Ok(TcpStream::connect(address).ok().map(drop)))
    })?
    .join()
    .map_err(|_| "the client panicked")???;
    lan.share_identity()?;
    let services = [lan.serve(&lan.a)?, lan.serve(&lan.b)?];
    let words = ["redis-benchmark", "-h", Lan::SERVICE, "-p", &port, "-c", "20", "-P", "16", "-n", ENDLESS];
    let rest = ["-t", "set", "-r", "100000", "-d", "100", "-q"];
    let bench = lan.middle.spawn(&Spawn::new(words.iter().chain(&rest)))?;
    let commands = |host: &Host| received(host);
    let busy = |host: &Host| -> Result {
        let before = commands(host)?;
        wait_for("more requests", PATIENCE, || {
            Ok((commands(host).is_ok_and(|now| now > before + 20_000)).then_some(()))
        })?;
        Ok(())
    };
    let mut here = &lan.a;
    busy(here)?;
    // Whoever connected before it listened was refused; and the client asks for something first, over a connection
    // that it closes.
    let resets = Resets::watch(lan, redis::PORT)?;
    for _ in 0..2 {
        lan.move_to(here, service_of_other(lan, here, &services), job.pid, &OPTIONS, MOVE)?.expect_moved()?;
        here = lan.other(here);
        busy(here)?;
    }
    let said = || format!("{}{}", lan.middle.stdout(&bench), lan.middle.stderr(&bench));
    // What it has counted last, of answers.
    let rates = || said().matches("rps=").count() - said().matches("rps=0.0").count();
    let before = rates();
    wait_for("redis-benchmark counting on", PATIENCE, || Ok((rates() > before + 1).then_some(())))
        .map_err(|error| format!("{error}: {}", said()))?;
    ensure(!said().to_lowercase().contains("error"), said)?;
    // Before its end: that resets connections, with answers under way.
    resets.none(lan)?;
    Ok(lan.middle.signal(bench.pid, libc::SIGKILL)?)
}

/// What there is of the process, and what was said, to understand a failure by.
fn story(lan: &Lan, pid: i32, services: &[Service; 2]) -> String {
    let of = |host: &Host, service: &Service| {
        let status = std::fs::read_to_string(host.proc(pid).join("status")).unwrap_or_default();
        let lines: Vec<&str> = status.lines().filter(|l| "SNTP".contains(&l[..1])).collect();
        let said = host.stderr(&service.job);
        let said: Vec<&str> = said.lines().rev().take(12).collect();
        format!("\n{}: {:?}\n{lines:?}\n{said:#?}", host.name(), host.processes())
    };
    of(&lan.a, &services[0]) + &of(&lan.b, &services[1])
}

/// What the kernels have, to understand a failure by.
fn sockets(lan: &Lan) -> String {
    let list = |host: &Host| {
        let busy = host.net(&["ss", "-tinmeo", "state", "connected", "exclude", "time-wait"]);
        let busy = busy.unwrap_or_else(|error| error.to_string());
        format!("\n{}:\n{busy}", host.name())
    };
    [&lan.a, &lan.b, &lan.middle].map(list).concat()
}

pub(super) fn service_of_other<'s>(lan: &Lan, here: &Host, services: &'s [Service; 2]) -> &'s Service {
    if here.name() == lan.a.name() { &services[1] } else { &services[0] }
}

/// Segments that a host has received.
fn received(host: &Host) -> Result<u64> {
    tcp_counter(&host.net(&["cat", "/proc/net/snmp"])?, "InSegs")
}

/// Streams through the echo in both directions, one request after the other, and connections that wait.
pub(super) struct Clients {
    stop: Arc<AtomicBool>,
    /// Bytes that came back, of each; the longest wait.
    progress: Vec<Arc<Progress>>,
    threads: Vec<JoinHandle<io::Result<()>>>,
    idle: Vec<TcpStream>,
}

#[derive(Default)]
struct Progress {
    bytes: AtomicU64,
    longest_us: AtomicU64,
    failure: std::sync::Mutex<Option<String>>,
}

impl Progress {
    fn waited(&self, since: Instant) {
        let micros = u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.longest_us.fetch_max(micros, Ordering::Relaxed);
    }
}

impl Clients {
    pub(super) fn start(lan: &Lan, address: &str, crowd: Crowd) -> Result<Self> {
        let address = SocketAddr::new(address.parse()?, PORT);
        let dial = move || -> io::Result<Vec<TcpStream>> {
            (0..crowd.streams + crowd.calls + crowd.idle)
                .map(|_| {
                    let stream = TcpStream::connect(address)?;
                    stream.set_read_timeout(Some(PATIENCE))?;
                    stream.set_write_timeout(Some(PATIENCE))?;
                    stream.set_nodelay(true)?;
                    Ok(stream)
                })
                .collect()
        };
        let mut idle = lan.client("dial", dial)?.join().map_err(|_| "the client panicked")???;
        let stop = Arc::new(AtomicBool::new(false));
        let (mut progress, mut threads) = (Vec::new(), Vec::new());
        for (number, stream) in idle.drain(..crowd.streams + crowd.calls).enumerate() {
            let (counted, stop) = (Arc::<Progress>::default(), Arc::clone(&stop));
            progress.push(Arc::clone(&counted));
            threads.push(std::thread::spawn(move || {
                let done = if number < crowd.streams {
                    streaming(&stream, number, &stop, &counted)
                } else {
                    calling(&stream, number, &stop, &counted)
                };
                if let Err(error) = &done {
                    *counted.failure.lock().unwrap() = Some(format!("client {number}: {error}"));
                }
                done
            }));
        }
        let clients = Self { stop, progress, threads, idle };
        clients.ping_idle()?;
        Ok(clients)
    }

    fn story(&self) -> String {
        let failures = self.progress.iter().filter_map(|p| p.failure.lock().unwrap().clone());
        failures.map(|text| format!("; {text}")).collect()
    }

    /// Each of the busy ones gets something back, and the idle ones as well.
    pub(super) fn get_on(&self) -> Result {
        let before: Vec<u64> = self.progress.iter().map(|p| p.bytes.load(Ordering::Relaxed)).collect();
        let waited = wait_for("all clients getting on", PATIENCE, || {
            let all = self.progress.iter().zip(&before);
            Ok((all.into_iter().all(|(p, was)| p.bytes.load(Ordering::Relaxed) > was + 1000)).then_some(()))
        });
        waited.map_err(|error| format!("{error}{}", self.story()))?;
        self.ping_idle()
    }

    fn ping_idle(&self) -> Result {
        for mut stream in &self.idle {
            stream.write_all(b"still there?")?;
        }
        for (number, mut stream) in self.idle.iter().enumerate() {
            let mut answer = [0; 12];
            stream.read_exact(&mut answer).map_err(|error| format!("idle client {number}: {error}"))?;
            ensure(&answer == b"still there?", || format!("idle client {number} got {answer:?}"))?;
        }
        Ok(())
    }

    /// Ends all streams, and looks whether everything came back. The longest wait for anything.
    pub(super) fn finish(self) -> Result<Duration> {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads {
            thread.join().map_err(|_| "a client panicked")??;
        }
        for mut stream in self.idle {
            stream.shutdown(Shutdown::Write)?;
            ensure(stream.read(&mut [0; 1])? == 0, || "more than expected".to_owned())?;
        }
        let longest = self.progress.iter().map(|p| p.longest_us.load(Ordering::Relaxed)).max();
        Ok(Duration::from_micros(longest.unwrap_or(0)))
    }
}

/// The byte at a place of a client's stream.
fn byte(at: u64, number: usize) -> u8 {
    let [.., byte] = (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40).to_be_bytes();
    byte.wrapping_add(u8::try_from(number).unwrap_or(0))
}

/// Writes as much as the connection takes, and reads it back in another thread.
fn streaming(stream: &TcpStream, number: usize, stop: &AtomicBool, progress: &Progress) -> io::Result<()> {
    let sent = AtomicU64::new(0);
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| -> io::Result<()> {
            let (mut at, mut output) = (0u64, stream);
            let mut block = vec![0u8; 64 << 10];
            while !stop.load(Ordering::Relaxed) {
                // More would fill the server's buffer to the brim while it stands still, and what is lost
                // then may find no room when it comes again: see the known limits.
                if at > progress.bytes.load(Ordering::Relaxed) + UNDER_WAY {
                    std::thread::sleep(Duration::from_micros(100));
                    continue;
                }
                for (place, slot) in (at..).zip(&mut block) {
                    *slot = byte(place, number);
                }
                output.write_all(&block)?;
                at += block.len() as u64;
                sent.store(at, Ordering::Relaxed);
            }
            ended.store(true, Ordering::Relaxed);
            stream.shutdown(Shutdown::Write)
        });
        let (mut at, mut input) = (0u64, stream);
        let mut block = vec![0u8; 64 << 10];
        let mut last = Instant::now();
        loop {
            let got = input.read(&mut block)?;
            progress.waited(last);
            last = Instant::now();
            if got == 0 {
                break;
            }
            if let Some(wrong) = (0..got).find(|i| block[*i] != byte(at + *i as u64, number)) {
                return Err(io::Error::other(format!("byte {} is wrong", at + wrong as u64)));
            }
            at += got as u64;
            progress.bytes.store(at, Ordering::Relaxed);
        }
        writer.join().map_err(|_| io::Error::other("the writer panicked"))??;
        let whole = ended.load(Ordering::Relaxed) && sent.load(Ordering::Relaxed) == at;
        if whole { Ok(()) } else { Err(io::Error::other(format!("ended after {at} bytes of {sent:?}"))) }
    })
}

/// One request after the other, each answered before the next.
fn calling(stream: &TcpStream, number: usize, stop: &AtomicBool, progress: &Progress) -> io::Result<()> {
    let (mut at, mut both) = (0u64, stream);
    while !stop.load(Ordering::Relaxed) {
        let request: Vec<u8> = (at..at + 100).map(|place| byte(place, number)).collect();
        let begin = Instant::now();
        both.write_all(&request)?;
        let mut answer = vec![0; request.len()];
        both.read_exact(&mut answer)?;
        progress.waited(begin);
        if answer != request {
            return Err(io::Error::other(format!("the answer at {at} is wrong")));
        }
        at += 100;
        progress.bytes.store(at, Ordering::Relaxed);
    }
    stream.shutdown(Shutdown::Write)?;
    if both.read(&mut [0; 1])? == 0 { Ok(()) } else { Err(io::Error::other("more than asked for")) }
}
