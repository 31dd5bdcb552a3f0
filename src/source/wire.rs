//! The source's words to messages of `proto/control.proto`, and back.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::protocol::{Event, Message, Tell};
use crate::engine::reason::Reason;
use crate::migration::{Fate, MigrationId};
use crate::proto::control::{
    self, Abort, Begin, Commit, Confirm, DrainStats, Gone, LateSignal, PageRuns, Query, Resume, Timings,
};
use crate::transport::{Incoming, Link};
use crate::wire::{Body, Control};

/// How long the last word on a link that takes no more may take.
const LAST_WORD_PATIENCE: Duration = Duration::from_millis(200);

/// A message that the source does not take.
#[derive(Debug, thiserror::Error)]
#[error("unexpected message of the destination: {0}")]
pub(super) struct Unexpected(String);

pub(super) fn to_control(tell: &Tell, id: MigrationId, begin: &Begin, late: &[LateSignal]) -> Control {
    let migration_id = id.to_string();
    let body = match tell {
        Tell::Begin => Body::Begin(begin.clone()),
        Tell::Commit => Body::Commit(Commit { migration_id, late: late.to_vec() }),
        Tell::Query => Body::Query(Query { migration_id }),
        Tell::Resume => Body::Resume(Resume { migration_id }),
        Tell::Gone(cause) => {
            let reason = Reason::new("source", cause.to_string(), "");
            Body::Gone(Gone { migration_id, reasons: vec![reason.into()] })
        }
        Tell::Confirm => Body::Confirm(Confirm { migration_id }),
        Tell::Abort(cause) => {
            let reason = Reason::new("source", cause.to_string(), "");
            Body::Abort(Abort { migration_id, reasons: vec![reason.into()] })
        }
    };
    Control { message: Some(body) }
}

/// What comes beside the word in its message.
#[derive(Debug, Default)]
pub(super) struct Extras {
    pub timings: Option<Timings>,
    pub lost_datagrams: u64,
    pub made_ahead: u64,
    pub urgent_port: u16,
    pub takes_queued: bool,
    pub missing: Option<PageRuns>,
    pub stats: Option<DrainStats>,
}

pub(super) fn to_message(message: Control) -> Result<(Message, Extras), Unexpected> {
    let mut extras = Extras::default();
    let message = match message.message {
        Some(Body::Ready(m)) => {
            extras.urgent_port = u16::try_from(m.urgent_port).unwrap_or(0);
            extras.takes_queued = m.takes_queued;
            Message::Ready
        }
        Some(Body::Refused(m)) => Message::Refused(reasons(m.reasons)),
        Some(Body::RoundPlaced(m)) => Message::RoundPlaced(m.round),
        Some(Body::Prepared(m)) => {
            extras.timings = m.timings;
            (extras.lost_datagrams, extras.made_ahead) = (m.lost_datagrams, m.made_ahead);
            Message::Prepared
        }
        Some(Body::Committed(m)) => {
            extras.timings = m.timings;
            Message::Committed
        }
        Some(Body::Abort(m)) => Message::Abort(reasons(m.reasons)),
        Some(Body::Resumed(m)) => {
            extras.missing = m.missing;
            extras.urgent_port = u16::try_from(m.urgent_port).unwrap_or(0);
            Message::Resumed
        }
        Some(Body::Drained(m)) => {
            extras.stats = m.stats;
            Message::Drained
        }
        Some(Body::Lost(m)) => Message::Lost(reasons(m.reasons)),
        Some(Body::Answer(m)) => match m.fate() {
            control::Fate::NotAccepted => Message::Answer(Fate::NotAccepted),
            control::Fate::Accepted => Message::Answer(Fate::Accepted),
            control::Fate::Invalid => return Err(Unexpected("an answer without a fate".into())),
        },
        other => return Err(Unexpected(format!("{other:?}").chars().take(100).collect())),
    };
    Ok((message, extras))
}

/// Of a link that takes no more: the abort that came before its end, or its end; `None` while it is there. What else
/// the destination has said is of no use then. `unread` came before.
pub(super) fn last_word(unread: &mut VecDeque<Incoming>, link: &mut Link) -> Option<Event> {
    let limit = Instant::now() + LAST_WORD_PATIENCE;
    loop {
        let next = || link.recv_timeout(limit.saturating_duration_since(Instant::now()));
        match unread.pop_front().or_else(next)? {
            Incoming::Control(message) => {
                if let Ok((message @ Message::Abort(_), _)) = to_message(*message) {
                    return Some(Event::Message(message));
                }
            }
            Incoming::Frame(_) => {}
            Incoming::Lost(error) => {
                tracing::info!(error = &error as &dyn std::error::Error, "connection ended");
                return Some(Event::LinkLost);
            }
        }
    }
}

fn reasons(reasons: Vec<control::Reason>) -> Vec<Reason> {
    reasons.into_iter().map(Into::into).collect()
}

#[cfg(test)]
mod tests {
    use crate::transport::tests::{patient, trusted_pair};

    use super::*;

    fn placed(round: u32) -> Control {
        Body::RoundPlaced(control::RoundPlaced { round }).into()
    }

    /// The source learns that its frames are not taken any more before it has read why.
    #[test]
    fn an_abort_is_found_behind_a_link_that_has_ended() {
        let (_a, _b, _l, mut source, destination) = trusted_pair(patient());
        let reason = Reason::new("memory", "there is none", "");
        destination.send_control(&placed(1)).unwrap();
        let abort = Abort { migration_id: "m".into(), reasons: vec![reason.clone().into()] };
        destination.send_control(&Body::Abort(abort).into()).unwrap();
        let waiting = std::thread::spawn(move || destination.finish(Duration::from_secs(20)));
        let said = last_word(&mut VecDeque::new(), &mut source);
        let Some(Event::Message(Message::Abort(reasons))) = said else { panic!("{said:?}") };
        assert_eq!(reasons, [reason]);
        drop(source);
        let _ = waiting.join();
    }

    #[test]
    fn a_link_that_ends_without_a_word_is_lost() {
        let (_a, _b, _l, mut source, destination) = trusted_pair(patient());
        destination.send_control(&placed(1)).unwrap();
        let mut said = last_word(&mut VecDeque::new(), &mut source);
        assert!(said.is_none());
        drop(destination);
        while said.is_none() {
            said = last_word(&mut VecDeque::new(), &mut source);
        }
        assert!(matches!(said, Some(Event::LinkLost)));
    }
}
