//! Names of unix sockets at the destination.
//!
//! A name that is a path makes a file, and one may be there already: a stale one, or on shared storage that
//! of the process itself, which must not be harmed before the commit. So a socket is bound in a directory
//! of its own beside that place (with the directory as root, so that the name reads as it did), and its file
//! is moved to its place when the process is about to run: [`UnixNames::publish`]. Until then, dropping the
//! names leaves no trace. Abstract names are taken at once.
//!
//! That place may belong to a user: everything is done through a descriptor of its directory, and below a
//! directory that is seen to be ours, so that nobody can put another one in between.

use std::ffi::OsStr;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, lchown};
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{chroot, fchdir, geteuid};

use super::{Trouble, errno_of};
use crate::engine::procfs;
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

/// Of the directories that stand for the root.
const MODE: u32 = 0o700;

#[derive(Debug)]
struct Staged {
    name: Vec<u8>,
    /// The directory of the file's place; the paths below lead through this descriptor.
    _beside: File,
    /// The directory that stands for the root, and the file in it.
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
            Some(place) if place.is_absolute() && place.file_name().is_some() => {
                place.parent().unwrap_or(place).to_owned()
            }
            Some(_) => return Err(Trouble::Invalid("the file of a unix socket")),
            None => std::env::temp_dir(),
        };
        let staged = stage(fd, image, path, &beside, place.as_deref()).map_err(|errno| match errno {
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
    let table = procfs::read("/proc/thread-self/net/unix").unwrap_or_default();
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
        match DirBuilder::new().mode(MODE).create(&root) {
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
    place: Option<&Path>,
) -> Result<Staged, Errno> {
    let errno = |e: std::io::Error| errno_of(&e);
    let flags = libc::O_PATH | libc::O_DIRECTORY;
    let beside = OpenOptions::new().read(true).custom_flags(flags).open(beside).map_err(errno)?;
    let here = PathBuf::from(format!("/proc/self/fd/{}", beside.as_raw_fd()));
    let root = new_directory(&here).map_err(errno)?;
    let mut inside = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::Normal(name) => inside.push(name),
            Component::ParentDir => drop(inside.pop()),
            _ => {}
        }
    }
    let file = root.join(inside.strip_prefix("/").unwrap_or(&inside));
    let place = place.and_then(Path::file_name).map(|name| here.join(name));
    let staged = Staged { name: image.name.clone(), _beside: beside, root, file, place };
    // From here on, a failure removes the directory again.
    let mut guard = UnixNames { staged: vec![staged] };
    let Some(staged) = guard.staged.first() else { return Err(Errno::EINVAL) };
    let bound = std::thread::scope(|scope| {
        let bind = || {
            unshare(CloneFlags::CLONE_FS)?;
            enter(&staged.root)?;
            std::fs::create_dir_all(inside.parent().unwrap_or(&inside)).map_err(errno)?;
            datagram::bind_raw(fd, &raw_of(&image.name))?;
            lchown(&inside, Some(image.uid), Some(image.gid)).map_err(errno)?;
            fs::set_permissions(&inside, Permissions::from_mode(image.mode & 0o7777)).map_err(errno)
        };
        scope.spawn(bind).join().unwrap_or(Err(Errno::EFAULT))
    });
    bound?;
    guard.staged.pop().ok_or(Errno::EINVAL)
}

/// Takes a directory for the root of this thread, if nobody else can write to it.
fn enter(root: &Path) -> Result<(), Errno> {
    let errno = |e: std::io::Error| errno_of(&e);
    let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW;
    let root = OpenOptions::new().read(true).custom_flags(flags).open(root).map_err(errno)?;
    let meta = root.metadata().map_err(errno)?;
    if meta.uid() != geteuid().as_raw() || meta.mode() & 0o777 != MODE {
        return Err(Errno::EPERM);
    }
    fchdir(&root)?;
    chroot(".")
}
