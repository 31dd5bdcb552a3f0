//! A source command and its sentinel killed together while nobody but the destination knows who runs the
//! process; and addresses that move, when the command is killed.

use std::path::{Path, PathBuf};
use std::time::Duration;

use migrate::testbed::{Host, Job, Lan, Outcome, STATE, Spawn, TestbedError, wait_for};
use serde_json::Value;

use super::crash::{self, SETTLE};
use crate::case::{Case, Choices, Result, ensure, fail};
use crate::relay::{Relay, Way, Weather};
use crate::workload::Workload;

const MOVE: Duration = Duration::from_secs(120);
const INSTANTS: u64 = 10;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("limbo/resume_accepted", |lan| limbo(lan, true)),
        Case::new("limbo/resume_not_accepted", |lan| limbo(lan, false)),
        Case::new("limbo/source_killed_with_address", addresses),
        Case::new("limbo/signals_before_the_commit", late_signals),
    ]
}

/// The one record of a migration that a host's source command has written.
fn record(host: &Host) -> Option<Value> {
    record_in(&records(host))
}

fn records(host: &Host) -> PathBuf {
    host.outside(format!("{STATE}/outgoing"))
}

fn record_in(directory: &Path) -> Option<Value> {
    let list = std::fs::read_dir(directory).ok()?;
    let paths = list.flatten().map(|entry| entry.path());
    let mut records: Vec<PathBuf> =
        paths.filter(|path| path.extension().is_some_and(|e| e == "json")).collect();
    serde_json::from_slice(&std::fs::read(records.pop()?).ok()?).ok()
}

/// A relay that holds what goes one way from when the source has recorded that state on.
pub(crate) fn held_from(lan: &Lan, way: Way, state: &'static str) -> Result<Relay> {
    let records = records(&lan.a);
    held_once(lan, way, move || record_in(&records).is_some_and(|record| record["state"] == state))
}

/// A relay that holds what goes one way once something is so.
fn held_once(lan: &Lan, way: Way, so: impl Fn() -> bool + Send + 'static) -> Result<Relay> {
    let weather = Weather { lost: 0, repeated: 0, delay: Duration::from_millis(10), reorders: true };
    Relay::with_gate(lan, weather, Box::new(move |at| at == way && so()))
}

/// Waits until the source command has recorded that state; its record.
pub(crate) fn at_state(host: &Host, job: &Job, state: &str) -> Result<Value> {
    let what = format!("the record of {state}");
    Ok(wait_for(&what, MOVE, || {
        if let Some(record) = record(host).filter(|record| record["state"] == state) {
            return Ok(Some(record));
        }
        match host.exit_of(job.pid) {
            Some(exit) => Err(TestbedError::Program(format!("{exit:?} before {what}: {}", host.stderr(job)))),
            None => Ok(None),
        }
    })?)
}

/// The sentinels on a host.
pub(crate) fn sentinels(host: &Host) -> Result<Vec<i32>> {
    let is_one = |pid: i32| {
        let words = std::fs::read(host.proc(pid).join("cmdline")).unwrap_or_default();
        words.split(|byte| *byte == 0).any(|word| word == b"__sentinel")
    };
    Ok(host.processes()?.into_iter().map(|(pid, _)| pid).filter(|pid| is_one(*pid)).collect())
}

/// In limbo both are killed. The process is held, whatever the destination does, until `migrate resume`.
fn limbo(lan: &Lan, accepted: bool) -> Result {
    let mut workload = Workload::start(&lan.a, "counter", &[])?;
    lan.share_identity()?;
    let service = lan.serve(&lan.b)?;
    // The record is written before the commit is sent, which gets no further: afterwards it arrives, or it meets a cut
    // link.
    let relay = held_from(lan, Way::Forth, "limbo")?;
    let job = lan.start_move(&lan.a, &relay.address, workload.pid(), &[])?;
    let record = at_state(&lan.a, &job, "limbo")?;
    let guards = sentinels(&lan.a)?;
    ensure(guards.len() == 1, || format!("{guards:?} sentinels"))?;
    if !accepted {
        lan.cut(&lan.b)?;
    }
    lan.a.signal(guards[0], libc::SIGKILL)?;
    lan.a.kill(job.pid)?;
    relay.release();
    let pid = workload.pid();
    wait_for("the fence", SETTLE, || Ok(stopped(&lan.a, pid).then_some(())))?;
    let id = record["id"].as_str().ok_or("a record without an id")?.to_owned();
    if accepted {
        wait_for("the process at the destination", SETTLE, || Ok(crash::runs(&lan.b, pid).then_some(())))?;
    } else {
        // While nobody can be asked the process stays where it is.
        let outcome = resume(lan, &id)?;
        expect(&outcome, 3, "unknown")?;
        wait_for("the destination giving up", SETTLE, || Ok((!lan.b.proc(pid).exists()).then_some(())))?;
        lan.heal(&lan.b)?;
    }
    ensure(stopped(&lan.a, pid), || "it is not held any more".to_owned())?;
    let (word, host) = if accepted { ("moved", &lan.b) } else { ("not_moved", &lan.a) };
    expect(&resume(lan, &id)?, 0, word)?;
    workload.check_going_on(host)?;
    let other = lan.other(host);
    wait_for("the end of the other one", SETTLE, || Ok((!crash::has(other, pid)).then_some(())))?;
    // Nothing is left to resolve.
    expect(&resume(lan, &id)?, 0, "nothing")?;
    ensure(lan.b.exit_of(service.job.pid).is_none(), || "the service has ended".to_owned())
}

pub(crate) fn stopped(host: &Host, pid: i32) -> bool {
    let status = std::fs::read_to_string(host.proc(pid).join("status")).unwrap_or_default();
    status.contains("State:\tT (stopped)") && status.contains("TracerPid:\t0")
}

pub(crate) fn resume(lan: &Lan, id: &str) -> Result<Outcome> {
    Ok(lan.run(&lan.a, &["resume", id, "--json", "--state-dir", STATE], Duration::from_secs(60))?)
}

fn expect(outcome: &Outcome, code: i32, word: &str) -> Result {
    ensure(outcome.exit.code == Some(code) && outcome.report["outcome"] == word, || {
        format!("not {code} {word}: {:?} {} {}", outcome.exit, outcome.report, outcome.stderr)
    })
}

/// Signals that come while the process is held, most of them after its capture: none is lost, and the stop
/// among them is one.
fn late_signals(lan: &Lan) -> Result {
    const SIGNALS: usize = 200;
    const EARLY: usize = 20;
    let mut workload = Workload::start(&lan.a, "late_signals", &[])?;
    lan.share_identity()?;
    let service = lan.serve(&lan.b)?;
    // The answer to the state, which the destination records before it sends it, waits for the last signal.
    let answers = lan.b.outside(format!("{STATE}/incoming"));
    let prepared = answers.clone();
    let relay = held_once(lan, Way::Back, move || record_in(&prepared).is_some())?;
    let job = lan.start_move(&lan.a, &relay.address, workload.pid(), &["--move-ip", Lan::MOVE_IP])?;
    at_state(&lan.a, &job, "taking")
        .map_err(|error| format!("{error}\nthe service: {}", lan.b.stderr(&service.job)))?;
    for _ in 0..EARLY {
        lan.a.signal(workload.pid(), libc::SIGRTMIN())?;
    }
    wait_for("the state at the destination", SETTLE, || Ok(record_in(&answers).map(drop)))?;
    // All by one program, as the source does not wait for an answer for ever.
    let kill = format!(
        "for i in $(seq {}); do kill -{} {pid}; done; kill -STOP {pid}",
        SIGNALS - EARLY,
        libc::SIGRTMIN(),
        pid = workload.pid()
    );
    let (exit, _, said) = lan.a.run(&Spawn::new(["/bin/sh", "-c", &kill]), SETTLE)?;
    ensure(exit.code == Some(0) && said.is_empty(), || format!("{exit:?} {said}"))?;
    ensure(record(&lan.a).is_some_and(|r| r["state"] == "taking"), || {
        format!("it did not wait for the answer: {}", lan.a.stderr(&job))
    })?;
    relay.release();
    lan.finish_move(&lan.a, &job, MOVE)?.expect_moved()?;
    wait_for("the stop at the destination", SETTLE, || Ok(stopped(&lan.b, workload.pid()).then_some(())))?;
    lan.b.signal(workload.pid(), libc::SIGCONT)?;
    workload.check(&lan.b)?;
    let wanted = format!("got {SIGNALS}\n");
    let said = lan.b.stdout(&workload.job);
    ensure(said.contains(&wanted), || format!("it said: {said}"))
}

/// kill -9 of a source command that moves an address: the address is where the process is, on one host.
fn addresses(lan: &Lan) -> Result {
    let mut choices = Choices::new("addresses");
    let mut workload = Workload::start(&lan.a, "writer", &["2", "32", "/run/shared/writer", "2"])?;
    lan.share_identity()?;
    let services = [lan.serve(&lan.a)?, lan.serve(&lan.b)?];
    let mut here = &lan.a;
    let mut moved = 0;
    for round in 0..INSTANTS {
        let there = lan.other(here);
        let service = &services[usize::from(there.name() == lan.b.name())];
        // In post-copy the process is lost with its source, as is said: what it misses was only there.
        let options = ["--mode", "precopy", "--move-ip", Lan::MOVE_IP];
        let job = lan.start_move(here, &service.address, workload.pid(), &options)?;
        // From the record on, the address may be gone: what comes after is what is to be hit.
        at_state_or_later(here, &job)?;
        std::thread::sleep(Duration::from_micros(choices.below(12_000) * round));
        let _ = here.signal(job.pid, libc::SIGKILL);
        here.wait_exit(job.pid, SETTLE)?;
        let runner = crash::settled(lan, workload.pid())?;
        let what = || format!("instant {round}, the process is on {}", runner.name());
        wait_for("the address on one host", SETTLE, || {
            let (at_runner, at_other) = (lan.has_service(runner)?, lan.has_service(lan.other(runner))?);
            Ok((at_runner && !at_other).then_some(()))
        })
        .map_err(|error| format!("{error}: {}", what()))?;
        workload.check(runner).map_err(|error| format!("{error}: {}", what()))?;
        wait_for("the end of the sentinel", SETTLE, || {
            Ok(sentinels(here).is_ok_and(|list| list.is_empty()).then_some(()))
        })?;
        moved += usize::from(runner.name() == there.name());
        here = runner;
    }
    println!("    of {INSTANTS} disturbed moves {moved} arrived");
    Ok(())
}

/// Waits until there is a record, or the command has ended: too soon for us.
fn at_state_or_later(host: &Host, job: &Job) -> Result {
    let seen = wait_for("a record", MOVE, || {
        Ok((record(host).is_some() || host.exit_of(job.pid).is_some()).then(|| host.exit_of(job.pid)))
    })?;
    match seen {
        Some(exit) if exit.code != Some(0) => fail(format!("{exit:?} {}", host.stderr(job))),
        _ => Ok(()),
    }
}
