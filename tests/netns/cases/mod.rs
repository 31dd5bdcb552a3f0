//! The cases, by what they show.

mod grounds;
mod kinds;
mod moves;
mod servers;

use crate::case::Case;

/// All of them, in the order they run.
pub(crate) fn all() -> Vec<Case> {
    [grounds::cases(), kinds::unmoved(), kinds::moved(), servers::cases(), moves::cases()]
        .into_iter()
        .flatten()
        .collect()
}
