//! Reaps the threads of a process that is killed while it is held.
//!
//! A leader's end is told to its tracer only when no other thread is left, and each of them is left until its
//! tracer has waited for it (ptrace(2): "the tracer must reap"). So whoever waits for the leader to stop would
//! wait for ever when the process is killed under his hands. Any thread of the tracer's process may do the
//! reaping (wait(2), without __WNOTHREAD); this one looks a few times a second whether it must.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

use super::freeze::thread_ids;
use super::procfs;
use super::remote::Tid;
use super::sys::ptrace;

const EVERY: Duration = Duration::from_millis(200);

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
