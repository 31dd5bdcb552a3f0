//! The cases, by what they show.

mod grounds;

use crate::case::Case;

/// All of them, in the order they run.
pub(crate) fn all() -> Vec<Case> {
    [grounds::cases()].into_iter().flatten().collect()
}
