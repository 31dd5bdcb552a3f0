//! Connections and messages, in the model.

use std::time::Duration;

use super::{Body, Event, LATENCY, Link, Opener, Packet, World, resolver};
use crate::dest::protocol as d;
use crate::source::protocol as s;

/// As the transport's.
const IDLE_TIMEOUT: Duration = Duration::from_secs(5);

impl World {
    pub(super) fn cut(&mut self, heal: Duration, late: bool, silent: bool) {
        self.network_up = false;
        self.at(heal, Event::Heal);
        let now = self.now;
        self.queue.retain_mut(|(time, _, event)| {
            if matches!(event, Event::Deliver(_)) {
                *time = now + heal + LATENCY;
                return late;
            }
            true
        });
        // Silence is noticed as well, by the transport, only later.
        let told_after = if silent { IDLE_TIMEOUT } else { LATENCY };
        for link in 0..self.links.len() {
            if std::mem::replace(&mut self.links[link].up, false) {
                self.at(told_after, Event::LinkGone { link, at_source: true });
                self.at(told_after, Event::LinkGone { link, at_source: false });
            }
        }
    }

    /// Puts a message on a connection; a dead one swallows it.
    pub(super) fn transmit(&mut self, link: usize, body: Body) {
        if self.links[link].up {
            self.at(LATENCY, Event::Deliver(Packet { link, body }));
        }
    }

    /// A new connection, if the other side can be reached.
    pub(super) fn connect(&mut self, opener: Opener) -> Option<usize> {
        if !self.network_up || !self.dest_up {
            return None;
        }
        self.links.push(Link { opener, up: true, incarnation: self.incarnation });
        Some(self.links.len() - 1)
    }

    pub(super) fn deliver(&mut self, packet: Packet) -> Result<(), String> {
        let link = &self.links[packet.link];
        match (packet.body, link.opener) {
            (Body::ToSource(message), Opener::Source) => self.source_event(s::Event::Message(message)),
            (Body::ToSource(message), Opener::Resolver(which)) => {
                let event = match message {
                    s::Message::Answer(fate) => resolver::Event::Answer(packet.link, fate),
                    s::Message::Resumed => resolver::Event::Resumed(packet.link),
                    s::Message::Drained | s::Message::Lost(_) => resolver::Event::Served(packet.link),
                    other => return Err(format!("a resolver was answered by {other:?}")),
                };
                self.resolver_event(which, event);
                Ok(())
            }
            _ if !self.dest_up || link.incarnation != self.incarnation => Ok(()),
            (body, _) => self.dest_receives(packet.link, body),
        }
    }
}

pub(super) fn link_id(link: usize) -> d::LinkId {
    d::LinkId(u64::try_from(link).unwrap_or(u64::MAX))
}

/// The words of the destination, as the source hears them.
pub(super) fn heard(word: d::Tell) -> s::Message {
    match word {
        d::Tell::Ready => s::Message::Ready,
        d::Tell::Refused(reasons) => s::Message::Refused(reasons),
        d::Tell::RoundPlaced(round) => s::Message::RoundPlaced(round),
        d::Tell::Prepared => s::Message::Prepared,
        d::Tell::Committed => s::Message::Committed,
        d::Tell::Answer(fate) => s::Message::Answer(fate),
        d::Tell::Resumed => s::Message::Resumed,
        d::Tell::Drained => s::Message::Drained,
        d::Tell::Lost(reasons) => s::Message::Lost(reasons),
        d::Tell::Abort(reasons) => s::Message::Abort(reasons),
    }
}
