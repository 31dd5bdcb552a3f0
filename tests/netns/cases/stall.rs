//! What clients send while nobody answers is not sent twice: it waits for the process and is put in where it runs
//! then. The clients repeat nothing by themselves here, so no time is measured.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

use migrate::engine::sys::socket;
use migrate::testbed::{Host, Lan, SHARED, wait_for};

use super::tcp::{OPTIONS, PORT};
use crate::case::{Case, Result, ensure};
use crate::resets::{Resets, tcp_counter};
use crate::workload::Workload;

const MOVE: Duration = Duration::from_secs(120);
const PATIENCE: Duration = Duration::from_secs(60);
/// A client that waits as long before it repeats anything has been answered, or the test has failed.
const LATE_US: &str = "100000000";
/// From where a connection is asked for that nobody wants.
const STRANGER: u16 = 4444;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("tcp/sent_while_the_source_is_silent", |lan| sent(lan, At::Source)),
        Case::new("tcp/sent_before_the_destination_is_live", |lan| sent(lan, At::Destination)),
        Case::new("tcp/sent_to_a_process_that_stays", |lan| sent(lan, At::SourceThatFails)),
    ]
}

/// Who is asked to wait while the clients send.
#[derive(Clone, Copy, PartialEq, Eq)]
enum At {
    Source,
    SourceThatFails,
    Destination,
}

fn sent(lan: &Lan, at: At) -> Result {
    for (name, value) in [("tcp_rto_min_us", LATE_US), ("tcp_early_retrans", "0")] {
        lan.middle.net(&["sh", "-c", &format!("echo {value} > /proc/sys/net/ipv4/{name}")])?;
    }
    let stage = if at == At::Destination { "network-unlock" } else { "network-lock" };
    let end = if at == At::SourceThatFails { "exit 1" } else { "exit 0" };
    let hook = format!(
        "[ $MIGRATE_STAGE = {stage} ] || exit 0; touch {SHARED}/held; \
         while [ ! -e {SHARED}/go ]; do sleep 0.01; done; {end}"
    );
    let hook = ["--hook", &hook];
    let mut workload = Workload::start(&lan.a, "tcp_echo", &[&PORT.to_string()])?;
    lan.share_identity()?;
    let service = lan.serve_with(&lan.b, if at == At::Destination { &hook } else { &[] })?;
    let address = SocketAddr::new(Lan::SERVICE.parse()?, PORT);
    let connect = move || -> std::io::Result<Vec<TcpStream>> {
        (0..8)
            .map(|_| {
                let mut stream = TcpStream::connect(address)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.set_nodelay(true)?;
                echo(&mut stream, b"first")?;
                Ok(stream)
            })
            .collect()
    };
    let mut clients = lan.client("connect", connect)?.join().map_err(|_| "the client panicked")???;
    // The requests for the connections may have been repeated on a busy machine.
    let earlier: Vec<u32> = clients.iter().map(repeated).collect::<Result<_>>()?;
    let resets = || tcp_counter(&lan.middle.net(&["cat", "/proc/net/snmp"])?, "OutRsts");
    let before = resets()?;
    let capture = Resets::watch(lan, PORT)?;

    let options = if at == At::Destination { OPTIONS.to_vec() } else { [&OPTIONS[..], &hook].concat() };
    let job = lan.start_move(&lan.a, &service.address, workload.pid(), &options)?;
    let shared = |name| lan.a.outside(format!("{SHARED}/{name}"));
    wait_for("the hook", MOVE, || Ok(shared("held").exists().then_some(())))?;
    let ended = clients.pop().ok_or("no client")?;
    for stream in &mut clients {
        stream.write_all(b"second ")?;
        stream.write_all(b"and third")?;
    }
    ended.shutdown(std::net::Shutdown::Write)?;
    // A request for a connection that nobody repeats: the answer finds no socket, and is reset.
    let only_once = move || request(Lan::CLIENT.parse().ok()?, Lan::SERVICE.parse().ok()?);
    lan.client("request", only_once)?.join().map_err(|_| "the client panicked")??.ok_or("no request")?;
    std::fs::write(shared("go"), "")?;

    let outcome = lan.finish_move(&lan.a, &job, MOVE)?;
    let here: &Host = if at == At::SourceThatFails {
        ensure(outcome.report["outcome"] == "not_moved", || outcome.report.to_string())?;
        &lan.a
    } else {
        outcome.expect_moved()?;
        &lan.b
    };
    for (number, stream) in clients.iter_mut().enumerate() {
        let mut answer = [0; 16];
        stream.read_exact(&mut answer).map_err(|error| format!("client {number}: {error}"))?;
        ensure(&answer == b"second and third", || format!("client {number} got {answer:?}"))?;
    }
    ensure((&ended).read(&mut [0; 1])? == 0, || "more than expected".to_owned())?;
    wait_for("the answer to the request", PATIENCE, || {
        Ok(resets().is_ok_and(|now| now > before).then_some(()))
    })?;
    for (number, (stream, earlier)) in clients.iter().chain([&ended]).zip(earlier).enumerate() {
        let repeated = repeated(stream)? - earlier;
        ensure(repeated == 0, || format!("client {number} has repeated {repeated} segments"))?;
    }
    for stream in &mut clients {
        echo(stream, b"and on").map_err(|error| {
            format!("{error}: {}{}", here.stdout(&workload.job), here.stderr(&workload.job))
        })?;
    }
    ensure(resets()? == before + 1, || "a connection was reset".to_owned())?;
    let seen = capture.seen();
    ensure(!seen.is_empty() && seen.iter().all(|reset| reset.from.port() == STRANGER), || {
        format!("{seen:?}")
    })?;
    workload.check(here)
}

fn echo(stream: &mut TcpStream, text: &[u8]) -> std::io::Result<()> {
    stream.write_all(text)?;
    let mut answer = vec![0; text.len()];
    stream.read_exact(&mut answer)?;
    if answer == text { Ok(()) } else { Err(std::io::Error::other(format!("{answer:?}"))) }
}

/// How many segments the client has sent again (`tcpi_total_retrans`).
fn repeated(stream: &TcpStream) -> Result<u32> {
    let info = socket::option(stream.as_fd(), libc::IPPROTO_TCP, libc::TCP_INFO)?;
    let word = info.get(100..).and_then(|b| b.first_chunk()).ok_or("a short TCP_INFO")?;
    Ok(u32::from_ne_bytes(*word))
}

/// Sends one SYN that no socket of this host knows about.
fn request(from: Ipv4Addr, to: Ipv4Addr) -> Option<()> {
    let mut tcp = Vec::with_capacity(20);
    tcp.extend(STRANGER.to_be_bytes());
    tcp.extend(PORT.to_be_bytes());
    tcp.extend([0, 0, 0, 1, 0, 0, 0, 0, 5 << 4, 2, 0xff, 0xff, 0, 0, 0, 0]);
    let words = [&from.octets()[..], &to.octets(), &[0, 6, 0, 20], &tcp].concat();
    let sum: u32 = words.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    let sum = !u16::try_from((sum & 0xffff) + (sum >> 16)).ok()?;
    tcp[16..18].copy_from_slice(&sum.to_be_bytes());
    let fd = socket::socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_TCP).ok()?;
    socket::bind(fd.as_fd(), from.into(), 0).ok()?;
    let to = nix::sys::socket::SockaddrStorage::from(SocketAddr::new(to.into(), 0));
    let sent = nix::sys::socket::sendto(
        std::os::fd::AsRawFd::as_raw_fd(&fd),
        &tcp,
        &to,
        nix::sys::socket::MsgFlags::empty(),
    );
    (sent == Ok(tcp.len())).then_some(())
}
