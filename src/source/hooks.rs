//! The operator's hooks where the source command is gone: what they are told by the journal's record.

use crate::engine::hook::{About, Hooks, Stage, run as run_all};
use crate::journal::Outgoing;

/// Runs a stage and waits for its end. Its failure is only reported: the decision has been made.
pub(super) fn run(record: &Outgoing, stage: Stage) {
    if let Err(error) = run_all(&record.hooks, stage, &about(record)) {
        tracing::error!(error = &error as &dyn std::error::Error, "a hook");
    }
}

/// Begins a stage.
pub(super) fn begin(record: &Outgoing, stage: Stage) {
    match Hooks::start(&record.hooks) {
        Ok(hooks) => drop(hooks.begin(stage, &about(record))),
        Err(error) => tracing::error!(%error, "no thread for a hook"),
    }
}

fn about(record: &Outgoing) -> About {
    About {
        id: record.id.to_string(),
        pid: record.process.pid,
        side: "source",
        destination: record.destination.clone(),
    }
}
