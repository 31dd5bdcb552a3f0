//! The accepting side.
//!
//! One task takes connections from the endpoint and does nothing else; each handshake is a task of its own
//! under a deadline. Only peers that have proved a trusted key and said hello become links.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use quinn::{Endpoint, VarInt};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;

use super::link::Link;
use super::setup::Answered;
use super::urgent::{Attachments, UrgentServer};
use super::{Settings, TransportError, pump, setup};
use crate::identity::Node;
use crate::wire::Hello;

/// Handshakes going on at once; more are refused.
const MAX_HANDSHAKES: usize = 64;
/// With so many going on, a peer must first show that it receives at its address.
const VALIDATE_FROM: usize = 16;
/// Links and failures that wait to be taken.
const READY: usize = 16;
/// How long closing everything may take.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(500);

/// A connection that was not accepted.
#[derive(Debug)]
pub struct Failed {
    /// Who tried.
    pub peer: SocketAddr,
    /// Why not.
    pub error: TransportError,
}

/// Accepts links from trusted peers.
#[derive(Debug)]
pub struct Server {
    endpoint: Endpoint,
    addr: SocketAddr,
    ready: mpsc::Receiver<Result<Link, Failed>>,
    accepting: JoinHandle<()>,
    urgent: Arc<OnceLock<Attachments>>,
}

impl Server {
    /// Listens on `addr`. `hello` makes our first message for each connection (the version is filled in).
    /// Needs the context of a tokio runtime, in which the links' network side will run.
    ///
    /// # Errors
    /// [`TransportError`] if the socket or TLS cannot be set up.
    pub fn bind(
        node: Arc<Node>,
        addr: SocketAddr,
        settings: Settings,
        hello: impl Fn() -> Hello + Send + Sync + 'static,
    ) -> Result<Self, TransportError> {
        let endpoint = setup::listen(&node, addr, &settings)?;
        let addr = endpoint.local_addr().map_err(TransportError::local("read the listening address"))?;
        let (ready_in, ready) = mpsc::channel(READY);
        let urgent = Arc::new(OnceLock::<Attachments>::new());
        let (attachments, bandwidth) = (urgent.clone(), settings.bandwidth);
        let take = move |peer, answered| {
            let (ready, attachments) = (ready_in.clone(), attachments.clone());
            async move {
                let result = match answered {
                    Ok(Answered::Link(streams)) => {
                        let (link, ends) = Link::new(&streams, bandwidth);
                        tokio::spawn(pump::run(streams, ends));
                        Ok(link)
                    }
                    Ok(Answered::Urgent(streams, id)) => {
                        match attachments.get() {
                            Some(attachments) => attachments.offer(streams, id),
                            None => Attachments::refuse(&streams),
                        }
                        return;
                    }
                    Err(error) => Err(Failed { peer, error }),
                };
                let _ = ready.send(result).await;
            }
        };
        let accepting = tokio::spawn(accept_all(endpoint.clone(), node, settings, hello, take));
        Ok(Self { endpoint, addr, ready, accepting, urgent })
    }

    /// Accepts connections for single pages here as well, for peers whose packets do not reach the port of
    /// `urgent`. They are served by its thread, but their packets pass through ours.
    pub fn also_for(&self, urgent: &UrgentServer) {
        // A second one is for the same migrations, if it is meant at all.
        let _ = self.urgent.set(urgent.attachments());
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    /// The next link, or the next peer that was refused or gave up; `None` after the endpoint has failed.
    pub async fn accept(&mut self) -> Option<Result<Link, Failed>> {
        self.ready.recv().await
    }

    /// Closes the endpoint and all its connections.
    pub async fn shutdown(self) {
        self.accepting.abort();
        self.endpoint.close(VarInt::from_u32(0), b"");
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, self.endpoint.wait_idle()).await;
    }
}

/// Takes connections until the endpoint is closed; what became of each goes to `take`.
pub(super) async fn accept_all<T: Future<Output = ()> + Send>(
    endpoint: Endpoint,
    node: Arc<Node>,
    settings: Settings,
    hello: impl Fn() -> Hello + Send + Sync + 'static,
    take: impl Fn(SocketAddr, Result<Answered, TransportError>) -> T + Send + Sync + 'static,
) {
    let (hello, take) = (Arc::new(hello), Arc::new(take));
    let handshakes = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    while let Some(incoming) = endpoint.accept().await {
        let Ok(permit) = handshakes.clone().try_acquire_owned() else {
            incoming.refuse();
            continue;
        };
        if handshakes.available_permits() < MAX_HANDSHAKES - VALIDATE_FROM && incoming.may_retry() {
            // Fails only if it may not be retried.
            let _ = incoming.retry();
            continue;
        }
        let (node, settings, hello, take) = (node.clone(), settings.clone(), hello.clone(), take.clone());
        tokio::spawn(async move {
            let peer = incoming.remote_address();
            let answered = setup::answer(&node, incoming, hello(), &settings).await;
            drop(permit);
            take(peer, answered).await;
        });
    }
}
