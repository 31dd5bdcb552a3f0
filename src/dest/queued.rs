//! Connections that the process had not accepted yet at the source: they come after the commit, and are put into the
//! queues of its sockets here.
//!
//! The process runs by then. Until they are there, what comes for them is kept from a kernel that does not know them, and
//! so are requests for new ones, which would take their places. That, and putting them in, is done by a thread of its own,
//! which has the lock. If the source does not send them in time, because it or the link is gone, they are lost, and
//! their peers learn that when they say something.

use std::collections::{HashMap, HashSet};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use super::handshakes::{self, Holding};
use crate::engine::handshake::Held;
use crate::engine::lock::{self, Connection, Lock};
use crate::engine::queued::{Closed, Placer};
use crate::engine::reason::chain;
use crate::engine::state::files;
use crate::engine::strays::{self, Strays};
use crate::proto::control;
use crate::proto::files::{Files, TcpConnection};

/// How long the source may take from the resume on, and from each message on, until the next.
const PATIENCE: Duration = Duration::from_secs(5);

/// Those that are to come, and what has come for them.
#[derive(Default)]
pub(super) struct Queued {
    placer: Option<Placer>,
    expected: Vec<Connection>,
    /// Their ends here, by those that they had at the source.
    names: HashMap<Connection, TcpConnection>,
    /// Those whose other end is of this host, and nobody's any more.
    halves: HashSet<Connection>,
    /// Handshakes that go on.
    held: Held,
    /// All of those; and where the process listens, if any are expected.
    closed: Vec<Connection>,
    tap: Option<Strays>,
    packets: Vec<Vec<u8>>,
    thread: Option<Sender<Came>>,
}

/// What the thread hears of.
pub(super) enum Came {
    Strays(Vec<Vec<u8>>),
    Connections { images: Vec<TcpConnection>, last: bool },
}

impl Queued {
    /// Finds out whether this host can do it. Takes milliseconds.
    pub(super) fn prepare(&mut self) {
        match Placer::prepare() {
            Ok(placer) => self.placer = Some(placer),
            Err(error) => {
                tracing::info!(error = chain(&error), "connections not accepted yet cannot be taken")
            }
        }
    }

    /// Whether it can.
    pub(super) fn is_able(&self) -> bool {
        self.placer.is_some()
    }

    /// Those that the state names, and `all` that is to be locked.
    /// `before`: what they were called at the source.
    pub(super) fn expect(&mut self, files: &Files, all: &[Connection], before: Vec<TcpConnection>) {
        self.expected = lock::queued_in_image(files);
        self.held = Held::of(files);
        self.closed = self.held.ends();
        let names = before.iter().map(lock::connection_of).zip(files.queued.iter().cloned());
        self.names = names.filter_map(|(before, name)| Some((before?, name))).collect();
        let own: HashSet<_> = all.iter().collect();
        let is_half = |one: &Connection| one.reversed().is_some_and(|other| !own.contains(&other));
        let halves = self.expected.iter().filter(|one| one.is_of_one_host() && is_half(one));
        self.halves = halves.copied().collect();
        if !self.expected.is_empty() {
            let listening = all.iter().filter(|connection| connection.remote.is_none());
            self.closed.extend(listening.chain(&self.expected));
        }
    }

    /// What must not be reached from outside before they are there; empty if there are none.
    pub(super) fn closed(&self) -> &[Connection] {
        &self.closed
    }

    /// Strays may be meant for them. The tap hears what comes to this host.
    pub(super) fn keep(&mut self, packets: &[Vec<u8>], tap: Option<Strays>) {
        if self.closed.is_empty() {
            return;
        }
        self.tap = tap.or(self.tap.take());
        match &self.thread {
            // One that has ended needs none.
            Some(thread) => drop(thread.send(Came::Strays(packets.to_vec()))),
            None => self.packets.extend_from_slice(packets),
        }
    }

    /// The process runs. Gives the lock back if there is nothing to be done with it.
    pub(super) fn start(&mut self, lock: Lock) -> Option<Lock> {
        if self.closed.is_empty() {
            return Some(lock);
        }
        let (sender, inbox) = channel();
        let placing = Placing {
            lock,
            placer: self.placer.take(),
            expected: std::mem::take(&mut self.expected),
            held: std::mem::take(&mut self.held),
            halves: std::mem::take(&mut self.halves),
            closed: self.closed.clone(),
            tap: self.tap.take(),
            packets: std::mem::take(&mut self.packets),
        };
        match std::thread::Builder::new().name("queued".into()).spawn(move || placing.run(&inbox)) {
            Ok(_) => self.thread = Some(sender),
            Err(error) => {
                tracing::error!(%error, lost = ?self.closed, "connections not accepted yet are lost");
            }
        }
        None
    }

    /// The process runs, and nothing keeps other kernels' segments from them.
    pub(super) fn give_up(&mut self) {
        for Connection { local, remote } in std::mem::take(&mut self.expected) {
            tracing::error!(%local, ?remote, "a connection not accepted yet is lost: there is no lock");
        }
        for Connection { local, remote } in std::mem::take(&mut self.held).ends() {
            tracing::error!(%local, ?remote, "a handshake is lost: there is no lock");
        }
    }

    /// They have come, or some of them.
    pub(super) fn take(&mut self, queued: control::Queued) {
        let control::Queued { connections: mut images, last, .. } = queued;
        for image in &mut images {
            let name = lock::connection_of(image).and_then(|before| self.names.get(&before));
            if let Some(name) = name {
                (image.local, image.remote) = (name.local.clone(), name.remote.clone());
            }
        }
        if let Some(thread) = &self.thread {
            let _ = thread.send(Came::Connections { images, last });
        }
        if last {
            self.thread = None;
        }
    }
}

/// What the thread has.
struct Placing {
    lock: Lock,
    placer: Option<Placer>,
    expected: Vec<Connection>,
    held: Held,
    halves: HashSet<Connection>,
    closed: Vec<Connection>,
    tap: Option<Strays>,
    packets: Vec<Vec<u8>>,
}

impl Placing {
    fn run(mut self, inbox: &Receiver<Came>) {
        // Those that the process may have both ends of.
        let own = self.expected.iter().filter(|one| one.is_of_one_host() && !self.halves.contains(one));
        let own: Vec<_> = own.copied().collect();
        let images = if self.expected.is_empty() { Vec::new() } else { self.await_all(inbox) };
        let is_half =
            |image: &&TcpConnection| lock::connection_of(image).is_some_and(|one| self.halves.contains(&one));
        let closed = Closed::make(images.iter().filter(is_half));
        let lost = match &self.placer {
            Some(placer) if !images.is_empty() => placer.place(&images).unwrap_or_else(|error| {
                tracing::error!(
                    count = images.len(),
                    error = chain(&error),
                    "connections not accepted yet are lost"
                );
                Vec::new()
            }),
            _ => {
                if !images.is_empty() {
                    tracing::error!(
                        count = images.len(),
                        "connections not accepted yet are lost: none are taken here"
                    );
                }
                Vec::new()
            }
        };
        for reason in lost {
            tracing::error!(%reason, "a connection is lost");
        }
        closed.into_iter().for_each(Closed::close);
        let Self { mut lock, placer, held, closed: mut wanted, mut tap, mut packets, .. } = self;
        let ends = held.ends();
        let released = lock.release_but(&ends);
        wanted.extend(handshakes::goals(&ends));
        packets.extend(tap.as_mut().map(|tap| tap.take(&wanted)).unwrap_or_default());
        let lock = match released {
            Ok(()) => Some(lock),
            Err(error) => {
                // The end of its socket lifts it as well.
                tracing::error!(error = chain(&error), "the lock");
                drop(lock);
                None
            }
        };
        match strays::put_in(&packets, &wanted) {
            Ok(count) => tracing::debug!(placed = images.len(), strays = count, "queues are as they were"),
            Err(error) => tracing::warn!(error = chain(&error), "strays are lost"),
        }
        Placer::abort_halves(&own);
        match (lock, placer) {
            _ if ends.is_empty() => {}
            (Some(lock), Some(placer)) => Holding::run(lock, placer, held, tap, packets, inbox),
            _ => tracing::error!(lost = ?ends, "handshakes are lost: none are taken here"),
        }
    }

    /// Those that were expected, in the order in which they come.
    fn await_all(&mut self, inbox: &Receiver<Came>) -> Vec<TcpConnection> {
        let mut all = Vec::new();
        let mut room = files::MOST_QUEUED_BYTES;
        let mut deadline = Instant::now() + PATIENCE;
        loop {
            match inbox.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(Came::Strays(packets)) => self.packets.extend(packets),
                Ok(Came::Connections { images, last }) => {
                    for image in images.into_iter().filter(|image| self.is_expected(image)) {
                        match room.checked_sub(image.received.len()) {
                            Some(left) => room = left,
                            None => {
                                tracing::error!(
                                    port = image.remote_port,
                                    "a connection is lost: too much has come"
                                );
                                continue;
                            }
                        }
                        all.push(image);
                    }
                    if last {
                        return all;
                    }
                    deadline = Instant::now() + PATIENCE;
                }
                Err(_) => {
                    let missing = self.expected.len();
                    tracing::error!(
                        missing,
                        "connections not accepted yet are lost: the source has not sent them"
                    );
                    return all;
                }
            }
        }
    }

    /// Each once.
    fn is_expected(&mut self, image: &TcpConnection) -> bool {
        let connection = lock::connection_of(image);
        let place = self.expected.iter().position(|expected| Some(*expected) == connection);
        place.map(|place| self.expected.swap_remove(place)).is_some()
    }
}
