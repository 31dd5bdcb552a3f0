//! Connections and messages, in the model.

use std::time::Duration;

use super::{Body, Event, LATENCY, Link, Opener, Packet, World, resolver};
use crate::dest::protocol as d;
use crate::source::protocol as s;

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
        for link in 0..self.links.len() {
            if std::mem::replace(&mut self.links[link].up, false) && !silent {
                self.at(LATENCY, Event::LinkGone { link, at_source: true });
                self.at(LATENCY, Event::LinkGone { link, at_source: false });
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
                let fate = match message {
                    s::Message::Answer(fate) => fate,
                    other => return Err(format!("a query was answered by {other:?}")),
                };
                self.resolver_event(which, resolver::Event::Answer(packet.link, fate));
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
        d::Tell::Abort(reasons) => s::Message::Abort(reasons),
    }
}
