//! Signals that are sent to a process between its capture and the commit. It is held and cannot take them,
//! and what is pending at the source when it ends there would be lost: they travel with the commit.
//!
//! The destination sends them again, after the state is complete and before the process runs, so that the
//! kernel gives them their meaning (a SIGCONT that came after a stop ends it, for example). The sender's
//! PID is then the service's where the kernel does not let one process speak for another.

use nix::errno::Errno;

use super::fence::{Queue, is_ours};
use super::remote::Tid;
use super::state::signals::{MAX_PENDING, signal_of};
use super::sys::attrs::SIGINFO_BYTES;
use super::sys::queue;
use crate::proto::control::LateSignal;
use crate::proto::image::Process;

/// What was pending at the capture: it is in the image.
#[derive(Debug, Default)]
pub struct Seen(Vec<(u32, Vec<Vec<u8>>)>);

impl Seen {
    /// The queues as they were captured.
    pub(super) fn of(process: &Process) -> Self {
        let threads = process.threads.iter().map(|t| (t.tid, t.pending.clone()));
        Self(std::iter::once((0, process.pending.clone())).chain(threads).collect())
    }

    /// What has come since, of these queues and of the SIGCONTs that our fence has removed.
    pub(super) fn since(&self, continued: &[Queue], now: Vec<(u32, Vec<Vec<u8>>)>) -> Vec<LateSignal> {
        let seen_in = |tid: u32| self.0.iter().find(|(t, _)| *t == tid).map_or(&[][..], |(_, list)| list);
        let mut late = Vec::new();
        for queue in continued {
            let tid = queue.number();
            if !seen_in(tid).iter().any(|info| signal_of(info) == Some(libc::SIGCONT)) {
                late.push(LateSignal { tid, info: plain(libc::SIGCONT) });
            }
        }
        for (tid, list) in now {
            let mut seen: Vec<&Vec<u8>> = seen_in(tid).iter().collect();
            for info in list {
                if let Some(at) = seen.iter().position(|known| **known == info) {
                    seen.swap_remove(at);
                } else if !is_ours(&info) && !is_of_a_timer(&info) {
                    late.push(LateSignal { tid, info });
                }
            }
        }
        late
    }
}

impl Queue {
    /// As messages name it: 0 for the process.
    pub(super) fn number(self) -> u32 {
        match self {
            Queue::Process => 0,
            Queue::Thread(tid) => tid.unsigned_abs(),
        }
    }
}

/// An entry as kill(2) makes it, by nobody.
fn plain(signal: i32) -> Vec<u8> {
    let mut info = vec![0; SIGINFO_BYTES];
    info[..4].copy_from_slice(&signal.to_ne_bytes());
    info
}

fn code(info: &[u8]) -> Option<i32> {
    info.get(8..12)?.try_into().ok().map(i32::from_ne_bytes)
}

/// Timers travel with what they have left: the destination's fires in its turn.
fn is_of_a_timer(info: &[u8]) -> bool {
    match code(info) {
        Some(libc::SI_TIMER) => true,
        Some(libc::SI_KERNEL) => {
            matches!(signal_of(info), Some(libc::SIGALRM | libc::SIGVTALRM | libc::SIGPROF))
        }
        _ => false,
    }
}

/// Sends them to the process here, all of whose threads are `tids`. What cannot be sent is only worth a line
/// in the log: the process is this host's by now.
pub(super) fn send(pid: Tid, tids: &[Tid], late: &[LateSignal]) {
    for signal in late.iter().take(MAX_PENDING) {
        let Some(number) = signal_of(&signal.info) else {
            tracing::warn!(pid, "a late signal that is none");
            continue;
        };
        let tid = Tid::try_from(signal.tid).ok().filter(|t| *t != 0);
        if signal.tid != 0 && !tid.is_some_and(|t| tids.contains(&t)) {
            tracing::warn!(pid, tid = signal.tid, "a late signal for no thread of the process");
            continue;
        }
        if let Err(errno) = send_one(pid, tid, number, &signal.info) {
            tracing::warn!(pid, signal = number, %errno, "a late signal is lost");
        }
    }
}

fn send_one(pid: Tid, tid: Option<Tid>, number: i32, info: &[u8]) -> Result<(), Errno> {
    let ours_to_say = code(info).is_some_and(|code| code < 0 && code != libc::SI_TKILL);
    match (info.try_into(), tid) {
        (Ok(info), tid) if ours_to_say => queue::queue(pid, tid, number, info),
        (_, Some(tid)) => queue::send_to_thread(pid, tid, number),
        (_, None) => queue::send_to_process(pid, number),
    }
}
