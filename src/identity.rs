//! Who this node is, and whom it trusts.
//!
//! A node is its key. On first use it makes one, with a self-signed certificate, and keeps both in one file
//! of the state directory, so that they cannot come apart; the file is linked into place whole, so that two
//! commands started at once agree on one identity. The certificate says nothing about names or dates: peers
//! are accepted by the fingerprint of the certificate, listed in [`trust`].

use std::fmt;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use ring::digest::{SHA256, SHA256_OUTPUT_LEN, digest};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

pub mod trust;

/// File of the key and certificate in the state directory.
const IDENTITY_FILE: &str = "identity.pem";
/// An identity file is some hundred bytes; whatever is larger is none.
const MAX_IDENTITY_BYTES: u64 = 64 << 10;

/// What went wrong with the files that say who we are and whom we trust.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file operation failed.
    #[error("{step} {}", path.display())]
    Io {
        /// What was being done.
        step: &'static str,
        /// To which file.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The key or certificate could not be made.
    #[error("make a key and certificate")]
    Generate(#[source] rcgen::Error),
    /// The identity file does not hold a key and a certificate.
    #[error("{} does not hold this node's key and certificate", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is missing.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// Others could read the key.
    #[error("{} is accessible by others (mode {mode:o}): its key may be known to them", path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A line of the trust store is not `NAME FINGERPRINT`.
    #[error("{}, line {line}: not a line of NAME FINGERPRINT", path.display())]
    BadLine {
        /// The file.
        path: PathBuf,
        /// Line number, from 1.
        line: usize,
    },
    /// Text that is no fingerprint.
    #[error("{0:?} is not a fingerprint: sha256: and 64 hexadecimal digits")]
    BadFingerprint(String),
    /// Text that cannot name a peer.
    #[error("{0:?} cannot name a peer: letters, digits and . _ - only")]
    BadName(String),
    /// The name is taken.
    #[error("{name} is trusted already, as {fingerprint}; remove it first")]
    DuplicateName {
        /// The name.
        name: String,
        /// What it stands for.
        fingerprint: Fingerprint,
    },
    /// The fingerprint is trusted under another name.
    #[error("{fingerprint} is trusted already, as {name}")]
    DuplicateFingerprint {
        /// The name it has.
        name: String,
        /// The fingerprint.
        fingerprint: Fingerprint,
    },
    /// No such name in the store.
    #[error("no peer named {0} is trusted")]
    UnknownName(String),
}

/// SHA-256 of a certificate: what peers know each other by.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint([u8; SHA256_OUTPUT_LEN]);

impl Fingerprint {
    /// The fingerprint of a certificate.
    pub fn of(certificate: &CertificateDer<'_>) -> Self {
        let mut bytes = [0; SHA256_OUTPUT_LEN];
        for (to, from) in bytes.iter_mut().zip(digest(&SHA256, certificate).as_ref()) {
            *to = *from;
        }
        Self(bytes)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sha256:")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Fingerprint {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        let bad = || IdentityError::BadFingerprint(text.to_owned());
        let hex = text.strip_prefix("sha256:").ok_or_else(bad)?.as_bytes();
        let mut bytes = [0; SHA256_OUTPUT_LEN];
        if hex.len() != bytes.len() * 2 {
            return Err(bad());
        }
        for (to, pair) in bytes.iter_mut().zip(hex.chunks_exact(2)) {
            for digit in pair {
                let value =
                    char::from(*digit).to_digit(16).and_then(|d| u8::try_from(d).ok()).ok_or_else(bad)?;
                *to = *to << 4 | value;
            }
        }
        Ok(Self(bytes))
    }
}

/// This node's key and certificate.
#[derive(Debug)]
pub struct Identity {
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
    fingerprint: Fingerprint,
}

impl Identity {
    /// The identity kept in `state_dir`; made, with the directory, if there is none yet.
    ///
    /// # Errors
    /// [`IdentityError`].
    pub fn load_or_create(state_dir: &Path) -> Result<Self, IdentityError> {
        let path = state_dir.join(IDENTITY_FILE);
        match Self::load(&path) {
            Err(IdentityError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                create(state_dir, &path)?;
                Self::load(&path)
            }
            loaded => loaded,
        }
    }

    fn load(path: &Path) -> Result<Self, IdentityError> {
        let file = fs::File::open(path).map_err(io_error("open", path))?;
        let meta = file.metadata().map_err(io_error("examine", path))?;
        let mode = meta.permissions().mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(IdentityError::Exposed { path: path.to_owned(), mode });
        }
        let mut pem = Vec::new();
        io::Read::read_to_end(&mut io::Read::take(file, MAX_IDENTITY_BYTES), &mut pem)
            .map_err(io_error("read", path))?;
        let parse = |source| IdentityError::Parse { path: path.to_owned(), source };
        let key = PrivateKeyDer::from_pem_slice(&pem).map_err(parse)?;
        let certificate = CertificateDer::from_pem_slice(&pem).map_err(parse)?;
        let fingerprint = Fingerprint::of(&certificate);
        Ok(Self { certificate, key, fingerprint })
    }

    /// What peers know this node by.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// The certificate shown to peers.
    pub(crate) fn certificate(&self) -> CertificateDer<'static> {
        self.certificate.clone()
    }

    /// The key that proves it.
    pub(crate) fn key(&self) -> PrivateKeyDer<'static> {
        self.key.clone_key()
    }
}

/// A node: its identity and the peers it accepts.
#[derive(Debug)]
pub struct Node {
    identity: Identity,
    trust: trust::TrustStore,
}

impl Node {
    /// The node of a state directory; its identity is made on first use.
    ///
    /// # Errors
    /// [`IdentityError`].
    pub fn open(state_dir: &Path) -> Result<Self, IdentityError> {
        let identity = Identity::load_or_create(state_dir)?;
        let trust = trust::TrustStore::new(state_dir, Some(identity.fingerprint()));
        Ok(Self { identity, trust })
    }

    /// The node's key and certificate.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The peers it accepts.
    pub fn trust(&self) -> &trust::TrustStore {
        &self.trust
    }

    /// What peers know it by.
    pub fn fingerprint(&self) -> Fingerprint {
        self.identity.fingerprint()
    }
}

/// Makes an identity and links it into place, unless another process was faster.
fn create(state_dir: &Path, path: &Path) -> Result<(), IdentityError> {
    make_state_dir(state_dir)?;
    let key = rcgen::KeyPair::generate().map_err(IdentityError::Generate)?;
    let params =
        rcgen::CertificateParams::new(vec!["migrate".to_owned()]).map_err(IdentityError::Generate)?;
    let certificate = params.self_signed(&key).map_err(IdentityError::Generate)?;
    let pem = format!("{}{}", key.serialize_pem(), certificate.pem());
    let temporary = write_beside(path, pem.as_bytes())?;
    let linked = fs::hard_link(&temporary, path);
    fs::remove_file(&temporary).map_err(io_error("remove", &temporary))?;
    match linked {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other.map_err(io_error("create", path)),
    }
}

/// Creates the state directory (0700) if it is missing.
///
/// # Errors
/// [`IdentityError::Io`].
pub fn make_state_dir(path: &Path) -> Result<(), IdentityError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(io_error("create directory", path))
}

/// Writes a private file next to `path`, under a name of our own.
fn write_beside(path: &Path, contents: &[u8]) -> Result<PathBuf, IdentityError> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.{:?}", std::process::id(), std::thread::current().id()));
    let temporary = PathBuf::from(name);
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)
        .map_err(io_error("create", &temporary))?;
    file.write_all(contents).map_err(io_error("write", &temporary))?;
    Ok(temporary)
}

fn io_error(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> IdentityError {
    move |source| IdentityError::Io { step, path: path.to_owned(), source }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_identity_stays_and_is_private() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("a/b");
        let first = Identity::load_or_create(&state).unwrap();
        let again = Identity::load_or_create(&state).unwrap();
        assert_eq!(first.fingerprint(), again.fingerprint());
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&state), 0o700);
        assert_eq!(mode(&state.join(IDENTITY_FILE)), 0o600);
        assert_eq!(fs::read_dir(&state).unwrap().count(), 1, "no temporary file is left");
    }

    #[test]
    fn commands_started_at_once_agree() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        let all: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| Identity::load_or_create(path).unwrap().fingerprint()))
                .collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        assert!(all.windows(2).all(|w| w[0] == w[1]), "{all:?}");
    }

    #[test]
    fn an_exposed_or_broken_identity_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(IDENTITY_FILE);
        Identity::load_or_create(dir.path()).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(
            Identity::load_or_create(dir.path()),
            Err(IdentityError::Exposed { mode: 0o640, .. })
        ));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&path, "nothing").unwrap();
        assert!(matches!(Identity::load_or_create(dir.path()), Err(IdentityError::Parse { .. })));
    }

    #[test]
    fn fingerprints_are_read_as_they_are_shown() {
        let shown = Fingerprint([0xab; 32]).to_string();
        assert_eq!(shown.parse::<Fingerprint>().unwrap(), Fingerprint([0xab; 32]));
        for bad in ["", "sha256:", "sha256:ab", &shown[1..], &format!("{shown}0"), &shown.replace('a', "g")] {
            assert!(bad.parse::<Fingerprint>().is_err(), "{bad}");
        }
        assert!(format!("sha256:é{}", &shown[9..]).parse::<Fingerprint>().is_err());
    }
}
