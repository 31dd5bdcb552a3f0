//! Sockets that have been there for a while.
//!
//! A running process is looked at through duplicates of its descriptors. What it closes while there is a duplicate is not
//! closed: its epoll goes on to tell of it, and a program that has freed what belongs to it by then may come to harm.
//! Each duplicate lives for microseconds only; but a server whose connections live for milliseconds closes one all the
//! time. So only those are duplicated that have lasted: they are most likely to go on doing so.

use std::collections::HashSet;
use std::fs;
use std::time::{Duration, Instant};

use crate::engine::lock;
use crate::engine::remote::Tid;

/// The time between two looks at which a socket must have been there.
const A_WHILE: Duration = Duration::from_millis(100);
/// How often a look is worth its while, and for each socket.
const OFTEN: Duration = Duration::from_millis(500);
const OFTEN_EACH: Duration = Duration::from_micros(100);

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

    /// Whether the last look was long ago, for what one costs.
    pub fn is_due(&self) -> bool {
        let each = u32::try_from(self.last.len()).unwrap_or(u32::MAX);
        self.since.elapsed() >= OFTEN.saturating_add(OFTEN_EACH.saturating_mul(each))
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

/// The sockets of a running process that may be duplicated, by inode. Where it has connections and an epoll, this takes
/// a moment.
pub(super) fn wait(pid: Tid, numbers: &[i32]) -> HashSet<u64> {
    let is_epoll = |number: &i32| link_of(pid, *number).is_some_and(|link| link == "anon_inode:[eventpoll]");
    let mut sockets: HashSet<u64> = numbers.iter().filter_map(|number| socket_of(pid, *number)).collect();
    // What cannot be told is treated with care.
    let is_connected =
        || lock::connections(&sockets).map_or(true, |all| all.iter().any(|one| one.remote.is_some()));
    if !sockets.is_empty() && numbers.iter().any(is_epoll) && is_connected() {
        std::thread::sleep(A_WHILE);
        if let Ok(now) = lock::socket_inodes(pid) {
            sockets.retain(|inode| now.contains(inode));
        }
    }
    sockets
}

/// The inode of the socket that a descriptor leads to now.
pub(super) fn socket_of(pid: Tid, number: i32) -> Option<u64> {
    link_of(pid, number)?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
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
