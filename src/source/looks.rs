//! How often a process is looked at before a refusal counts.
//!
//! A busy process changes while it is examined: a temporary file that it had open is gone before the
//! destination looks for it. So it is looked at again, and what is against the move counts if one look finds
//! what the one before it has found.

use std::time::Duration;

use crate::engine::reason::Reason;

/// A process that gives another reason each time is refused too.
const MOST: usize = 6;
/// For what passes to pass.
const PAUSE: Duration = Duration::from_millis(100);

/// The looks so far.
#[derive(Debug, Default)]
pub(super) struct Looks {
    made: usize,
    found: Vec<Reason>,
}

impl Looks {
    /// Whether this look's reasons are the last word; else waits for a moment, and another look is due.
    pub(super) fn stand(&mut self, reasons: &[Reason]) -> bool {
        self.made += 1;
        if self.made == MOST || reasons.iter().any(|reason| self.found.contains(reason)) {
            return true;
        }
        self.found = reasons.to_vec();
        std::thread::sleep(PAUSE);
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn about(objects: &[&str]) -> Vec<Reason> {
        objects.iter().map(|object| Reason::new(*object, "is not there", "")).collect()
    }

    #[test]
    fn what_is_found_twice_stands() {
        let mut looks = Looks::default();
        assert!(!looks.stand(&about(&["file a", "fd 3"])));
        assert!(looks.stand(&about(&["fd 3"])));
    }

    #[test]
    fn what_has_passed_does_not() {
        let mut looks = Looks::default();
        assert!(!looks.stand(&about(&["file a"])));
        assert!(!looks.stand(&about(&["file b"])));
        // Two looks lie between: it was not there all the time.
        assert!(!looks.stand(&about(&["file a"])));
    }

    #[test]
    fn what_never_ends_does() {
        let mut looks = Looks::default();
        let refused = (0..100).position(|i| looks.stand(&about(&[&format!("file {i}")])));
        assert_eq!(refused, Some(MOST - 1));
    }
}
