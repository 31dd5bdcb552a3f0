//! Sockets that the destination makes before the state comes: most of those of idle connections are used, whatever else
//! goes on meanwhile; and if nothing comes of the move, nobody hears of them.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use migrate::testbed::{Host, Lan, Outcome, wait_for};

use super::crash::SETTLE;
use super::hooks::Hold;
use super::refusals::says;
use super::tcp::{Clients, Crowd, OPTIONS, PORT, service_of_other};
use crate::case::{Case, Result, ensure};
use crate::resets::{Resets, tcp_counter};
use crate::workload::Workload;

const MOVE: Duration = Duration::from_secs(120);
const PATIENCE: Duration = Duration::from_secs(30);
const CROWD: Crowd = Crowd { streams: 1, calls: 4, idle: 400 };
/// Of those that do nothing. One that the kernel had to say something about by itself is another one then.
const MOST: u64 = 360;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("ahead/idle_among_busy", idle_among_busy),
        Case::new("ahead/nothing_comes_of_it", nothing_comes_of_it),
        Case::new("ahead/nobody_to_tell", nobody_to_tell),
    ]
}

/// Some begin and end all the time, and some are busy.
fn idle_among_busy(lan: &Lan) -> Result {
    let mut workload = Workload::start(&lan.a, "tcp_echo", &[&PORT.to_string()])?;
    lan.share_identity()?;
    let services = [lan.serve(&lan.a)?, lan.serve(&lan.b)?];
    let clients = Clients::start(lan, Lan::SERVICE, CROWD)?;
    let resets = Resets::watch(lan, PORT)?;
    let (stop, ended) = (Arc::new(AtomicBool::new(false)), Arc::<AtomicU64>::default());
    let passing = {
        let (stop, ended) = (Arc::clone(&stop), Arc::clone(&ended));
        lan.client("passing", move || passing(&stop, &ended))?
    };
    let mut here = &lan.a;
    for mode in ["precopy", "auto", "postcopy", "precopy"] {
        clients.get_on()?;
        let before = ended.load(Ordering::Relaxed);
        wait_for("some that begin and end", PATIENCE, || {
            Ok((ended.load(Ordering::Relaxed) > before + 10 || passing.is_finished()).then_some(()))
        })?;
        workload.check(here)?;
        let options = [&OPTIONS[..], &["--mode", mode, "-v"]].concat();
        let outcome = lan
            .move_to(here, service_of_other(lan, here, &services), workload.pid(), &options, MOVE)
            .and_then(Outcome::expect_moved)?;
        let number = |key: &str| outcome.report[key].as_u64().unwrap_or_default();
        let (all, ahead) = (number("connections"), number("connections_ahead"));
        println!("    {mode}: {ahead} of {all} connections were made ahead");
        ensure(all >= 405 && (MOST..=all).contains(&ahead), || {
            format!("{mode}: {ahead} of {all} connections were made ahead\n{}", outcome.stderr)
        })?;
        here = lan.other(here);
        workload.check(here)?;
        clients.get_on()?;
    }
    stop.store(true, Ordering::Relaxed);
    passing.join().map_err(|_| "a client panicked")???;
    resets.none(lan).map_err(|error| format!("before the clients end: {error}"))?;
    clients.finish()?;
    resets.none_but_after_ends(lan)
}

/// Connections that say something, wait for the answer and end; some are kept for a while.
fn passing(stop: &AtomicBool, ended: &AtomicU64) -> io::Result<()> {
    let address = SocketAddr::new(Lan::SERVICE.parse().map_err(io::Error::other)?, PORT);
    let mut kept = std::collections::VecDeque::new();
    while !stop.load(Ordering::Relaxed) {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"passing")?;
        stream.read_exact(&mut [0; 7])?;
        kept.push_back(stream);
        // A pace at which the ports last.
        std::thread::sleep(Duration::from_millis(2));
        if kept.len() > 5 {
            // The oldest one: it goes once the other end has gone, so that nothing is left of it there.
            kept.pop_front();
            ended.fetch_add(1, Ordering::Relaxed);
        }
    }
    Ok(())
}

/// Connections of the port that a host has.
fn there(host: &Host) -> Result<usize> {
    let of_port = format!("sport = :{PORT}");
    Ok(host.net(&["ss", "-Htan", "state", "established", &of_port])?.lines().count())
}

fn said(host: &Host) -> Result<u64> {
    tcp_counter(&host.net(&["cat", "/proc/net/snmp"])?, "OutSegs")
}

/// The destination is gone when it is to be told of the connections: the move ends, and the process has not noticed.
fn nobody_to_tell(lan: &Lan) -> Result {
    let mut workload = Workload::start(&lan.a, "tcp_echo", &[&PORT.to_string()])?;
    lan.share_identity()?;
    let service = lan.serve(&lan.b)?;
    let clients = Clients::start(lan, Lan::SERVICE, CROWD)?;
    let hold = Hold::at(lan, "pre-freeze", 0);
    let options = [&OPTIONS[..], &["--hook", &hold.command, "-vv"]].concat();
    let job = lan.start_move(&lan.a, &service.address, workload.pid(), &options)?;
    hold.until_held(&job)?;
    lan.b.kill(service.job.pid)?;
    wait_for("the end of the connection", MOVE, || {
        Ok(lan.a.stderr(&job).contains("connection ended").then_some(()))
    })?;
    hold.let_go()?;
    let outcome = lan.finish_move(&lan.a, &job, MOVE)?;
    ensure(!outcome.moved(), || "it was moved".to_owned())?;
    workload.check_going_on(&lan.a)?;
    clients.get_on()?;
    clients.finish()?;
    Ok(())
}

/// A hook says no when the sockets are there; and the service is killed then. The clients notice a pause.
fn nothing_comes_of_it(lan: &Lan) -> Result {
    let mut workload = Workload::start(&lan.a, "tcp_echo", &[&PORT.to_string()])?;
    lan.share_identity()?;
    let mut service = lan.serve(&lan.b)?;
    let clients = Clients::start(lan, Lan::SERVICE, CROWD)?;
    let resets = Resets::watch(lan, PORT)?;
    let (silent, alone) = (said(&lan.b)?, there(&lan.b)?);
    ensure(alone == 0, || format!("b has {alone} connections of the port"))?;
    let hold = Hold::at(lan, "network-lock", 1);
    let options = [&OPTIONS[..], &["--hook", &hold.command, "-v"]].concat();
    for is_killed in [false, true] {
        let job = lan.start_move(&lan.a, &service.address, workload.pid(), &options)?;
        hold.until_held(&job)?;
        wait_for("the sockets on b", PATIENCE, || {
            Ok(there(&lan.b).is_ok_and(|count| count as u64 >= MOST).then_some(()))
        })?;
        if is_killed {
            lan.b.kill(service.job.pid)?;
        }
        hold.let_go()?;
        let outcome = lan.finish_move(&lan.a, &job, MOVE)?;
        if !is_killed {
            says(&outcome, &["hook", "network-lock"])?;
        }
        ensure(!outcome.moved(), || "it was moved".to_owned())?;
        wait_for("nothing being left on b", SETTLE, || {
            Ok(there(&lan.b).is_ok_and(|count| count == 0).then_some(()))
        })?;
        workload.check_going_on(&lan.a)?;
        clients.get_on()?;
        let now = said(&lan.b)?;
        ensure(now == silent, || format!("b has sent {} segments", now - silent))?;
    }
    service = lan.serve(&lan.b)?;
    let outcome = lan.move_to(&lan.a, &service, workload.pid(), &OPTIONS, MOVE)?.expect_moved()?;
    let ahead = outcome.report["connections_ahead"].as_u64();
    ensure(ahead >= Some(MOST), || format!("{ahead:?} connections were made ahead"))?;
    workload.check(&lan.b)?;
    clients.get_on()?;
    resets.none(lan).map_err(|error| format!("before the clients end: {error}"))?;
    clients.finish()?;
    resets.none_but_after_ends(lan)
}
