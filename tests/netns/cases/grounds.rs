//! The grounds themselves: hosts and the network between them.

use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, UdpSocket};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use migrate::testbed::{Host, Lan, Spawn, wait_for};

use crate::case::{Case, Result, ensure};
use crate::relay::{Relay, Weather};

/// How long what must come may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long another runner may take to make hosts.
const HOSTS_MADE: Duration = Duration::from_secs(60);

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("grounds/hosts", hosts),
        Case::new("grounds/cut", cut),
        Case::new("grounds/relay", relay),
        Case::new("grounds/nothing_left_after_kill", killed),
    ]
}

/// What `a` starts has PIDs that `b` has not, and each sees only its own processes.
fn hosts(lan: &Lan) -> Result {
    let job = lan.a.spawn(&Spawn::new(["sleep", "1000"]))?;
    ensure(job.pid >= i32::try_from(Lan::FIRST_PID)?, || format!("PID {} on a", job.pid))?;
    ensure(lan.a.proc(job.pid).exists(), || "not seen on a".to_owned())?;
    ensure(!lan.b.proc(job.pid).exists(), || "seen on b".to_owned())?;
    // Until it is there `setsid` runs, and the linker with files of its own.
    wait_for("its sleep", PATIENCE, || {
        let status = std::fs::read_to_string(lan.a.proc(job.pid).join("status")).unwrap_or_default();
        Ok((status.starts_with("Name:\tsleep\n") && status.contains("\nState:\tS")).then_some(()))
    })?;
    let descriptors = std::fs::read_dir(lan.a.proc(job.pid).join("fd"))?.count();
    ensure(descriptors == 3, || format!("{descriptors} descriptors: some are inherited"))?;
    lan.a.kill(job.pid)?;
    let exit = lan.a.wait_exit(job.pid, Duration::from_secs(5))?;
    ensure(exit.signal == Some(libc::SIGKILL), || format!("{exit:?}"))?;
    ensure(lan.a.processes()?.is_empty(), || format!("{:?}", lan.a.processes()))?;
    Ok(())
}

/// A cut link carries nothing; a healed one does again.
fn cut(lan: &Lan) -> Result {
    ensure(reaches(lan, PATIENCE)?, || "the link does not carry".to_owned())?;
    lan.cut(&lan.b)?;
    // Nothing can come: there is nothing to be patient for.
    ensure(!reaches(lan, Duration::from_millis(300))?, || "the cut link carries".to_owned())?;
    lan.heal(&lan.b)?;
    let end = Instant::now() + PATIENCE;
    while !reaches(lan, PATIENCE)? {
        ensure(Instant::now() < end, || "the healed link does not carry".to_owned())?;
    }
    Ok(())
}

/// Whether the clients' place reaches host `b`: a refused connection is an answer.
fn reaches(lan: &Lan, patience: Duration) -> Result<bool> {
    let attempt = lan.client("reach", move || {
        let address = std::net::SocketAddr::new(Lan::B.parse().expect("an address"), 9);
        std::net::TcpStream::connect_timeout(&address, patience)
    })?;
    let answer = attempt.join().map_err(|_| "the client panicked")??;
    Ok(answer.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused))
}

/// A relay in good weather carries everything in both directions, in bad weather what it is told to.
fn relay(lan: &Lan) -> Result {
    let echo = UdpSocketInside::echo(&lan.b, SocketAddr::new(Lan::B.parse()?, 7077))?;
    for (lost, repeated, least, most) in
        [(0, 0, 50, 50), (1000, 0, 0, 0), (0, 1000, 200, 200), (300, 0, 5, 45)]
    {
        let relay =
            Relay::start(lan, Weather { lost, repeated, delay: Duration::from_millis(1), reorders: true })?;
        let to: SocketAddr = relay.address.parse()?;
        let counting = lan.client("count", move || -> std::io::Result<u32> {
            let socket = UdpSocket::bind((Lan::CLIENT, 0))?;
            for _ in 0..50 {
                socket.send_to(b"hello", to)?;
            }
            let mut bytes = [0; 16];
            let mut count = 0;
            loop {
                // What must come may be late on a busy machine; what may not come is not waited for long.
                let patience = if count < least { 10_000 } else { 300 };
                socket.set_read_timeout(Some(Duration::from_millis(patience)))?;
                if socket.recv(&mut bytes).is_err() {
                    return Ok(count);
                }
                count += 1;
            }
        })?;
        let count = counting.join().map_err(|_| "the client panicked")???;
        ensure((least..=most).contains(&count), || format!("{count} of 50 came back, lost {lost}"))?;
    }
    drop(echo);
    Ok(())
}

/// A socket in a host that sends back what it gets, until dropped.
struct UdpSocketInside {
    stop: Arc<AtomicBool>,
}

impl UdpSocketInside {
    fn echo(host: &Host, address: SocketAddr) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let (ready, bound) = std::sync::mpsc::channel();
        Lan::inside(host, "echo", move || -> std::io::Result<()> {
            let socket = UdpSocket::bind(address)?;
            socket.set_read_timeout(Some(Duration::from_millis(50)))?;
            let _ = ready.send(());
            let mut bytes = [0; 16];
            while !stopped.load(Ordering::Relaxed) {
                if let Ok((count, from)) = socket.recv_from(&mut bytes) {
                    socket.send_to(&bytes[..count], from)?;
                }
            }
            Ok(())
        })?;
        bound.recv_timeout(Duration::from_secs(5)).map_err(|_| "the echo does not listen")?;
        Ok(Self { stop })
    }
}

impl Drop for UdpSocketInside {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// A runner that is killed leaves no process behind: here another runner with a host of its own.
fn killed(_: &Lan) -> Result {
    let mut runner = Command::new(std::env::current_exe()?).arg("--hold").stdout(Stdio::piped()).spawn()?;
    let output = runner.stdout.take().ok_or("no output")?;
    let (sender, said) = channel();
    std::thread::spawn(move || {
        let mut line = String::new();
        let read = BufReader::new(output).read_line(&mut line);
        let _ = sender.send(read.map(|_| line));
    });
    let said = said.recv_timeout(HOSTS_MADE);
    if said.is_err() {
        runner.kill()?;
    }
    let line = said.map_err(|_| "it did not say which hosts it has")??;
    let inits: Vec<String> = line.split_whitespace().map(|init| format!("/proc/{init}")).collect();
    ensure(inits.len() == 3 && inits.iter().all(|init| Path::new(init).exists()), || line.clone())?;
    runner.kill()?;
    runner.wait()?;
    let end = Instant::now() + Duration::from_secs(10);
    while inits.iter().any(|init| Path::new(init).exists()) {
        ensure(Instant::now() < end, || format!("still there: {inits:?}"))?;
    }
    Ok(())
}
