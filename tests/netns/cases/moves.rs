//! Many moves in a row: nothing stale, lost or invented, and nothing left over in the services.

use std::time::Duration;

use migrate::testbed::{Host, Lan, Outcome, Service};

use super::drain::only;
use super::kinds::{EVERY_KIND, HUGE_PAGES};
use crate::case::{Case, Need, Result, ensure};
use crate::workload::Workload;

const MOVE: Duration = Duration::from_secs(180);
pub(crate) fn cases() -> Vec<Case> {
    let writers = ["precopy", "postcopy", "auto"]
        .map(|mode| Case::new(format!("moves/writer_20_times_{mode}"), move |lan| writer(lan, mode)));
    let all_kinds = ["precopy", "postcopy", "auto"].map(|mode| {
        Case::new(format!("moves/writer_of_all_kinds_{mode}"), move |lan| all_kinds(lan, mode))
            .needs(Need::HugePages(HUGE_PAGES))
    });
    let fifty = Case::new("moves/50_times_and_no_growth", fifty);
    let shell = Case::new("moves/started_by_a_shell_that_stays", |lan| {
        let mut workload = Workload::under_shell(&lan.a, "counter")?;
        back_and_forth(lan, &mut workload, 2, &[], |_, _| Ok(()))
    });
    writers.into_iter().chain(all_kinds).chain([fifty, shell]).collect()
}

/// 8 threads over 512 MiB, mapping, unmapping, moving and dropping memory all the while.
fn writer(lan: &Lan, mode: &str) -> Result {
    let mut workload = Workload::start(&lan.a, "writer", &["8", "512", "/run/shared/writer", "4"])?;
    back_and_forth(lan, &mut workload, 20, &["--mode", mode], |_, _| Ok(()))
}

/// What was missing at the resume has arrived, each page once, or was given up by the process.
pub(crate) fn count_is_exact(outcome: &Outcome) -> Result {
    let count = |field: &str| outcome.report[field].as_u64().unwrap_or(u64::MAX);
    let come = count("pages_faulted") + count("pages_pushed") + count("pages_dropped");
    let exact = count("pages_postcopy") == come && count("pages_twice") == 0;
    // With children born meanwhile, pages go to several places.
    ensure(exact, || format!("pages after the resume do not add up: {}", outcome.report))
}

/// The same over 1 GiB, of all kinds of memory at the same time.
fn all_kinds(lan: &Lan, mode: &str) -> Result {
    let words = ["8", "1024", "/run/shared/writer", "4"];
    let words: Vec<&str> = words.iter().chain(EVERY_KIND).copied().collect();
    let mut workload = Workload::start(&lan.a, "writer", &words)?;
    // It writes faster than rounds can follow: more of them would only take longer.
    back_and_forth(lan, &mut workload, 20, &["--mode", mode, "--max-rounds", "4"], |_, _| Ok(()))
}

fn fifty(lan: &Lan) -> Result {
    let mut workload = Workload::start(&lan.a, "writer", &["2", "16", "/run/shared/writer", "4"])?;
    let mut sizes = Vec::new();
    back_and_forth(lan, &mut workload, 50, &[], |_, services| {
        sizes.push([Size::of(&lan.a, &services[0])?, Size::of(&lan.b, &services[1])?]);
        Ok(())
    })?;
    let (first, last) = (&sizes[..15], &sizes[40..]);
    for host in 0..2 {
        for (what, allowed, of) in Size::GROWTH {
            // The largest of the first and the smallest of the last: what it holds for a moment is not growth.
            let was = first.iter().map(|sizes| of(&sizes[host])).max().unwrap_or(0);
            let is = last.iter().map(|sizes| of(&sizes[host])).min().unwrap_or(u64::MAX);
            ensure(is <= was + allowed, || format!("service {host}: {was} {what}, then {is}"))?;
        }
    }
    // A service on each, and after an even number of moves the workload where it began.
    only(&lan.a, 2)?;
    only(&lan.b, 1)
}

fn back_and_forth(
    lan: &Lan,
    workload: &mut Workload,
    moves: usize,
    options: &[&str],
    mut after_each: impl FnMut(usize, &[Service; 2]) -> Result,
) -> Result {
    lan.share_identity()?;
    let services = [lan.serve(&lan.a)?, lan.serve(&lan.b)?];
    let mut here = &lan.a;
    for round in 1..=moves {
        let there = lan.other(here);
        let service = if here.name() == lan.a.name() { &services[1] } else { &services[0] };
        let outcome = lan
            .move_to(here, service, workload.pid(), options, MOVE)
            .and_then(Outcome::expect_moved)
            .map_err(|error| format!("move {round}: {error}\nthe service: {}", there.stderr(&service.job)))?;
        if options.contains(&"postcopy") {
            let late = outcome.report["pages_postcopy"].as_u64();
            ensure(late > Some(0), || format!("nothing followed after the resume: {}", outcome.report))?;
            count_is_exact(&outcome).map_err(|error| format!("move {round}: {error}"))?;
        }
        workload.check(there).map_err(|error| {
            format!(
                "after move {round}: {error}; it wrote: {}\nreport: {}\nthe service: {}",
                there.stdout(&workload.job),
                outcome.report,
                there.stderr(&service.job)
            )
        })?;
        after_each(round, &services)?;
        here = there;
    }
    workload.check_going_on(here)
}

/// What may grow, by how much, and how to read it.
type Growth = (&'static str, u64, fn(&Size) -> u64);

/// How large a service is.
struct Size {
    anonymous_kib: u64,
    descriptors: u64,
    mappings: u64,
    children: u64,
}

impl Size {
    /// What it may grow by over all moves after the first ones. The memory: the receive buffers of its two
    /// sockets, of which more becomes resident the first time that many datagrams are read at once.
    const GROWTH: [Growth; 4] = [
        ("KiB", 6 << 10, |size| size.anonymous_kib),
        ("descriptors", 0, |size| size.descriptors),
        ("mappings", 8, |size| size.mappings),
        ("children", 0, |size| size.children),
    ];

    fn of(host: &Host, service: &Service) -> Result<Self> {
        let directory = host.proc(service.job.pid);
        let status = std::fs::read_to_string(directory.join("status"))?;
        let anonymous = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap_or_default();
        let children = std::fs::read_to_string(directory.join(format!("task/{}/children", service.job.pid)))?;
        Ok(Self {
            anonymous_kib: anonymous.split_whitespace().next().unwrap_or("0").parse()?,
            descriptors: u64::try_from(std::fs::read_dir(directory.join("fd"))?.count())?,
            mappings: u64::try_from(std::fs::read_to_string(directory.join("maps"))?.lines().count())?,
            children: u64::try_from(children.split_whitespace().count())?,
        })
    }
}
