//! Sockets of connections, made before the state of the process comes.
//!
//! Most connections of a server do nothing for as long as a freeze takes. What the source saw of them just before is most
//! likely what the state says of them in the end, so their sockets are made meanwhile. The state says it all the same:
//! a socket is used if it was made from just what is in the state, and thrown away otherwise. In `TCP_REPAIR` that is
//! silent.
//!
//! They are behind the lock before they are made. Their clocks are set again at the end, and only then do they send
//! keep-alive probes, whose timer starts with the connection.

use std::collections::HashMap;
use std::ffi::c_int;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use libc::{O_NONBLOCK, O_RDWR, SOL_SOCKET};
use nix::sys::resource::{Resource, getrlimit};

use super::super::Trouble;
use super::Silent;
use super::connection::{complete, make, resume_clock};
use super::live::silence;
use super::recipe::{Recipe, Recipes};
use crate::engine::lock::{Connection, connection_of};
use crate::engine::many;
use crate::engine::sys::tcp::{Queue, choose_queue};
use crate::engine::sys::{fds, socket};
use crate::proto::files::{Ahead, OptionSet, TcpConnection};

/// Most sockets that are made for one process.
pub const MOST_AHEAD: usize = 16_384;

/// How many there are, for all processes that come.
static THERE: AtomicU64 = AtomicU64::new(0);

/// The sockets that are there for a process which is not.
#[derive(Debug, Default)]
pub struct AheadSockets {
    made: HashMap<Connection, Box<Early>>,
    /// What has turned out to be another connection.
    stale: Vec<Early>,
    recipes: Recipes,
}

/// One of them.
#[derive(Debug)]
pub(in super::super) struct Early {
    fd: Arc<OwnedFd>,
    /// What it was made from.
    image: TcpConnection,
    recipe: Arc<Recipe>,
    connected: bool,
}

impl AheadSockets {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.made.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.made.is_empty()
    }

    /// Makes sockets of what does nothing. No packet may reach them. What cannot be made is not there, and is made when
    /// it is needed.
    pub fn make(&mut self, ahead: &Ahead) {
        self.begin();
        let mut wanted = Vec::new();
        for image in ahead.connections.iter().filter(|image| is_idle(image)).take(room()) {
            // Both ends of those of the host itself are here, and may be somebody else's.
            let Some(ends) = connection_of(image).filter(|ends| !ends.local.ip().is_loopback()) else {
                continue;
            };
            // An older one of the same ends would be in the way.
            self.made.remove(&ends);
            match self.recipe_of(image, &ahead.option_sets) {
                Ok(recipe) => wanted.push((ends, image, recipe)),
                Err(trouble) => tracing::debug!(%trouble, "options of a connection that is not made ahead"),
            }
        }
        let made = many::map(&wanted, |(_, image, recipe)| Early::make(image, recipe));
        for ((ends, ..), made) in wanted.iter().zip(made) {
            match made {
                Ok(early) => drop(self.made.insert(*ends, Box::new(early))),
                Err(trouble) => tracing::debug!(%trouble, ?ends, "a connection is not made ahead"),
            }
        }
    }

    /// Other sets of options have the numbers from here on.
    pub(in super::super) fn begin(&mut self) {
        self.recipes.forget_numbers();
    }

    /// The recipe for a connection, whose options are among `sets`.
    pub(in super::super) fn recipe_of(
        &mut self,
        image: &TcpConnection,
        sets: &[OptionSet],
    ) -> Result<Arc<Recipe>, Trouble> {
        self.recipes.of(image, sets)
    }

    /// The socket for this connection.
    pub(in super::super) fn take(
        &mut self,
        image: &TcpConnection,
        recipe: &Arc<Recipe>,
    ) -> Option<Box<Early>> {
        let early = self.made.remove(&connection_of(image)?)?;
        if early.is_for(image, recipe) {
            return Some(early);
        }
        self.stale.push(*early);
        None
    }

    /// Those that nobody takes go.
    pub(in super::super) fn drop_rest(self) {
        let Self { made, mut stale, .. } = self;
        stale.extend(made.into_values().map(|early| *early));
        if !stale.is_empty() {
            tracing::debug!(count = stale.len(), "sockets made ahead are of no use");
        }
        many::drop_all(stale);
    }
}

/// How many more there may be: others need descriptors as well.
fn room() -> usize {
    let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _)| soft);
    let left = (limit / 2).saturating_sub(THERE.load(Ordering::Relaxed));
    usize::try_from(left).unwrap_or(usize::MAX).min(MOST_AHEAD)
}

/// Nothing is under way, in either direction.
fn is_idle(image: &TcpConnection) -> bool {
    let queued = !image.received.is_empty() || !image.sent.is_empty() || !image.unsent.is_empty();
    !(queued || image.connecting || image.read_ended || image.write_ended)
}

/// Whether two connections are the same in all but the clock and the number of their options. All fields are named, so
/// that none is forgotten.
fn is_same(one: &TcpConnection, other: &TcpConnection) -> bool {
    let TcpConnection {
        family,
        local,
        local_port,
        remote,
        remote_port,
        connecting,
        receive_sequence,
        send_sequence,
        received,
        sent,
        unsent,
        read_ended,
        write_ended,
        negotiated,
        send_scale,
        receive_scale,
        segment_limit,
        timestamp: _,
        window,
        window_clamp,
        option_set: _,
        send_buffer,
        receive_buffer,
    } = one;
    *receive_sequence == other.receive_sequence
        && *send_sequence == other.send_sequence
        && *window == other.window
        && *family == other.family
        && *local == other.local
        && *local_port == other.local_port
        && *remote == other.remote
        && *remote_port == other.remote_port
        && *connecting == other.connecting
        && *received == other.received
        && *sent == other.sent
        && *unsent == other.unsent
        && *read_ended == other.read_ended
        && *write_ended == other.write_ended
        && *negotiated == other.negotiated
        && *send_scale == other.send_scale
        && *receive_scale == other.receive_scale
        && *segment_limit == other.segment_limit
        && *window_clamp == other.window_clamp
        && *send_buffer == other.send_buffer
        && *receive_buffer == other.receive_buffer
}

impl Early {
    fn make(image: &TcpConnection, recipe: &Arc<Recipe>) -> Result<Self, Trouble> {
        // Most servers do not wait.
        let fd = Arc::new(make(image, O_NONBLOCK, recipe)?);
        THERE.fetch_add(1, Ordering::Relaxed);
        let mut early = Self { fd, image: image.clone(), recipe: recipe.clone(), connected: false };
        early.set_keep_alive(0)?;
        early.connected = complete(early.fd.as_fd(), image)?;
        if early.connected {
            choose_queue(early.fd.as_fd(), Queue::None).map_err(Trouble::step("leaving a queue"))?;
        }
        Ok(early)
    }

    fn set_keep_alive(&self, value: c_int) -> Result<(), Trouble> {
        if self.recipe.keep_alive == 0 {
            return Ok(());
        }
        socket::set_int_option(self.fd.as_fd(), SOL_SOCKET, libc::SO_KEEPALIVE, value)
            .map_err(Trouble::step("setting SO_KEEPALIVE"))
    }

    /// Whether it was made from what this one is. The clock goes on meanwhile, and numbers of sets mean nothing here.
    fn is_for(&self, image: &TcpConnection, recipe: &Arc<Recipe>) -> bool {
        Arc::ptr_eq(&self.recipe, recipe) && is_same(&self.image, image)
    }

    /// What is left to do for the connection of the state, which it is for. `None` if that fails: it is silent then,
    /// and in nobody's way.
    pub(in super::super) fn give(&self, image: &TcpConnection, flags: c_int) -> Option<Silent> {
        let given = self.finish(image, flags & O_NONBLOCK);
        if let Err(trouble) = &given {
            tracing::warn!(%trouble, "a connection made ahead");
            silence(self.fd.as_fd());
        }
        given.ok()
    }

    fn finish(&self, image: &TcpConnection, flags: c_int) -> Result<Silent, Trouble> {
        let fd = self.fd.as_fd();
        let connected = if self.connected {
            resume_clock(fd, image)?;
            true
        } else {
            // Where there was no route before.
            complete(fd, image)?
        };
        self.set_keep_alive(self.recipe.keep_alive)?;
        if flags != O_NONBLOCK {
            fds::set_status_flags(fd, O_RDWR | flags).map_err(Trouble::step("setting flags"))?;
        }
        Silent::of(self.fd.clone(), image, &self.recipe, connected, self.connected)
    }
}

impl Drop for Early {
    /// A process that is being started may have a copy of the descriptor for a moment, and the ends are to be free at
    /// once.
    fn drop(&mut self) {
        THERE.fetch_sub(1, Ordering::Relaxed);
        let is_given = Arc::strong_count(&self.fd) > 1;
        if self.connected && !is_given {
            silence(self.fd.as_fd());
        }
    }
}
