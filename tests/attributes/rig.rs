//! All kinds of attributes after another, as a capture and a restore call them.

use migrate::engine::clocks::ClocksProbe;
use migrate::engine::procfs::{parse_stat, parse_status};
use migrate::engine::reason::Reason;
use migrate::engine::remote::{Batch, RemoteCalls, Tid};
use migrate::engine::state::calls::{AttrError, Named};
use migrate::engine::state::creds::{self, CredsProbe};
use migrate::engine::state::keys::{self, KeysProbe};
use migrate::engine::state::limits::{self, LimitsProbe};
use migrate::engine::state::sched;
use migrate::engine::state::signals::{self, ActionsProbe};
use migrate::engine::state::threads::{self, ThreadProbe};
use migrate::engine::state::timers::restore::Timers;
use migrate::engine::state::timers::{self, TimersProbe};
use migrate::proto::image::{Process, Thread};

/// All attributes of a stopped process; its threads, leader first.
pub(crate) fn capture(process: &mut dyn RemoteCalls, tids: &[Tid]) -> Result<Process, AttrError> {
    let pid = process.pid();
    let read = |tid: Tid, file| std::fs::read(format!("/proc/{pid}/task/{tid}/{file}")).unwrap();
    let leader = parse_status(&read(pid, "status")).unwrap();
    let stat = parse_stat(&read(pid, "stat")).unwrap();
    let mut batch = Batch::new();
    let actions = ActionsProbe::ask(&mut batch);
    let time = ClocksProbe::ask(&mut batch);
    let clocks = TimersProbe::ask(pid, &mut batch)?;
    let rights = CredsProbe::ask(&mut batch);
    let bounds = LimitsProbe::ask(pid, &mut batch);
    let outcome = process.run(&batch)?;
    let (itimers, timers) = clocks.read(pid, &outcome)?;
    let mut image = Process {
        pid: pid.unsigned_abs(),
        actions: actions.read(pid, &outcome)?,
        pending: signals::capture_pending(pid, true, leader.shared_pending)?,
        clocks: Some(time.read(pid, &outcome)?),
        itimers,
        timers,
        creds: Some(rights.read(&leader, &outcome)?),
        attrs: Some(bounds.read(&leader, &stat, &outcome)?),
        ..Process::default()
    };
    let mut probes = Vec::new();
    let mut work = Vec::new();
    for &tid in tids {
        let mut batch = Batch::new();
        let keys = KeysProbe::ask(tid, &mut batch);
        probes.push((ThreadProbe::ask(tid, &mut batch), keys));
        work.push((tid, batch));
    }
    let outcomes = process.run_in_threads(&work)?;
    keys::check(process, leader.uids[0], probes.iter().map(|(_, keys)| keys).zip(&outcomes))?;
    let defaults = sched::Defaults::here()?;
    for ((&tid, (probe, _)), outcome) in tids.iter().zip(&probes).zip(&outcomes) {
        let status = parse_status(&read(tid, "status")).unwrap();
        assert!(creds::same(&leader, &status));
        let found = probe.read(pid, outcome)?;
        image.attrs.as_mut().unwrap().personality = found.personality;
        image.threads.push(Thread {
            pending: signals::capture_pending(tid, false, status.pending)?,
            sched: Some(sched::capture(tid, &defaults)?),
            ..found.thread
        });
    }
    Ok(image)
}

/// What this host has against it.
pub(crate) fn check_here(image: &Process) -> Vec<Reason> {
    let ours = creds::here().unwrap();
    let mut reasons = timers::check_here(&image.timers);
    reasons.extend(sched::check_here(&image.threads).unwrap());
    reasons.extend(limits::check_here(image.attrs.as_ref().unwrap(), &ours).unwrap());
    reasons.extend(creds::check_here(image.creds.as_ref().unwrap(), &ours));
    reasons
}

/// Gives a skeleton with the same threads all attributes.
pub(crate) fn restore(process: &mut dyn RemoteCalls, image: &Process) {
    let attrs = image.attrs.as_ref().unwrap();
    let rights = image.creds.as_ref().unwrap();
    let ours = creds::here().unwrap();
    leader(process, |batch| signals::restore_actions(&image.actions, batch));
    in_threads(process, image, |thread, batch| Ok(threads::restore_calls(thread, attrs.personality, batch)));
    for thread in &image.threads {
        sched::restore(thread.tid.cast_signed(), thread.sched.as_ref().unwrap()).unwrap();
    }
    let mut timers = Timers::make(process, image).unwrap();
    signals::restore_pending(process, image, &mut timers).unwrap();
    leader(process, |batch| limits::restore_calls(attrs, batch));
    limits::restore_outside(process.pid(), attrs).unwrap();
    leader(process, |batch| {
        keys::restore_calls(rights, batch);
        timers.start(batch)
    });
    in_threads(process, image, |_, batch| creds::restore_calls(rights, &ours, batch));
    leader(process, |batch| Ok(creds::finish_calls(rights, batch)));
    in_threads(process, image, |thread, batch| Ok(threads::finish_calls(thread, batch)));
}

fn leader(process: &mut dyn RemoteCalls, fill: impl FnOnce(&mut Batch) -> Result<Named, AttrError>) {
    let mut batch = Batch::new();
    let calls = fill(&mut batch).unwrap();
    let outcome = process.run(&batch).unwrap();
    calls.check(process.pid(), &outcome).unwrap();
}

fn in_threads(
    process: &mut dyn RemoteCalls,
    image: &Process,
    fill: impl Fn(&Thread, &mut Batch) -> Result<Named, AttrError>,
) {
    let mut calls = Vec::new();
    let mut work = Vec::new();
    for thread in &image.threads {
        let mut batch = Batch::new();
        calls.push(fill(thread, &mut batch).unwrap());
        work.push((thread.tid.cast_signed(), batch));
    }
    let outcomes = process.run_in_threads(&work).unwrap();
    for ((calls, (tid, _)), outcome) in calls.iter().zip(&work).zip(&outcomes) {
        calls.check(*tid, outcome).unwrap();
    }
}
