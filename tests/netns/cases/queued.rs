//! Connections that the server has not accepted when it moves: plain clients that connect once, say something, and are
//! answered when the server accepts them, wherever that is.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use migrate::testbed::{Host, Lan, Service, wait_for};

use super::tcp::{ON_BOTH, OPTIONS, PORT, give_to_both, lead_to, service_of_other};
use crate::case::{Case, Result, ensure};
use crate::resets::Resets;
use crate::workload::Workload;

const MOVE: Duration = Duration::from_secs(120);
/// No client waits longer than this for anything: it has lost its connection then.
const PATIENCE: Duration = Duration::from_secs(30);
/// More than a segment, less than what a client may send before anybody reads.
const MUCH: usize = 30_000;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("tcp/not_accepted_yet", |lan| there_and_back(lan, 20, 64)),
        Case::new("tcp/not_accepted_yet_full_queue", |lan| there_and_back(lan, 6, 5)),
        Case::new("tcp/not_accepted_yet_500", |lan| there_and_back(lan, 500, 512)),
        Case::new("tcp/not_accepted_yet_timestamps_off_there", |lan| without_timestamps(lan, &lan.b)),
        Case::new("tcp/not_accepted_yet_timestamps_off_here", |lan| without_timestamps(lan, &lan.a)),
        Case::new("tcp/not_accepted_yet_ipv6", ipv6),
        Case::new("tcp/not_accepted_yet_address_on_both_hosts", address_on_both_hosts),
        Case::new("tcp/not_accepted_yet_and_not_moved", not_moved),
    ]
}

/// A client, and what it has said.
struct Client {
    stream: TcpStream,
    said: Vec<u8>,
    ended: bool,
}

/// Of every kind: that say nothing, little, much; that have ended their streams, or not.
fn connect(lan: &Lan, address: &str, count: usize) -> Result<Vec<Client>> {
    let address = SocketAddr::new(address.parse()?, PORT);
    let dial = move || -> std::io::Result<Vec<Client>> {
        let one = |number: usize| {
            let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            let len = [0, 5, MUCH][number % 3];
            let said: Vec<u8> = (number..number + len).map(|i| i.to_le_bytes()[0]).collect();
            stream.write_all(&said)?;
            let ended = number % 2 == 1;
            if ended {
                stream.shutdown(Shutdown::Write)?;
            }
            Ok(Client { stream, said, ended })
        };
        (0..count).map(one).collect()
    };
    Ok(lan.client("dial", dial)?.join().map_err(|_| "the client panicked")???)
}

/// How many wait to be accepted on a host, and how much they have brought, their ends included.
fn waiting(host: &Host) -> Result<(usize, u64)> {
    let (mut count, mut bytes) = (0, 0);
    for line in host.net(&["cat", "/proc/net/tcp6"])?.lines().skip(1) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (Some(local), Some(state), Some(queues), Some(inode)) =
            (words.get(1), words.get(3), words.get(4), words.get(9))
        else {
            continue;
        };
        if local.ends_with(&format!(":{PORT:04X}")) && ["01", "08"].contains(state) && *inode == "0" {
            count += 1;
            bytes += u64::from_str_radix(queues.split(':').nth(1).unwrap_or("0"), 16)?;
        }
    }
    Ok((count, bytes))
}

/// All of them wait on this host, with all they have brought.
fn all_wait(host: &Host, clients: &[Client]) -> Result {
    let bytes = clients.iter().map(|client| client.said.len() + usize::from(client.ended)).sum::<usize>();
    let expected = (clients.len(), u64::try_from(bytes)?);
    let mut seen = (0, 0);
    let waited = wait_for("the queue", PATIENCE, || {
        seen = waiting(host).unwrap_or_default();
        Ok((seen == expected).then_some(()))
    });
    Ok(waited.map_err(|error| format!("{error}: {seen:?} in place of {expected:?} on {}", host.name()))?)
}

/// The server accepts them, and each gets what it is owed. Nobody was reset, before and afterwards.
fn all_are_served(
    lan: &Lan,
    host: &Host,
    workload: &mut Workload,
    clients: Vec<Client>,
    resets: &Resets,
) -> Result {
    resets.none(lan)?;
    host.signal(workload.pid(), libc::SIGUSR2)?;
    for (number, mut client) in clients.into_iter().enumerate() {
        let failed = |error| format!("client {number}: {error}");
        let mut echo = vec![0; client.said.len()];
        client.stream.read_exact(&mut echo).map_err(failed)?;
        ensure(echo == client.said, || format!("client {number} got other bytes"))?;
        if !client.ended {
            client.stream.write_all(b"still there?").map_err(failed)?;
            let mut answer = [0; 12];
            client.stream.read_exact(&mut answer).map_err(failed)?;
            ensure(&answer == b"still there?", || format!("client {number} got {answer:?}"))?;
            client.stream.shutdown(Shutdown::Write).map_err(failed)?;
        }
        ensure(client.stream.read(&mut [0]).map_err(failed)? == 0, || format!("client {number} hears more"))?;
    }
    workload.check(host)?;
    resets.none_but_after_ends(lan)
}

fn start(lan: &Lan, backlog: usize) -> Result<Workload> {
    Workload::start(&lan.a, "tcp_echo", &[&PORT.to_string(), &backlog.to_string()])
}

/// A server that does not accept, twelve clients of it, and a host to move it to.
fn begin(lan: &Lan, address: &str) -> Result<(Workload, Resets, Service, Vec<Client>)> {
    let workload = start(lan, 64)?;
    let resets = Resets::watch(lan, PORT)?;
    lan.share_identity()?;
    let service = lan.serve(&lan.b)?;
    let clients = connect(lan, address, 12)?;
    all_wait(&lan.a, &clients)?;
    Ok((workload, resets, service, clients))
}

/// Two moves, and nobody was accepted before.
fn there_and_back(lan: &Lan, count: usize, backlog: usize) -> Result {
    let mut workload = start(lan, backlog)?;
    let resets = Resets::watch(lan, PORT)?;
    let clients = connect(lan, Lan::SERVICE, count)?;
    all_wait(&lan.a, &clients)?;
    lan.share_identity()?;
    let services = [lan.serve(&lan.a)?, lan.serve(&lan.b)?];
    let mut here = &lan.a;
    for _ in 0..2 {
        let to = service_of_other(lan, here, &services);
        let moved = lan.move_to(here, to, workload.pid(), &OPTIONS, MOVE)?.expect_moved()?;
        println!("    downtime {} ms", moved.report["downtime_ms"]);
        here = lan.other(here);
        all_wait(here, &clients)?;
    }
    all_are_served(lan, here, &mut workload, clients, &resets)
}

/// Addresses of IPv6, which the clients and the server have as well.
const CLIENT_IPV6: &str = "fd00:77::9/64";
const SERVICE_IPV6: &str = "fd00:77::100";
const NOBODY_IPV6: &str = "fd00:77::2";
const MOVE_IPV6: [&str; 3] = ["--tcp-established", "--move-ip", "fd00:77::100/64@eth0"];

/// Over IPv6, by an address that moves along.
fn ipv6(lan: &Lan) -> Result {
    // Without waiting for another host that might have it.
    let give = |host: &Host, address: &str, device| {
        host.net(&["ip", "address", "add", address, "dev", device, "nodad"]).map(drop)
    };
    give(&lan.middle, CLIENT_IPV6, "br0")?;
    give(&lan.a, &format!("{SERVICE_IPV6}/64"), "eth0")?;
    give(&lan.b, &format!("{NOBODY_IPV6}/64"), "eth0")?;
    // A reset would be seen: there is one where nobody listens.
    let nobody = SocketAddr::new(NOBODY_IPV6.parse()?, PORT);
    let resets = Resets::watch(lan, PORT)?;
    let dialled =
        lan.client("refused", move || TcpStream::connect(nobody))?.join().map_err(|_| "panicked")??;
    ensure(dialled.is_err(), || "somebody listens".to_owned())?;
    ensure(resets.seen().iter().any(|reset| reset.from == nobody), || "no reset was seen".to_owned())?;

    let (mut workload, resets, service, clients) = begin(lan, SERVICE_IPV6)?;
    lan.move_to(&lan.a, &service, workload.pid(), &MOVE_IPV6, MOVE)?.expect_moved()?;
    all_wait(&lan.b, &clients)?;
    all_are_served(lan, &lan.b, &mut workload, clients, &resets)
}

/// Begun with timestamps, they go on where there are none; and the other way round.
fn without_timestamps(lan: &Lan, off: &Host) -> Result {
    off.net(&["sh", "-c", "echo 0 > /proc/sys/net/ipv4/tcp_timestamps"])?;
    let (mut workload, resets, service, clients) = begin(lan, Lan::SERVICE)?;
    lan.move_to(&lan.a, &service, workload.pid(), &OPTIONS, MOVE)?.expect_moved()?;
    all_are_served(lan, &lan.b, &mut workload, clients, &resets)
}

/// Behind a router, with an address that both hosts have.
fn address_on_both_hosts(lan: &Lan) -> Result {
    give_to_both(lan)?;
    let (mut workload, resets, service, clients) = begin(lan, ON_BOTH)?;
    lan.move_to(&lan.a, &service, workload.pid(), &["--tcp-established"], MOVE)?.expect_moved()?;
    lead_to(lan, &lan.b)?;
    all_are_served(lan, &lan.b, &mut workload, clients, &resets)
}

/// The move fails when they are locked already: they wait where they were.
fn not_moved(lan: &Lan) -> Result {
    let (mut workload, resets, service, clients) = begin(lan, Lan::SERVICE)?;
    let hook = ["--hook", "test $MIGRATE_STAGE != network-lock"];
    let outcome = lan.move_to(&lan.a, &service, workload.pid(), &[&OPTIONS[..], &hook].concat(), MOVE)?;
    ensure(!outcome.moved(), || "it was moved".to_owned())?;
    all_wait(&lan.a, &clients)?;
    all_are_served(lan, &lan.a, &mut workload, clients, &resets)
}
