//! `migrate serve`: accepts connections, gives each migration a thread, answers for those of the past.

use std::collections::HashMap;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::drain::Drain;
use super::driver::{Arrival, Ask, Driver, Inbox};
use super::guardian::Guard;
use super::machine::{DestMachine, answer_unknown};
use super::protocol::{Message, Outcome};
use super::queued::Queued;
use super::recover;
use super::steps::in_words;
use super::strays::Waiting;
use super::wire::{Extras, migration_of, to_control, to_message};
use crate::config::ServeConfig;
use crate::engine::address::AddressSet;
use crate::engine::clocks::{self, Shift};
use crate::engine::hook::Hooks;
use crate::engine::kernel::Host;
use crate::engine::own_files;
use crate::engine::remote::Tid;
use crate::engine::state::files::{AheadSockets, SilentConnections, UnixNames};
use crate::engine::sys::heap;
use crate::identity::{IdentityError, Node};
use crate::journal::{self, JournalError};
use crate::lazy::Held;
use crate::migration::MigrationId;
use crate::operator::protocol::Side;
use crate::operator::{About, Board, Listener, client};
use crate::proto::control::Begin;
use crate::report::PhaseClock;
use crate::transport::urgent::UrgentServer;
use crate::transport::{Incoming, Link, Server, Settings, TransportError};
use crate::wire::Body;

/// How long a connected source may take to say what it wants.
const FIRST_WORD: Duration = Duration::from_secs(30);
/// How long an answered connection is kept for the next question.
const NEXT_WORD: Duration = Duration::from_secs(10);

/// Why the service could not start or had to end.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Our key or the trusted peers.
    #[error("this node's identity")]
    Identity(#[from] IdentityError),
    /// The records of migrations.
    #[error("the records of earlier migrations")]
    Journal(#[from] JournalError),
    /// The network.
    #[error("the network")]
    Transport(#[from] TransportError),
    /// What this host has.
    #[error("examining this host")]
    Host(#[from] crate::engine::kernel::HostError),
    /// A thread or the runtime could not be started, or standard output is closed.
    #[error("{step}")]
    Io {
        /// What was being done.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
}

/// A migration whose thread lives: where to send questions about it, and who may ask.
#[derive(Debug)]
pub(super) struct Entry {
    pub inbox: Sender<Arrival>,
    pub peer: String,
}

/// All migrations that have a thread.
pub(super) type Registry = Arc<Mutex<HashMap<MigrationId, Entry>>>;

pub(super) struct Service {
    pub config: ServeConfig,
    host: Arc<Host>,
    pub hooks: Hooks,
    pub registry: Registry,
    pub board: Arc<Board>,
    urgent: Arc<UrgentServer>,
}

/// Runs the service until the network fails or it is killed.
///
/// # Errors
/// See [`ServeError`].
pub fn serve(config: ServeConfig) -> Result<(), ServeError> {
    let io = |step| move |source| ServeError::Io { step, source };
    own_files::make_room();
    let node = Arc::new(Node::open(&config.state_dir)?);
    let host = Arc::new(Host::probe()?);
    let hooks = Hooks::start(&config.hooks).map_err(io("starting the thread of hooks"))?;
    let registry = Registry::default();
    let board = Arc::new(Board::default());
    let _listener = Listener::start(&config.state_dir, board.clone());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("net")
        .enable_all()
        .build()
        .map_err(io("starting the network runtime"))?;
    runtime.block_on(async {
        let mut server = Server::bind(node.clone(), config.listen, Settings::default(), crate::hello::hello)?;
        let addr = server.local_addr();
        let urgent = Arc::new(UrgentServer::start(node.clone(), addr, crate::hello::hello)?);
        server.also_for(&urgent);
        let service = Arc::new(Service { config, host, hooks, registry, board, urgent });
        // Before anybody can ask, and with a way for the missing pages of those that wait for them.
        recover::recover(&service)?;
        let mut out = std::io::stdout();
        writeln!(out, "listening on {addr} (fingerprint {})", node.fingerprint())
            .and_then(|()| out.flush())
            .map_err(io("writing to standard output"))?;
        while let Some(link) = server.accept().await {
            match link {
                Err(failed) => {
                    let error = &failed.error as &dyn std::error::Error;
                    tracing::warn!(peer = %failed.peer, error, "connection refused");
                }
                Ok(link) => {
                    let service = service.clone();
                    let thread =
                        std::thread::Builder::new().name("dest".into()).spawn(move || service.session(link));
                    if let Err(error) = thread {
                        tracing::error!(%error, "no thread for a connection");
                    }
                }
            }
        }
        Ok(())
    })
}

impl Service {
    /// One connection: a migration of its own, or questions about others.
    fn session(&self, mut link: Link) {
        let mut patience = FIRST_WORD;
        loop {
            let until = Instant::now() + patience;
            let message = loop {
                match link.recv_timeout(until.saturating_duration_since(Instant::now())) {
                    Some(Incoming::Control(message)) => break message,
                    Some(Incoming::Frame(_)) => {}
                    Some(Incoming::Lost(_)) | None => return,
                }
            };
            let Some(id) = migration_of(&message) else { return };
            if let Some(Body::Begin(begin)) = message.message {
                return self.migration(id, begin, link);
            }
            let Ok(message) = to_message(*message) else { return };
            if message == Message::Resume {
                match self.resume(id, link) {
                    Some(again) => link = again,
                    None => return,
                }
            }
            self.answer(id, message, &link);
            patience = NEXT_WORD;
        }
    }

    /// Hands a connection over to the migration that it goes on with; back if there is none.
    fn resume(&self, id: MigrationId, link: Link) -> Option<Link> {
        let peer = link.peer().fingerprint.to_string();
        let registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = registry.get(&id)?;
        if entry.peer != peer {
            tracing::warn!(%id, peer, "a connection for a migration of somebody else");
            return None;
        }
        match entry.inbox.send(Arrival::Resume(Box::new(link))) {
            Ok(()) => None,
            Err(unsent) => match unsent.0 {
                Arrival::Resume(link) => Some(*link),
                Arrival::Ask(_) => None,
            },
        }
    }

    /// Passes a question on to the migration's thread, or answers for one that is not known.
    fn answer(&self, id: MigrationId, message: Message, link: &Link) {
        let peer = link.peer().fingerprint.to_string();
        // The lock is held until the answer is decided: see `machine`.
        let registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        let unanswered = match registry.get(&id) {
            Some(entry) if entry.peer != peer => {
                tracing::warn!(%id, peer, "a question about a migration of somebody else");
                return;
            }
            Some(entry) => {
                let ask = Arrival::Ask(Ask { message, answer: link.sender() });
                entry.inbox.send(ask).err().and_then(|unsent| match unsent.0 {
                    Arrival::Ask(ask) => Some(ask.message),
                    Arrival::Resume(_) => None,
                })
            }
            None => Some(message),
        };
        if let Some(tell) = unanswered.as_ref().and_then(answer_unknown) {
            let _ = link.send_control(&to_control(&tell, id, Extras::default()));
        }
    }

    fn migration(&self, id: MigrationId, begin: Begin, link: Link) {
        let received = clocks::here();
        let peer = link.peer().fingerprint.to_string();
        let (inbox, asks) = channel();
        {
            let mut registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
            if registry.contains_key(&id) {
                tracing::warn!(%id, "a second beginning of the same migration");
                return;
            }
            registry.insert(id, Entry { inbox, peer: peer.clone() });
        }
        tracing::info!(%id, pid = begin.pid, comm = begin.comm, peer, "migration begins");
        let about = About {
            id,
            side: Side::Destination,
            pid: i32::try_from(begin.pid).unwrap_or(0),
            command: client::shown(begin.comm.as_bytes()),
            peer: link.peer().addr.to_string(),
        };
        // Before the answer: the source attaches as soon as it knows the port.
        let peer_key = link.peer().fingerprint;
        let drain = Drain::expect(self.urgent.clone(), id, peer_key, &self.config.state_dir);
        let mut driver = self.driver(id, about, peer, asks, drain);
        (driver.begin, driver.received, driver.link) = (begin, received.ok(), Some(link));
        self.finish(id, &driver.run());
    }

    fn driver(&self, id: MigrationId, about: About, peer: String, inbox: Inbox, drain: Drain) -> Driver {
        Driver {
            posting: self.board.post(about, Arc::default()),
            id,
            begin: Begin::default(),
            received: None,
            shift: Shift::default(),
            link: None,
            inbox,
            state_dir: self.config.state_dir.clone(),
            host: self.host.clone(),
            assembly: None,
            skeleton: None,
            process: None,
            stopped: false,
            masks: Vec::new(),
            late: Vec::new(),
            addresses: None,
            ahead: AheadSockets::default(),
            made_ahead: 0,
            connections: SilentConnections::default(),
            names: UnixNames::default(),
            lost_datagrams: 0,
            remaps: Vec::new(),
            lock: None,
            strays: Waiting::default(),
            queued: Queued::default(),
            hooks: self.hooks.clone(),
            listen: self.config.listen,
            consented: false,
            asks: HashMap::new(),
            next_ask: 0,
            clock: PhaseClock::start(),
            peer,
            drain,
            accepted: false,
            drained_told: false,
        }
    }

    fn finish(&self, id: MigrationId, outcome: &Outcome) {
        tracing::info!(%id, "{}", in_words(outcome));
        self.registry.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        // A service that waits for the next one holds no memory for it.
        heap::give_back();
    }

    /// Goes on, in a thread of its own, with a process that runs here and misses pages which a guardian
    /// holds. Otherwise the guardian comes back, and the process must be killed.
    pub(super) fn take_over(
        self: &Arc<Self>,
        record: &journal::Incoming,
        guard: Guard,
        kept: &[(Held, OwnedFd)],
    ) -> Result<(), Guard> {
        let (id, pid) = (record.id, Tid::try_from(record.process.pid).unwrap_or(0));
        let Ok(peer) = record.peer.parse() else { return Err(guard) };
        let mut drain = Drain::expect(self.urgent.clone(), id, peer, &self.config.state_dir);
        if let Err((error, guard)) = drain.take_over(pid, guard, kept) {
            tracing::error!(%id, pid, error = &error as &dyn std::error::Error, "not taken over");
            return Err(guard);
        }
        let (inbox, asks) = channel();
        let entry = Entry { inbox, peer: record.peer.clone() };
        self.registry.lock().unwrap_or_else(PoisonError::into_inner).insert(id, entry);
        let mut driver = self.driver(id, About::of(record), record.peer.clone(), asks, drain);
        (driver.process, driver.accepted) = (Some(record.process), true);
        driver.stopped = record.was_stopped;
        driver.masks.clone_from(&record.masks);
        driver.addresses = AddressSet::of(&record.addresses).ok();
        let (machine, actions) = DestMachine::recovered(record.process, true, true);
        let service = self.clone();
        let thread = std::thread::Builder::new()
            .name("dest-recovered".into())
            .spawn(move || service.finish(id, &driver.run_from(machine, actions)));
        if let Err(error) = thread {
            // The driver is dropped, and the process killed with it.
            tracing::error!(%id, %error, "no thread for a process that misses pages");
        }
        Ok(())
    }
}

impl About {
    /// What a record says.
    pub(super) fn of(record: &journal::Incoming) -> Self {
        Self {
            id: record.id,
            side: Side::Destination,
            pid: i32::try_from(record.process.pid).unwrap_or(0),
            command: client::command_of(record.process.pid),
            peer: record.peer.clone(),
        }
    }
}
