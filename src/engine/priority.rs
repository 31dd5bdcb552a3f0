//! How much of the CPU we take: little while memory is copied, as much as there is during the freeze.

use crate::engine::remote::Tid;
use crate::engine::sys::attrs::{SchedAttr, set_sched_attr};
use crate::engine::sys::priority::{self as sys, set_nice};

/// Nice value while the process runs and its memory is copied: on a busy host the process comes first
/// (about ten times our share), on an idle one nothing is lost.
const BACKGROUND_NICE: i32 = 10;

/// `SCHED_FIFO`: runs until it waits.
const SCHED_FIFO: u32 = 1;
/// Its priorities: who is waited for, before who only holds what that one needs.
const AT_ONCE: u32 = 2;
const HURRIED: i32 = 1;
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
    let attr =
        SchedAttr { policy: SCHED_FIFO, priority: AT_ONCE, flags: RESET_ON_FORK, ..SchedAttr::default() };
    if let Err(errno) = set_sched_attr(0, attr) {
        tracing::debug!(%errno, "no real-time priority");
    }
}

/// A thread that is about to end, and whose end takes long, runs when nobody else wants to.
pub fn stand_back(tid: Tid) {
    set_policy(tid, libc::SCHED_IDLE);
}

/// A thread is one like others.
pub fn as_others(tid: Tid) {
    set_policy(tid, libc::SCHED_OTHER);
}

fn set_policy(tid: Tid, policy: i32) {
    let attr = SchedAttr { policy: policy.unsigned_abs(), ..SchedAttr::default() };
    // It may have ended.
    if let Err(errno) = set_sched_attr(tid, attr) {
        tracing::debug!(tid, policy, %errno, "policy not changed");
    }
}

/// As long as it lives the calling thread comes before all ordinary ones: while it holds a lock for which a thread
/// may wait that is first in line. An ordinary one that had to give up the processor would keep that one waiting for
/// milliseconds. Costs three calls.
#[derive(Debug)]
pub struct Hurry {
    /// What it was; none if nothing is to be undone.
    policy: Option<i32>,
    /// It belongs to the thread.
    _here: std::marker::PhantomData<*const ()>,
}

impl Hurry {
    /// Without the right to, things stay as they are.
    pub fn up() -> Self {
        let ordinary =
            |policy: &i32| [libc::SCHED_OTHER, libc::SCHED_BATCH, libc::SCHED_IDLE].contains(policy);
        let policy = sys::policy().ok().filter(ordinary).filter(|_| sys::set_first(HURRIED).is_ok());
        Self { policy, _here: std::marker::PhantomData }
    }
}

impl Drop for Hurry {
    fn drop(&mut self) {
        if let Some(policy) = self.policy
            && let Err(errno) = sys::set_ordinary(policy)
        {
            tracing::warn!(%errno, "a thread keeps its priority");
        }
    }
}

fn set_all(nice: i32) {
    for tid in super::freeze::thread_ids(i32::try_from(std::process::id()).unwrap_or(0)).unwrap_or_default() {
        if let Err(errno) = set_nice(tid, nice) {
            tracing::debug!(tid, nice, %errno, "priority not changed");
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_hurry_ends() {
        let before = sys::policy().unwrap();
        let hurry = Hurry::up();
        let meanwhile = sys::policy().unwrap();
        {
            let _another = Hurry::up();
        }
        assert_eq!(sys::policy().unwrap(), meanwhile, "one within another changes nothing");
        drop(hurry);
        assert_eq!(sys::policy().unwrap(), before);
        if sys::set_first(HURRIED).is_ok() {
            assert_eq!(meanwhile, libc::SCHED_FIFO);
            sys::set_ordinary(before).unwrap();
        }
    }
}
