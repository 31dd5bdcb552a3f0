//! The guardian's whole life: it holds what it is given, gives it to whoever asks, and does nothing else.

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::SigSet;
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, SockFlag, SockType, UnixAddr, accept, bind, getsockopt, listen, socket,
    sockopt,
};

use super::wire::{self, Kind, Packet};
use crate::engine::sys::{inherit, uffd};
use crate::lazy::Held;
use crate::migration::MigrationId;

/// The directory of the sockets, below the state directory.
const DIRECTORY: &str = "run";
/// How often a guardian that nobody speaks with looks whether there is anything left to guard.
const LOOK_EVERY: u16 = 500;
/// An address to ask the kernel about when what matters is whether it answers.
const ANYWHERE: u64 = 1 << 20;

/// Why there is no guardian.
#[derive(Debug, thiserror::Error)]
#[error("guardian: {step}")]
pub struct GuardianError {
    /// What was being done.
    pub step: &'static str,
    /// Why it failed.
    #[source]
    pub source: io::Error,
}

/// Where the guardian of a migration is found. The directory is kept open, because a socket's address has
/// room for 107 bytes only.
#[derive(Debug)]
pub(super) struct Place {
    directory: File,
    name: String,
}

impl Place {
    pub(super) fn open(state_dir: &Path, id: MigrationId) -> io::Result<Self> {
        let path = state_dir.join(DIRECTORY);
        DirBuilder::new().recursive(true).mode(0o700).create(&path)?;
        let directory =
            OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(path)?;
        Ok(Self { directory, name: format!("guardian-{id}.sock") })
    }

    fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{}", self.directory.as_raw_fd(), self.name))
    }

    pub(super) fn address(&self) -> io::Result<UnixAddr> {
        Ok(UnixAddr::new(&self.path())?)
    }

    /// Removes it; that there is none is fine.
    pub(super) fn remove(&self) -> io::Result<()> {
        match fs::remove_file(self.path()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    fn bind(&self) -> io::Result<OwnedFd> {
        self.remove()?;
        let listener = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
        bind(listener.as_raw_fd(), &self.address()?)?;
        // The directory lets nobody else in meanwhile.
        fs::set_permissions(self.path(), fs::Permissions::from_mode(0o600))?;
        listen(&listener, Backlog::new(8)?)?;
        Ok(listener)
    }
}

/// Guards migration `id`; the service that started this process is at the other end of standard input.
///
/// To be called first thing in a process that owns no descriptor above 2.
///
/// # Errors
/// If it cannot be set up.
pub fn run(state_dir: &Path, id: MigrationId) -> Result<(), GuardianError> {
    let failed = |step| move |source: io::Error| GuardianError { step, source };
    let set_up = |step| move |errno: Errno| GuardianError { step, source: errno.into() };
    inherit::close_inherited().map_err(set_up("closing inherited descriptors"))?;
    // Nothing but SIGKILL ends it: there is one thread, and it takes no signal.
    SigSet::all().thread_block().map_err(set_up("blocking signals"))?;
    nix::unistd::setsid().map_err(set_up("making a session"))?;
    prctl::set_name(c"migrate-guard").map_err(set_up("taking a name"))?;
    // One userfaultfd for each child of the process.
    if let Ok((_, most)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, most, most);
    }
    // Without it the process would have to go, so it may go last. That takes a privilege that we may lack.
    let _ = fs::write("/proc/self/oom_score_adj", "-1000");
    let place = Place::open(state_dir, id).map_err(failed("opening its directory"))?;
    nix::unistd::chdir("/").map_err(set_up("leaving the working directory"))?;
    let listener = place.bind().map_err(failed("making its socket"))?;
    let line = io::stdin().as_fd().try_clone_to_owned().map_err(failed("taking its line"))?;
    detach_input().map_err(failed("leaving standard input"))?;
    let _ = wire::say(&line, Kind::Ready); // if nobody listens any more, its end is read below
    let guarded = guard(&listener, line).map_err(failed("waiting"));
    let removed = place.remove().map_err(failed("removing its socket"));
    guarded.and(removed)
}

/// Standard input is one end of the line: it must be closed when the line is.
fn detach_input() -> io::Result<()> {
    let null = File::open("/dev/null")?;
    nix::unistd::dup2_stdin(null)?;
    Ok(())
}

fn guard(listener: &OwnedFd, line: OwnedFd) -> io::Result<()> {
    let mut kept = BTreeMap::new();
    let mut lines = vec![line];
    loop {
        if lines.is_empty() && !is_needed(&kept) {
            return Ok(());
        }
        let mut ready: Vec<PollFd<'_>> =
            lines.iter().map(|line| PollFd::new(line.as_fd(), PollFlags::POLLIN)).collect();
        ready.push(PollFd::new(listener.as_fd(), PollFlags::POLLIN));
        let timeout = if lines.is_empty() { PollTimeout::from(LOOK_EVERY) } else { PollTimeout::NONE };
        match poll(&mut ready, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let spoke: Vec<bool> = ready.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        drop(ready);
        if spoke.last() == Some(&true) {
            lines.extend(admit(listener));
        }
        let mut open = Vec::new();
        for (index, line) in lines.into_iter().enumerate() {
            if spoke.get(index) != Some(&true) || index + 1 == spoke.len() {
                open.push(line);
                continue;
            }
            match wire::receive(line.as_fd()) {
                Ok(Some(Packet { kind: Kind::Go, .. })) => return Ok(()),
                Ok(Some(packet)) => {
                    if act(packet, &line, &mut kept).is_ok() {
                        open.push(line);
                    }
                }
                Ok(None) | Err(_) => {}
            }
        }
        lines = open;
    }
}

/// Takes a connection, if it is of the same user.
fn admit(listener: &OwnedFd) -> Option<OwnedFd> {
    let line = accept(listener.as_raw_fd()).ok().map(crate::engine::sys::owned_fd)?;
    let peer = getsockopt(&line, sockopt::PeerCredentials).ok()?;
    (peer.uid() == nix::unistd::geteuid().as_raw()).then_some(line)
}

fn act(packet: Packet, line: &OwnedFd, kept: &mut BTreeMap<Held, OwnedFd>) -> io::Result<()> {
    match packet.kind {
        Kind::Keep => kept.extend(packet.what.into_iter().zip(packet.fds)),
        Kind::Release => packet.what.iter().for_each(|what| drop(kept.remove(what))),
        Kind::Take => {
            let all: Vec<_> = kept.iter().map(|(what, fd)| (*what, Some(fd.as_fd()))).collect();
            if !all.is_empty() {
                wire::send(line.as_fd(), Kind::Keep, &all, MsgFlags::empty())?;
            }
            wire::say(line, Kind::End)?;
        }
        Kind::Ready | Kind::End | Kind::Go => {}
    }
    Ok(())
}

/// Whether any of the address spaces lives.
fn is_needed(kept: &BTreeMap<Held, OwnedFd>) -> bool {
    kept.iter().any(|(what, fd)| {
        matches!(what, Held::Space(_)) && uffd::is_registered(fd.as_fd(), ANYWHERE) != Err(Errno::ESRCH)
    })
}
