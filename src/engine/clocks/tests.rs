//! Real time namespaces. Each test has a thread of its own, which is what a namespace is made for.

#![allow(clippy::unwrap_used, reason = "tests may panic")]

use std::process::{Command, Stdio};
use std::time::Instant;

use super::*;
use crate::engine::freeze::Frozen;
use crate::engine::remote::RemoteCalls;
use crate::engine::skeleton::ReservedPid;
use crate::engine::state::mm::{self, FlagCache};
use crate::engine::trial::{Killed, until_asleep};

const HOUR: i64 = 3600 * NS;

/// A child of this thread, which has become the program that it is to become, and sleeps.
fn start(words: &[&str]) -> Killed {
    let mut command = Command::new(words[0]);
    let quiet = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let child = Killed::spawn(quiet.args(&words[1..]));
    until_asleep(child.id());
    child
}

fn plan(now: Clocks, offsets: Clocks) -> Begin {
    Begin { clocks: Some(now), clock_offsets: Some(offsets), ..Begin::default() }
}

fn ahead(by: i64) -> Clocks {
    let now = here().unwrap();
    Clocks { monotonic_ns: now.monotonic_ns + by, boottime_ns: now.boottime_ns + 2 * by }
}

fn readings(process: &mut dyn RemoteCalls) -> Clocks {
    let mut batch = Batch::new();
    let probe = ClocksProbe::ask(&mut batch);
    let outcome = process.run(&batch).unwrap();
    probe.read(process.pid(), &outcome).unwrap()
}

fn assert_between(before: &Clocks, at: &Clocks, after: &Clocks) {
    assert!(
        (before.monotonic_ns..=after.monotonic_ns).contains(&at.monotonic_ns),
        "{before:?} {at:?} {after:?}"
    );
    assert!(
        (before.boottime_ns..=after.boottime_ns).contains(&at.boottime_ns),
        "{before:?} {at:?} {after:?}"
    );
}

#[test]
fn clocks_of_another_machine_go_on_whatever_they_read() {
    for by in [HOUR, 1, -1_000_000, -here().unwrap().monotonic_ns / 3] {
        let (received, there) = (here().unwrap(), ahead(by));
        let shift = prepare(&plan(there, Clocks::default()), false, Some(&received)).unwrap();
        let child = start(&["sleep", "1000"]);
        assert_eq!(shift_of(child.pid()).unwrap(), shift);
        let mut frozen = Frozen::freeze(child.pid(), Duration::from_secs(5)).unwrap();
        let before = shift.readings().unwrap();
        let at = readings(&mut frozen);
        assert_between(&before, &at, &shift.readings().unwrap());
        // On from what the source said, by no more than has passed since.
        let passed = here().unwrap().monotonic_ns - received.monotonic_ns;
        assert!((0..=passed).contains(&(at.monotonic_ns - there.monotonic_ns)), "{there:?} {at:?}");
        frozen.thaw().unwrap();
    }
}

#[test]
fn on_the_same_kernel_a_skeleton_has_exactly_the_clocks_of_the_process() {
    let namespace = ["unshare", "-T", "--monotonic", "1000", "--boottime", "500000", "sleep", "1000"];
    let child = start(&namespace);
    let (pid, mut view) = (child.pid(), look(child.pid()).unwrap());
    assert_eq!(view.offsets, Clocks { monotonic_ns: 1000 * NS, boottime_ns: 500_000 * NS });
    let mut layout = mm::capture(pid, &FlagCache::look(pid).unwrap()).unwrap().layout;
    layout.tids = vec![pid.unsigned_abs()];
    let group = mm::vdso_group(&layout).unwrap();
    let mut frozen = Frozen::freeze(pid, Duration::from_secs(5)).unwrap();
    let mut last = readings(&mut frozen);
    frozen.close_injection().unwrap();
    frozen.kill();
    drop(child);
    // And onward, from a namespace that we have made.
    for _ in 0..2 {
        let shift = prepare(&plan(view.now, view.offsets), true, here().ok().as_ref()).unwrap();
        let mut skeleton = ReservedPid::take(pid).unwrap().execute(&layout).unwrap();
        skeleton.reconcile(layout.clone()).unwrap();
        let now = readings(&mut skeleton);
        assert_between(&last, &now, &shift.readings().unwrap());
        let onward = look(pid).unwrap();
        assert_eq!(onward.offsets, view.offsets);
        let map = mm::capture(pid, &FlagCache::default()).unwrap();
        assert_eq!(mm::vdso_group(&map.layout), Some(group));
        (view, last) = (onward, now);
    }
}

#[test]
fn equal_clocks_need_no_namespace() {
    let ours = || std::fs::read_link(format!("/proc/{}/ns/time_for_children", gettid())).unwrap();
    let before = ours();
    let view = look(Tid::try_from(std::process::id()).unwrap()).unwrap();
    let shift = prepare(&plan(view.now, view.offsets), true, here().ok().as_ref()).unwrap();
    assert_eq!((shift, ours()), (Shift::default(), before));
}

#[test]
fn impossible_clocks_are_refused() {
    let zero = Clocks::default();
    let negative = Clocks { monotonic_ns: -HOUR, boottime_ns: -HOUR };
    let least = Clocks { monotonic_ns: i64::MIN, boottime_ns: i64::MIN };
    let most = Clocks { monotonic_ns: i64::MAX, boottime_ns: i64::MAX };
    let received = here().ok();
    for clocks in [negative, least, most] {
        let error = prepare(&plan(clocks, zero), false, received.as_ref()).unwrap_err();
        assert!(matches!(error, ClockError::Offsets { .. } | ClockError::Range), "{error:?}");
    }
    assert!(matches!(prepare(&Begin::default(), true, received.as_ref()), Err(ClockError::Untold)));
}

#[test]
fn a_process_waits_for_its_clocks() {
    let shift = Shift { monotonic_ns: HOUR, boottime_ns: 2 * HOUR };
    let frozen = shift.readings().unwrap();
    assert!(catch_up(Some(&frozen), &shift).unwrap() < Duration::from_secs(20));
    let start = Instant::now();
    let mut later = shift.readings().unwrap();
    later.boottime_ns += 100_000_000;
    catch_up(Some(&later), &shift).unwrap();
    assert!(start.elapsed() > Duration::from_millis(90));
    assert!(shift.readings().unwrap().boottime_ns >= later.boottime_ns);
    assert!(matches!(catch_up(Some(&later), &Shift::default()), Err(ClockError::Behind(_))));
}
