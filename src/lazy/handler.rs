//! Reading what the userfaultfds have to say, and acting upon it.
//!
//! That is done by whoever has a thread for it (see [`Lazy::read`]), best by the one that asks the source and places
//! what it answers: to wake another thread costs as much as the network does. And by whoever wants to place a page
//! and finds that an event has to be read before.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::MutexGuard;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollTimeout};

use super::state::{Pumped, State};
use super::table::MmId;
use super::{Lazy, Shared};

/// How long a thread that is about to tell of a change is given the CPU: we come before it.
const UNSETTLED: Duration = Duration::from_micros(30);
/// How long to wait for the thread behind an event to go on, before looking again.
const AGAIN_AFTER: Duration = Duration::from_micros(200);
/// Userfaultfds that are looked at in one turn.
const TURN: usize = 32;

/// What is left after reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// There will be something when [`Lazy::events`] becomes ready again.
    Nothing,
    /// Something that could not be read yet: to be tried again at once, after whatever else there is to do. A thread
    /// that is to tell of it may wait for a page that is to be placed.
    Some,
}

/// What a turn of reading has found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Read {
    Nothing,
    Something,
    /// Something that cannot be read yet.
    Unsettled,
}

impl Lazy {
    /// Is ready to be read when there may be something for [`Lazy::read`].
    pub fn events(&self) -> BorrowedFd<'_> {
        self.shared.epoll.0.as_fd()
    }

    /// Reads faults and events until there are none, and asks for what is needed. Any thread may call it; without
    /// being called whenever [`Lazy::events`] is ready, whoever touches a missing page waits.
    pub fn read(&self) -> Left {
        loop {
            let mut asks = Vec::new();
            let found = self.shared.turn(&mut self.shared.lock(), &mut asks);
            self.shared.ask_for(&asks);
            match found {
                Read::Nothing => return Left::Nothing,
                Read::Something => self.shared.changed.notify_all(),
                Read::Unsettled => {
                    self.shared.changed.notify_all();
                    std::thread::sleep(UNSETTLED);
                    return Left::Some;
                }
            }
        }
    }

    /// Reads the event that stands in the way, or gives its thread the time to go on.
    pub(super) fn clear_the_way<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let mut asks = Vec::new();
        let found = self.shared.turn(&mut state, &mut asks);
        if !asks.is_empty() {
            drop(state);
            self.shared.ask_for(&asks);
            state = self.shared.lock();
        }
        if found == Read::Something {
            return state;
        }
        let waited = self.shared.changed.wait_timeout(state, AGAIN_AFTER);
        waited.unwrap_or_else(std::sync::PoisonError::into_inner).0
    }
}

impl Shared {
    /// Reads from those that are ready.
    fn turn(&self, state: &mut State, asks: &mut Vec<u64>) -> Read {
        let mut ready = [EpollEvent::empty(); TURN];
        let count = match self.epoll.wait(&mut ready, EpollTimeout::ZERO) {
            Ok(0) => return Read::Nothing,
            Ok(count) => count,
            Err(Errno::EINTR) => return Read::Something,
            Err(errno) => {
                tracing::error!(%errno, "looking for faults");
                return Read::Nothing;
            }
        };
        let mut found = Read::Something;
        for event in ready.iter().take(count) {
            let Ok(mm) = MmId::try_from(event.data()) else { continue };
            if state.pump(mm, &self.epoll, asks) == Pumped::Unsettled {
                found = Read::Unsettled;
            }
        }
        found
    }

    fn ask_for(&self, pages: &[u64]) {
        if !pages.is_empty() {
            (self.ask)(pages);
        }
    }
}
