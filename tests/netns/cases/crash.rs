//! kill -9 of the source command, of the service, and a cut link, each at random instants of a move: one
//! host runs the process, nothing is left at the other, and the next move works.

use std::time::{Duration, Instant};

use migrate::testbed::{Host, Job, Lan, Outcome, Service, TestbedError, wait_for};

use crate::case::{Case, Choices, Result};
use crate::workload::Workload;

const INSTANTS: usize = 20;
const MOVE: Duration = Duration::from_secs(120);
/// How long it may take until it is clear which host runs the process.
const SETTLE: Duration = Duration::from_secs(60);
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
        Case::new("crash/service_killed", |lan| at_random_instants(lan, Blow::KillService, "service")),
        Case::new("crash/link_cut", |lan| at_random_instants(lan, Blow::CutLink, "link")),
    ]
}

fn at_random_instants(lan: &Lan, blow: Blow, name: &str) -> Result {
    let mut choices = Choices::new(name);
    let mut workload = Workload::start(&lan.a, "writer", &["2", "64", "/run/shared/writer", "4"])?;
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
        let runner = settled(lan, workload.pid()).map_err(|error| format!("{}: {error}", what()))?;
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

/// The one host that has the process, once that is clear. Both running it at once is an error at any time.
fn settled(lan: &Lan, pid: i32) -> Result<&Host> {
    let host = wait_for("one host having the process", SETTLE, || {
        let (on_a, on_b) = (state(&lan.a, pid), state(&lan.b, pid));
        let runs = |state: Option<char>| state.is_some_and(|state| matches!(state, 'R' | 'S' | 'D'));
        if runs(on_a) && runs(on_b) {
            return Err(TestbedError::Program(format!("process {pid} runs on both hosts")));
        }
        Ok(match (on_a, on_b) {
            // The looks are not at one instant: between them it may have moved.
            (None, None) if state(&lan.a, pid).is_none() && state(&lan.b, pid).is_none() => {
                return Err(TestbedError::Program(format!("process {pid} is on no host")));
            }
            (Some(_), None) if runs(on_a) => Some(&lan.a),
            (None, Some(_)) if runs(on_b) => Some(&lan.b),
            _ => None,
        })
    })?;
    Ok(host)
}

/// The letter of the leader's state; a zombie that waits for its parent is none.
fn state(host: &Host, pid: i32) -> Option<char> {
    let status = std::fs::read_to_string(host.proc(pid).join("status")).ok()?;
    let letter = status.lines().find_map(|line| line.strip_prefix("State:\t"))?.chars().next()?;
    (letter != 'Z' && letter != 'X').then_some(letter)
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
