//! Where the cells and the move wait for each other. Nobody waits for time.

use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use super::peer::Outcome;

/// The parts of a move, as the cells see them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Part {
    /// The connection is made, and the process told what to do with it.
    Ordered,
    /// It is brought into the state that the cell wants.
    Before,
    /// The process stands still at the source, and its address is gone.
    AtSource,
    /// The address is at the destination, the connections are not live yet.
    AtDestination,
    /// They are, and the process reads nothing yet.
    Live,
    /// It goes on.
    On,
}

const PARTS: usize = 6;

#[derive(Default)]
struct Count {
    open: [bool; PARTS],
    done: [usize; PARTS],
    over: bool,
}

/// The gates between the parts.
#[derive(Default)]
pub(crate) struct Gates {
    count: Mutex<Count>,
    changed: Condvar,
}

impl Gates {
    /// A cell: waits until this part has begun.
    pub(crate) fn enter(&self, part: Part) -> Outcome {
        let mut count = self.count.lock().unwrap();
        while !count.open[part as usize] {
            if count.over {
                return Err(format!("the move failed before {part:?}"));
            }
            count = self.changed.wait(count).unwrap();
        }
        Ok(())
    }

    /// A cell: is done with this part.
    pub(crate) fn done(&self, part: Part) {
        self.count.lock().unwrap().done[part as usize] += 1;
        self.changed.notify_all();
    }

    /// The move: begins a part.
    pub(crate) fn open(&self, part: Part) {
        self.count.lock().unwrap().open[part as usize] = true;
        self.changed.notify_all();
    }

    /// The move: waits until so many cells are done with a part.
    pub(crate) fn all(&self, part: Part, cells: usize, limit: Duration) -> Outcome {
        let end = Instant::now() + limit;
        let mut count = self.count.lock().unwrap();
        loop {
            let done = count.done[part as usize];
            if done >= cells {
                return Ok(());
            }
            let Some(rest) = end.checked_duration_since(Instant::now()) else {
                return Err(format!("{done} of {cells} cells are done with {part:?}"));
            };
            count = self.changed.wait_timeout(count, rest).unwrap().0;
        }
    }

    /// The move: there will be no more parts.
    pub(crate) fn end(&self) {
        self.count.lock().unwrap().over = true;
        self.changed.notify_all();
    }
}
