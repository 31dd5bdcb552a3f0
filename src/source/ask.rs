//! Asks a destination what became of a migration, on behalf of a source command that is gone.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::protocol::Message;
use super::resolve::Destination;
use super::wire::to_message;
use crate::identity::Node;
use crate::journal::Outgoing;
use crate::migration::Fate;
use crate::proto::control::{Confirm, Query};
use crate::transport::{self, Incoming, Link, Settings};
use crate::wire::{Body, Control};

const ANSWER_PATIENCE: Duration = Duration::from_secs(5);

/// The way to the destination that a record names, by QUIC with this node's identity.
#[derive(Debug)]
pub struct OverQuic {
    state_dir: PathBuf,
}

impl OverQuic {
    /// With the identity in this state directory.
    pub fn new(state_dir: PathBuf) -> Self {
        Self { state_dir }
    }

    fn connect(&self, record: &Outgoing) -> Option<Link> {
        let log = |what: &str, error: &dyn std::error::Error| {
            tracing::info!(destination = record.destination, error = super::driver::chain(error), "{what}");
        };
        let node = Node::open(&self.state_dir).map_err(|e| log("no identity", &e)).ok()?;
        let to: crate::config::Destination = record.destination.parse().ok()?;
        let addrs = to.resolve().map_err(|e| log("no address", &e)).ok()?;
        let link = transport::connect(Arc::new(node), addrs, crate::hello::hello(), Settings::default())
            .map_err(|e| log("not reached", &e))
            .ok()?;
        // Only the node that was offered the process can know.
        (record.peer.is_empty() || link.peer().fingerprint.to_string() == record.peer).then_some(link)
    }
}

impl Destination for OverQuic {
    fn ask(&mut self, record: &Outgoing) -> Option<Fate> {
        let mut link = self.connect(record)?;
        let query = Body::Query(Query { migration_id: record.id.to_string() });
        link.send_control(&Control { message: Some(query) }).ok()?;
        match link.recv_timeout(ANSWER_PATIENCE)? {
            Incoming::Control(message) => match to_message(*message).ok()?.0 {
                Message::Answer(fate) => Some(fate),
                Message::Committed => Some(Fate::Accepted),
                Message::Abort(_) => Some(Fate::NotAccepted),
                _ => None,
            },
            _ => None,
        }
    }

    fn serve(&mut self, _record: &Outgoing) -> bool {
        false
    }

    fn confirm(&mut self, record: &Outgoing) {
        let Some(link) = self.connect(record) else { return };
        let confirm = Body::Confirm(Confirm { migration_id: record.id.to_string() });
        if link.send_control(&Control { message: Some(confirm) }).is_ok() {
            let _ = link.finish(ANSWER_PATIENCE);
        }
    }
}
