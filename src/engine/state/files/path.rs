//! Descriptors that lead to a path: regular files, directories, and the harmless /dev nodes. They are
//! opened anew at the destination, so the file there must be the same one.

use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use nix::sys::stat::Mode;
use nix::unistd::{Whence, lseek};
use xxhash_rust::xxh3::Xxh3;

use super::scan::Open;
use super::{Stop, Trouble};
use crate::engine::reason::Reason;
use crate::engine::remote::Tid;
use crate::engine::sys::fds;
use crate::proto::files::{FileRef, PathFile};

/// Files up to this size are compared by their contents, larger ones by size and time.
const HASHED_BYTES: u64 = 64 << 20;

/// Longest path that we take from a peer.
const PATH_BYTES: usize = 4096;

/// Device numbers (all major 1) of null, zero, full, random, urandom.
const DEVICES: [u64; 5] = [3, 5, 7, 8, 9];

/// The magic number of procfs (linux/magic.h).
const PROC: i64 = 0x9fa0;
/// File systems whose files are views into this kernel and not data.
const KERNEL_VIEWS: [(i64, &str); 9] = [
    (PROC, "/proc"),
    (0x6265_6572, "/sys"),
    (0x6367_7270, "cgroup"),
    (0x0027_e0eb, "cgroup"),
    (0x6462_6720, "debugfs"),
    (0x7472_6163, "tracefs"),
    (0xcafe_4a11, "bpf"),
    (0x1980_0202, "mqueue"),
    (0x6e73_6673, "namespace"),
];

/// What a process reads of /proc again and again, with a descriptor that it keeps or in passing: of itself or a thread, and
/// of the machine. Read at the destination they tell of that one.
const OWN_VIEWS: [&str; 9] =
    ["stat", "statm", "status", "io", "limits", "schedstat", "cgroup", "oom_score", "cmdline"];
const VIEWS: [&str; 7] = ["stat", "meminfo", "loadavg", "uptime", "vmstat", "cpuinfo", "diskstats"];

/// Whether a path leads to one of these; `pid` is the process, or any.
fn is_view(path: &[u8], pid: Option<Tid>) -> bool {
    let Some(rest) = path.strip_prefix(b"/proc/").and_then(|rest| std::str::from_utf8(rest).ok()) else {
        return false;
    };
    let is_own = |word: &str| word.parse::<Tid>().is_ok_and(|found| pid.is_none_or(|pid| pid == found));
    match rest.split('/').collect::<Vec<_>>().as_slice() {
        [name] => VIEWS.contains(name),
        [process, name] => is_own(process) && OWN_VIEWS.contains(name),
        [process, "task", tid, name] => {
            is_own(process) && tid.parse::<Tid>().is_ok() && OWN_VIEWS.contains(name)
        }
        _ => false,
    }
}

/// Whether a file is such a view: there is nothing about it to be compared.
pub(super) fn is_kernel_view(file: &FileRef) -> bool {
    is_view(&file.path, None)
}

/// Describes a file by its path and attributes; contents are added by [`add_content`].
pub fn describe(path: &Path, stat: &Metadata, writable: bool) -> FileRef {
    FileRef {
        path: path.as_os_str().as_bytes().to_vec(),
        dev: stat.dev(),
        ino: stat.ino(),
        size: stat.size(),
        mtime_ns: stat.mtime().saturating_mul(1_000_000_000).saturating_add(stat.mtime_nsec()),
        mode: stat.mode(),
        rdev: stat.rdev(),
        content: None,
        writable,
    }
}

/// Adds the hash of the contents, if it is a regular file of moderate size.
///
/// # Errors
/// If the file cannot be read.
pub fn add_content(file: &mut FileRef) -> io::Result<()> {
    if file.mode & libc::S_IFMT == libc::S_IFREG && file.size <= HASHED_BYTES {
        file.content = Some(hash(&path_of(file))?);
    }
    Ok(())
}

fn path_of(file: &FileRef) -> PathBuf {
    PathBuf::from(std::ffi::OsString::from_vec(file.path.clone()))
}

fn hash(path: &Path) -> io::Result<u64> {
    let mut hasher = Xxh3::new();
    let mut file = File::open(path)?.take(HASHED_BYTES);
    let mut buffer = vec![0u8; 1 << 18];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hasher.digest()),
            n => hasher.update(buffer.get(..n).unwrap_or_default()),
        }
    }
}

/// `pid`: the process that has it.
pub(super) fn capture(open: &Open, pid: Tid) -> Result<PathFile, Stop> {
    let path = Path::new(&open.link);
    let kind = open.stat.file_type();
    if open.has_locks() {
        return Err(Stop::refuse("holds file locks, which cannot be carried yet"));
    }
    if kind.is_char_device() && !is_simple_device(&open.stat) {
        return Err(Stop::refuse(device_words(path)));
    }
    if !(kind.is_file() || kind.is_dir() || kind.is_char_device()) {
        let what = match () {
            () if kind.is_fifo() => "a named pipe",
            () if kind.is_block_device() => "a block device",
            () if kind.is_symlink() => "a symbolic link opened as such",
            () => "an object of an unknown kind",
        };
        return Err(Stop::refuse(format!("is {what} ({}), which cannot be carried yet", path.display())));
    }
    if open.stat.nlink() == 0 {
        return Err(Stop::refuse(format!(
            "is a deleted file ({}), which cannot be carried yet",
            path.display()
        )));
    }
    let file_system = nix::sys::statfs::fstatfs(open.fd()).map(|fs| fs.filesystem_type().0);
    let view = KERNEL_VIEWS.iter().find(|(magic, _)| file_system == Ok(*magic));
    let name = path.as_os_str().as_bytes();
    match view {
        Some((PROC, _)) if open.access() == libc::O_RDONLY && is_view(name, Some(pid)) => {}
        Some((_, kind)) => {
            let path = path.display();
            return Err(Stop::refuse(format!(
                "is {path}, a {kind} file of this kernel, which cannot be carried"
            )));
        }
        // The destination would take it for one, and not compare it.
        None if is_view(name, None) => {
            let path = path.display();
            return Err(Stop::refuse(format!(
                "is {path} in a /proc that is not procfs, which cannot be carried"
            )));
        }
        None => {}
    }
    // The path must lead us to the same file: else it was replaced, or lies in another mount namespace.
    match fs::symlink_metadata(path) {
        Ok(there) if (there.dev(), there.ino()) == (open.stat.dev(), open.stat.ino()) => {}
        _ => {
            return Err(Stop::refuse(format!(
                "is a file that its path {} does not lead to (any more, or from here)",
                path.display()
            )));
        }
    }
    let writable = kind.is_file() && open.access() != libc::O_RDONLY && !open.is_path_only();
    let position = if kind.is_char_device() { 0 } else { open.position };
    Ok(PathFile { file: Some(describe(path, &open.stat, writable)), position })
}

fn is_simple_device(stat: &Metadata) -> bool {
    let (major, minor) = (libc::major(stat.rdev()), libc::minor(stat.rdev()));
    major == 1 && DEVICES.contains(&u64::from(minor))
}

fn device_words(path: &Path) -> String {
    let name = path.as_os_str().as_bytes();
    if name.starts_with(b"/dev/pts/") || name.starts_with(b"/dev/tty") || name == b"/dev/console" {
        format!("is a terminal ({})", path.display())
    } else {
        format!("is a device ({}), which cannot be carried", path.display())
    }
}

/// Whether a description is a terminal.
pub(super) fn is_terminal(open: &Open) -> bool {
    open.stat.file_type().is_char_device() && nix::unistd::isatty(open.fd()).unwrap_or(false)
}

/// Why `file` is not here, or not the same; `None` if it is. `same_kernel`: the source is this machine,
/// and so the same inode is the same file.
pub fn compare_here(file: &FileRef, same_kernel: bool) -> Option<Reason> {
    if is_kernel_view(file) {
        return None;
    }
    let path = path_of(file);
    let object = format!("file {}", path.display());
    let sync = "make the same file available there";
    let here = match fs::symlink_metadata(&path) {
        Ok(here) => here,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Some(Reason::new(object, "does not exist at the destination", sync));
        }
        Err(e) => return Some(Reason::new(object, format!("cannot be looked at: {e}"), sync)),
    };
    if (here.mode() ^ file.mode) & libc::S_IFMT != 0 || here.rdev() != file.rdev {
        return Some(Reason::new(object, "is of another type at the destination", sync));
    }
    if same_kernel && (here.dev(), here.ino()) == (file.dev, file.ino) || !here.is_file() {
        return None;
    }
    let local = describe(&path, &here, file.writable);
    if local.size != file.size {
        let why = format!("differs: {} bytes here, {} at the source", local.size, file.size);
        return Some(Reason::new(object, why, sync));
    }
    let same_time = local.mtime_ns == file.mtime_ns;
    // Two files written within one tick of the clock have one time: it says nothing where contents can.
    if same_time && file.content.is_none() {
        return None;
    }
    if file.writable && !same_time {
        let why = "is open for writing and is not shared with the source";
        return Some(Reason::new(object, why, "put it on storage that both machines share"));
    }
    match file.content {
        Some(content) => match hash(&path) {
            Ok(here) if here == content => None,
            Ok(_) => Some(Reason::new(object, "differs in its contents", sync)),
            Err(e) => Some(Reason::new(object, format!("cannot be read: {e}"), sync)),
        },
        None => Some(Reason::new(object, "differs in its time of modification", sync)),
    }
}

/// Opens the file anew.
pub(super) fn make(image: &PathFile, flags: i32, same_kernel: bool) -> Result<OwnedFd, Trouble> {
    let file = image.file.as_ref().ok_or(Trouble::Invalid("a file without a path"))?;
    if file.path.len() > PATH_BYTES || !file.path.starts_with(b"/") {
        return Err(Trouble::Invalid("a path that is too long or not absolute"));
    }
    // The contents were compared before the freeze: now only what a look at the attributes tells.
    let mut known = file.clone();
    if !known.writable && known.content.is_none() {
        known.mtime_ns =
            fs::symlink_metadata(path_of(file)).map_or(0, |m| describe(Path::new(""), &m, false).mtime_ns);
    }
    if let Some(reason) = compare_here(&known, same_kernel) {
        return Err(Trouble::File(reason));
    }
    if file.mode & libc::S_IFMT == libc::S_IFDIR && image.position != 0 && !is_same_inode(file, same_kernel) {
        let path = path_of(file).display().to_string();
        let why = "is a directory being read, whose position means nothing in another file system";
        return Err(Trouble::File(Reason::new(format!("file {path}"), why, "")));
    }
    let not_reopened = libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC | libc::O_ASYNC;
    let flags = OFlag::from_bits_retain(flags & !not_reopened) | OFlag::O_CLOEXEC | OFlag::O_NOCTTY;
    let fd =
        nix::fcntl::open(&path_of(file), flags, Mode::empty()).map_err(Trouble::step("opening a file"))?;
    if is_kernel_view(file) && !nix::sys::statfs::fstatfs(&fd).is_ok_and(|fs| fs.filesystem_type().0 == PROC)
    {
        let object = format!("file {}", path_of(file).display());
        return Err(Trouble::File(Reason::new(
            object,
            "is not on procfs at the destination",
            "mount it there",
        )));
    }
    if image.position != 0 && fds::status_flags(fd.as_fd()).is_ok_and(|f| f & libc::O_PATH == 0) {
        let position = i64::try_from(image.position).map_err(|_| Trouble::Invalid("a file position"))?;
        lseek(fd.as_fd(), position, Whence::SeekSet).map_err(Trouble::step("setting a file's position"))?;
    }
    Ok(fd)
}

fn is_same_inode(file: &FileRef, same_kernel: bool) -> bool {
    same_kernel
        && fs::symlink_metadata(path_of(file)).is_ok_and(|h| (h.dev(), h.ino()) == (file.dev, file.ino))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_tells_of_the_process_itself_or_the_machine() {
        let is_view = |path: &str| is_view(path.as_bytes(), Some(12));
        for good in ["/proc/12/stat", "/proc/12/task/13/status", "/proc/meminfo", "/proc/stat"] {
            assert!(is_view(good), "{good}");
        }
        for bad in [
            "/proc/13/stat",
            "/proc/12/mem",
            "/proc/12/task/stat",
            "/proc/12/task/13/mem",
            "/proc/self/stat",
            "/proc/kmsg",
            "/proc/12/net/tcp",
            "/proc",
            "/proc/",
            "/tmp/proc/12/stat",
            "/proc/+12/../stat",
        ] {
            assert!(!is_view(bad), "{bad}");
        }
    }
}
