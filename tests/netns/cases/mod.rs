//! The cases, by what they show.

mod ahead;
mod clocks;
mod crash;
mod drain;
mod grid;
mod grounds;
mod handshake;
mod hooks;
mod hosts;
mod kinds;
mod limbo;
mod live;
mod lock;
mod moves;
mod network;
mod operator;
mod orphans;
mod own_queue;
mod queued;
mod refusals;
mod segments;
mod servers;
mod stall;
mod storm;
mod tcp;

use crate::case::Case;

/// All of them, in the order they run.
pub(crate) fn all() -> Vec<Case> {
    let groups = [
        grounds::cases(),
        kinds::unmoved(),
        refusals::cases(),
        hosts::cases(),
        kinds::moved(),
        segments::cases(),
        servers::cases(),
        tcp::cases(),
        ahead::cases(),
        live::cases(),
        grid::cases(),
        stall::cases(),
        orphans::cases(),
        handshake::cases(),
        queued::cases(),
        own_queue::cases(),
        network::cases(),
        operator::cases(),
        hooks::cases(),
        lock::cases(),
        clocks::cases(),
        moves::cases(),
        drain::cases(),
        storm::cases(),
        crash::cases(),
        limbo::cases(),
    ];
    groups.into_iter().flatten().collect()
}
