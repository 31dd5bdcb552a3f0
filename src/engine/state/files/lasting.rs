//! Sockets that have been there for a while.
//!
//! A running process is looked at through duplicates of its descriptors. What it closes while there is a duplicate is not
//! closed: its epoll goes on to tell of it, and a program that has freed what belongs to it by then may come to harm.
//! Each duplicate lives for microseconds only; but a server whose connections live for milliseconds closes one all the
//! time. So only those are duplicated that have lasted: they are most likely to go on doing so.

use std::collections::HashSet;
use std::fs;
use std::time::{Duration, Instant};

use super::scan::EPOLL;
use crate::engine::lock::{self, LockError};
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
pub(super) fn wait(pid: Tid, numbers: &[i32]) -> Result<HashSet<u64>, LockError> {
    let is_epoll = |number: &i32| {
        fs::read_link(format!("/proc/{pid}/fd/{number}")).is_ok_and(|link| link.as_os_str() == EPOLL)
    };
    let sockets = lock::socket_inodes(pid)?;
    // What cannot be told is treated with care.
    let is_connected =
        || lock::connections(&sockets).map_or(true, |all| all.iter().any(|one| one.remote.is_some()));
    if sockets.is_empty() || !numbers.iter().any(is_epoll) || !is_connected() {
        return Ok(sockets);
    }
    std::thread::sleep(A_WHILE);
    Ok(&sockets & &lock::socket_inodes(pid)?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::{AsFd, AsRawFd};
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::engine::sys::fds;

    fn inode_of(socket: &impl AsFd) -> u64 {
        nix::sys::stat::fstat(socket).unwrap().st_ino
    }

    /// Of a server that goes on to open sockets.
    #[test]
    fn what_is_new_is_not_duplicated() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let connection = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let epoll = fds::epoll().unwrap();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let opened = scope.spawn(|| {
                let (mut opened, mut kept) = (Vec::new(), Vec::new());
                while !stop.load(Ordering::Relaxed) && kept.len() < 1000 {
                    let before = Instant::now();
                    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
                    opened.push((before, inode_of(&socket)));
                    kept.push(socket);
                    std::thread::sleep(Duration::from_millis(1));
                }
                (opened, kept)
            });
            let pid = std::process::id().cast_signed();
            let found = wait(pid, &[epoll.as_raw_fd(), connection.as_raw_fd()]).unwrap();
            let there = Instant::now().checked_sub(A_WHILE).unwrap();
            stop.store(true, Ordering::Relaxed);
            let (opened, _kept) = opened.join().unwrap();
            assert!(found.contains(&inode_of(&connection)) && found.contains(&inode_of(&listener)));
            let new: Vec<_> = opened.iter().filter(|(before, _)| *before > there).collect();
            assert!(!new.is_empty());
            assert!(new.iter().all(|(_, inode)| !found.contains(inode)), "{new:?}");
        });
    }

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
