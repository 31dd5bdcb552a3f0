//! The source's words to messages of `proto/control.proto`, and back.

use super::protocol::{Message, Tell};
use crate::engine::reason::Reason;
use crate::migration::{Fate, MigrationId};
use crate::proto::control::{self, Abort, Begin, Commit, Confirm, Query, Timings};
use crate::wire::{Body, Control};

/// A message that the source does not take.
#[derive(Debug, thiserror::Error)]
#[error("unexpected message of the destination: {0}")]
pub(super) struct Unexpected(String);

pub(super) fn to_control(tell: &Tell, id: MigrationId, begin: &Begin) -> Control {
    let migration_id = id.to_string();
    let body = match tell {
        Tell::Begin => Body::Begin(begin.clone()),
        Tell::Commit => Body::Commit(Commit { migration_id }),
        Tell::Query => Body::Query(Query { migration_id }),
        Tell::Confirm => Body::Confirm(Confirm { migration_id }),
        Tell::Abort(cause) => {
            let reason = Reason::new("source", cause.to_string(), "");
            Body::Abort(Abort { migration_id, reasons: vec![reason.into()] })
        }
    };
    Control { message: Some(body) }
}

pub(super) fn to_message(message: Control) -> Result<(Message, Option<Timings>), Unexpected> {
    Ok(match message.message {
        Some(Body::Ready(_)) => (Message::Ready, None),
        Some(Body::Refused(m)) => (Message::Refused(reasons(m.reasons)), None),
        Some(Body::RoundPlaced(m)) => (Message::RoundPlaced(m.round), None),
        Some(Body::Prepared(m)) => (Message::Prepared, m.timings),
        Some(Body::Committed(m)) => (Message::Committed, m.timings),
        Some(Body::Abort(m)) => (Message::Abort(reasons(m.reasons)), None),
        Some(Body::Answer(m)) => match m.fate() {
            control::Fate::NotAccepted => (Message::Answer(Fate::NotAccepted), None),
            control::Fate::Accepted => (Message::Answer(Fate::Accepted), None),
            control::Fate::Invalid => return Err(Unexpected("an answer without a fate".into())),
        },
        other => return Err(Unexpected(format!("{other:?}").chars().take(100).collect())),
    })
}

fn reasons(reasons: Vec<control::Reason>) -> Vec<Reason> {
    reasons.into_iter().map(Into::into).collect()
}
