//! Sockets that have been there for a while.
//!
//! A running process is looked at through duplicates of its descriptors. What it closes while there is a duplicate is not
//! closed: its epoll goes on to tell of it, and a program that has freed what belongs to it by then may come to harm.
//! Each duplicate lives for microseconds only; but a server whose connections live for milliseconds closes one all the
//! time. So only those are duplicated that have lasted: they are most likely to go on doing so.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::time::{Duration, Instant};

use crate::engine::lock;
use crate::engine::remote::Tid;

/// The time between two looks at which a socket must have been there.
const A_WHILE: Duration = Duration::from_millis(100);

/// The sockets of a process at several times, by inode.
#[derive(Debug)]
pub struct Lasting {
    /// At the last look, and at one that is not too close to now.
    last: HashSet<u64>,
    before: HashSet<u64>,
    since: Instant,
}

impl Lasting {
    /// These have been there for a while.
    pub fn new(sockets: HashSet<u64>) -> Self {
        Self { last: sockets.clone(), before: sockets, since: Instant::now() }
    }

    /// These are there now.
    pub fn note(&mut self, sockets: HashSet<u64>) {
        if self.since.elapsed() >= A_WHILE {
            self.before = std::mem::replace(&mut self.last, sockets);
            self.since = Instant::now();
        }
    }

    /// Those of `now` that have been there for a while.
    pub fn among(&self, now: &HashSet<u64>) -> HashSet<u64> {
        let then = if self.since.elapsed() >= A_WHILE { &self.last } else { &self.before };
        now.intersection(then).copied().collect()
    }
}

/// The sockets of a running process that may be duplicated, by the numbers of their descriptors. Where it has
/// connections and an epoll, this takes a moment.
pub(super) fn wait(pid: Tid, numbers: &[i32]) -> HashMap<i32, u64> {
    let inode = |link: &str| link.strip_prefix("socket:[")?.strip_suffix(']')?.parse::<u64>().ok();
    let mut watched = false;
    let mut sockets = HashMap::new();
    for number in numbers {
        let Some(link) = link_of(pid, *number) else { continue };
        watched |= link == "anon_inode:[eventpoll]";
        sockets.extend(inode(&link).map(|inode| (*number, inode)));
    }
    let inodes: HashSet<u64> = sockets.values().copied().collect();
    let is_connected = || {
        // What cannot be told is treated with care.
        lock::connections(&inodes).map_or(true, |all| all.iter().any(|one| one.remote.is_some()))
    };
    if watched && !inodes.is_empty() && is_connected() {
        std::thread::sleep(A_WHILE);
        sockets.retain(|number, then| {
            link_of(pid, *number).and_then(|link| inode(&link)).is_some_and(|now| now == *then)
        });
    }
    sockets
}

fn link_of(pid: Tid, number: i32) -> Option<String> {
    fs::read_link(format!("/proc/{pid}/fd/{number}")).ok()?.into_os_string().into_string().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_there_before_has_lasted() {
        let mut lasting = Lasting::new([1, 2].into());
        let now = [1, 3].into();
        assert_eq!(lasting.among(&now), [1].into());
        // Too close to the first look to tell anything.
        lasting.note([1, 3].into());
        assert_eq!(lasting.among(&now), [1].into());
        lasting.since = Instant::now().checked_sub(A_WHILE).unwrap_or(lasting.since);
        lasting.note([1, 3].into());
        lasting.since = Instant::now();
        assert_eq!(lasting.among(&now), [1].into());
        lasting.since = Instant::now().checked_sub(A_WHILE).unwrap_or(lasting.since);
        assert_eq!(lasting.among(&now), [1, 3].into());
    }
}
