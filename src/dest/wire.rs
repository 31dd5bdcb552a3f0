//! The destination's words to messages of `proto/control.proto`, and back.

use super::protocol::{Message, Tell};
use crate::migration::{Fate, MigrationId};
use crate::proto::control::{
    self, Abort, Answer, Committed, DrainStats, Drained, LateSignal, Lost, PageRuns, Prepared, Ready,
    Refused, Resumed, RoundPlaced, Timings,
};
use crate::wire::{Body, Control};

/// A message that the destination does not take.
#[derive(Debug, thiserror::Error)]
#[error("unexpected message of the source: {0}")]
pub(super) struct Unexpected(String);

/// What goes beside the word into its message.
#[derive(Debug, Default)]
pub(super) struct Extras {
    pub timings: Option<Timings>,
    pub lost_datagrams: u64,
    pub made_ahead: u64,
    pub urgent_port: u16,
    pub takes_queued: bool,
    pub missing: PageRuns,
    pub stats: DrainStats,
}

pub(super) fn to_control(tell: &Tell, id: MigrationId, extras: Extras) -> Control {
    let Extras { timings, lost_datagrams, made_ahead, urgent_port, takes_queued, missing, stats } = extras;
    let migration_id = id.to_string();
    let reasons = |list: &[crate::engine::reason::Reason]| list.iter().cloned().map(Into::into).collect();
    let body = match tell {
        Tell::Ready => Body::Ready(Ready { migration_id, urgent_port: u32::from(urgent_port), takes_queued }),
        Tell::Refused(list) => Body::Refused(Refused { reasons: reasons(list) }),
        Tell::RoundPlaced(round) => Body::RoundPlaced(RoundPlaced { round: *round }),
        Tell::Prepared => Body::Prepared(Prepared { migration_id, timings, lost_datagrams, made_ahead }),
        Tell::Committed => Body::Committed(Committed { migration_id, timings }),
        Tell::Answer(fate) => {
            let fate = match fate {
                Fate::Accepted => control::Fate::Accepted,
                Fate::NotAccepted => control::Fate::NotAccepted,
            };
            Body::Answer(Answer { migration_id, fate: fate.into() })
        }
        Tell::Resumed => {
            let urgent_port = u32::from(urgent_port);
            Body::Resumed(Resumed { migration_id, missing: Some(missing), urgent_port })
        }
        Tell::Drained => Body::Drained(Drained { migration_id, stats: Some(stats) }),
        Tell::Lost(list) => Body::Lost(Lost { migration_id, reasons: reasons(list) }),
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
        Body::Resume(m) => m.migration_id.parse().ok(),
        Body::Gone(m) => m.migration_id.parse().ok(),
        _ => None,
    }
}

/// Takes the late signals out of a commit.
pub(super) fn late_signals(message: &mut Control) -> Vec<LateSignal> {
    match message.message.as_mut() {
        Some(Body::Commit(commit)) => std::mem::take(&mut commit.late),
        _ => Vec::new(),
    }
}

pub(super) fn to_message(message: Control) -> Result<Message, Unexpected> {
    Ok(match message.message {
        Some(Body::Commit(_)) => Message::Commit,
        Some(Body::Query(_)) => Message::Query,
        Some(Body::Confirm(_)) => Message::Confirm,
        Some(Body::Resume(_)) => Message::Resume,
        Some(Body::Gone(m)) => Message::Gone(m.reasons.into_iter().map(Into::into).collect()),
        Some(Body::Abort(m)) => Message::Abort(m.reasons.into_iter().map(Into::into).collect()),
        other => return Err(Unexpected(format!("{other:?}").chars().take(100).collect())),
    })
}
