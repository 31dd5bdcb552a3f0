//! Serves owed pages over a pair of connections: answers on the one, pushes on the other.
//!
//! Used by the source command, and by the sentinel or `migrate resume` when the command is gone: what is
//! needed is the stopped process, and the destination's word about what it misses.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use bytes::Bytes;

use super::postcopy::{PostcopyError, Store};
use crate::engine::reason::chain;
use crate::identity::Node;
use crate::migration::MigrationId;
use crate::transport::{Link, LinkSender, TransportError, urgent};
use crate::wire::Hello;

/// What is new since the last look.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum News {
    /// A connection is lost.
    Lost,
    /// All owed pages were sent.
    AllSent,
    /// Pages cannot be read any more.
    Failed(String),
}

/// The service of one migration.
pub(super) struct Serving {
    store: Arc<Store>,
    node: Arc<Node>,
    hello: Hello,
    id: MigrationId,
    urgent: Option<urgent::UrgentLink>,
    push: Option<Push>,
    /// Why pages could not be read.
    failure: Arc<Mutex<Option<String>>>,
    told: Option<News>,
}

struct Push {
    thread: JoinHandle<()>,
    stop: Arc<AtomicBool>,
}

impl Serving {
    /// Nothing is connected yet.
    pub(super) fn new(store: Arc<Store>, node: Arc<Node>, hello: Hello, id: MigrationId) -> Self {
        let failure = Arc::default();
        Self { store, node, hello, id, urgent: None, push: None, failure, told: None }
    }

    /// What is owed.
    pub(super) fn store(&self) -> &Store {
        &self.store
    }

    /// Opens the connection for requests beside `link`: to `port` of the same host, or else where the link
    /// goes to. True if it has a port of its own there.
    ///
    /// # Errors
    /// If it cannot be had at all.
    pub(super) fn answer(&mut self, link: &Link, port: u16) -> Result<bool, TransportError> {
        self.urgent = None;
        let main = link.peer().addr;
        let own = SocketAddr::new(main.ip(), port);
        let addrs = if port == 0 { vec![main] } else { vec![own, main] };
        let (store, failure) = (self.store.clone(), self.failure.clone());
        let mut packer = Store::answering_packer();
        let serve = move |address: u64, out: &mut dyn FnMut(Bytes)| {
            let mut sink = |bytes| {
                out(bytes);
                Ok::<(), Infallible>(())
            };
            if let Err(error) = store.answer(address, &mut packer, &mut sink) {
                note(&failure, &error);
            }
        };
        let lost = |error: TransportError| tracing::info!(%error, "the connection for single pages ended");
        let settings = urgent::settings();
        let hello = self.hello.clone();
        let link = urgent::connect(
            self.node.clone(),
            addrs,
            hello,
            self.id,
            Box::new(serve),
            Box::new(lost),
            settings,
        )?;
        let has_own = link.peer().addr.port() == port;
        self.urgent = Some(link);
        Ok(has_own)
    }

    /// Pushes what is owed on the bulk stream of `sender`, in the background.
    ///
    /// # Errors
    /// If there is no thread to be had.
    pub(super) fn push(&mut self, sender: LinkSender) -> std::io::Result<()> {
        self.stop_push();
        self.told = None;
        sender.set_polite(true);
        let stop = Arc::new(AtomicBool::new(false));
        let (store, failure, stopped) = (self.store.clone(), self.failure.clone(), stop.clone());
        let work = move || {
            let mut sink = |bytes: Bytes| sender.send_frame_blocking(bytes);
            match store.push(&mut sink, &|| stopped.load(Ordering::Relaxed)) {
                // The link's end is seen by whoever reads from it.
                Ok(()) | Err(PostcopyError::Pack(_)) => {}
                Err(error) => note(&failure, &error),
            }
        };
        let thread = std::thread::Builder::new().name("push".into()).spawn(work)?;
        self.push = Some(Push { thread, stop });
        Ok(())
    }

    /// Whether single pages can be asked for.
    pub(super) fn is_attached(&self) -> bool {
        self.urgent.as_ref().is_some_and(|u| !u.is_lost())
    }

    /// What is new. Each is told once.
    pub(super) fn news(&mut self) -> Option<News> {
        let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let sent = self.push.as_ref().is_some_and(|p| p.thread.is_finished()) && self.store.pages_left() == 0;
        let news = if let Some(error) = failure {
            News::Failed(error)
        } else if self.urgent.as_ref().is_some_and(urgent::UrgentLink::is_lost) {
            News::Lost
        } else if sent {
            News::AllSent
        } else {
            return None;
        };
        if self.told.as_ref() == Some(&news) {
            return None;
        }
        self.told = Some(news.clone());
        Some(news)
    }

    /// Closes both ways. The link that the push uses must be gone, or it may wait for room on it.
    pub(super) fn stop(&mut self) {
        self.urgent = None;
        self.stop_push();
        self.told = None;
    }

    fn stop_push(&mut self) {
        if let Some(Push { thread, stop }) = self.push.take() {
            stop.store(true, Ordering::Relaxed);
            if thread.join().is_err() {
                tracing::error!("the push has panicked");
            }
        }
    }
}

fn note<E: std::error::Error + 'static>(failure: &Mutex<Option<String>>, error: &PostcopyError<E>) {
    let text = chain(error);
    tracing::error!(error = text, "owed pages cannot be served");
    failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(text);
}
