//! How much of the CPU we take: little while memory is copied, as much as there is during the freeze.

use crate::engine::sys::attrs::{SchedAttr, set_sched_attr};
use crate::engine::sys::priority::set_nice;

/// Nice value while the process runs and its memory is copied: on a busy host the process comes first
/// (about ten times our share), on an idle one nothing is lost.
const BACKGROUND_NICE: i32 = 10;

/// `SCHED_FIFO`: runs until it waits.
const SCHED_FIFO: u32 = 1;
/// `SCHED_FLAG_RESET_ON_FORK`.
const RESET_ON_FORK: u64 = 1;

/// All our threads stand back for the process that is being moved.
pub fn background() {
    set_all(BACKGROUND_NICE);
}

/// The process stands still: nobody comes before us. Without CAP_SYS_NICE things stay as they are.
pub fn urgent() {
    set_all(0);
}

/// The calling thread runs as soon as it has something to do, before all ordinary threads: for one that others
/// wait for and that has little to do. Without the right to, things stay as they are.
pub fn at_once() {
    // What it starts in turn is ordinary again.
    let attr = SchedAttr { policy: SCHED_FIFO, priority: 1, flags: RESET_ON_FORK, ..SchedAttr::default() };
    if let Err(errno) = set_sched_attr(0, attr) {
        tracing::debug!(%errno, "no real-time priority");
    }
}

fn set_all(nice: i32) {
    for tid in super::freeze::thread_ids(i32::try_from(std::process::id()).unwrap_or(0)).unwrap_or_default() {
        if let Err(errno) = set_nice(tid, nice) {
            tracing::debug!(tid, nice, %errno, "priority not changed");
        }
    }
}
