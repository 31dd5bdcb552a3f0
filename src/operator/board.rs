//! Where the migrations of one `migrate` write how far they are, and read what the operator wants.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::meter::Meter;
use super::protocol::{MigrationStatus, Phase, Side, Verdict};
use crate::migration::MigrationId;
use crate::report::Histogram;

/// What the operator wants of one migration. Cheap to ask between two reads.
#[derive(Debug, Default)]
pub struct Orders {
    cancel: AtomicBool,
    postcopy: AtomicBool,
}

impl Orders {
    /// The process is to stay.
    pub fn cancel(&self) {
        self.cancel.store(true, Ordering::Relaxed);
    }

    /// Whether it is.
    pub fn cancelled(&self) -> bool {
        self.cancel.load(Ordering::Relaxed)
    }

    /// The process is to be frozen now, the rest of its memory follows.
    pub fn switch_to_postcopy(&self) {
        self.postcopy.store(true, Ordering::Relaxed);
    }

    /// Whether it is.
    pub fn postcopy(&self) -> bool {
        self.postcopy.load(Ordering::Relaxed)
    }
}

/// What does not change about a migration.
#[derive(Debug, Clone)]
pub struct About {
    /// Names it on both nodes.
    pub id: MigrationId,
    /// Which end this is.
    pub side: Side,
    /// The process.
    pub pid: i32,
    /// Its name.
    pub command: String,
    /// The other node.
    pub peer: String,
}

/// How a migration ended, as far as it decides about orders.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The process runs at the destination.
    Moved,
    /// It runs at the source, and nothing of the migration is left in it.
    NotMoved,
    /// It is not known.
    Unknown,
}

/// The migrations of this `migrate`.
#[derive(Debug, Default)]
pub struct Board {
    entries: Mutex<Vec<Arc<Entry>>>,
}

#[derive(Debug)]
struct Entry {
    about: About,
    began: Instant,
    orders: Arc<Orders>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    phase: Phase,
    round: Option<u32>,
    pages_remaining: Option<u64>,
    dirty_pages_per_second: Option<u64>,
    meter: Meter,
    faults: Option<Arc<Histogram>>,
    end: Option<End>,
}

impl Board {
    /// Puts a migration on the board until the posting is dropped.
    pub fn post(self: &Arc<Self>, about: About, orders: Arc<Orders>) -> Posting {
        let state = State {
            phase: Phase::Asking,
            round: None,
            pages_remaining: None,
            dirty_pages_per_second: None,
            meter: Meter::default(),
            faults: None,
            end: None,
        };
        let entry = Arc::new(Entry {
            about,
            began: Instant::now(),
            orders,
            state: Mutex::new(state),
            changed: Condvar::new(),
        });
        self.entries().push(entry.clone());
        Posting { board: self.clone(), entry }
    }

    fn entries(&self) -> MutexGuard<'_, Vec<Arc<Entry>>> {
        // Nothing panics while holding it.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known of each.
    pub(super) fn list(&self) -> Vec<MigrationStatus> {
        let entries: Vec<_> = self.entries().clone();
        entries.iter().map(|entry| entry.status()).collect()
    }

    fn source(&self, id: MigrationId) -> Result<Arc<Entry>, Verdict> {
        let of_id: Vec<_> = self.entries().iter().filter(|e| e.about.id == id).cloned().collect();
        let Some(first) = of_id.first() else { return Err(Verdict::Unknown) };
        let source = of_id.iter().find(|e| e.about.side == Side::Source);
        source.cloned().ok_or_else(|| {
            let peer = &first.about.peer;
            Verdict::Refused(format!("the process comes here: give the order at its source, {peer}"))
        })
    }

    /// Orders a migration to be cancelled, and waits until it is decided whether it is.
    pub(super) fn cancel(&self, id: MigrationId, patience: Duration) -> Verdict {
        let entry = match self.source(id) {
            Ok(entry) => entry,
            Err(verdict) => return verdict,
        };
        entry.orders.cancel();
        entry.wait(patience, |state| match (state.end, state.phase) {
            (Some(End::NotMoved), _) => Some(Verdict::Cancelled),
            (Some(End::Moved), _) => Some(Verdict::TooLate("the process has been moved".into())),
            (Some(End::Unknown), _) => {
                Some(Verdict::TooLate(format!("who has the process is not known; ask: migrate resume {id}")))
            }
            (None, phase) if phase.can_cancel() => None,
            (None, phase) => Some(Verdict::TooLate(format!("the migration is at {phase}"))),
        })
    }

    /// Orders a migration to switch to post-copy, and waits until it does.
    pub(super) fn switch_to_postcopy(&self, id: MigrationId, patience: Duration) -> Verdict {
        let entry = match self.source(id) {
            Ok(entry) => entry,
            Err(verdict) => return verdict,
        };
        if let (None, phase) = entry.now()
            && !phase.can_switch()
        {
            return Verdict::TooLate(format!("the migration is at {phase}"));
        }
        entry.orders.switch_to_postcopy();
        entry.wait(patience, |state| match (state.end, state.phase) {
            (Some(End::NotMoved), _) => Some(Verdict::Refused("the migration has ended, not moved".into())),
            (Some(_), _) => Some(Verdict::TooLate("the migration has ended".into())),
            (None, phase) => (!phase.can_switch()).then_some(Verdict::Switched),
        })
    }
}

impl Entry {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while holding it, and what is in it is only shown.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> (Option<End>, Phase) {
        let state = self.state();
        (state.end, state.phase)
    }

    fn wait(&self, patience: Duration, decided: impl Fn(&State) -> Option<Verdict>) -> Verdict {
        let until = Instant::now() + patience;
        let mut state = self.state();
        loop {
            if let Some(verdict) = decided(&state) {
                return verdict;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let text =
                    format!("it was told, but is still at {} after {} s", state.phase, patience.as_secs());
                return Verdict::Refused(text);
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn status(&self) -> MigrationStatus {
        let now = Instant::now();
        let state = self.state();
        MigrationStatus {
            migration_id: self.about.id,
            side: self.about.side,
            pid: self.about.pid,
            command: self.about.command.clone(),
            phase: state.phase,
            round: state.round.filter(|_| state.phase == Phase::Precopy),
            pages_remaining: state.pages_remaining,
            bytes_per_second: state.meter.now(now),
            bytes_per_second_mean: state.meter.mean(),
            dirty_pages_per_second: state.dirty_pages_per_second,
            faults: state.faults.as_ref().map(|faults| faults.latency()),
            elapsed_ms: u64::try_from(now.saturating_duration_since(self.began).as_millis()).ok(),
            peer: self.about.peer.clone(),
            migrate_pid: Some(std::process::id()),
            resolve_with: None,
        }
    }
}

/// A migration's place on the board: what it writes there is what operators see.
#[derive(Debug)]
pub struct Posting {
    board: Arc<Board>,
    entry: Arc<Entry>,
}

impl Posting {
    /// What the operator wants.
    pub fn orders(&self) -> &Orders {
        &self.entry.orders
    }

    /// It is at another phase.
    pub fn phase(&self, phase: Phase) {
        self.entry.state().phase = phase;
        self.entry.changed.notify_all();
    }

    /// It is in this round of pre-copy.
    pub fn round(&self, round: u32) {
        let mut state = self.entry.state();
        (state.phase, state.round) = (Phase::Precopy, Some(round));
        drop(state);
        self.entry.changed.notify_all();
    }

    /// So many pages are still to be sent.
    pub fn remaining(&self, pages: u64) {
        self.entry.state().pages_remaining = Some(pages);
    }

    /// The process writes so many pages per second.
    pub fn dirty_rate(&self, pages_per_second: u64) {
        self.entry.state().dirty_pages_per_second = Some(pages_per_second);
    }

    /// So many bytes of frames went, or came.
    pub fn carried(&self, bytes: u64) {
        self.entry.state().meter.add(Instant::now(), bytes);
    }

    /// Where the waits for missing pages are recorded.
    pub fn faults(&self, histogram: Arc<Histogram>) {
        self.entry.state().faults = Some(histogram);
    }

    /// It has ended; orders that wait for that are answered.
    pub fn end(&self, end: End) {
        let mut state = self.entry.state();
        state.end = Some(end);
        if end == End::Moved {
            state.phase = Phase::Complete;
        }
        drop(state);
        self.entry.changed.notify_all();
    }
}

impl Drop for Posting {
    fn drop(&mut self) {
        self.board.entries().retain(|entry| !Arc::ptr_eq(entry, &self.entry));
        if self.entry.state().end.is_none() {
            self.end(End::Unknown);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::engine::trial::{PATIENCE, until};

    fn about(byte: u8, side: Side) -> About {
        let id = MigrationId::new([byte; crate::migration::ID_BYTES]);
        About { id, side, pid: 7, command: "redis".into(), peer: "b:7077".into() }
    }

    fn posted(side: Side) -> (Arc<Board>, Posting, MigrationId) {
        let board = Arc::new(Board::default());
        let about = about(1, side);
        let id = about.id;
        let posting = board.post(about, Arc::default());
        (board, posting, id)
    }

    #[test]
    fn what_is_written_is_shown_until_it_is_taken_off() {
        let (board, posting, id) = posted(Side::Source);
        let other = board.post(about(2, Side::Destination), Arc::default());
        posting.round(3);
        posting.remaining(100);
        posting.dirty_rate(5);
        let histogram = Arc::new(Histogram::default());
        posting.faults(histogram.clone());
        histogram.record(Duration::from_micros(80));
        let list = board.list();
        assert_eq!(list.len(), 2);
        let status = &list[0];
        assert_eq!((status.migration_id, status.phase, status.round), (id, Phase::Precopy, Some(3)));
        assert_eq!((status.pages_remaining, status.dirty_pages_per_second), (Some(100), Some(5)));
        assert_eq!(status.faults.unwrap().count, 1);
        assert_eq!(list[1].side, Side::Destination);
        posting.phase(Phase::Frozen);
        assert_eq!(board.list()[0].round, None);
        drop(posting);
        assert_eq!(board.list().len(), 1);
        drop(other);
        assert_eq!(board.list(), vec![]);
    }

    /// What a cancel is answered if the migration then does this.
    fn cancelled(then: impl FnOnce(&Posting)) -> Verdict {
        let (board, posting, id) = posted(Side::Source);
        posting.round(1);
        let asking = std::thread::spawn(move || board.cancel(id, PATIENCE));
        until("the order", || posting.orders().cancelled());
        then(&posting);
        drop(posting);
        asking.join().unwrap()
    }

    #[test]
    fn a_cancel_is_answered_when_it_is_decided() {
        assert_eq!(cancelled(|posting| posting.end(End::NotMoved)), Verdict::Cancelled);
        assert_eq!(
            cancelled(|posting| {
                posting.phase(Phase::Frozen);
                posting.end(End::NotMoved);
            }),
            Verdict::Cancelled
        );
        let late = [
            cancelled(|posting| posting.end(End::Moved)),
            cancelled(|posting| posting.end(End::Unknown)),
            cancelled(|posting| posting.phase(Phase::Committing)),
            cancelled(|_| ()),
        ];
        for verdict in late {
            assert!(matches!(verdict, Verdict::TooLate(_)), "{verdict:?}");
        }
    }

    #[test]
    fn orders_that_cannot_be_given() {
        let (board, posting, id) = posted(Side::Destination);
        let unknown = about(9, Side::Source).id;
        assert_eq!(board.cancel(unknown, PATIENCE), Verdict::Unknown);
        assert_eq!(board.switch_to_postcopy(unknown, PATIENCE), Verdict::Unknown);
        assert!(matches!(board.cancel(id, PATIENCE), Verdict::Refused(text) if text.contains("b:7077")));
        assert!(!posting.orders().cancelled());

        // Both ends in one program: the order is for the source.
        let source = board.post(about(1, Side::Source), Arc::default());
        source.phase(Phase::Committing);
        assert!(matches!(board.cancel(id, PATIENCE), Verdict::TooLate(_)));
        assert!(matches!(board.switch_to_postcopy(id, PATIENCE), Verdict::TooLate(_)));
        assert!(!source.orders().postcopy(), "an order that comes too late is not given");
        // One that nobody acts on is not waited for without end.
        source.phase(Phase::Precopy);
        assert!(matches!(board.cancel(id, Duration::ZERO), Verdict::Refused(_)));
    }

    #[test]
    fn a_switch_is_answered_when_the_process_is_frozen() {
        for (freeze, want) in [(true, true), (false, false)] {
            let (board, posting, id) = posted(Side::Source);
            let asking = std::thread::spawn(move || board.switch_to_postcopy(id, PATIENCE));
            until("the order", || posting.orders().postcopy());
            if freeze {
                posting.phase(Phase::Frozen);
            } else {
                posting.end(End::NotMoved);
            }
            assert_eq!(asking.join().unwrap() == Verdict::Switched, want);
        }
    }
}
