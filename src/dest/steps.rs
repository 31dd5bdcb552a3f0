//! What the driver's steps are called, why they fail, and how they end.

use super::assemble::AssembleError;
use super::drain::DrainError;
use super::guardian::GuardianError;
use super::protocol::{Action, Cause, Outcome};
use crate::engine::address::Address;
use crate::engine::alive;
use crate::engine::clocks::ClockError;
use crate::engine::lock::LockError;
use crate::engine::reason::Reason;
use crate::engine::remap::Remap;
use crate::engine::restore::RestoreError;
use crate::engine::skeleton::SkeletonError;
use crate::engine::state::files;
use crate::journal::JournalError;

/// Why an action failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum ActionError {
    #[error(transparent)]
    Assemble(#[from] AssembleError),
    #[error(transparent)]
    Restore(#[from] RestoreError),
    #[error(transparent)]
    Files(#[from] files::RestoreFilesError),
    #[error(transparent)]
    Lock(#[from] LockError),
    #[error(transparent)]
    Clocks(#[from] ClockError),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Skeleton(#[from] SkeletonError),
    #[error(transparent)]
    Alive(#[from] alive::AliveError),
    #[error(transparent)]
    Drain(#[from] DrainError),
    #[error("guarding the missing pages")]
    Guard(#[from] GuardianError),
    #[error("this step came before the one that it needs")]
    Order,
}

/// For the log of a finished migration.
pub(super) fn in_words(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Moved => "moved here".into(),
        Outcome::NotMoved(Cause::Unable(reasons)) => {
            let list: Vec<String> = reasons.iter().map(ToString::to_string).collect();
            format!("refused: {}", list.join("; "))
        }
        Outcome::NotMoved(cause) => format!("not moved: {cause}"),
    }
}

pub(super) fn step_name(action: &Action) -> &'static str {
    match action {
        Action::Build => "making the skeleton",
        Action::Record(_) => "recording the process",
        Action::Accept => "accepting the process",
        _ => "switching over",
    }
}

/// What sockets of a plan get for the addresses they had.
pub(super) fn parse_remaps(texts: &[String]) -> Result<Vec<Remap>, Reason> {
    texts
        .iter()
        .map(|text| text.parse().map_err(|_| Reason::new(format!("remap {text}"), "is not OLD=NEW", "")))
        .collect()
}

/// The addresses of a plan, with what `ip address add` would give them.
pub(super) fn parse_addresses(texts: &[String]) -> Result<Vec<Address>, Reason> {
    texts
        .iter()
        .map(|text| match text.parse() {
            Ok(spec) => Ok(Address::new(spec)),
            Err(_) => Err(Reason::new(format!("address {text}"), "is not ADDR/PREFIX@DEV", "")),
        })
        .collect()
}
