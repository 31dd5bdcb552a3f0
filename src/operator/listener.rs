//! Answers operators on the control socket, for one board.

use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::socket::{Shutdown, shutdown};

use super::board::Board;
use super::place::{self, Place};
use super::protocol::{self, Answer, MAX_REQUEST_BYTES, Request};
use crate::migration::ProcessKey;

/// How long a client may take to say what it wants and to take the answer. In tests it is not the point, and the host is busy.
const CLIENT_PATIENCE: Duration = Duration::from_secs(if cfg!(test) { 20 } else { 2 });
/// How long an order may take to be followed.
pub(super) const ORDER_PATIENCE: Duration = Duration::from_secs(120);
/// How long the end of the program waits for answers that are on their way.
const LAST_ANSWERS: Duration = Duration::from_secs(1);
/// Clients that are served at the same time.
const MOST_CLIENTS: usize = 16;
/// The threads only read a line and write one.
const STACK_BYTES: usize = 256 * 1024;
/// Pause after a failed accept: it may fail again at once, for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The control socket of this `migrate`, until it is dropped.
#[derive(Debug)]
pub struct Listener {
    place: Place,
    owner: ProcessKey,
    socket: Arc<UnixListener>,
    thread: Option<JoinHandle<()>>,
    clients: Arc<Clients>,
}

#[derive(Debug, Default)]
struct Clients {
    count: Mutex<usize>,
    left: Condvar,
}

impl Listener {
    /// Listens for the migrations of a board. If that is not possible, a warning says so, and they go on without.
    pub fn start(state_dir: &Path, board: Arc<Board>) -> Option<Self> {
        Self::listen(state_dir, board)
            .inspect_err(
                |error| tracing::warn!(%error, "no control socket: status, cancel and postcopy do not work"),
            )
            .ok()
    }

    fn listen(state_dir: &Path, board: Arc<Board>) -> io::Result<Self> {
        let place = Place::make(state_dir)?;
        place.tidy();
        let owner = place::ourselves();
        let socket = Arc::new(place.bind(owner)?);
        let clients = Arc::new(Clients::default());
        let (listening, serving) = (socket.clone(), clients.clone());
        let thread = Builder::new()
            .name("operator".into())
            .stack_size(STACK_BYTES)
            .spawn(move || accept(&listening, &board, &serving))
            .inspect_err(|_| place.remove(owner))?;
        Ok(Self { place, owner, socket, thread: Some(thread), clients })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.place.remove(self.owner);
        // Ends the accept.
        if let Err(errno) = shutdown(self.socket.as_raw_fd(), Shutdown::Both) {
            tracing::warn!(%errno, "closing the control socket");
            return;
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        // A client that waits for the end of a migration has its answer now, but not in its hands yet.
        let until = Instant::now() + LAST_ANSWERS;
        let mut count = self.clients.count();
        while *count > 0 && Instant::now() < until {
            let left = until.saturating_duration_since(Instant::now());
            count = self.clients.left.wait_timeout(count, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Clients {
    fn count(&self) -> MutexGuard<'_, usize> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A place for one more, if there is one.
    fn admit(self: &Arc<Self>) -> Option<Seat> {
        let mut count = self.count();
        if *count >= MOST_CLIENTS {
            return None;
        }
        *count += 1;
        Some(Seat(self.clone()))
    }
}

/// One client's place, given back when dropped.
struct Seat(Arc<Clients>);

impl Drop for Seat {
    fn drop(&mut self) {
        *self.0.count() -= 1;
        self.0.left.notify_all();
    }
}

fn accept(socket: &UnixListener, board: &Arc<Board>, clients: &Arc<Clients>) {
    loop {
        let stream = match socket.accept() {
            Ok((stream, _)) => stream,
            // Shut down.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => return,
            Err(error) => {
                tracing::warn!(%error, "accepting on the control socket");
                std::thread::sleep(ACCEPT_PAUSE);
                continue;
            }
        };
        // More of them are sent away: they ask again.
        let Some(seat) = clients.admit() else { continue };
        let board = board.clone();
        let serve = move || {
            let _seat = seat;
            if let Err(error) = serve(&stream, &board) {
                tracing::debug!(%error, "a client of the control socket");
            }
        };
        if let Err(error) = Builder::new().name("operator-client".into()).stack_size(STACK_BYTES).spawn(serve)
        {
            tracing::warn!(%error, "no thread for a client of the control socket");
        }
    }
}

/// One request, one answer.
fn serve(mut stream: &UnixStream, board: &Board) -> io::Result<()> {
    stream.set_read_timeout(Some(CLIENT_PATIENCE))?;
    stream.set_write_timeout(Some(CLIENT_PATIENCE))?;
    let answer = match protocol::read(stream, MAX_REQUEST_BYTES) {
        Ok(Request::Status) => Answer::Migrations { migrations: board.list() },
        Ok(Request::Cancel { id }) => Answer::Verdict { verdict: board.cancel(id, ORDER_PATIENCE) },
        Ok(Request::Postcopy { id }) => {
            Answer::Verdict { verdict: board.switch_to_postcopy(id, ORDER_PATIENCE) }
        }
        Err(error) => Answer::Error { text: error.to_string() },
    };
    protocol::write(&mut stream, &answer)
}
