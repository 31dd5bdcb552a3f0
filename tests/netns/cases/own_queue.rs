//! A process that has connections to itself which it has not accepted when it moves: both ends come along, or the move is
//! refused by name.

use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use migrate::testbed::{Host, Lan, wait_for};

use super::hooks::Hold;
use super::refusals::says;
use super::tcp::OPTIONS;
use crate::case::{Case, Result, ensure};
use crate::resets::Resets;
use crate::workload::Workload;

const PORT: u16 = 4400;
const MOVE: Duration = Duration::from_secs(60);
const PATIENCE: Duration = Duration::from_secs(30);
/// What the clients have said takes more than five seconds.
const SLOW_MBIT: u32 = 8;
const V6: &str = "::1";

/// Where it listens, and what it connects to.
type Place = (&'static str, &'static str);
const V4: Place = ("127.0.0.1", "127.0.0.1");

pub(crate) fn cases() -> Vec<Case> {
    let places: [(&str, Place); 4] = [
        ("ipv4", V4),
        ("ipv6", (V6, V6)),
        ("ipv4_at_a_socket_of_ipv6", ("::", "127.0.0.1")),
        ("ipv4_as_ipv6", ("::", "::ffff:127.0.0.1")),
    ];
    let mut cases = Vec::new();
    for (name, place) in places {
        for mode in ["precopy", "auto"] {
            let run = move |lan: &Lan| there_and_back(lan, place, &["--tcp-established", "--mode", mode]);
            cases.push(Case::new(format!("own_queue/{name}_{mode}"), run));
        }
    }
    let own = ("0.0.0.0", Lan::SERVICE);
    cases.push(Case::new("own_queue/address_that_moves", move |lan| there_and_back(lan, own, &OPTIONS)));
    cases.push(Case::new("own_queue/address_that_changes", address_that_changes));
    cases.push(Case::new("own_queue/not_moved", not_moved));
    cases.push(Case::new("own_queue/not_moved_with_all_that_was_read", not_arrived));
    cases.push(Case::new("own_queue/client_that_closed_before_all_has_come", closed_full));
    cases.push(Case::new("own_queue/client_of_another_process", of_another_process));
    cases.push(Case::new("own_queue/waiting_for_another_process", of_a_sibling));
    cases.push(Case::new("own_queue/sent_slowly", sent_slowly));
    for (name, kind) in [("clients_closed_and_served", "closed"), ("no_room_for_all", "asked")] {
        let run = move |lan: &Lan| one_end(lan, kind);
        cases.push(Case::new(format!("own_queue/{name}"), run));
    }
    cases.push(Case::new("own_queue/asks_itself_all_the_time", asks_all_the_time));
    cases
}

fn start(lan: &Lan, (at, to): Place, more: &[&str]) -> Result<(Workload, Resets)> {
    let port = PORT.to_string();
    let words = [&[at, to, &port], more].concat();
    let workload = Workload::start(&lan.a, "tcp_self", &words)?;
    Ok((workload, Resets::watch(lan, PORT)?))
}

/// It accepts all of them; the number of times that it has, with this one. Nobody was reset.
fn all_are_served(lan: &Lan, host: &Host, workload: &mut Workload, resets: &Resets, times: usize) -> Result {
    workload.check(host)?;
    resets.none(lan)?;
    host.signal(workload.pid(), libc::SIGUSR2)?;
    let served = wait_for("all being served", PATIENCE, || {
        let said = host.stdout(&workload.job);
        let all: Vec<&str> = said.lines().filter(|line| line.starts_with("served")).collect();
        Ok((all.len() == times).then(|| all.last().map(|last| (*last).to_owned())))
    });
    let served = served.map_err(|error| format!("{error}: {}", host.stdout(&workload.job)))?;
    println!("    {}", served.unwrap_or_default());
    resets.none(lan)?;
    workload.check_going_on(host)
}

fn there_and_back(lan: &Lan, place: Place, options: &[&str]) -> Result {
    let (mut workload, resets) = start(lan, place, &[])?;
    lan.share_identity()?;
    let services = [lan.serve(&lan.b)?, lan.serve(&lan.a)?];
    for (times, (from, service)) in [(&lan.a, &services[0]), (&lan.b, &services[1])].into_iter().enumerate() {
        let to = lan.other(from);
        let moved = lan.move_to(from, service, workload.pid(), options, MOVE)?.expect_moved()?;
        println!("    downtime {} ms", moved.report["downtime_ms"]);
        all_are_served(lan, to, &mut workload, &resets, times + 1)
            .map_err(|error| format!("{error}\nthe service: {}", to.stderr(&service.job)))?;
    }
    Ok(())
}

/// The same, two moves before it accepts; the address of both ends is another one there.
fn address_that_changes(lan: &Lan) -> Result {
    let (mut workload, resets) = start(lan, ("0.0.0.0", Lan::A), &[])?;
    lan.share_identity()?;
    let services = [lan.serve(&lan.b)?, lan.serve(&lan.a)?];
    let remap = |from: &str, to: &str| format!("{from}={to}");
    let there = remap(Lan::A, Lan::B);
    let options = |remap| ["--tcp-established", "--tcp-remap", remap];
    lan.move_to(&lan.a, &services[0], workload.pid(), &options(&there), MOVE)?.expect_moved()?;
    workload.check(&lan.b)?;
    let back = remap(Lan::B, Lan::A);
    lan.move_to(&lan.b, &services[1], workload.pid(), &options(&back), MOVE)?.expect_moved()?;
    all_are_served(lan, &lan.a, &mut workload, &resets, 1)
}

/// The move fails when they are locked already.
fn not_moved(lan: &Lan) -> Result {
    let (mut workload, resets) = start(lan, V4, &[])?;
    lan.share_identity()?;
    let service = lan.serve(&lan.b)?;
    let hold = Hold::at(lan, "network-lock", 1);
    let options = ["--tcp-established", "--hook", &hold.command];
    let job = lan.start_move(&lan.a, &service.address, workload.pid(), &options)?;
    hold.until_held(&job)?;
    hold.let_go()?;
    says(&lan.finish_move(&lan.a, &job, MOVE)?, &["hook", "network-lock"])?;
    all_are_served(lan, &lan.a, &mut workload, &resets, 1)
}

/// The destination is gone when the connections have been read.
fn not_arrived(lan: &Lan) -> Result {
    let (mut workload, resets) = start(lan, V4, &[])?;
    lan.share_identity()?;
    let service = lan.serve(&lan.b)?;
    let hold = Hold::at(lan, "network-lock", 0);
    let options = ["--tcp-established", "--hook", &hold.command];
    let job = lan.start_move(&lan.a, &service.address, workload.pid(), &options)?;
    hold.until_held(&job)?;
    lan.b.kill(service.job.pid)?;
    hold.let_go()?;
    let outcome = lan.finish_move(&lan.a, &job, MOVE)?;
    ensure(!outcome.moved(), || format!("it was moved: {}", outcome.report))?;
    all_are_served(lan, &lan.a, &mut workload, &resets, 1)
}

/// Nobody could take along what the kernel of a closed end still has to say.
fn closed_full(lan: &Lan) -> Result {
    let (mut workload, resets) = start(lan, V4, &["closed_full"])?;
    lan.share_identity()?;
    let service = lan.serve(&lan.b)?;
    let outcome = lan.move_to(&lan.a, &service, workload.pid(), &["--tcp-established"], MOVE)?;
    says(&outcome, &["not accepted yet", "of this very host", "closed"])?;
    all_are_served(lan, &lan.a, &mut workload, &resets, 1)?;
    // Now nothing is in the way.
    lan.move_to(&lan.a, &service, workload.pid(), &["--tcp-established"], MOVE)?.expect_moved()?;
    all_are_served(lan, &lan.b, &mut workload, &resets, 2)
}

/// A client on the same host that does not come along.
fn of_another_process(lan: &Lan) -> Result {
    let mut workload = Workload::start(&lan.a, "tcp_echo", &[&PORT.to_string(), "16"])?;
    let connect = || TcpStream::connect(SocketAddr::from(([127, 0, 0, 1], PORT)));
    let client = Lan::inside(&lan.a, "connect", connect)?.join().map_err(|_| "the client panicked")???;
    let name = client.local_addr()?.to_string();
    lan.share_identity()?;
    let service = lan.serve(&lan.b)?;
    let outcome = lan.move_to(&lan.a, &service, workload.pid(), &["--tcp-established"], MOVE)?;
    says(&outcome, &["not accepted yet", "of this very host", &name])?;
    workload.check_going_on(&lan.a)
}

/// Where a sibling listens as well, nobody can tell whose those are that wait.
fn of_a_sibling(lan: &Lan) -> Result {
    let port = PORT.to_string();
    let mut sibling = Workload::start(&lan.a, "tcp_own", &["sibling", &port])?;
    let mut workload = Workload::start(&lan.a, "tcp_own", &["crowd", &port])?;
    lan.share_identity()?;
    let service = lan.serve(&lan.b)?;
    let options = ["--tcp-established", "--mode", "precopy"];
    let outcome = lan.move_to(&lan.a, &service, workload.pid(), &options, MOVE)?;
    says(&outcome, &["not accepted yet", "another process", "so_reuseport"])?;
    sibling.check_going_on(&lan.a)?;
    is_told_to_serve(&lan.a, &mut workload)
}

/// More waits than the link carries in the time that one message may take.
fn sent_slowly(lan: &Lan) -> Result {
    let (mut workload, resets) = start(lan, V4, &[])?;
    lan.share_identity()?;
    let service = lan.serve(&lan.b)?;
    lan.limit_rate(&lan.a, SLOW_MBIT)?;
    let options = ["--tcp-established", "--mode", "precopy"];
    let moved = lan.move_to(&lan.a, &service, workload.pid(), &options, MOVE)?.expect_moved()?;
    println!("    total {} ms", moved.report["total_ms"]);
    all_are_served(lan, &lan.b, &mut workload, &resets, 1)
}

fn is_told_to_serve(host: &Host, workload: &mut Workload) -> Result {
    workload.check(host)?;
    host.signal(workload.pid(), libc::SIGUSR2)?;
    wait_for("its connections being served", PATIENCE, || {
        Ok(host.stdout(&workload.job).lines().any(|line| line == "served").then_some(()))
    })
    .map_err(|error| format!("{error}: {}", host.stdout(&workload.job)))?;
    workload.check_going_on(host)
}

/// There and back, and then it is told.
fn one_end(lan: &Lan, kind: &str) -> Result {
    let mut workload = Workload::start(&lan.a, "tcp_own", &[kind, &PORT.to_string()])?;
    lan.share_identity()?;
    let services = [lan.serve(&lan.b)?, lan.serve(&lan.a)?];
    for (from, service) in [(&lan.a, &services[0]), (&lan.b, &services[1])] {
        lan.move_to(from, service, workload.pid(), &["--tcp-established"], MOVE)?.expect_moved()?;
        workload.check(lan.other(from))?;
    }
    is_told_to_serve(&lan.a, &mut workload)
}

/// Whatever the connection is doing that it has at that moment.
fn asks_all_the_time(lan: &Lan) -> Result {
    let mut workload = Workload::start(&lan.a, "tcp_own", &["asking", &PORT.to_string()])?;
    lan.share_identity()?;
    let services = [lan.serve(&lan.b)?, lan.serve(&lan.a)?];
    for _ in 0..5 {
        for (from, service) in [(&lan.a, &services[0]), (&lan.b, &services[1])] {
            lan.move_to(from, service, workload.pid(), &["--tcp-established"], MOVE)?.expect_moved()?;
            workload.check_going_on(lan.other(from))?;
        }
    }
    Ok(())
}
