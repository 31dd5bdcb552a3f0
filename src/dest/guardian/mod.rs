//! A small process that keeps a migration's missing pages waiting when the service dies.
//!
//! A userfaultfd whose last descriptor is closed lets everybody read zeros. So the guardian holds duplicates
//! of all of them, and the book in which the service writes what it does (see [`crate::lazy::book`]). It
//! reads neither: the threads that wait go on waiting, and a restarted service takes all of it over. It has
//! a session of its own, takes no signal, and is found by the migration's id below the state directory.
//!
//! It ends when the service says so, which is when nothing is missing any more; or when it is alone and the
//! processes that it guards are gone.

mod process;
mod wire;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, connect, socket, socketpair};

use crate::lazy::{Held, Keeper, Kept};
use crate::migration::MigrationId;
use process::Place;
use wire::Kind;

pub use process::{GuardianError, run};

/// It is there within milliseconds, and what it says is a few packets.
const PATIENCE: Duration = Duration::from_secs(10);

/// The service's hold on a guardian. Dropping it leaves the guardian alone with what it has.
#[derive(Debug)]
pub(super) struct Guard {
    line: OwnedFd,
    state_dir: PathBuf,
    id: MigrationId,
    /// Nobody else waits for its end.
    child: Option<Child>,
}

fn failed(step: &'static str) -> impl Fn(io::Error) -> GuardianError {
    move |source| GuardianError { step, source }
}

impl Guard {
    /// Starts one, and does not wait for it: see [`Guard::await_ready`].
    ///
    /// # Errors
    /// If it cannot be started.
    pub(super) fn spawn(state_dir: &Path, id: MigrationId) -> Result<Self, GuardianError> {
        let (line, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .map_err(|errno| failed("making its line")(errno.into()))?;
        let state_dir = std::path::absolute(state_dir).map_err(failed("finding the state directory"))?;
        let mut command = Command::new("/proc/self/exe");
        command.arg("--state-dir").arg(&state_dir).arg("__guardian").arg(id.to_string());
        let child = command
            .stdin(theirs)
            // An inherited pipe would keep whoever reads it waiting for us.
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(failed("starting it"))?;
        drop(command); // and with it our copy of its end
        Ok(Self { line, state_dir, id, child: Some(child) })
    }

    /// Waits until it can be found by others.
    ///
    /// # Errors
    /// If it does not come up.
    pub(super) fn await_ready(&self) -> Result<(), GuardianError> {
        match self.receive().map_err(failed("waiting for it"))?.kind {
            Kind::Ready => Ok(()),
            _ => Err(failed("waiting for it")(io::ErrorKind::InvalidData.into())),
        }
    }

    /// The one that an earlier service has left behind, and all that it holds.
    ///
    /// # Errors
    /// If it does not answer. `Ok(None)`: there is none, and nothing is left of it.
    pub(super) fn find(state_dir: &Path, id: MigrationId) -> Result<Option<(Self, Kept)>, GuardianError> {
        let place = Place::open(state_dir, id).map_err(failed("opening its directory"))?;
        let to = |step| move |errno: Errno| failed(step)(errno.into());
        let line = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)
            .map_err(to("making a socket for it"))?;
        let address = place.address().map_err(failed("naming it"))?;
        match connect(line.as_raw_fd(), &address) {
            Ok(()) => {}
            Err(Errno::ENOENT) => return Ok(None),
            Err(Errno::ECONNREFUSED) => {
                place.remove().map_err(failed("removing its socket"))?;
                return Ok(None);
            }
            Err(errno) => return Err(to("connecting to it")(errno)),
        }
        let guard = Self { line, state_dir: state_dir.to_owned(), id, child: None };
        wire::say(&guard.line, Kind::Take).map_err(failed("asking it"))?;
        let mut kept = Vec::new();
        loop {
            let packet = guard.receive().map_err(failed("taking over from it"))?;
            match packet.kind {
                Kind::Keep => kept.extend(packet.what.into_iter().zip(packet.fds)),
                Kind::End => return Ok(Some((guard, kept))),
                _ => {}
            }
        }
    }

    /// Whether we have started it ourselves.
    pub(super) fn is_new(&self) -> bool {
        self.child.is_some()
    }

    /// Its end of what a [`crate::lazy::Lazy`] entrusts.
    ///
    /// # Errors
    /// If there is no descriptor to be had.
    pub(super) fn keeper(&self) -> io::Result<Box<dyn Keeper>> {
        Ok(Box::new(Line(self.line.try_clone()?)))
    }

    /// Whether it is there. Never waits.
    pub(super) fn is_alive(&self) -> bool {
        let mut fds = [PollFd::new(self.line.as_fd(), PollFlags::empty())];
        poll(&mut fds, PollTimeout::ZERO) == Ok(0)
    }

    /// Tells it to go, and waits until it is gone and has closed what it held.
    pub(super) fn dismiss(mut self) {
        let gone = wire::say(&self.line, Kind::Go).is_err()
            || loop {
                match self.receive() {
                    Ok(_) => {}
                    Err(error) => break error.kind() == io::ErrorKind::UnexpectedEof,
                }
            };
        if let Some(child) = &mut self.child {
            if !gone {
                let _ = child.kill();
            }
            let _ = child.wait();
        } else if !gone {
            tracing::error!(id = %self.id, "a guardian does not go");
        }
        // One that was killed has left its socket.
        if let Err(error) = Place::open(&self.state_dir, self.id).and_then(|place| place.remove()) {
            tracing::warn!(%error, "removing a guardian's socket");
        }
    }

    fn receive(&self) -> io::Result<wire::Packet> {
        let timeout = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(self.line.as_fd(), PollFlags::POLLIN)];
        loop {
            match poll(&mut fds, timeout) {
                Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
                Ok(_) => break,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        wire::receive(self.line.as_fd())?.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }
}

/// What lies in the queue of the guardian's socket is in its hands.
#[derive(Debug)]
struct Line(OwnedFd);

impl Keeper for Line {
    fn keep(&mut self, what: &[(Held, BorrowedFd<'_>)]) -> io::Result<()> {
        let what: Vec<_> = what.iter().map(|(held, fd)| (*held, Some(*fd))).collect();
        wire::send(self.0.as_fd(), Kind::Keep, &what, MsgFlags::MSG_DONTWAIT)
    }

    fn release(&mut self, what: Held) {
        // If it is gone, so is what it held.
        let _ = wire::send(self.0.as_fd(), Kind::Release, &[(what, None)], MsgFlags::MSG_DONTWAIT);
    }
}
