//! The thread that reads faults and events, first in line for the CPU.
//!
//! It waits for any userfaultfd to have something (epoll), and reads under the lock. A read that blocks
//! would spare a call, but what it returns could not be acted upon before somebody else places a page.

use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollTimeout};

use super::Shared;
use super::state::Pumped;
use super::table::MmId;
use crate::engine::sys::priority;

/// What the epoll says when the reader is to end.
pub(super) const STOP: u64 = u64::MAX;

/// How long a thread that is about to tell of a change is given the CPU.
const UNSETTLED: Duration = Duration::from_micros(30);

/// Runs until it is told to stop.
pub(super) fn run(shared: &Shared) {
    if let Err(errno) = priority::first_in_line() {
        tracing::debug!(%errno, "the reader of faults has no priority");
    }
    let mut ready = [EpollEvent::empty(); 32];
    let mut asks = Vec::new();
    loop {
        let count = match shared.epoll.wait(&mut ready, EpollTimeout::NONE) {
            Ok(count) => count,
            Err(Errno::EINTR) => continue,
            Err(errno) => {
                tracing::error!(%errno, "waiting for faults");
                return;
            }
        };
        for event in ready.iter().take(count) {
            if event.data() == STOP {
                return;
            }
            let Ok(mm) = MmId::try_from(event.data()) else { continue };
            let pumped = shared.lock().pump(mm, &shared.epoll, &mut asks);
            if !asks.is_empty() {
                (shared.ask)(&asks);
                asks.clear();
            }
            if pumped == Pumped::Unsettled {
                // Let that thread run: we come before it.
                std::thread::sleep(UNSETTLED);
            }
        }
        shared.changed.notify_all();
    }
}
