//! Programs that change all they have while their memory is missing: children, threads, maps, buffers of the
//! kernel's, and real run-time systems that move their objects about.
//!
//! A program's storm is what it does when it is asked to check itself: once before the move, once while pages
//! are missing, once when all are there.

use std::time::Duration;

use migrate::testbed::{Exit, Host, Job, Lan, Outcome, Service, Spawn, TestbedError, wait_for};

use super::drain::{only, wait_for_drain};
use super::kinds::HUGE_PAGES;
use super::moves::count_is_exact;
use crate::case::{Case, Need, Result, ensure};
use crate::workload::{self, Workload};

const MOVE: Duration = Duration::from_secs(120);
const END: Duration = Duration::from_secs(60);
/// Many seconds for the memory of these programs, and still more for that of those that end in the middle.
const SLOW: &[&str] = &["--mode", "postcopy", "--bandwidth", "8M"];
const SLOWER: &[&str] = &["--mode", "postcopy", "--bandwidth", "4M"];

/// Programs of C by their kinds: those that have threads only keep an exact account.
const STORMS: &[(&str, &[&str])] = &[
    ("storm_memory", &["mremap", "munmap", "dontneed", "remove", "twice", "all", "huge"]),
    ("storm_kernel", &["buffers", "futex", "stack"]),
    ("storm_family", &["vfork", "threads", "fork_bomb", "exec", "exec_self"]),
];

pub(crate) fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for &(program, kinds) in STORMS {
        for &kind in kinds {
            let pair = [
                Case::new(format!("storm/{kind}_unmoved"), move |lan: &Lan| {
                    Workload::start(&lan.a, program, &[kind])?.check_going_on(&lan.a)
                }),
                Case::new(format!("storm/{kind}"), move |lan: &Lan| through(lan, program, kind)),
            ];
            let huge = Need::HugePages(HUGE_PAGES);
            all.extend(pair.map(|case| if kind == "huge" { case.needs(huge) } else { case }));
        }
    }
    let crashed = Exit { code: None, signal: Some(libc::SIGSEGV) };
    let ended = Exit { code: Some(3), signal: None };
    for (kind, exit) in [("crash", crashed), ("exit", ended), ("orphan", ended)] {
        all.push(Case::new(format!("storm/{kind}_unmoved"), move |lan: &Lan| ends_unmoved(lan, kind, exit)));
    }
    for (kind, exit) in [("crash", "Signaled(Pid(#), SIGSEGV,"), ("exit", "Exited(Pid(#), 3)")] {
        all.push(Case::new(format!("storm/{kind}"), move |lan: &Lan| ends(lan, kind, exit)));
    }
    all.push(Case::new("storm/orphan", orphan));
    for (name, program) in [("python", "python3"), ("node", "node"), ("java", "javac")] {
        for mode in ["still", "postcopy", "auto"] {
            all.push(
                Case::new(format!("storm/{name}_{mode}"), move |lan: &Lan| objects(lan, name, mode))
                    .needs(Need::Program(program)),
            );
        }
    }
    all
}

/// A move whose process runs at the destination and misses pages.
struct Storm {
    workload: Workload,
    service: Service,
    job: Job,
}

impl Storm {
    fn begin(lan: &Lan, mut workload: Workload, options: &[&str]) -> Result<Self> {
        workload.check(&lan.a)?;
        lan.share_identity()?;
        let service = lan.serve(&lan.b)?;
        let job = lan.start_move(&lan.a, &service.address, workload.pid(), options)?;
        wait_for_drain(lan, &job)?;
        Ok(Self { workload, service, job })
    }

    fn check(&mut self, lan: &Lan) -> Result {
        let checked = self.workload.check(&lan.b);
        checked.map_err(|error| format!("{error}\nthe service: {}", lan.b.stderr(&self.service.job)).into())
    }

    /// Lets it end. Its parent is the service now, which tells how: `#` stands for the PID.
    fn end(&self, lan: &Lan, how: &str) -> Result {
        let pid = self.workload.pid();
        let how = how.replace('#', &pid.to_string());
        lan.b.signal(pid, libc::SIGUSR2)?;
        let ended = wait_for("the end of the process", END, || {
            let told = lan.b.stderr(&self.service.job).contains(&how);
            Ok((told && !lan.b.proc(pid).exists()).then_some(()))
        });
        ended.map_err(|error| format!("{error}\nthe service: {}", lan.b.stderr(&self.service.job)))?;
        Ok(())
    }

    fn finish(&self, lan: &Lan) -> Result<Outcome> {
        let outcome = lan.finish_move(&lan.a, &self.job, MOVE)?.expect_moved();
        Ok(outcome.map_err(|error| format!("{error}\nthe service: {}", lan.b.stderr(&self.service.job)))?)
    }
}

fn through(lan: &Lan, program: &str, kind: &str) -> Result {
    let mut storm = Storm::begin(lan, Workload::start(&lan.a, program, &[kind])?, SLOW)?;
    storm.check(lan)?;
    let outcome = storm.finish(lan)?;
    ensure(outcome.report["pages_faulted"].as_u64() > Some(0), || {
        format!("the storm missed nothing: {}", outcome.report)
    })?;
    // With children born meanwhile, pages go to several places.
    if !["fork_bomb", "exec"].contains(&kind) {
        count_is_exact(&outcome)?;
    }
    storm.check(lan)?;
    storm.check(lan)?;
    only(&lan.a, 0)?;
    only(&lan.b, 2)
}

fn ends_unmoved(lan: &Lan, kind: &str, end: Exit) -> Result {
    let mut workload = Workload::start(&lan.a, "storm_family", &[kind])?;
    workload.check(&lan.a)?;
    lan.a.signal(workload.pid(), libc::SIGUSR2)?;
    let exit = lan.a.wait_exit(workload.pid(), END)?;
    ensure(exit == end, || format!("it ended otherwise: {exit:?}"))?;
    if kind == "orphan" { said(&lan.a, &workload.job, ORPHAN) } else { Ok(()) }
}

/// The end of the process is the end it chose, and nothing waits for the pages it missed.
fn ends(lan: &Lan, kind: &str, end: &str) -> Result {
    let storm = Storm::begin(lan, Workload::start(&lan.a, "storm_family", &[kind])?, SLOWER)?;
    storm.end(lan, end)?;
    let outcome = storm.finish(lan)?;
    ensure(outcome.report["pages_dropped"].as_u64() > Some(0), || format!("{}", outcome.report))?;
    only(&lan.a, 0)?;
    only(&lan.b, 1)
}

/// A child that is left alone with missing pages finds them all.
fn orphan(lan: &Lan) -> Result {
    let storm = Storm::begin(lan, Workload::start(&lan.a, "storm_family", &["orphan"])?, SLOW)?;
    storm.end(lan, "Exited(Pid(#), 3)")?;
    said(&lan.b, &storm.workload.job, ORPHAN)
        .map_err(|error| format!("{error}\nthe service: {}", lan.b.stderr(&storm.service.job)))?;
    storm.finish(lan)?;
    only(&lan.a, 0)?;
    only(&lan.b, 1)
}

/// What the child that is left writes at its end.
const ORPHAN: &str = "orphan is right";

/// Waits for a line that a child of an ended job writes.
fn said(host: &Host, job: &Job, line: &str) -> Result {
    Ok(wait_for(line, END, || {
        let text = host.stdout(job);
        if text.contains("FAIL") {
            return Err(TestbedError::Program(text));
        }
        Ok(text.contains(line).then_some(()))
    })?)
}

/// A large graph of objects, changed and verified all the time, in a run-time system with a collector.
fn objects(lan: &Lan, name: &str, mode: &str) -> Result {
    let script = |file: &str| workload::sources().join(file).to_string_lossy().into_owned();
    let mut workload = match name {
        "python" => Workload::python(&lan.a, "graph", &[])?,
        "java" => {
            let classes = workload::java("Graph")?;
            let words = ["java", "-Xmx128m", "-XX:+UseG1GC", "-cp", &classes, "Graph"];
            Workload::spawn(&lan.a, &Spawn::new(words))?
        }
        _ => Workload::spawn(&lan.a, &Spawn::new(["node", "--expose-gc", &script("graph.js")]))?,
    };
    workload.check_going_on(&lan.a)?;
    if mode == "still" {
        return Ok(());
    }
    lan.share_identity()?;
    let service = lan.serve(&lan.b)?;
    let options = ["--mode", mode, "--bandwidth", "32M"];
    let job = lan.start_move(&lan.a, &service.address, workload.pid(), &options)?;
    if mode == "postcopy" {
        wait_for_drain(lan, &job)?;
        workload.check(&lan.b)?;
    }
    let outcome = lan.finish_move(&lan.a, &job, MOVE)?.expect_moved()?;
    let checked = workload.check_going_on(&lan.b);
    checked.map_err(|error| format!("{error}\n{}\n{}", outcome.report, lan.b.stderr(&service.job)))?;
    only(&lan.a, 0)?;
    only(&lan.b, 2)
}
