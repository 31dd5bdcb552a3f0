//! Talks to a destination on behalf of a source command that is gone: asks what became of the migration,
//! serves the pages that are owed.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::postcopy::Store;
use super::protocol::Message;
use super::resolve::Destination;
use super::serving::{News, Serving};
use super::wire::{Extras, to_message};
use crate::engine::alive;
use crate::engine::reason::{Reason, chain};
use crate::identity::Node;
use crate::journal::{self, Outgoing};
use crate::migration::Fate;
use crate::pageserver::pack::Compression;
use crate::pageserver::runs;
use crate::proto::control::{Confirm, Gone, Query, Resume};
use crate::transport::{self, Incoming, Link, Settings};
use crate::wire::{Body, Control};

const ANSWER_PATIENCE: Duration = Duration::from_secs(5);
/// How often the service of owed pages is looked after.
const NEWS_POLL: Duration = Duration::from_millis(50);

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
            tracing::info!(destination = record.destination, error = chain(error), "{what}");
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

    /// The memory of the record's process, if it is there still.
    fn store(&self, record: &Outgoing) -> Option<Store> {
        if journal::boot_id().ok()? != record.boot {
            return None;
        }
        alive::open(record.process.pid, record.process.start_ticks).ok()??;
        Store::open(i32::try_from(record.process.pid).ok()?, Compression::Auto).ok()
    }
}

/// The next message of the destination.
fn word(link: &mut Link, patience: Duration) -> Option<(Message, Extras)> {
    match link.recv_timeout(patience)? {
        Incoming::Control(message) => to_message(*message).ok(),
        _ => None,
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

    fn serve(&mut self, record: &Outgoing) -> bool {
        let Some(mut link) = self.connect(record) else { return false };
        let id = record.id.to_string();
        let Some(store) = self.store(record) else {
            // The process is gone, and its pages with it: the destination must not wait for ever.
            let reason = Reason::new("source", "the process and its memory are gone", "");
            let gone = Body::Gone(Gone { migration_id: id, reasons: vec![reason.into()] });
            let told = link.send_control(&Control { message: Some(gone) }).is_ok();
            return told && matches!(word(&mut link, ANSWER_PATIENCE), Some((Message::Lost(_), _)));
        };
        let resume = Body::Resume(Resume { migration_id: id });
        if link.send_control(&Control { message: Some(resume) }).is_err() {
            return false;
        }
        let missing = match word(&mut link, ANSWER_PATIENCE) {
            Some((Message::Resumed, extras)) => extras,
            Some((Message::Drained | Message::Lost(_), _)) => return true,
            _ => return false,
        };
        let decoded = missing.missing.as_ref().map(runs::decode);
        let Some(Ok(pages)) = decoded else { return false };
        store.owe_again(pages);
        tracing::info!(id = %record.id, pages = store.pages_left(), "serving owed pages");
        let Ok(node) = Node::open(&self.state_dir) else { return false };
        let mut serving = Serving::new(Arc::new(store), Arc::new(node), crate::hello::hello(), record.id);
        if let Err(error) = serving.answer(&link, missing.urgent_port) {
            tracing::info!(error = chain(&error), "the connection for single pages");
            return false;
        }
        if serving.push(link.sender()).is_err() {
            return false;
        }
        loop {
            match serving.news() {
                Some(News::Lost | News::Failed(_)) => {
                    drop(link);
                    return false;
                }
                Some(News::AllSent) | None => {}
            }
            match link.recv_timeout(NEWS_POLL) {
                None | Some(Incoming::Frame(_)) => {}
                Some(Incoming::Control(message)) => match to_message(*message) {
                    Ok((Message::Drained | Message::Lost(_), _)) => return true,
                    Ok(_) => {}
                    Err(_) => return false,
                },
                Some(Incoming::Lost(error)) => {
                    tracing::info!(error = chain(&error), "connection ended");
                    return false;
                }
            }
        }
    }

    fn confirm(&mut self, record: &Outgoing) {
        let Some(link) = self.connect(record) else { return };
        let confirm = Body::Confirm(Confirm { migration_id: record.id.to_string() });
        if link.send_control(&Control { message: Some(confirm) }).is_ok() {
            let _ = link.finish(ANSWER_PATIENCE);
        }
    }
}
