//! System V semaphore adjustments (SEM_UNDO), which a process takes back when it ends.
//!
//! The kernel tells nobody who has some. A process without threads and without adjustments has no list of them,
//! like most others: kcmp(2) tells. With threads it has a list in any case. So the sets of semaphores are asked
//! which of them it can have adjusted:
//!
//! - none that nobody has operated on since the process began;
//! - any whose last operation on one of the semaphores was its own;
//! - of the others any that it may alter by its user and groups: it may have done so before whoever was last.
//!
//! This misses what another process did in its place by passing a set on, and errs for a process that might
//! alter a busy set and does not. Who has given up the right to alter a set, and was not the last to do so,
//! is taken not to have adjusted it.

use crate::engine::procfs::{self, Stat, Status};
use crate::engine::reason::Reason;
use crate::engine::remote::Tid;
use crate::engine::sys::attrs::{Shared, share};
use crate::engine::sys::{fds, sem};

const TABLE: &str = "/proc/sysvipc/sem";
/// Most semaphores of a set (SEMMSL) that are asked for; the kernel's limit is 32000 by default.
const MAX_SEMAPHORES: i32 = 65536;
const TICKS_PER_SECOND: i64 = 100;
const NS: i64 = 1_000_000_000;
/// Times of semaphores are whole seconds, and the clock may have been corrected since.
pub(super) const SLACK_SECONDS: i64 = 5;

/// A line of the table.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Set {
    pub(super) id: i32,
    mode: u32,
    semaphores: i32,
    uids: [u32; 2],
    gids: [u32; 2],
    /// When the last operation was, in seconds; 0: never.
    pub(super) operated: i64,
}

impl Set {
    /// Its semaphores.
    pub(super) fn indices(&self) -> std::ops::Range<i32> {
        0..self.semaphores.min(MAX_SEMAPHORES)
    }
}

/// All sets there are; without the table the kernel has none.
pub(super) fn sets() -> Vec<Set> {
    let table = procfs::read_text(TABLE).unwrap_or_default();
    table.lines().skip(1).filter_map(parse).collect()
}

/// The sets that the process may have adjusted.
pub(super) fn semaphores(pid: Tid, stat: &Stat, status: &Status) -> Vec<Reason> {
    let sets = sets();
    let Some(began) = sets.first().and_then(|_| began(stat)) else { return Vec::new() };
    let touched = |set: &Set| {
        let mut indices = set.indices();
        set.operated != 0
            && set.operated >= began - SLACK_SECONDS
            && (may_alter(status, set) || indices.any(|i| sem::last_process(set.id, i) == Ok(pid)))
    };
    let touched: Vec<Set> = sets.into_iter().filter(touched).collect();
    if touched.is_empty() || status.threads <= 1 && has_no_list(pid) {
        return Vec::new();
    }
    let reason = |set: Set| {
        let why = format!("may be adjusted when process {pid} ends (SEM_UNDO), which cannot be carried yet");
        let remedy = "ipcs -s shows it; a set that nobody needs can be removed by ipcrm";
        Reason::new(format!("System V semaphore set {}", set.id), why, remedy)
    };
    touched.into_iter().map(reason).collect()
}

fn parse(line: &str) -> Option<Set> {
    // key semid perms nsems uid gid cuid cgid otime ctime
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    let [_, id, mode, semaphores, uid, gid, cuid, cgid, operated, _] = fields[..] else { return None };
    Some(Set {
        id: id.parse().ok()?,
        mode: u32::from_str_radix(mode, 8).ok()?,
        semaphores: semaphores.parse().ok()?,
        uids: [uid.parse().ok()?, cuid.parse().ok()?],
        gids: [gid.parse().ok()?, cgid.parse().ok()?],
        operated: operated.parse().ok()?,
    })
}

/// When the process began, in seconds of the time of day.
pub(super) fn began(stat: &Stat) -> Option<i64> {
    let booted = fds::clock_ns(libc::CLOCK_REALTIME).ok()? - fds::clock_ns(libc::CLOCK_BOOTTIME).ok()?;
    Some(booted / NS + i64::try_from(stat.starttime).ok()? / TICKS_PER_SECOND)
}

/// As the kernel checks it (ipcperms in ipc/util.c), but for CAP_IPC_OWNER: root may alter every set, and seldom means
/// those of others.
fn may_alter(status: &Status, set: &Set) -> bool {
    const ALTER: u32 = 2;
    let group = |gid: &u32| status.gids[1] == *gid || status.groups.contains(gid);
    let bits = if set.uids.contains(&status.uids[1]) {
        set.mode >> 6
    } else if set.gids.iter().any(group) {
        set.mode >> 3
    } else {
        set.mode
    };
    bits & ALTER != 0
}

/// Whether a process without threads has no list of adjustments: then it is like any other that has none.
fn has_no_list(pid: Tid) -> bool {
    let mut others = std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse::<Tid>().ok())
        .filter(|other| *other != pid);
    others.any(|other| share(pid, other, Shared::SemaphoreUndo) == Ok(true))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_may_alter_a_set() {
        let set = parse("  0x1   7   620   3   10   20   11   21   99   98").unwrap();
        assert_eq!((set.id, set.mode, set.semaphores, set.operated), (7, 0o620, 3, 99));
        assert_eq!((set.uids, set.gids), ([10, 11], [20, 21]));
        assert_eq!(parse("key semid perms nsems uid gid cuid cgid otime ctime"), None);
        let may = |uid: u32, gid: u32, groups: &[u32], effective: u64, mode: u32| {
            let status = Status {
                uids: [0, uid, 0, 0],
                gids: [0, gid, 0, 0],
                groups: groups.to_vec(),
                caps: [0, 0, effective, 0, 0],
                ..Status::default()
            };
            may_alter(&status, &Set { mode, ..parse("1 7 0 3 10 20 11 21 9 9").unwrap() })
        };
        assert!(may(10, 1, &[], 0, 0o600) && may(11, 1, &[], 0, 0o200));
        assert!(!may(10, 20, &[], 0, 0o066), "the owner's bits alone count");
        assert!(may(1, 21, &[], 0, 0o020) && may(1, 1, &[5, 20], 0, 0o020));
        assert!(!may(1, 20, &[], 0, 0o602) && may(1, 1, &[], 0, 0o002));
        assert!(!may(1, 1, &[], 0, 0o660));
        assert!(!may(1, 1, &[], u64::MAX, 0), "nobody's set for root's sake alone");
    }
}
