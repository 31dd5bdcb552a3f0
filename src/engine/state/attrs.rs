//! All attributes of a process and its threads together: everything but memory, registers and
//! descriptors. One batch for the process, one for each thread, at the source and at the destination.
//!
//! Order at the destination: [`restore`] when memory and descriptors are complete (rseq writes memory,
//! limits bind, credentials take rights away), [`restore_pending`] once dispositions are set, and
//! [`start_timers`] as the last thing before the registers.

use std::time::Duration;

use super::calls::{AttrError, Named, read_as};
use super::threads::ThreadProbe;
use super::{creds, limits, sched, signals, threads, timers};
use crate::engine::procfs::{Status, parse_stat, parse_status};
use crate::engine::reason::Reason;
use crate::engine::remote::{Batch, Outcome, RemoteCalls, Tid};
use crate::proto::image::{Process, Thread};

pub use super::signals::restore_pending;

/// Reads all attributes of a stopped process. `tids` are all its threads, leader first. Left to others:
/// registers and masks, memory, descriptors, `stopped`.
///
/// # Errors
/// If something cannot be read, and for state that cannot be carried.
pub fn capture(process: &mut dyn RemoteCalls, tids: &[Tid]) -> Result<Process, AttrError> {
    let pid = process.pid();
    let mut reasons = Vec::new();
    let mut statuses = Vec::with_capacity(tids.len());
    for tid in tids {
        statuses.push(read_as(format!("/proc/{pid}/task/{tid}/status"), parse_status)?);
    }
    let leader = statuses.first().ok_or_else(|| refused(pid, "has no threads"))?;
    reasons.extend(creds::preflight(pid, &statuses));

    let mut batch = Batch::new();
    let actions = signals::ActionsProbe::ask(&mut batch);
    let clocks = timers::TimersProbe::ask(pid, &mut batch)?;
    let ids = creds::CredsProbe::ask(&mut batch);
    let numbers = limits::LimitsProbe::ask(&mut batch);
    let outcome = process.run(&batch)?;
    let stat = read_as(format!("/proc/{pid}/stat"), parse_stat)?;
    let (itimers, posix_timers) = clocks.read(pid, &outcome)?;
    let own = ids.read(leader, &outcome)?;
    let mut image = Process {
        pid: pid.unsigned_abs(),
        actions: actions.read(pid, &outcome)?,
        pending: signals::capture_pending(pid, true, leader.shared_pending)?,
        itimers,
        timers: posix_timers,
        attrs: Some(numbers.read(leader, &stat, &outcome)?),
        ..Process::default()
    };

    let asked: Vec<(ThreadProbe, (Tid, Batch))> = tids
        .iter()
        .map(|&tid| {
            let mut batch = Batch::new();
            (ThreadProbe::ask(tid, &mut batch), (tid, batch))
        })
        .collect();
    let (probes, batches): (Vec<_>, Vec<_>) = asked.into_iter().unzip();
    let outcomes = process.run_in_threads(&batches)?;
    let defaults = sched::Defaults::here()?;
    let mut personality = None;
    for ((probe, status), outcome) in probes.iter().zip(&statuses).zip(&outcomes) {
        let found = probe.read(pid, outcome)?;
        let tid = status.pid;
        let object = format!("thread {tid}");
        if *personality.get_or_insert(found.personality) != found.personality {
            reasons.push(Reason::new(&object, "has another personality than the leader", ""));
        }
        if found.securebits != own.securebits {
            reasons.push(Reason::new(&object, "has other securebits than the leader", ""));
        }
        if found.thread.pdeath_signal != 0 {
            let why = "is to be told when its parent dies (PR_SET_PDEATHSIG), and its parent does not move";
            reasons.push(Reason::new(&object, why, ""));
        }
        image.threads.push(Thread {
            pending: signals::capture_pending(tid, false, status.pending)?,
            sched: Some(sched::capture(tid, &defaults)?),
            ..found.thread
        });
    }
    if !reasons.is_empty() {
        return Err(AttrError::Refused(reasons));
    }
    if let Some(attrs) = &mut image.attrs {
        attrs.personality = personality.unwrap_or(0);
    }
    image.creds = Some(own);
    Ok(image)
}

fn refused(pid: Tid, why: &str) -> AttrError {
    AttrError::Refused(vec![Reason::new(format!("pid {pid}"), why, "")])
}

/// What is in the way of giving these attributes to a process here.
///
/// # Errors
/// If /proc cannot be read.
pub fn check_here(image: &Process) -> Result<Vec<Reason>, AttrError> {
    let ours = creds::here()?;
    let mut reasons = timers::check_here(&image.timers);
    reasons.extend(sched::check_here(&image.threads)?);
    if let Some(attrs) = &image.attrs {
        reasons.extend(limits::check_here(attrs, &ours)?);
    }
    if let Some(creds) = &image.creds {
        reasons.extend(creds::check_here(creds, &ours));
    }
    Ok(reasons)
}

/// Gives a skeleton with all its threads, memory and descriptors the attributes of `image`; then come
/// [`restore_pending`] and [`start_timers`].
///
/// # Errors
/// If the image is not valid, or something cannot be set here: the skeleton is then of no use.
pub fn restore(process: &mut dyn RemoteCalls, image: &Process) -> Result<(), AttrError> {
    let pid = process.pid();
    let missing = |what| refused(pid, what);
    let wanted = image.attrs.as_ref().ok_or_else(|| missing("came without attributes"))?;
    let own = image.creds.as_ref().ok_or_else(|| missing("came without credentials"))?;
    let ours: Status = read_as(format!("/proc/{pid}/status"), parse_status)?;
    for thread in &image.threads {
        if let Some(wanted) = &thread.sched {
            sched::restore(tid_of(thread), wanted)?;
        }
    }
    limits::restore_outside(pid, wanted)?;

    let mut batch = Batch::new();
    let all =
        [signals::restore_actions(&image.actions, &mut batch)?, limits::restore_calls(wanted, &mut batch)?];
    let outcome = process.run(&batch)?;
    for calls in all {
        calls.check(pid, &outcome)?;
    }

    let mut named: Vec<(Tid, [Named; 3])> = Vec::with_capacity(image.threads.len());
    let mut batches = Vec::with_capacity(image.threads.len());
    for thread in &image.threads {
        let mut batch = Batch::new();
        let calls = [
            threads::restore_calls(thread, wanted.personality, &mut batch),
            creds::restore_calls(own, &ours, &mut batch)?,
            threads::finish_calls(thread, &mut batch),
        ];
        named.push((tid_of(thread), calls));
        batches.push((tid_of(thread), batch));
    }
    let outcomes = process.run_in_threads(&batches)?;
    for ((tid, calls), outcome) in named.iter().zip(&outcomes) {
        for calls in calls {
            calls.check(*tid, outcome)?;
        }
    }
    run_named(process, |batch| Ok(creds::finish_calls(own, batch)))
}

/// Makes and starts the timers; see [`timers::restore_calls`] for `elapsed`.
///
/// # Errors
/// If a timer is not valid or cannot be made.
pub fn start_timers(
    process: &mut dyn RemoteCalls,
    image: &Process,
    elapsed: Duration,
) -> Result<(), AttrError> {
    run_named(process, |batch| timers::restore_calls(image, elapsed, batch))
}

fn run_named(
    process: &mut dyn RemoteCalls,
    fill: impl FnOnce(&mut Batch) -> Result<Named, AttrError>,
) -> Result<(), AttrError> {
    let mut batch = Batch::new();
    let calls = fill(&mut batch)?;
    let outcome: Outcome = process.run(&batch)?;
    Ok(calls.check(process.pid(), &outcome)?)
}

fn tid_of(thread: &Thread) -> Tid {
    Tid::try_from(thread.tid).unwrap_or(0)
}
