//! How much of the CPU we take: little while memory is copied, as much as there is during the freeze.

use crate::engine::remote::Tid;
use crate::engine::sys::attrs::{SchedAttr, sched_attr, set_sched_attr};
use crate::engine::sys::priority::set_nice;

/// Nice value while the process runs and its memory is copied: on a busy host the process comes first
/// (about ten times our share), on an idle one nothing is lost.
const BACKGROUND_NICE: i32 = 10;

/// All our threads stand back for the process that is being moved.
pub fn background() {
    set_all(BACKGROUND_NICE);
}

/// The process stands still: nobody comes before us. Without CAP_SYS_NICE things stay as they are.
pub fn urgent() {
    set_all(0);
}

/// SCHED_FIFO, and back to normal for what it starts.
const AHEAD: SchedAttr =
    SchedAttr { size: 0, policy: 1, flags: 1, nice: 0, priority: 1, runtime: 0, deadline: 0, period: 0 };

/// While it lives, the thread that made it runs before all ordinary ones. Nice values do not achieve that on
/// a busy host: they count only within a session or control group.
#[derive(Debug)]
pub struct Ahead {
    before: Option<SchedAttr>,
    /// It speaks of the thread it was made in.
    _here: std::marker::PhantomData<*const ()>,
}

impl Ahead {
    /// For this thread, and for `helpers` until they are scheduled otherwise. Without CAP_SYS_NICE things
    /// stay as they are.
    pub fn with(helpers: &[Tid]) -> Self {
        let before = sched_attr(0).ok().filter(|_| set_ahead(0));
        if before.is_some() {
            for &tid in helpers {
                set_ahead(tid);
            }
        }
        Self { before, _here: std::marker::PhantomData }
    }
}

impl Drop for Ahead {
    fn drop(&mut self) {
        if let Some(before) = self.before
            && let Err(errno) = set_sched_attr(0, before)
        {
            tracing::warn!(%errno, "a thread of ours keeps its priority");
        }
    }
}

fn set_ahead(tid: Tid) -> bool {
    let set = set_sched_attr(tid, AHEAD);
    if let Err(errno) = set {
        tracing::debug!(tid, %errno, "priority not changed");
    }
    set.is_ok()
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
    fn ahead_ends_with_its_value() {
        let before = sched_attr(0).unwrap();
        let ahead = Ahead::with(&[]);
        assert_eq!(sched_attr(0).unwrap().policy, 1, "needs CAP_SYS_NICE");
        drop(ahead);
        assert_eq!(sched_attr(0).unwrap(), before);
    }
}
