//! Where control sockets are: `STATE_DIR/run/PID-START.sock`, one for each running `migrate`.
//!
//! The start time in the name tells a living `migrate` from a later process with its number. A socket that
//! nobody listens on, of a `migrate` that is gone, is removed by whoever meets it.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use crate::engine::alive;
use crate::migration::ProcessKey;

/// Below the state directory.
const DIRECTORY: &str = "run";
const SUFFIX: &str = ".sock";

/// The directory of the sockets. Kept open, because a socket's address has room for 107 bytes only: sockets
/// are named through the descriptor.
#[derive(Debug)]
pub(super) struct Place {
    path: PathBuf,
    directory: File,
}

impl Place {
    /// Opens the directory, making it (0700) if need be.
    pub(super) fn make(state_dir: &Path) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(state_dir.join(DIRECTORY))?;
        Self::open(state_dir)
    }

    /// Opens the directory.
    pub(super) fn open(state_dir: &Path) -> io::Result<Self> {
        let path = state_dir.join(DIRECTORY);
        let directory =
            OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(&path)?;
        Ok(Self { path, directory })
    }

    fn address(&self, owner: ProcessKey) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{}", self.directory.as_raw_fd(), name(owner)))
    }

    /// Makes the socket of this `migrate`.
    pub(super) fn bind(&self, owner: ProcessKey) -> io::Result<UnixListener> {
        let address = self.address(owner);
        let listener = match UnixListener::bind(&address) {
            // Of an earlier boot: the number and the start time are ours alone.
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                fs::remove_file(&address)?;
                UnixListener::bind(&address)?
            }
            other => other?,
        };
        // The directory lets nobody else in meanwhile.
        fs::set_permissions(&address, fs::Permissions::from_mode(0o600))?;
        Ok(listener)
    }

    /// Removes it.
    pub(super) fn remove(&self, owner: ProcessKey) {
        if let Err(error) = fs::remove_file(self.path.join(name(owner)))
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, "removing the control socket");
        }
    }

    /// All that there are, as their names tell.
    pub(super) fn owners(&self) -> io::Result<Vec<ProcessKey>> {
        let mut owners = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            owners.extend(entry?.file_name().to_str().and_then(owner));
        }
        owners.sort_unstable_by_key(|owner| (owner.start_ticks, owner.pid));
        Ok(owners)
    }

    /// Connects to one. None if nobody is there; what a dead `migrate` has left is removed.
    pub(super) fn connect(&self, owner: ProcessKey) -> io::Result<Option<UnixStream>> {
        match UnixStream::connect(self.address(owner)) {
            Ok(stream) => Ok(Some(stream)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                // A living one may be about to listen, or about to end.
                if alive::start_ticks(owner.pid).is_ok_and(|start| start != Some(owner.start_ticks)) {
                    self.remove(owner);
                }
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Removes what dead ones have left.
    pub(super) fn tidy(&self) {
        for owner in self.owners().unwrap_or_default() {
            let _ = self.connect(owner);
        }
    }
}

fn name(owner: ProcessKey) -> String {
    format!("{}-{}{SUFFIX}", owner.pid, owner.start_ticks)
}

fn owner(name: &str) -> Option<ProcessKey> {
    let (pid, start) = name.strip_suffix(SUFFIX)?.split_once('-')?;
    let owner = ProcessKey { pid: pid.parse().ok()?, start_ticks: start.parse().ok()? };
    // One text form only: what is removed later must be what was found.
    (self::name(owner) == name).then_some(owner)
}

/// This very process.
pub(super) fn ourselves() -> ProcessKey {
    let pid = std::process::id();
    ProcessKey { pid, start_ticks: alive::start_ticks(pid).ok().flatten().unwrap_or(0) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_name_tells_its_owner() {
        let key = ProcessKey { pid: 12, start_ticks: 3456 };
        assert_eq!(owner(&name(key)), Some(key));
        for bad in ["", "12.sock", "12-.sock", "12-3", "012-3.sock", "+12-3.sock", "12-3-4.sock", "x-3.sock"]
        {
            assert_eq!(owner(bad), None, "{bad}");
        }
    }

    #[test]
    fn what_the_dead_have_left_is_removed_and_nothing_else() {
        // Longer than a socket's address may be.
        let dir = tempfile::tempdir().unwrap();
        let state_dir = dir.path().join("d".repeat(120));
        assert!(Place::open(&state_dir).is_err());
        let place = Place::make(&state_dir).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode(&place.path), 0o700);

        let us = ourselves();
        let dead = ProcessKey { pid: us.pid, start_ticks: us.start_ticks + 1 };
        let listener = place.bind(us).unwrap();
        drop(place.bind(dead).unwrap());
        fs::write(place.path.join("README"), "").unwrap();
        assert_eq!(mode(&place.path.join(name(us))), 0o600);
        assert_eq!(place.owners().unwrap(), vec![us, dead]);
        place.tidy();
        assert_eq!(place.owners().unwrap(), vec![us]);
        assert!(place.connect(us).unwrap().is_some());
        assert!(place.connect(dead).unwrap().is_none());

        // Ours is not removed while we live, even if nobody listens.
        drop(listener);
        assert!(place.connect(us).unwrap().is_none());
        assert_eq!(place.owners().unwrap(), vec![us]);
        let again = place.bind(us).unwrap();
        assert!(place.connect(us).unwrap().is_some());
        drop(again);
        place.remove(us);
        assert_eq!(place.owners().unwrap(), vec![]);
        assert!(place.path.join("README").exists());
    }
}
