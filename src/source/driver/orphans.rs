//! Connections that the process has closed before their peers got everything (see [`crate::engine::lock::Orphan`])
//! cannot be taken along. So they get time to end while the process runs, and a last moment when it stands still and
//! can close no more. A peer that takes nothing more in that time would be left with half a stream: then the process
//! stays. A peer that does not answer at all is most likely gone; what is lost to it is told.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use super::{ActionError, Driver, ordered};
use crate::engine::lock::{Concerned, Connection, LockError, Orphan};
use crate::source::orphans;
use crate::source::policy::Order;

/// A wait for connections to end.
struct Wait {
    patience: Duration,
    /// Between two looks: to list the sockets of a large host takes milliseconds.
    pause: Duration,
    frozen: bool,
}

/// Before anything is copied: nobody waits for us yet.
const AT_FIRST: Wait =
    Wait { patience: Duration::from_secs(5), pause: Duration::from_millis(1), frozen: false };
/// Before the freeze, while the process writes what has to be copied then.
const AT_LAST: Wait = Wait { patience: Duration::from_secs(1), ..AT_FIRST };
/// In the freeze: what a peer takes that is near and reads.
const FROZEN: Wait =
    Wait { patience: Duration::from_millis(50), pause: Duration::from_millis(5), frozen: true };

/// What there is after a wait.
#[derive(Default)]
struct Left {
    all: Vec<Orphan>,
    /// Those of them that were there before, and whose peers answer.
    awaited: Vec<Orphan>,
}

impl Driver<'_> {
    /// To be called before the migration begins. What is left is looked at again.
    pub(super) fn await_orphans(&mut self) {
        let waited = orphans::concerned(self.pid(), &self.config.allowed).and_then(|concerned| {
            concerned.map_or(Ok(Left::default()), |concerned| self.wait_for_orphans(&concerned, &AT_FIRST))
        });
        if let Err(error) = waited {
            // Said where it matters.
            tracing::debug!(%error, "looking for closed connections");
        }
    }

    /// To be called while the process runs, just before the freeze.
    pub(super) fn refuse_orphans_early(&mut self) -> Result<(), ActionError> {
        self.state.orphans = match orphans::concerned(self.pid(), &self.config.allowed) {
            Ok(concerned) => concerned,
            Err(error) => {
                self.report.notes.push(orphans::unseen(&error));
                None
            }
        };
        let Some(concerned) = &self.state.orphans else { return Ok(()) };
        let since = Instant::now();
        let left = self.wait_for_orphans(concerned, &AT_LAST)?;
        // Who wants something else of us by now gets that.
        if since.elapsed() < AT_LAST.patience { Ok(()) } else { self.refuse_orphans(&left.awaited) }
    }

    /// To be called when the process stands still, before anything is taken away; and once more whenever it has run
    /// since.
    pub(super) fn refuse_orphans_left(&mut self) -> Result<(), ActionError> {
        let Some(concerned) = &self.state.orphans else { return Ok(()) };
        let left = self.wait_for_orphans(concerned, &FROZEN)?;
        // What is on the wire arrives most likely, be its peer as far away as it may: a server closes connections all
        // the time, and there are always some that have a round trip to go.
        let unsent: Vec<Orphan> = left.all.iter().filter(|orphan| orphan.unsent).copied().collect();
        self.refuse_orphans(&unsent)?;
        for loss in orphans::losses(&left.all) {
            if !self.report.notes.contains(&loss) {
                self.report.notes.push(loss);
            }
        }
        Ok(())
    }

    fn refuse_orphans(&self, left: &[Orphan]) -> Result<(), ActionError> {
        // Whoever gives his connections up gives these up as well.
        let given_up = self.config.allowed.files.tcp_close;
        let kept: Vec<Orphan> = left.iter().filter(|orphan| !orphan.unanswered).copied().collect();
        if kept.is_empty() || given_up { Ok(()) } else { Err(ActionError::Orphans(orphans::reasons(&kept))) }
    }

    /// Waits for those that there are now, but for such as are not answered; in the freeze for those only that would
    /// end the move, and whatever was ordered but to give it up.
    fn wait_for_orphans(&self, concerned: &Concerned, wait: &Wait) -> Result<Left, LockError> {
        let since = Instant::now();
        let mut all = concerned.look()?;
        let first: HashSet<Connection> = all.iter().map(|orphan| orphan.connection).collect();
        let is_awaited = |orphan: &Orphan| !orphan.unanswered && first.contains(&orphan.connection);
        let mut told = false;
        let is_ordered = || match ordered(&self.posting, self.config, self.began) {
            Some(Order::Cancel) => true,
            order => order.is_some() && !wait.frozen,
        };
        let matters = |orphan: &Orphan| is_awaited(orphan) && (orphan.unsent || !wait.frozen);
        while all.iter().any(matters) && since.elapsed() < wait.patience && !is_ordered() {
            if !std::mem::replace(&mut told, true) {
                tracing::info!(count = all.len(), "waiting for the peers of closed connections");
            }
            std::thread::sleep(wait.pause);
            all = concerned.look()?;
        }
        Ok(Left { awaited: all.iter().filter(|orphan| is_awaited(orphan)).copied().collect(), all })
    }
}
