//! A server writes much, closes, and is moved with its address, while its kernel still sends to a client that takes its
//! time. The client gets every byte and the end, or the move is refused by its name.

use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use migrate::testbed::{Lan, Outcome, STATE, wait_for};

use super::refusals::says;
use super::tcp::{OPTIONS, PORT};
use crate::case::{Case, Result, ensure, fail};
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
    let right = got.iter().enumerate().all(|(at, byte)| usize::from(*byte) == at % 251);
    ensure(right && got.len() == BYTES, || format!("{} of {BYTES} bytes, right: {right}", got.len()))
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
