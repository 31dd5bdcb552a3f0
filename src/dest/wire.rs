//! The destination's words to messages of `proto/control.proto`, and back.

use super::protocol::{Message, Tell};
use crate::migration::{Fate, MigrationId};
use crate::proto::control::{self, Abort, Answer, Committed, Prepared, Ready, Refused, RoundPlaced, Timings};
use crate::wire::{Body, Control};

/// A message that the destination does not take.
#[derive(Debug, thiserror::Error)]
#[error("unexpected message of the source: {0}")]
pub(super) struct Unexpected(String);

pub(super) fn to_control(tell: &Tell, id: MigrationId, timings: Option<Timings>) -> Control {
    let migration_id = id.to_string();
    let reasons = |list: &[crate::engine::reason::Reason]| list.iter().cloned().map(Into::into).collect();
    let body = match tell {
        Tell::Ready => Body::Ready(Ready { migration_id }),
        Tell::Refused(list) => Body::Refused(Refused { reasons: reasons(list) }),
        Tell::RoundPlaced(round) => Body::RoundPlaced(RoundPlaced { round: *round }),
        Tell::Prepared => Body::Prepared(Prepared { migration_id, timings }),
        Tell::Committed => Body::Committed(Committed { migration_id, timings }),
        Tell::Answer(fate) => {
            let fate = match fate {
                Fate::Accepted => control::Fate::Accepted,
                Fate::NotAccepted => control::Fate::NotAccepted,
            };
            Body::Answer(Answer { migration_id, fate: fate.into() })
        }
        Tell::Abort(list) => Body::Abort(Abort { migration_id, reasons: reasons(list) }),
    };
    Control { message: Some(body) }
}

/// Which migration a message of the source is about.
pub(super) fn migration_of(message: &Control) -> Option<MigrationId> {
    match message.message.as_ref()? {
        Body::Commit(m) => m.migration_id.parse().ok(),
        Body::Query(m) => m.migration_id.parse().ok(),
        Body::Confirm(m) => m.migration_id.parse().ok(),
        Body::Abort(m) => m.migration_id.parse().ok(),
        Body::Begin(m) => m.migration_id.parse().ok(),
        _ => None,
    }
}

pub(super) fn to_message(message: Control) -> Result<Message, Unexpected> {
    Ok(match message.message {
        Some(Body::Commit(_)) => Message::Commit,
        Some(Body::Query(_)) => Message::Query,
        Some(Body::Confirm(_)) => Message::Confirm,
        Some(Body::Abort(m)) => Message::Abort(m.reasons.into_iter().map(Into::into).collect()),
        other => return Err(Unexpected(format!("{other:?}").chars().take(100).collect())),
    })
}
