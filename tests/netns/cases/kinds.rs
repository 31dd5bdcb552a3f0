//! Every self-verifying program, unmoved and moved: one table for both, so that a red moved case blames
//! the move.

use std::process::Command;
use std::time::Duration;

use migrate::testbed::{Host, Lan, Service, TestbedError, wait_for};

use super::moves;
use crate::case::{Case, Need, Result};
use crate::visible::Snapshot;
use crate::workload::{Workload, build};

/// How long one move of a small program may take.
const MOVE: Duration = Duration::from_secs(60);

/// The zoo: programs with a table of kinds each.
const ZOO: &[&str] = &[
    "zoo_signals",
    "zoo_timers",
    "zoo_clocks",
    "zoo_blocked",
    "zoo_fds",
    "zoo_process",
    "zoo_memory",
    "zoo_threads",
    "zoo_shared",
    "zoo_sockets",
    "zoo_huge",
    "zoo_state",
    "zoo_open",
    "zoo_waits",
    "zoo_layout",
];

/// Huge pages that a kind of `zoo_huge` takes at both ends.
pub(super) const HUGE_PAGES: u64 = 10;

/// What makes the writer use all kinds of memory.
pub(super) const EVERY_KIND: &[&str] = &["shared", "memfd", "sysv", "huge"];

type Start = Box<dyn Fn(&Host) -> Result<Workload>>;

struct Kind {
    name: String,
    start: Start,
    need: Option<Need>,
    /// Looks the same from outside at any time: it maps nothing and starts no thread on its own.
    steady: bool,
}

fn kinds() -> Vec<Kind> {
    let own = |name: &str, start: Start, need| {
        // Pages of huge ones and droppable ones come and go as the kernel likes.
        let restless = ["writer", "python", "shared_memfd_behind", "layout_thp", "layout_droppable"];
        let steady = !restless.iter().any(|prefix| name.starts_with(prefix));
        Kind { name: name.to_owned(), start, need, steady }
    };
    let writer = |more: &'static [&'static str]| -> Start {
        let words = ["4", "64", "/run/shared/writer", "4"];
        let words: Vec<&str> = words.iter().chain(more).copied().collect();
        Box::new(move |host| Workload::start(host, "writer", &words))
    };
    let python = Some(Need::Program("python3"));
    let mut all = vec![
        own("counter", Box::new(|host| Workload::start(host, "counter", &[])), None),
        own("writer", writer(&[]), None),
        own("writer_shared", writer(&["shared"]), None),
        own("writer_memfd", writer(&["memfd"]), None),
        own("writer_sysv", writer(&["sysv"]), None),
        own("writer_all", writer(EVERY_KIND), Some(Need::HugePages(HUGE_PAGES))),
        own("python", Box::new(|host| Workload::python(host, "busy", &["/run/shared/busy"])), python),
    ];
    for program in ZOO {
        for name in list(program).unwrap_or_default() {
            let kind = name.clone();
            let start: Start = Box::new(move |host| Workload::start(host, program, &[&kind]));
            let need = (*program == "zoo_huge").then_some(Need::HugePages(HUGE_PAGES));
            all.push(own(&format!("{}_{name}", &program[4..]), start, need));
        }
    }
    all
}

/// The kinds a program of the zoo has; none if it does not build, which a case of its own reports.
fn list(program: &str) -> Result<Vec<String>> {
    let output = Command::new(build(program)?).arg("--list").output()?;
    Ok(String::from_utf8(output.stdout)?.lines().map(str::to_owned).collect())
}

pub(crate) fn unmoved() -> Vec<Case> {
    let builds = Case::new("still/builds", |_| ZOO.iter().try_for_each(|program| build(program).map(drop)));
    let case = |kind: Kind| {
        let need = kind.need;
        let run = move |lan: &Lan| (kind.start)(&lan.a)?.check_going_on(&lan.a);
        with_need(Case::new(format!("still/{}", kind.name), run), need)
    };
    // What is refused is harmless where it is.
    let refused = Case::new("still/refused_states", |lan| {
        super::refusals::STATES.iter().try_for_each(|(_, states, _)| {
            let mut workload = Workload::start(&lan.a, "counter", states)?;
            workload.check_going_on(&lan.a)?;
            // It counts until then, and the next ones are many.
            lan.a.kill(workload.pid())?;
            Ok(())
        })
    });
    [builds, refused].into_iter().chain(kinds().into_iter().map(case)).collect()
}

/// By pre-copy as far as it goes (mode auto), and with all memory after the resume.
pub(crate) fn moved() -> Vec<Case> {
    let case = |group: &str, mode: &'static str, kind: Kind| {
        let (name, need) = (format!("{group}/{}", kind.name), kind.need);
        (Case::new(name, move |lan: &Lan| there_and_back(lan, &kind, mode)), need)
    };
    let early = kinds().into_iter().map(|kind| case("moved", "auto", kind));
    let late = kinds().into_iter().map(|kind| case("late", "postcopy", kind));
    early.chain(late).map(|(case, need)| with_need(case, need)).collect()
}

fn with_need(case: Case, need: Option<Need>) -> Case {
    match need {
        Some(need) => case.needs(need),
        None => case,
    }
}

fn there_and_back(lan: &Lan, kind: &Kind, mode: &str) -> Result {
    lan.share_identity()?;
    let services = [lan.serve(&lan.a)?, lan.serve(&lan.b)?];
    let mut workload = (kind.start)(&lan.a)?;
    workload.check(&lan.a)?;
    for (from, to, service) in [(&lan.a, &lan.b, &services[1]), (&lan.b, &lan.a, &services[0])] {
        one_way(lan, kind, mode, &mut workload, from, to, service).map_err(|error| {
            let log = to.stderr(&service.job);
            let start = log.char_indices().rev().nth(2000).map_or(0, |(at, _)| at);
            format!("from {} to {}: {error}\nthe service: {}", from.name(), to.name(), &log[start..])
        })?;
    }
    Ok(())
}

fn one_way(
    lan: &Lan,
    kind: &Kind,
    mode: &str,
    workload: &mut Workload,
    from: &Host,
    to: &Host,
    service: &Service,
) -> Result {
    let pid = workload.pid();
    let before = Snapshot::take(from, pid).map_err(|error| format!("the look before: {error}"))?;
    let outcome = lan.move_to(from, service, pid, &["--mode", mode], MOVE)?.expect_moved()?;
    if mode == "postcopy" {
        moves::count_is_exact(&outcome)?;
    }
    gone(from, pid)?;
    let after = Snapshot::take(to, pid)
        .map_err(|error| format!("the process is gone ({error}); it wrote: {}", to.stdout(&workload.job)))?;
    if kind.steady {
        after.compare(&before)?;
    }
    workload.check_going_on(to)
}

/// The process has ended at the source. Its parent there takes notice of that in its own time, until which it is a
/// zombie; anything else is one process too many.
fn gone(from: &Host, pid: i32) -> Result {
    Ok(wait_for("its parent at the source taking notice", MOVE, || {
        let status = std::fs::read_to_string(from.proc(pid).join("status")).unwrap_or_default();
        match status.lines().find_map(|line| line.strip_prefix("State:\t")) {
            None => Ok(Some(())),
            Some(state) if state.starts_with(['Z', 'X']) => Ok(None),
            Some(state) => Err(TestbedError::Program(format!("the process is still at the source: {state}"))),
        }
    })?)
}
