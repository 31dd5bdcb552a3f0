//! The lock on connections and the addresses they need: what is locked is not answered while the process is held,
//! the lock is gone whatever happens to those who hold it, and what the destination lacks is refused.

use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use migrate::engine::sys::socket;
use migrate::testbed::{Host, Lan, Outcome, STATE, Spawn, TestbedError, wait_for};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, connect, recv, send,
};

use super::crash::SETTLE;
use super::hooks::Hold;
use super::limbo::{at_state, held_from, resume, sentinels, stopped};
use super::refusals::says;
use crate::case::{Case, Result, ensure};
use crate::relay::Way;
use crate::workload::Workload;

const MOVE: Duration = Duration::from_secs(60);
/// Where the counting program listens.
const PORT: u16 = 4243;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("lock/not_answered_while_it_is_held", not_answered),
        Case::new("lock/gone_after_a_move", after_a_move),
        Case::new("lock/gone_with_its_last_holder", last_holder),
        Case::new("lock/addresses_that_are_missing_there", missing_addresses),
        Case::new("lock/a_listener_changes_its_address", remapped),
    ]
}

/// The tables of nf_tables that a host has.
fn tables(host: &Host) -> Result<Vec<String>> {
    let listed = Lan::inside(host, "tables", || -> nix::Result<Vec<String>> {
        let fd = nix::sys::socket::socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkNetFilter,
        )?;
        // A header (length, kind, flags for a dump, sequence, port), then the family: any.
        let mut request = 20u32.to_ne_bytes().to_vec();
        request.extend([1, 10, 1, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        send(fd.as_raw_fd(), &request, MsgFlags::empty())?;
        let mut names = Vec::new();
        let mut buffer = vec![0; 32768];
        loop {
            let count = recv(fd.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            let mut rest = &buffer[..count];
            while rest.len() >= 16 {
                let length = u32::from_ne_bytes(rest[..4].try_into().unwrap_or_default()) as usize;
                match u16::from_ne_bytes([rest[4], rest[5]]) {
                    // NLMSG_DONE, and NLMSG_ERROR, after which nothing comes either.
                    3 => return Ok(names),
                    2 => {
                        let word = rest.get(16..20).and_then(|b| b.first_chunk()).copied();
                        return Err(Errno::from_raw(-i32::from_ne_bytes(word.unwrap_or_default())));
                    }
                    _ => {}
                }
                // Header, family; the first attribute is the name: length, kind, text.
                let text = rest[24..length].split(|byte| *byte == 0).next().unwrap_or_default();
                names.push(String::from_utf8_lossy(text).into_owned());
                rest = &rest[length.next_multiple_of(4).min(rest.len())..];
            }
        }
    })?;
    Ok(listed.join().map_err(|_| "the thread panicked")???)
}

/// A request for a connection, under way.
struct Request(OwnedFd);

impl Request {
    const SYN_SENT: u8 = 2;
    const ESTABLISHED: u8 = 1;

    fn begin(lan: &Lan, to: SocketAddr) -> Result<Self> {
        let started = lan.client("request", move || -> nix::Result<OwnedFd> {
            let fd = socket::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_NONBLOCK, 0)?;
            match connect(fd.as_raw_fd(), &SockaddrStorage::from(to)) {
                Err(Errno::EINPROGRESS) => Ok(fd),
                Err(errno) => Err(errno),
                Ok(()) => Err(Errno::EISCONN),
            }
        })?;
        Ok(Self(started.join().map_err(|_| "the thread panicked")???))
    }

    /// Its state, and how often it was repeated.
    fn info(&self) -> std::result::Result<(u8, u32), TestbedError> {
        let info = socket::option(self.0.as_fd(), libc::IPPROTO_TCP, libc::TCP_INFO)
            .map_err(|errno| TestbedError::Program(format!("TCP_INFO: {errno}")))?;
        Ok((info[0], u32::from_ne_bytes(info[100..104].try_into().unwrap_or_default())))
    }

    fn await_repetition(&self) -> Result {
        Ok(wait_for("the request repeated", MOVE, || {
            let (state, repeated) = self.info()?;
            if state != Self::SYN_SENT {
                return Err(TestbedError::Program(format!("it was answered: state {state}")));
            }
            Ok((repeated > 0).then_some(()))
        })?)
    }

    fn await_connection(&self) -> Result {
        Ok(wait_for("the connection", MOVE, || match self.info()?.0 {
            Self::SYN_SENT => Ok(None),
            Self::ESTABLISHED => Ok(Some(())),
            state => Err(TestbedError::Program(format!("it was refused: state {state}"))),
        })?)
    }
}

/// While a hook holds the process, a request to it is not answered, by no kernel; when the move fails, it is.
fn not_answered(lan: &Lan) -> Result {
    let mut workload = Workload::start(&lan.a, "counter", &["port"])?;
    lan.share_identity()?;
    let service = lan.serve(&lan.b)?;
    let hold = Hold::at(lan, "network-lock", 1);
    let options = ["--tcp-established", "--hook", &hold.command];
    let job = lan.start_move(&lan.a, &service.address, workload.pid(), &options)?;
    hold.until_held(&job)?;
    ensure(tables(&lan.a)?.len() == 1, || format!("{:?}", tables(&lan.a)))?;
    let request = Request::begin(lan, SocketAddr::new(Lan::A.parse()?, PORT))?;
    request.await_repetition()?;
    hold.let_go()?;
    let outcome = lan.finish_move(&lan.a, &job, MOVE)?;
    says(&outcome, &["network-lock hook"])?;
    request.await_connection()?;
    ensure(tables(&lan.a)?.is_empty(), || format!("{:?}", tables(&lan.a)))?;
    workload.check_going_on(&lan.a)
}

fn after_a_move(lan: &Lan) -> Result {
    let pid = greeter(&lan.a, Lan::SERVICE)?;
    lan.share_identity()?;
    let to = SocketAddr::new(Lan::SERVICE.parse()?, GREETER_PORT);
    // At the destination the lock is there until the process runs, and longer than the address is not.
    let hold = Hold::at(lan, "network-unlock", 0);
    let service = lan.serve_with(&lan.b, &["--hook", &hold.command])?;
    let options = ["--tcp-established", "--move-ip", Lan::MOVE_IP];
    let job = lan.start_move(&lan.a, &service.address, pid, &options)?;
    hold.until_held(&job)?;
    ensure(lan.has_service(&lan.b)?, || "the address is not there yet".to_owned())?;
    let both = (tables(&lan.a)?.len(), tables(&lan.b)?.len());
    ensure(both == (1, 1), || format!("{:?} {:?}", tables(&lan.a), tables(&lan.b)))?;
    let request = Request::begin(lan, to)?;
    request.await_repetition()?;
    hold.let_go()?;
    lan.finish_move(&lan.a, &job, MOVE)?.expect_moved()?;
    request.await_connection()?;
    greeted(lan, Lan::SERVICE)?;
    for host in [&lan.a, &lan.b] {
        wait_for("the end of the lock", SETTLE, || {
            Ok(tables(host).is_ok_and(|t| t.is_empty()).then_some(()))
        })?;
    }
    Ok(())
}

/// kill -9 of the command leaves the lock to its sentinel; after that of both there is none.
fn last_holder(lan: &Lan) -> Result {
    let mut workload = Workload::start(&lan.a, "counter", &["port"])?;
    lan.share_identity()?;
    lan.serve(&lan.b)?;
    // The commit gets no further than there, and meets a cut link then.
    let relay = held_from(lan, Way::Forth, "limbo")?;
    let job = lan.start_move(&lan.a, &relay.address, workload.pid(), &["--tcp-established"])?;
    let record = at_state(&lan.a, &job, "limbo")?;
    lan.cut(&lan.b)?;
    let name = format!("migrate-{}", record["id"].as_str().ok_or("no id")?);
    lan.a.kill(job.pid)?;
    relay.release();
    let pid = workload.pid();
    wait_for("the fence", SETTLE, || Ok(stopped(&lan.a, pid).then_some(())))?;
    ensure(tables(&lan.a)? == [name.clone()], || format!("{:?}", tables(&lan.a)))?;
    let guards = sentinels(&lan.a)?;
    ensure(guards.len() == 1, || format!("{guards:?} sentinels"))?;
    lan.a.kill(guards[0])?;
    wait_for("the end of the lock", SETTLE, || Ok(tables(&lan.a).is_ok_and(|t| t.is_empty()).then_some(())))?;
    wait_for("the destination giving up", SETTLE, || Ok((!lan.b.proc(pid).exists()).then_some(())))?;
    wait_for("its lock", SETTLE, || Ok(tables(&lan.b).is_ok_and(|t| t.is_empty()).then_some(())))?;
    lan.heal(&lan.b)?;
    let outcome = resume(lan, &name["migrate-".len()..])?;
    ensure(outcome.report["outcome"] == "not_moved", || outcome.report.to_string())?;
    workload.check_going_on(&lan.a)
}

const GREETER_PORT: u16 = 4300;
/// A program that listens at one address and greets whoever comes.
const GREETER: &str = "import socket, sys
s = socket.create_server((sys.argv[1], int(sys.argv[2])))
kept = []
print('ready', flush=True)
while True:
    c, _ = s.accept()
    c.sendall(b'hello')
    kept.append(c)";

fn greeter(host: &Host, address: &str) -> Result<i32> {
    let port = GREETER_PORT.to_string();
    let job = host.spawn(&Spawn::new(["/usr/bin/python3", "-c", GREETER, address, &port]))?;
    host.wait_line(&job, "ready", 0, MOVE)?;
    Ok(job.pid)
}

fn greeted(lan: &Lan, address: &str) -> Result<TcpStream> {
    let to = SocketAddr::new(address.parse()?, GREETER_PORT);
    let greeting = lan.client("greeted", move || -> std::io::Result<TcpStream> {
        let mut stream = TcpStream::connect_timeout(&to, MOVE)?;
        stream.set_read_timeout(Some(MOVE))?;
        std::io::Read::read_exact(&mut stream, &mut [0; 5])?;
        Ok(stream)
    })?;
    Ok(greeting.join().map_err(|_| "the client panicked")???)
}

fn missing_addresses(lan: &Lan) -> Result {
    let pid = greeter(&lan.a, Lan::SERVICE)?.to_string();
    let _client = greeted(lan, Lan::SERVICE)?;
    lan.share_identity()?;
    let mut service = lan.serve(&lan.b)?;
    let ask = |to: &str, options: &[&str]| -> Result<Outcome> {
        let words = ["check", &pid, "--to", to, "--tcp-established", "--json", "--state-dir", STATE];
        Ok(lan.run(&lan.a, &[&words, options].concat(), MOVE)?)
    };
    let remap = |new: &str| format!("{}={new}", Lan::SERVICE);
    let about = format!("address {}", Lan::SERVICE);
    let reasons = ask(&service.address, &[])?.reasons();
    for word in [about.as_str(), "--move-ip", "--tcp-remap", "--hook"] {
        ensure(reasons.contains(word), || format!("no {word:?} in {reasons}"))?;
    }
    for options in [&["--move-ip", Lan::MOVE_IP][..], &["--hook", "true"], &["--tcp-remap", &remap(Lan::B)]] {
        let reasons = ask(&service.address, options)?.reasons();
        ensure(!reasons.contains(&about) && !reasons.contains("--tcp-remap"), || {
            format!("{options:?}: {reasons}")
        })?;
    }
    let reasons = ask(&service.address, &["--tcp-remap", &remap("10.77.0.77")])?.reasons();
    ensure(reasons.contains("the destination does not have 10.77.0.77"), || reasons.clone())?;
    // Where it is there already nothing is to be moved.
    lan.b.kill(service.job.pid)?;
    service = lan.serve_with(&lan.b, &["--hook", "true"])?;
    let reasons = ask(&service.address, &[])?.reasons();
    ensure(!reasons.contains(&about), || reasons.clone())
}

/// It listened at the address of the one host, and does so at that of the other.
fn remapped(lan: &Lan) -> Result {
    let pid = greeter(&lan.a, Lan::A)?;
    lan.share_identity()?;
    let service = lan.serve(&lan.b)?;
    let remap = format!("{}={}", Lan::A, Lan::B);
    lan.move_to(&lan.a, &service, pid, &["--tcp-remap", &remap], MOVE)?.expect_moved()?;
    greeted(lan, Lan::B).map(drop)
}
