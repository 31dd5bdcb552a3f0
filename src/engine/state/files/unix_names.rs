//! Names of unix sockets at the destination.
//!
//! A name that is a path makes a file, and one may be there already: a stale one, or on shared storage that
//! of the process itself, which must not be harmed before the commit. So a socket is bound in a directory
//! of its own beside that place (with the directory as root, so that the name reads as it did), and its file
//! is moved to its place when the process is about to run: [`UnixNames::publish`]. Until then, dropping the
//! names leaves no trace. Abstract names are taken at once.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, Permissions};
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt, lchown};
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::unistd::chroot;

use super::{Trouble, errno_of};
use crate::engine::reason::Reason;
use crate::engine::sys::datagram;
use crate::proto::files::UnixName;

/// Longest name: `sun_path`.
pub(super) const NAME_BYTES: usize = 108;
/// Longest path of a file.
const PATH_BYTES: usize = 4096;

/// Names that are taken, and files that are not at their places yet.
#[derive(Debug, Default)]
pub struct UnixNames {
    staged: Vec<Staged>,
}

#[derive(Debug)]
struct Staged {
    /// The name, and the directory beside the file's place that stands for the root.
    name: Vec<u8>,
    root: PathBuf,
    file: PathBuf,
    /// Where the file belongs; `None` if it was removed at the source.
    place: Option<PathBuf>,
}

impl Drop for UnixNames {
    fn drop(&mut self) {
        for staged in &self.staged {
            let _ = fs::remove_dir_all(&staged.root);
        }
    }
}

/// A socket address in the kernel's form.
pub(super) fn raw_of(name: &[u8]) -> Vec<u8> {
    let mut raw = u16::try_from(libc::AF_UNIX).unwrap_or(1).to_ne_bytes().to_vec();
    raw.extend_from_slice(name);
    raw
}

/// The path that a name is; `None` for abstract ones.
pub(super) fn path_of(name: &[u8]) -> Option<&Path> {
    let path = name.split(|b| *b == 0).next().filter(|path| !path.is_empty())?;
    Some(Path::new(OsStr::from_bytes(path)))
}

impl UnixNames {
    /// Gives a socket its name.
    pub(super) fn bind(&mut self, fd: BorrowedFd<'_>, image: &UnixName) -> Result<(), Trouble> {
        if image.name.is_empty() || image.name.len() > NAME_BYTES || image.file.len() > PATH_BYTES {
            return Err(Trouble::Invalid("the name of a unix socket"));
        }
        let Some(path) = path_of(&image.name) else {
            return datagram::bind_raw(fd, &raw_of(&image.name))
                .map_err(Trouble::step("naming a unix socket"));
        };
        let place = (!image.file.is_empty()).then(|| PathBuf::from(OsStr::from_bytes(&image.file)));
        if let Some(place) = &place {
            check_place(place).map_err(Trouble::File)?;
        }
        let beside = match &place {
            Some(place) => place.parent().ok_or(Trouble::Invalid("the file of a unix socket"))?.to_owned(),
            None => std::env::temp_dir(),
        };
        let staged = stage(fd, image, path, &beside, place).map_err(|errno| match errno {
            Errno::ENOENT => Trouble::File(Reason::new(
                format!("directory {}", beside.display()),
                "does not exist here, and a unix socket has its name in it",
                "",
            )),
            errno => Trouble::Step("naming a unix socket", errno),
        })?;
        self.staged.push(staged);
        Ok(())
    }

    /// Connects to, or sends to, the socket of the process that has a name; others by the name itself.
    pub(super) fn reach<T>(
        &self,
        name: &[u8],
        call: impl FnOnce(&[u8]) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        let fits = self.staged.iter().filter(|staged| staged.name == name);
        let Some(staged) = fits.max_by_key(|staged| staged.place.is_some()) else {
            return call(&raw_of(name));
        };
        // The way there may be longer than a name can be.
        let directory = staged.file.parent().unwrap_or(&staged.root);
        let base = staged.file.file_name().unwrap_or_default();
        let directory = File::open(directory).map_err(|e| errno_of(&e))?;
        let mut path = format!("/proc/self/fd/{}/", directory.as_raw_fd()).into_bytes();
        path.extend_from_slice(base.as_bytes());
        if path.len() > NAME_BYTES {
            return Err(Errno::ENAMETOOLONG);
        }
        call(&raw_of(&path))
    }

    /// Puts the files at their places, over what was there. A failure is told in the log: it comes too late
    /// for anything else, and the process runs without that name.
    pub fn publish(&mut self) {
        let names = std::mem::take(self);
        for staged in &names.staged {
            let Some(place) = &staged.place else { continue };
            if let Err(error) = fs::rename(&staged.file, place) {
                let place = place.display();
                tracing::error!(error = &error as &dyn std::error::Error, %place, "naming a unix socket");
            }
        }
    }
}

/// Nothing may be lost there: only a socket that nobody uses any more is replaced.
fn check_place(place: &Path) -> Result<(), Reason> {
    let object = || format!("unix socket {}", place.display());
    let kind = match fs::symlink_metadata(place) {
        Ok(meta) => meta.file_type(),
        Err(_) => return Ok(()),
    };
    if !kind.is_socket() {
        return Err(Reason::new(object(), "has its name where another kind of file is here", ""));
    }
    // Flags, type, state, inode and so on, then the name.
    let table = fs::read("/proc/thread-self/net/unix").unwrap_or_default();
    let is_it = |line: &[u8]| {
        line.iter().position(|b| *b == b'/').and_then(|at| line.get(at..))
            == Some(place.as_os_str().as_bytes())
    };
    match table.split(|b| *b == b'\n').any(is_it) {
        true => {
            Err(Reason::new(object(), "is in use at the destination", "stop the service that uses it there"))
        }
        false => Ok(()),
    }
}

/// A directory that nobody has, not even a service that was killed here and had our number.
fn new_directory(beside: &Path) -> std::io::Result<PathBuf> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    loop {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let root = beside.join(format!(".migrate-{}-{number}", std::process::id()));
        match DirBuilder::new().mode(0o700).create(&root) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            made => return made.map(|()| root),
        }
    }
}

/// Binds below a new directory `beside`, which a thread of its own takes for the root.
fn stage(
    fd: BorrowedFd<'_>,
    image: &UnixName,
    path: &Path,
    beside: &Path,
    place: Option<PathBuf>,
) -> Result<Staged, Errno> {
    let errno = |e: std::io::Error| errno_of(&e);
    let root = new_directory(beside).map_err(errno)?;
    let mut file = root.clone();
    for part in path.components() {
        match part {
            Component::Normal(name) => file.push(name),
            Component::ParentDir if file != root => drop(file.pop()),
            _ => {}
        }
    }
    let staged = Staged { name: image.name.clone(), root, file, place };
    // From here on, a failure removes the directory again.
    let mut guard = UnixNames { staged: vec![staged] };
    let Some(staged) = guard.staged.first() else { return Err(Errno::EINVAL) };
    fs::create_dir_all(staged.file.parent().unwrap_or(&staged.root)).map_err(errno)?;
    let raw = raw_of(&image.name);
    let bound = std::thread::scope(|scope| {
        let enter_and_bind = || {
            unshare(CloneFlags::CLONE_FS)?;
            chroot(&staged.root)?;
            std::env::set_current_dir("/").map_err(errno)?;
            datagram::bind_raw(fd, &raw)
        };
        scope.spawn(enter_and_bind).join().unwrap_or(Err(Errno::EFAULT))
    });
    bound?;
    lchown(&staged.file, Some(image.uid), Some(image.gid)).map_err(errno)?;
    fs::set_permissions(&staged.file, Permissions::from_mode(image.mode & 0o7777)).map_err(errno)?;
    guard.staged.pop().ok_or(Errno::EINVAL)
}
