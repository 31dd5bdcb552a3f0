//! What can go wrong while pages are missing: links cut and bad, commands and services killed, the process
//! changing its memory. No page may be lost, stale or read as zeros, and none travels twice.

use std::path::Path;
use std::time::{Duration, Instant};

use migrate::testbed::{Host, Job, Lan, Outcome, STATE, Service, wait_for};
use serde_json::Value;

use super::moves::count_is_exact;
use crate::case::{Case, Result, ensure};
use crate::relay::{Relay, Way, Weather};
use crate::workload::Workload;

const MOVE: Duration = Duration::from_secs(180);
const SETTLE: Duration = Duration::from_secs(60);
/// On a link of this rate the writer's memory takes some seconds.
const SLOW: &[&str] = &["--mode", "postcopy", "--bandwidth", "16M"];
/// On this one twice as many, for what is to be done meanwhile on a busy machine; on the last a quarter of a minute, for
/// those that end it.
const SLOWER: &[&str] = &["--mode", "postcopy", "--bandwidth", "8M"];
const SLOWEST: &[&str] = &["--mode", "postcopy", "--bandwidth", "4M"];
/// 4 threads over 64 MiB.
const WRITER: &[&str] = &["4", "64", "/run/shared/writer", "4"];

pub(crate) fn cases() -> Vec<Case> {
    let weather = |name: &str, lost, ms| {
        let weather = Weather { lost, repeated: 0, delay: Duration::from_millis(ms), reorders: false };
        Case::new(format!("drain/{name}"), move |lan: &Lan| through(lan, weather))
    };
    let cuts = [1, 5, 30].map(|seconds| {
        Case::new(format!("drain/link_cut_twice_for_{seconds}_s_at_ten_points"), move |lan: &Lan| {
            cut_twice_at_ten_points(lan, Duration::from_secs(seconds))
        })
    });
    let others = vec![
        Case::new("drain/link_cut_at_ten_points", cut_at_ten_points),
        Case::new("drain/link_cut_in_the_restore", cut_in_the_restore),
        Case::new("drain/source_killed", source_killed),
        Case::new("drain/resume_by_hand", resume_by_hand),
        weather("delay_1_ms", 0, 1),
        weather("delay_10_ms", 0, 10),
        weather("delay_50_ms", 0, 50),
        weather("loss_1_of_1000", 1, 1),
        weather("loss_10_of_1000", 10, 1),
        Case::new("drain/process_ends", process_ends),
        Case::new("drain/service_killed", service_killed),
        Case::new("drain/guardian_killed", guardian_killed),
        Case::new("drain/service_and_guardian_killed", service_and_guardian_killed),
    ];
    cuts.into_iter().chain(others).collect()
}

/// A move whose process runs at the destination already.
struct Drain {
    workload: Workload,
    service: Service,
    job: Job,
    id: String,
    began: Instant,
}

impl Drain {
    fn begin(lan: &Lan, options: &[&str]) -> Result<Self> {
        let workload = Workload::start(&lan.a, "writer", WRITER)?;
        lan.share_identity()?;
        let service = lan.serve(&lan.b)?;
        Self::of(lan, workload, service, options)
    }

    fn of(lan: &Lan, workload: Workload, service: Service, options: &[&str]) -> Result<Self> {
        let job = lan.start_move(&lan.a, &service.address, workload.pid(), options)?;
        let id = wait_for_drain(lan, &job)?;
        Ok(Self { workload, service, job, id, began: Instant::now() })
    }

    /// Waits for the end of the command, which must be a good one.
    fn arrive(mut self, lan: &Lan) -> Result {
        let outcome = lan
            .finish_move(&lan.a, &self.job, MOVE)?
            .expect_moved()
            .map_err(|error| format!("{error}\nthe service: {}", lan.b.stderr(&self.service.job)))?;
        count_is_exact(&outcome)?;
        self.workload.check_going_on(&lan.b).map_err(|error| {
            format!("{error}\n{}\nthe service: {}", outcome.report, lan.b.stderr(&self.service.job))
        })?;
        only(&lan.a, 0)?;
        only(&lan.b, 2)
    }
}

/// Waits until a process that is moved runs at the destination and misses pages; the migration's number.
pub(super) fn wait_for_drain(lan: &Lan, job: &Job) -> Result<String> {
    let id = wait_for("post-copy", SETTLE, || {
        let all = status(lan, &lan.a);
        let late = all.iter().find(|m| m["phase"] == "postcopy" && m["pages_remaining"] != 0);
        Ok(late.and_then(|m| m["migration_id"].as_str()).map(str::to_owned))
    });
    Ok(id.map_err(|error| format!("{error}: {} {}", lan.a.stdout(job), lan.a.stderr(job)))?)
}

/// So many processes are left on a host, soon.
pub(super) fn only(host: &Host, count: usize) -> Result {
    wait_for("all else ending", SETTLE, || Ok((host.processes()?.len() == count).then_some(())))
        .map_err(|error| format!("{error}; on {}: {:?}", host.name(), host.processes()).into())
}

fn status(lan: &Lan, host: &Host) -> Vec<Value> {
    let words = ["status", "--json", "--state-dir", STATE];
    let outcome = lan.run(host, &words, Duration::from_secs(20));
    outcome.ok().and_then(|o| o.report["migrations"].as_array().cloned()).unwrap_or_default()
}

fn cut_at_ten_points(lan: &Lan) -> Result {
    lan.share_identity()?;
    let service = lan.serve(&lan.b)?;
    for point in 0..10u32 {
        let workload = Workload::start(&lan.a, "writer", WRITER)?;
        let drain = Drain::of(lan, workload, service.clone(), SLOW)?;
        // A tenth of what it takes undisturbed, each.
        std::thread::sleep(Duration::from_millis(400) * point);
        lan.cut(&lan.b)?;
        // The length of the cut is the point.
        std::thread::sleep(Duration::from_secs(if point % 5 == 4 { 5 } else { 1 }));
        lan.heal(&lan.b)?;
        let pid = drain.workload.pid();
        drain.arrive(lan).map_err(|error| format!("cut at point {point}: {error}"))?;
        lan.b.kill(pid)?;
    }
    Ok(())
}

/// Ten processes whose pages follow, each further than the one after it, and a link that is cut under all of
/// them, and again while they recover.
fn cut_twice_at_ten_points(lan: &Lan, long: Duration) -> Result {
    const POINTS: usize = 10;
    /// The memory of one takes three quarters of a minute. What is written of private files would go before the
    /// resume, and take as long.
    const SLOWLY: &[&str] = &["--mode", "postcopy", "--bandwidth", "400k"];
    /// From one point to the next.
    const STEP: Duration = Duration::from_millis(2500);
    lan.share_identity()?;
    let service = lan.serve(&lan.b)?;
    // First all of them, so that nothing but the moves lies between the points.
    let mut workloads = Vec::new();
    for point in 0..POINTS {
        let words = ["1", "24", &format!("/run/shared/writer-{point}"), "1", "nofile"];
        workloads.push(Workload::start(&lan.a, "writer", &words)?);
    }
    let mut drains = Vec::new();
    for (point, workload) in workloads.into_iter().enumerate() {
        let job = lan.start_move(&lan.a, &service.address, workload.pid(), SLOWLY)?;
        drains.push((workload, job));
        std::thread::sleep(if point + 1 < POINTS { STEP } else { Duration::ZERO });
    }
    wait_for("post-copy", SETTLE, || Ok((draining(lan) == POINTS).then_some(()))).map_err(|error| {
        let said: Vec<String> =
            drains.iter().map(|(_, job)| lan.a.stderr(job) + &lan.a.stdout(job)).collect();
        format!("{error}: {said:?} {:?}", status(lan, &lan.a))
    })?;
    // The length of a cut is the point; and that of the pause: in the middle of the recovery, as like as not.
    for pause in [Duration::ZERO, Duration::from_millis(300)] {
        std::thread::sleep(pause);
        lan.cut(&lan.b)?;
        std::thread::sleep(long);
        lan.heal(&lan.b)?;
    }
    for (point, (mut workload, job)) in drains.into_iter().enumerate() {
        let what = |error| format!("{point}: {error}\nthe service: {}", lan.b.stderr(&service.job));
        let outcome = lan.finish_move(&lan.a, &job, MOVE)?.expect_moved().map_err(|e| what(e.to_string()))?;
        count_is_exact(&outcome).map_err(|e| what(e.to_string()))?;
        workload.check_going_on(&lan.b).map_err(|e| what(e.to_string()))?;
    }
    only(&lan.a, 0)?;
    only(&lan.b, 1 + POINTS)
}

/// How many processes run at the destination and miss pages.
fn draining(lan: &Lan) -> usize {
    status(lan, &lan.a).iter().filter(|m| m["phase"] == "postcopy" && m["pages_remaining"] != 0).count()
}

/// The restore itself needs pages that are missing. If they do not come, it ends, and the process stays where
/// it was.
fn cut_in_the_restore(lan: &Lan) -> Result {
    const FAR: Duration = Duration::from_millis(400);
    let mut workload = Workload::start(&lan.a, "writer", &["2", "16", "/run/shared/writer", "2"])?;
    lan.share_identity()?;
    let service = lan.serve(&lan.b)?;
    // What tells of faults is there before the restore touches anything. A page is 800 ms away, and comes no nearer
    // then.
    let descriptors = lan.b.proc(service.job.pid).join("fd");
    let relay = Relay::with_gate(
        lan,
        Weather { lost: 0, repeated: 0, delay: FAR, reorders: false },
        Box::new(move |way| way == Way::Forth && sees_faults(&descriptors)),
    )?;
    let job = lan.start_move(&lan.a, &relay.address, workload.pid(), &["--mode", "postcopy"])?;
    wait_for("the restore", SETTLE, || {
        Ok(status(lan, &lan.b).iter().any(|m| m["phase"] == "frozen").then_some(()))
    })?;
    lan.cut(&lan.b)?;
    relay.release();
    let exit = lan.a.wait_exit(job.pid, MOVE)?;
    lan.heal(&lan.b)?;
    ensure(exit.code != Some(0), || format!("{exit:?}: {}", lan.a.stdout(&job)))?;
    workload.check_going_on(&lan.a)?;
    only(&lan.a, 1)?;
    only(&lan.b, 1).map_err(|error| format!("{error}\nthe service: {}", lan.b.stderr(&service.job)))?;
    lan.move_to(&lan.a, &service, workload.pid(), &[], MOVE)?.expect_moved()?;
    workload.check_going_on(&lan.b)
}

/// Whether a service has a userfaultfd.
fn sees_faults(descriptors: &Path) -> bool {
    let Ok(list) = std::fs::read_dir(descriptors) else { return false };
    let link = |entry: std::fs::DirEntry| std::fs::read_link(entry.path());
    list.flatten().any(|entry| link(entry).is_ok_and(|to| to.as_os_str() == "anon_inode:[userfaultfd]"))
}

/// The sentinel goes on with the pages of the stopped process.
fn source_killed(lan: &Lan) -> Result {
    let mut drain = Drain::begin(lan, SLOW)?;
    lan.a.kill(drain.job.pid)?;
    drain.workload.check_going_on(&lan.b)?;
    only(&lan.a, 0)?;
    drain.workload.check_going_on(&lan.b)?;
    only(&lan.b, 2)
}

/// Without command and sentinel the process waits where it touches what is missing, until somebody resumes.
fn resume_by_hand(lan: &Lan) -> Result {
    let mut drain = Drain::begin(lan, SLOWER)?;
    lan.a.kill(drain.job.pid)?;
    let others = lan.a.processes()?.into_iter().filter(|(pid, _)| *pid != drain.workload.pid());
    for (pid, _) in others {
        let _ = lan.a.kill(pid);
    }
    let seen = status(lan, &lan.a);
    let paused = seen.iter().find(|m| m["migration_id"] == drain.id.as_str());
    let remedy = paused.and_then(|m| m["resolve_with"].as_str()).unwrap_or_default();
    ensure(remedy.contains("resume"), || format!("status does not say what to do: {seen:?}"))?;
    let words = ["resume", &drain.id, "--state-dir", STATE, "--json"];
    let outcome = lan.run(&lan.a, &words, MOVE)?;
    let moved = outcome.exit.code == Some(0) && outcome.report["outcome"] == "moved";
    ensure(moved, || format!("not resumed: {:?} {} {}", outcome.exit, outcome.report, outcome.stderr))?;
    drain.workload.check_going_on(&lan.b)?;
    only(&lan.a, 0)?;
    only(&lan.b, 2)
}

fn through(lan: &Lan, weather: Weather) -> Result {
    let mut workload = Workload::start(&lan.a, "writer", &["2", "16", "/run/shared/writer", "2"])?;
    lan.share_identity()?;
    let service = lan.serve(&lan.b)?;
    let relay = Relay::start(lan, weather)?;
    let job = lan.start_move(&lan.a, &relay.address, workload.pid(), &["--mode", "postcopy"])?;
    let outcome = lan
        .finish_move(&lan.a, &job, MOVE)
        .and_then(Outcome::expect_moved)
        .map_err(|error| format!("{error}\nthe service: {}", lan.b.stderr(&service.job)))?;
    count_is_exact(&outcome)?;
    workload.check_going_on(&lan.b)
}

/// Nobody waits for the pages of a process that has ended.
fn process_ends(lan: &Lan) -> Result {
    let drain = Drain::begin(lan, SLOWEST)?;
    lan.b.kill(drain.workload.pid())?;
    let outcome = lan.finish_move(&lan.a, &drain.job, MOVE)?.expect_moved()?;
    ensure(outcome.report["pages_dropped"].as_u64() > Some(0), || format!("{}", outcome.report))?;
    ensure(drain.began.elapsed() < MOVE, || "it took too long".to_owned())?;
    only(&lan.a, 0)?;
    only(&lan.b, 1)
}

/// The guardian on a host, if there is one.
fn guardian(host: &Host) -> Result<Option<i32>> {
    Ok(host.processes()?.into_iter().find(|(_, name)| name == "migrate-guard").map(|(pid, _)| pid))
}

/// A restarted service goes on: the process finds all its pages, and so do its children.
fn service_killed(lan: &Lan) -> Result {
    lan.share_identity()?;
    let mut service = lan.serve(&lan.b)?;
    for point in 0..10u32 {
        let what = |error| format!("killed at point {point}: {error}");
        let workload = Workload::start(&lan.a, "writer", WRITER)?;
        let mut drain = Drain::of(lan, workload, service.clone(), SLOW)?;
        let pid = drain.workload.pid();
        lan.b.signal(pid, libc::SIGUSR2)?;
        // A tenth of what it takes undisturbed, each.
        std::thread::sleep(Duration::from_millis(400) * point);
        let blows = if point % 3 == 1 { 2 } else { 1 };
        for _ in 0..blows {
            lan.b.kill(drain.service.job.pid)?;
            // Long enough that whoever misses a page waits for it.
            std::thread::sleep(Duration::from_millis(500));
            ensure(lan.b.proc(pid).exists(), || what(lan.b.stdout(&drain.workload.job)))?;
            drain.service = lan.serve(&lan.b)?;
        }
        service = drain.service.clone();
        lan.finish_move(&lan.a, &drain.job, MOVE)?
            .expect_moved()
            .map_err(|error| what(format!("{error}\nthe service: {}", lan.b.stderr(&service.job))))?;
        drain
            .workload
            .check_going_on(&lan.b)
            .map_err(|error| what(format!("{error}\nthe service: {}", lan.b.stderr(&service.job))))?;
        // No more children.
        lan.b.signal(pid, libc::SIGUSR2)?;
        only(&lan.a, 0).map_err(|error| what(error.to_string()))?;
        only(&lan.b, 2).map_err(|error| what(error.to_string()))?;
        drain.workload.check_going_on(&lan.b)?;
        lan.b.kill(pid)?;
    }
    only(&lan.b, 1)
}

/// The service starts another guardian, which is as good: the service is killed then.
fn guardian_killed(lan: &Lan) -> Result {
    let mut drain = Drain::begin(lan, SLOWER)?;
    let first = guardian(&lan.b)?.ok_or("there is no guardian")?;
    lan.b.kill(first)?;
    let again = |host: &Host| Ok(guardian(host).ok().flatten().filter(|pid| *pid != first));
    wait_for("another guardian", SETTLE, || again(&lan.b))?;
    drain.workload.check(&lan.b)?;
    drain.arrive(lan)
}

/// Nobody holds the pages: the process must not read zeros in their place.
fn service_and_guardian_killed(lan: &Lan) -> Result {
    let drain = Drain::begin(lan, SLOWEST)?;
    let pid = drain.workload.pid();
    // Both at once as far as the process can see: it is stopped meanwhile.
    lan.b.signal(pid, libc::SIGSTOP)?;
    let guardian = guardian(&lan.b)?.ok_or("there is no guardian")?;
    lan.b.signal(drain.service.job.pid, libc::SIGSTOP)?;
    lan.b.signal(guardian, libc::SIGKILL)?;
    lan.b.kill(drain.service.job.pid)?;
    let _service = lan.serve(&lan.b)?;
    only(&lan.b, 1)?;
    let outcome = lan.finish_move(&lan.a, &drain.job, MOVE)?;
    ensure(outcome.exit.code != Some(0), || format!("it is said to have moved: {}", outcome.report))?;
    let said = lan.b.stdout(&drain.workload.job);
    ensure(!said.contains("FAIL"), || said)
}
