//! The scheduler's clocks, one per CPU, as instants of the monotonic clock.
//!
//! /proc/PID/sched tells when a thread went to sleep, on the clock of its CPU, which leaves out the time
//! that a hypervisor took away. So we go to that CPU and see what its clock says now.

use std::collections::HashMap;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

use super::look::parse_sched;

/// Now, on the monotonic clock.
pub(super) fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |t| t.tv_sec() * 1_000_000_000 + t.tv_nsec());
    u64::try_from(now).unwrap_or(0)
}

/// How far the clocks of the CPUs are behind the monotonic clock, each found out once. Our thread may move
/// to another CPU while one exists that was asked.
#[derive(Debug, Default)]
pub(super) struct CpuClocks {
    behind: HashMap<usize, Option<i128>>,
}

impl CpuClocks {
    /// The instant at which the clock of `cpu` showed `exec_start`; none if we may not run there.
    pub(super) fn monotonic(&mut self, cpu: usize, exec_start: u64) -> Option<u64> {
        let behind = *self.behind.entry(cpu).or_insert_with(|| behind(cpu));
        let now = monotonic_ns();
        Some(u64::try_from(i128::from(exec_start) + behind?).ok()?.min(now))
    }
}

fn behind(cpu: usize) -> Option<i128> {
    let us = Pid::from_raw(0);
    let everywhere = sched_getaffinity(us).ok()?;
    let mut there = CpuSet::new();
    there.set(cpu).ok()?;
    sched_setaffinity(us, &there).ok()?;
    // Yielding brings our own entry up to date.
    std::thread::yield_now();
    let now = monotonic_ns();
    let own = std::fs::read_to_string("/proc/thread-self/sched").ok();
    let back = sched_setaffinity(us, &everywhere);
    if let Err(error) = back {
        tracing::warn!(%error, cpu, "this thread stays on one CPU");
    }
    let exec_start = parse_sched(&own?)?.exec_start;
    Some(i128::from(now) - i128::from(exec_start))
}
