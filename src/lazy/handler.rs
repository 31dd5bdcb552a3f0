//! Reading what the userfaultfds have to say, and acting upon it.
//!
//! That is done by whoever has a thread for it (see [`Lazy::read`]), best by the one that asks the source and places
//! what it answers: to wake another thread costs a third of what a page does. And by whoever wants to place a page and
//! finds that an event has to be read before.
//!
//! Where shared memory is missing, a thread that gives some of it up has to be looked into while it waits (see `look`),
//! which may take long on a busy host. Then a thread of its own reads, and holds up nobody else's pages.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{EpollEvent, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::state::{Pumped, State};
use super::table::MmId;
use super::{Lazy, LazyError, Shared};
use crate::engine::priority;

/// How long a thread that is about to tell of a change, or to go on, is given the CPU: we come before it.
pub const UNSETTLED: Duration = Duration::from_micros(30);
/// How long to wait for a reader.
const AGAIN_AFTER: Duration = Duration::from_micros(200);
/// So often in a row something that cannot be read yet is tried soon, and then less often.
const SOON: u32 = 16;
const LATER: Duration = Duration::from_millis(1);
/// Stack of a reader; it is touched as far as it is used.
const STACK_BYTES: usize = 256 * 1024;

/// What is left after reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// There will be something when [`Lazy::events`] becomes ready again.
    Nothing,
    /// Perhaps more: to be read after whatever else there is to do.
    Some,
    /// Something that cannot be read yet: to be tried again in a moment ([`UNSETTLED`]), after whatever else there is to
    /// do. A thread that is to tell of it may wait for a page that is to be placed.
    Unsettled,
}

/// A thread that reads, as long as this lives.
#[derive(Debug)]
pub struct Reader {
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Stop {
    event: EventFd,
    said: AtomicBool,
}

impl Lazy {
    /// Is ready to be read when there may be something for [`Lazy::read`].
    pub fn events(&self) -> BorrowedFd<'_> {
        self.shared.epoll.0.as_fd()
    }

    /// Whether [`Lazy::read`] may take long, so that it needs a thread of its own.
    pub fn reads_slowly(&self) -> bool {
        !self.shared.lock().objects.is_empty()
    }

    /// Reads some faults and events, and asks for what is needed. Any thread may call it; without being called
    /// whenever [`Lazy::events`] is ready, whoever touches a missing page waits.
    pub fn read(&self) -> Left {
        let mut asks = Vec::new();
        let left = self.shared.turn(&mut self.shared.lock(), &mut asks);
        self.shared.ask_for(&asks);
        if left != Left::Nothing {
            self.shared.changed.notify_all();
        }
        left
    }

    /// Starts a thread that reads.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn read_on_a_thread(self: &Arc<Self>) -> Result<Reader, LazyError> {
        let pid = self.shared.lock().pid;
        let sys = |step| move |errno| LazyError::Sys { step, pid, errno };
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC).map_err(sys("making an eventfd"))?;
        let stop = Arc::new(Stop { event, said: AtomicBool::new(false) });
        let (lazy, stopped) = (Arc::clone(self), Arc::clone(&stop));
        let thread = std::thread::Builder::new()
            .name(format!("faults-{pid}"))
            .stack_size(STACK_BYTES)
            .spawn(move || read_all(&lazy, &stopped))
            .map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(0)))
            .map_err(sys("starting the reader of faults"))?;
        Ok(Reader { stop, thread: Some(thread) })
    }

    /// Reads the event that stands in the way, or gives its thread the time to go on.
    pub(super) fn clear_the_way<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        if !state.objects.is_empty() {
            // That may take long, and has a thread of its own.
            let waited = self.shared.changed.wait_timeout(state, AGAIN_AFTER);
            return waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let mut asks = Vec::new();
        let left = self.shared.turn(&mut state, &mut asks);
        if !asks.is_empty() {
            drop(state);
            self.shared.ask_for(&asks);
            state = self.shared.lock();
        }
        if left == Left::Some {
            self.shared.changed.notify_all();
            return state;
        }
        let waited = self.shared.changed.wait_timeout(state, UNSETTLED);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

impl Shared {
    /// Reads from one that is ready: the next time it is another one's turn.
    fn turn(&self, state: &mut State, asks: &mut Vec<u64>) -> Left {
        let mut ready = [EpollEvent::empty(); 1];
        match self.epoll.wait(&mut ready, EpollTimeout::ZERO) {
            Ok(0) if state.later.is_empty() => return Left::Nothing,
            // Who had to wait for what was read looks again: and may have to wait again.
            Ok(0) => {
                state.settled();
                return Left::Unsettled;
            }
            Ok(_) => {}
            Err(Errno::EINTR) => return Left::Some,
            Err(errno) => {
                tracing::error!(%errno, "looking for faults");
                return Left::Unsettled;
            }
        }
        let pumped = MmId::try_from(ready[0].data()).map(|mm| state.pump(mm, asks));
        if pumped == Ok(Pumped::Unsettled) { Left::Unsettled } else { Left::Some }
    }

    fn ask_for(&self, pages: &[u64]) {
        if !pages.is_empty() {
            (self.ask)(pages);
        }
    }
}

fn read_all(lazy: &Lazy, stop: &Stop) {
    priority::at_once();
    let is_stopped = || stop.said.load(Ordering::Acquire);
    while !is_stopped() {
        let mut ready = [lazy.events(), stop.event.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        match poll(&mut ready, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => {
                tracing::error!(%errno, "waiting for faults");
                return;
            }
        }
        let mut tries = 0;
        while !is_stopped() {
            match lazy.read() {
                Left::Nothing => break,
                Left::Some => {}
                Left::Unsettled => {
                    std::thread::sleep(if tries < SOON { UNSETTLED } else { LATER });
                    tries += 1;
                }
            }
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.stop.said.store(true, Ordering::Release);
        if let Err(errno) = self.stop.event.write(1) {
            tracing::error!(%errno, "stopping the reader of faults");
            return;
        }
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
            && thread.join().is_err()
        {
            tracing::error!("the reader of faults has panicked");
        }
    }
}
