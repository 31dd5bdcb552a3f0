//! The peers that are accepted: file `trusted_peers` in the state directory, lines of `NAME FINGERPRINT`.
//!
//! Read anew for each connection, so a change counts at once. Changes replace the file whole, under a lock.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use super::{Fingerprint, IdentityError, io_error, make_state_dir, write_beside};

/// The store's file.
const TRUST_FILE: &str = "trusted_peers";
/// Held while the file is replaced.
const LOCK_FILE: &str = "trusted_peers.lock";

/// One accepted peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// What the operator calls it.
    pub name: String,
    /// What it is known by.
    pub fingerprint: Fingerprint,
}

/// The store of a state directory.
#[derive(Debug, Clone)]
pub struct TrustStore {
    state_dir: PathBuf,
    own: Option<Fingerprint>,
}

impl TrustStore {
    /// The store in `state_dir`; `own`, the node's own fingerprint, is trusted without being listed.
    pub fn new(state_dir: &Path, own: Option<Fingerprint>) -> Self {
        Self { state_dir: state_dir.to_owned(), own }
    }

    /// Whether a peer is accepted, by the file as it is now.
    ///
    /// # Errors
    /// If the file cannot be read; then nobody but the node itself is accepted.
    pub fn accepts(&self, fingerprint: &Fingerprint) -> Result<bool, IdentityError> {
        if self.own.as_ref() == Some(fingerprint) {
            return Ok(true);
        }
        Ok(self.list()?.iter().any(|peer| peer.fingerprint == *fingerprint))
    }

    /// All accepted peers, in the order of the file.
    ///
    /// # Errors
    /// If the file cannot be read, or a line is not one of ours.
    pub fn list(&self) -> Result<Vec<Peer>, IdentityError> {
        let path = self.path();
        let text = match fs::read_to_string(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(io_error("read", &path))?,
        };
        let mut peers = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let mut words = line.split_ascii_whitespace();
            let peer = match (words.next(), words.next(), words.next()) {
                (None, ..) => continue,
                (Some(comment), ..) if comment.starts_with('#') => continue,
                (Some(name), Some(print), None) => {
                    print.parse().ok().map(|fingerprint| Peer { name: name.to_owned(), fingerprint })
                }
                _ => None,
            };
            peers.push(peer.ok_or_else(|| IdentityError::BadLine { path: path.clone(), line: index + 1 })?);
        }
        Ok(peers)
    }

    /// Accepts a peer.
    ///
    /// # Errors
    /// If the name or the fingerprint is listed already, the name is none, or the file cannot be written.
    pub fn add(&self, name: &str, fingerprint: Fingerprint) -> Result<(), IdentityError> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if name.is_empty() || !name.chars().all(plain) {
            return Err(IdentityError::BadName(name.to_owned()));
        }
        let _lock = self.lock()?;
        let mut peers = self.list()?;
        if let Some(peer) = peers.iter().find(|peer| peer.name == name) {
            return Err(IdentityError::DuplicateName {
                name: name.to_owned(),
                fingerprint: peer.fingerprint,
            });
        }
        if let Some(peer) = peers.iter().find(|peer| peer.fingerprint == fingerprint) {
            return Err(IdentityError::DuplicateFingerprint { name: peer.name.clone(), fingerprint });
        }
        peers.push(Peer { name: name.to_owned(), fingerprint });
        self.replace(&peers)
    }

    /// Accepts a peer no longer. Connections that exist go on.
    ///
    /// # Errors
    /// If no such name is listed, or the file cannot be written.
    pub fn remove(&self, name: &str) -> Result<(), IdentityError> {
        let _lock = self.lock()?;
        let mut peers = self.list()?;
        let before = peers.len();
        peers.retain(|peer| peer.name != name);
        if peers.len() == before {
            return Err(IdentityError::UnknownName(name.to_owned()));
        }
        self.replace(&peers)
    }

    fn path(&self) -> PathBuf {
        self.state_dir.join(TRUST_FILE)
    }

    fn lock(&self) -> Result<Flock<fs::File>, IdentityError> {
        make_state_dir(&self.state_dir)?;
        let path = self.state_dir.join(LOCK_FILE);
        let file = fs::OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(io_error("open", &path))?;
        Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| io_error("lock", &path)(errno.into()))
    }

    fn replace(&self, peers: &[Peer]) -> Result<(), IdentityError> {
        let path = self.path();
        let text: String = peers.iter().map(|peer| format!("{} {}\n", peer.name, peer.fingerprint)).collect();
        let temporary = write_beside(&path, text.as_bytes())?;
        fs::rename(&temporary, &path).map_err(io_error("replace", &path))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn print(digit: char) -> Fingerprint {
        format!("sha256:{}", digit.to_string().repeat(64)).parse().unwrap()
    }

    #[test]
    fn peers_come_and_go() {
        let dir = tempfile::tempdir().unwrap();
        let store = TrustStore::new(&dir.path().join("state"), Some(print('f')));
        assert!(store.accepts(&print('f')).unwrap(), "a node trusts itself");
        assert!(!store.accepts(&print('1')).unwrap());
        store.add("alpha", print('1')).unwrap();
        store.add("beta", print('2')).unwrap();
        let other_handle = TrustStore::new(&dir.path().join("state"), None);
        assert!(other_handle.accepts(&print('1')).unwrap() && !other_handle.accepts(&print('f')).unwrap());
        store.remove("alpha").unwrap();
        assert!(!other_handle.accepts(&print('1')).unwrap() && other_handle.accepts(&print('2')).unwrap());
        assert!(matches!(store.remove("alpha"), Err(IdentityError::UnknownName(_))));
    }

    #[test]
    fn duplicates_and_nonsense_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let store = TrustStore::new(dir.path(), None);
        store.add("alpha", print('1')).unwrap();
        assert!(matches!(store.add("alpha", print('2')), Err(IdentityError::DuplicateName { .. })));
        assert!(matches!(store.add("beta", print('1')), Err(IdentityError::DuplicateFingerprint { .. })));
        for name in ["", "a b", "#a", "a\nb", "ä"] {
            assert!(matches!(store.add(name, print('3')), Err(IdentityError::BadName(_))), "{name:?}");
        }
        assert_eq!(store.list().unwrap().len(), 1);
    }

    #[test]
    fn a_broken_line_is_named_and_nobody_is_accepted() {
        let dir = tempfile::tempdir().unwrap();
        let store = TrustStore::new(dir.path(), None);
        fs::write(dir.path().join(TRUST_FILE), format!("# peers\n\nalpha {}\nbeta\n", print('1'))).unwrap();
        let error = store.accepts(&print('1')).unwrap_err();
        assert!(matches!(error, IdentityError::BadLine { line: 4, .. }), "{error}");
    }
}
