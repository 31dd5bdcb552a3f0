//! kill -9 of the source command, of the service, and a cut link, each at random instants of a move: one
//! host runs the process, nothing is left at the other, and the next move works.

use std::time::{Duration, Instant};

use migrate::testbed::{Host, Job, Lan, Outcome, Service, Spawn, TestbedError, wait_for};

use crate::case::{Case, Choices, Result};
use crate::workload::{Workload, build};

const INSTANTS: usize = 20;
const MOVE: Duration = Duration::from_secs(120);
/// How long it may take until it is clear which host runs the process.
pub(crate) const SETTLE: Duration = Duration::from_secs(60);
/// How long a link stays cut.
const CUT: Duration = Duration::from_secs(3);

#[derive(Clone, Copy)]
enum Blow {
    KillSource,
    KillService,
    CutLink,
}

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("crash/source_killed", |lan| at_random_instants(lan, Blow::KillSource, "source")),
        Case::new("crash/source_killed_all_signals_handled", |lan| {
            at_random_instants(lan, Blow::KillSource, "handled")
        }),
        Case::new("crash/service_killed", |lan| at_random_instants(lan, Blow::KillService, "service")),
        Case::new("crash/link_cut", |lan| at_random_instants(lan, Blow::CutLink, "link")),
    ]
}

fn at_random_instants(lan: &Lan, blow: Blow, name: &str) -> Result {
    let mut choices = Choices::new(name);
    let mut program = Spawn::new([&build("writer")?, "2", "64", "/run/shared/writer", "4"]);
    if name == "handled" {
        program = program.env("HANDLE_ALL_SIGNALS", "1");
    }
    let mut workload = Workload::spawn(&lan.a, &program)?;
    lan.share_identity()?;
    let mut services = [lan.serve(&lan.a)?, lan.serve(&lan.b)?];
    let mut here = &lan.a;
    // One undisturbed move tells how long one takes.
    let begin = Instant::now();
    lan.move_to(here, other_service(lan, here, &services), workload.pid(), &[], MOVE)?.expect_moved()?;
    let whole = begin.elapsed();
    here = lan.other(here);
    let mut moved = 0;
    for round in 1..=INSTANTS {
        let micros = choices.below(u64::try_from(whole.as_micros())? * 11 / 10);
        let what = || format!("instant {round}, {micros} µs of {} µs", whole.as_micros());
        let there = lan.other(here);
        let service = other_service(lan, here, &services).clone();
        let job = lan.start_move(here, &service.address, workload.pid(), &[])?;
        // The instant is the point here: there is no condition to wait for.
        std::thread::sleep(Duration::from_micros(micros));
        strike(lan, blow, here, there, &job, &service).map_err(|error| format!("{}: {error}", what()))?;
        if matches!(blow, Blow::KillService) {
            let fresh = lan.serve(there)?;
            services[usize::from(there.name() == lan.b.name())] = fresh;
        }
        // A command that is still at it could move the process after all, once the link is back.
        here.wait_exit(job.pid, MOVE).map_err(|error| format!("{}: {error}", what()))?;
        let runner = settled(lan, workload.pid())
            .map_err(|error| format!("{}: {error}{}", what(), story(lan, here, &job, &services)))?;
        moved += usize::from(runner.name() == there.name());
        here = runner;
        workload.check(here).map_err(|error| format!("{}: {error}", what()))?;
        nothing_left(lan, here, &services).map_err(|error| format!("{}: {error}", what()))?;
        lan.move_to(here, other_service(lan, here, &services), workload.pid(), &[], MOVE)
            .and_then(Outcome::expect_moved)
            .map_err(|error| format!("{}, the next move: {error}", what()))?;
        here = lan.other(here);
        workload.check(here)?;
    }
    println!("    of {INSTANTS} disturbed moves {moved} arrived");
    Ok(())
}

fn strike(lan: &Lan, blow: Blow, here: &Host, there: &Host, job: &Job, service: &Service) -> Result {
    match blow {
        Blow::KillSource => {
            // It may have ended by itself already.
            let _ = here.signal(job.pid, libc::SIGKILL);
            here.wait_exit(job.pid, SETTLE)?;
        }
        Blow::KillService => {
            there.kill(service.job.pid)?;
        }
        Blow::CutLink => {
            lan.cut(there)?;
            // Long enough that both sides notice, unless the command has ended before.
            let _ = here.wait_exit(job.pid, CUT);
            lan.heal(there)?;
        }
    }
    Ok(())
}

/// What is there and what was said, to understand a failure by.
fn story(lan: &Lan, here: &Host, job: &Job, services: &[Service; 2]) -> String {
    let tail = |text: String| {
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    };
    let mut story = format!("\nthe command on {}:\n{}", here.name(), tail(here.stderr(job)));
    for (host, service) in [(&lan.a, &services[0]), (&lan.b, &services[1])] {
        story +=
            &format!("\n{} has {:?}\n{}", host.name(), host.processes(), tail(host.stderr(&service.job)));
    }
    story
}

/// The one host that has the process, once that is clear. Both running it at once is an error at any time.
pub(crate) fn settled(lan: &Lan, pid: i32) -> Result<&Host> {
    // How long it had run on each when it first seemed to run on both.
    let mut both: Option<[u64; 2]> = None;
    let host = wait_for("one host having the process", SETTLE, || {
        let (on_a, on_b) = (Life::of(&lan.a, pid), Life::of(&lan.b, pid));
        if (on_a, on_b) == (Life::Runs, Life::Runs) {
            let ran = *both.get_or_insert_with(|| [ran(&lan.a, pid), ran(&lan.b, pid)]);
            let proven = runs_indeed(&lan.a, pid, ran[0]) && runs_indeed(&lan.b, pid, ran[1]);
            // The looks are not at one instant: between them it may have moved.
            if proven && Life::of(&lan.a, pid) == Life::Runs {
                return Err(TestbedError::Program(format!("process {pid} runs on both hosts")));
            }
            return Ok(None);
        }
        both = None;
        Ok(match (on_a, on_b) {
            (Life::None, Life::None) if Life::of(&lan.a, pid) == Life::None => {
                return Err(TestbedError::Program(format!("process {pid} is on no host")));
            }
            (Life::Runs, Life::None) => Some(&lan.a),
            (Life::None, Life::Runs) => Some(&lan.b),
            _ => None,
        })
    })?;
    Ok(host)
}

/// Whether what seems to run really does: it sleeps in a call of its own, or has run on for a while. A process whose
/// tracer was killed is woken to come to the stop that waits for it: so it looks as if it ran until it gets a processor.
fn runs_indeed(host: &Host, pid: i32, before: u64) -> bool {
    const A_WHILE_NS: u64 = 1_000_000;
    let status = std::fs::read_to_string(host.proc(pid).join("status")).unwrap_or_default();
    match status.lines().find_map(|line| line.strip_prefix("State:\t")).and_then(|s| s.chars().next()) {
        Some('S' | 'D') => Life::of(host, pid) == Life::Runs,
        Some('R') => ran(host, pid) > before + A_WHILE_NS,
        _ => false,
    }
}

/// How long the first thread of a process has run, in ns.
fn ran(host: &Host, pid: i32) -> u64 {
    let text = std::fs::read_to_string(host.proc(pid).join("schedstat")).unwrap_or_default();
    text.split(' ').next().and_then(|ns| ns.parse().ok()).unwrap_or(0)
}

/// Whether the process runs by itself on a host.
pub(crate) fn runs(host: &Host, pid: i32) -> bool {
    Life::of(host, pid) == Life::Runs
}

/// Whether a host has anything of the process.
pub(crate) fn has(host: &Host, pid: i32) -> bool {
    Life::of(host, pid) != Life::None
}

/// What a host has of the process.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Life {
    /// Nothing, or a zombie that waits for its parent.
    None,
    /// It is stopped, or traced: what is being made runs calls of its tracer, and not itself. Or only its
    /// number is there, held by a copy of the service.
    Held,
    /// It runs by itself.
    Runs,
}

impl Life {
    fn of(host: &Host, pid: i32) -> Self {
        let Ok(status) = std::fs::read_to_string(host.proc(pid).join("status")) else { return Self::None };
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        match field("State:").and_then(|state| state.chars().next()) {
            None | Some('Z' | 'X') => Self::None,
            Some('R' | 'S' | 'D') if field("TracerPid:") == Some("0") && !is_ours(host, pid) => Self::Runs,
            Some(_) => Self::Held,
        }
    }
}

/// Whether the program is `migrate` itself.
fn is_ours(host: &Host, pid: i32) -> bool {
    let program = std::fs::read_link(host.proc(pid).join("exe")).unwrap_or_default();
    program.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"migrate"))
}

/// Only the services run, and the process on the host that has it. What the command leaves to tidy up
/// ends by itself, soon.
fn nothing_left(lan: &Lan, here: &Host, services: &[Service; 2]) -> Result {
    for (host, service) in [(&lan.a, &services[0]), (&lan.b, &services[1])] {
        let expected = if host.name() == here.name() { 2 } else { 1 };
        wait_for("all else ending", SETTLE, || Ok((host.processes()?.len() == expected).then_some(())))
            .map_err(|error| {
                format!(
                    "{error}; on {}, with service {}: {:?}",
                    host.name(),
                    service.job.pid,
                    host.processes()
                )
            })?;
    }
    Ok(())
}

fn other_service<'s>(lan: &Lan, here: &Host, services: &'s [Service; 2]) -> &'s Service {
    if here.name() == lan.a.name() { &services[1] } else { &services[0] }
}
