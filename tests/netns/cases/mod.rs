//! The cases, by what they show.

mod clocks;
mod crash;
mod grounds;
mod kinds;
mod moves;
mod network;
mod operator;
mod refusals;
mod servers;

use crate::case::Case;

/// All of them, in the order they run.
pub(crate) fn all() -> Vec<Case> {
    let groups = [
        grounds::cases(),
        kinds::unmoved(),
        refusals::cases(),
        kinds::moved(),
        servers::cases(),
        network::cases(),
        operator::cases(),
        clocks::cases(),
        moves::cases(),
        crash::cases(),
    ];
    groups.into_iter().flatten().collect()
}
