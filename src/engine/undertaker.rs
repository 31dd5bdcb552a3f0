//! Ends a process, and reaps the threads of one that is killed while it is held.
//!
//! A leader's end is told to its tracer only when no other thread is left, and each of them is left until its
//! tracer has waited for it (ptrace(2): "the tracer must reap"). So whoever waits for the leader to stop would
//! wait for ever when the process is killed under his hands. Any thread of the tracer's process may do the
//! reaping (wait(2), without __WNOTHREAD); this one looks a few times a second whether it must.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::freeze::thread_ids;
use super::remote::Tid;
use super::sys::ptrace::{self, Stop};
use super::{priority, procfs};

const EVERY: Duration = Duration::from_millis(200);
/// How long one that ends lets all others go first.
const STANDS_BACK: Duration = Duration::from_millis(200);

/// Looks after one process until it is dropped.
#[derive(Debug)]
pub struct Undertaker {
    /// The thread ends when it is closed. Nobody waits for that: it would be in the time that the process
    /// stands still.
    _until: Sender<()>,
}

impl Undertaker {
    /// Begins to look after a process that we trace, or will trace.
    ///
    /// # Errors
    /// If there is no thread to be had.
    pub fn start(pid: Tid) -> std::io::Result<Self> {
        let (until, over) = channel::<()>();
        let work = move || {
            while over.recv_timeout(EVERY) == Err(RecvTimeoutError::Timeout) {
                // The leader may also have ended alone (pthread_exit); then the others are not zombies.
                if is_zombie(pid, pid) {
                    reap_threads(pid);
                }
            }
        };
        std::thread::Builder::new().name("undertaker".into()).spawn(work)?;
        Ok(Self { _until: until })
    }
}

/// Kills a process that we trace, of which these are the threads, the leader first; returns when it is gone.
///
/// It takes its memory apart as it ends, which may take long. At first others need the processors more than that: those
/// whose clients come back now.
pub(super) fn end(pid: Tid, threads: &[Tid]) {
    threads.iter().for_each(|tid| priority::stand_back(*tid));
    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    std::thread::scope(|scope| {
        let (is_gone, gone) = channel::<()>();
        let hurry = move || {
            if gone.recv_timeout(STANDS_BACK) == Err(RecvTimeoutError::Timeout) {
                thread_ids(pid).unwrap_or_default().into_iter().for_each(priority::as_others);
            }
        };
        if std::thread::Builder::new().name("hurry".into()).spawn_scoped(scope, hurry).is_err() {
            threads.iter().for_each(|tid| priority::as_others(*tid));
        }
        // Threads before the leader: it cannot be waited for while traced threads have not been.
        for tid in threads.iter().rev() {
            while let Ok((stop, _)) = ptrace::wait(*tid) {
                if stop == Stop::Gone {
                    break;
                }
            }
        }
        drop(is_gone);
    });
}

fn reap_threads(pid: Tid) {
    for tid in thread_ids(pid).unwrap_or_default() {
        // What has only stopped is somebody else's to hear of.
        if tid != pid && is_zombie(pid, tid) {
            // Somebody else may have been faster.
            let _ = ptrace::poll(tid);
        }
    }
}

fn is_zombie(pid: Tid, tid: Tid) -> bool {
    let stat = std::fs::read(format!("/proc/{pid}/task/{tid}/stat")).unwrap_or_default();
    procfs::parse_stat(&stat).is_ok_and(|stat| stat.state == b'Z')
}
