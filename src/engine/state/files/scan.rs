//! The descriptor table of a process: each descriptor duplicated into ours, with what fdinfo says of it,
//! and which of them share an open file description.

use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::PathBuf;

use nix::errno::Errno;

use super::tcp::Seen;
use super::{CaptureFilesError, EarlyLook, errno_of, lasting};
use crate::engine::many;
use crate::engine::procfs;
use crate::engine::remote::{Batch, InjectError, RemoteCalls, Tid};
use crate::engine::sys::{fds, pidfd, socket};

/// Calls in one batch.
const CALLS: usize = 1024;
/// `FD_CLOEXEC`, as a call returns it.
const CLOEXEC: u64 = 1;
/// What /proc shows an epoll as.
pub(super) const EPOLL: &str = "anon_inode:[eventpoll]";

/// One descriptor of the process.
#[derive(Debug)]
pub(super) struct Open {
    pub(super) number: i32,
    pub(super) cloexec: bool,
    /// Our duplicate: the same description. Of what was given back it is nothing.
    pub(super) ours: File,
    /// Of a socket of a running process, which may have been given back: its domain.
    pub(super) domain: Option<i32>,
    /// What /proc shows it as: a path, or `pipe:[12]`.
    pub(super) link: OsString,
    pub(super) stat: Metadata,
    /// `F_GETFL`.
    pub(super) flags: i32,
    pub(super) position: u64,
    /// The lines of fdinfo.
    pub(super) info: String,
}

impl Open {
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.ours.as_fd()
    }

    /// What a socket speaks (`SO_DOMAIN`); `None` for anything else.
    pub(super) fn socket_domain(&self) -> Option<i32> {
        let ask = || socket::int_option(self.fd(), libc::SOL_SOCKET, libc::SO_DOMAIN).ok();
        self.domain.or_else(|| if self.stat.file_type().is_socket() { ask() } else { None })
    }

    /// The rest of the first fdinfo line that starts with `name:`.
    pub(super) fn field(&self, name: &str) -> Option<&str> {
        self.info.lines().find_map(|line| field_of(line, name))
    }

    pub(super) fn has_locks(&self) -> bool {
        self.field("lock").is_some()
    }

    pub(super) fn access(&self) -> i32 {
        self.flags & libc::O_ACCMODE
    }

    pub(super) fn is_path_only(&self) -> bool {
        self.flags & libc::O_PATH != 0
    }

    /// The link up to its first colon or bracket, for objects without a path: `pipe`, `anon_inode:[eventfd`.
    pub(super) fn link_starts_with(&self, prefix: &str) -> bool {
        self.link.as_bytes().starts_with(prefix.as_bytes())
    }
}

fn field_of<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    Some(line.strip_prefix(name)?.strip_prefix(':')?.trim())
}

/// One that is ours too by now, of which nothing was asked yet but what it is.
#[derive(Debug)]
struct Duplicate {
    number: i32,
    ours: File,
    stat: Metadata,
    /// Whether it is closed by exec, where the process was asked.
    cloexec: Option<bool>,
    /// All the rest, where it was read ahead.
    look: Option<Look>,
}

impl Duplicate {
    fn is_socket(&self) -> bool {
        self.stat.file_type().is_socket()
    }

    /// Nobody but the process changes an epoll, unlike a file's position, or a timer. What fails is told when all are
    /// read.
    fn look_if_epoll(&mut self, pid: Tid) {
        // Those of no kind that the attributes know.
        let is_anonymous = self.stat.mode() & libc::S_IFMT == 0;
        if is_anonymous && link(&self.ours).is_ok_and(|link| link == EPOLL) {
            self.look = look(pid, self, None).ok();
        }
    }
}

/// The descriptors of a stopped process. What is to be known of them early, before the state is captured, is
/// asked of these duplicates: to take them is half of the work.
#[derive(Debug)]
pub struct Descriptors {
    pid: Tid,
    /// Ascending by number.
    duplicates: Vec<Duplicate>,
    early: Option<EarlyLook>,
    seen: Option<Seen>,
}

impl Descriptors {
    /// Takes all of them.
    ///
    /// # Errors
    /// If the process is gone or cannot be looked at.
    pub fn take(pid: Tid) -> Result<Self, CaptureFilesError> {
        let (pidfd, numbers) = numbers_of(pid)?;
        let take = |number: &i32| duplicate(&pidfd, *number).map_err(|cause| cause_of(pid, *number, cause));
        let duplicates = many::map(&numbers, take).into_iter().collect::<Result<_, _>>()?;
        Ok(Self { pid, duplicates, early: None, seen: None })
    }

    /// What was seen when the process was running.
    pub fn remember(&mut self, early: EarlyLook) {
        self.early = Some(early);
    }

    /// Looks at all TCP connections at a glance, where `early` has made ready for that. From here on nothing may come
    /// for the process. The kernel does that on one processor; what epolls have to say is read on another one, as it
    /// takes as long where they watch thousands.
    pub fn glance(&mut self, early: &EarlyLook) {
        let (pid, duplicates) = (self.pid, &mut self.duplicates);
        self.seen = std::thread::scope(|scope| {
            let read = || duplicates.iter_mut().for_each(|duplicate| duplicate.look_if_epoll(pid));
            // If there is no thread to be had, they are read with all others.
            let _reading = std::thread::Builder::new().name("epolls".into()).spawn_scoped(scope, read);
            early.glance()
        });
    }

    /// What was seen when the process was running, and at a glance when it stood still.
    pub(super) fn take_early(&mut self) -> (Option<EarlyLook>, Option<Seen>) {
        (self.early.take(), self.seen.take())
    }

    fn is_quiet(&self, socket: &Duplicate) -> bool {
        self.seen.as_ref().is_some_and(|seen| seen.is_quiet(socket.number, socket.stat.ino()))
    }

    /// Asks the process itself what it alone can say of its sockets without much ado. Otherwise /proc is read, which
    /// takes ten times as long.
    ///
    /// # Errors
    /// If the process cannot be driven.
    pub fn ask(&mut self, process: &mut dyn RemoteCalls) -> Result<(), InjectError> {
        let mut sockets: Vec<&mut Duplicate> = self.duplicates.iter_mut().filter(|d| d.is_socket()).collect();
        for some in sockets.chunks_mut(CALLS) {
            let mut batch = Batch::new();
            for socket in some.iter() {
                batch.call(libc::SYS_fcntl, &[socket.number.into(), libc::F_GETFD.into()]);
            }
            let outcome = process.run(&batch)?;
            for (at, socket) in some.iter_mut().enumerate() {
                // One that fails is looked up.
                socket.cloexec = outcome.ret(at).ok().map(|flags| flags & CLOEXEC != 0);
            }
        }
        Ok(())
    }

    /// The inodes of its sockets, by which the kernel lists them.
    pub fn socket_inodes(&self) -> HashSet<u64> {
        self.duplicates.iter().filter(|d| d.is_socket()).map(|d| d.stat.ino()).collect()
    }

    /// The numbers of its sockets.
    pub fn socket_numbers(&self) -> HashSet<i32> {
        self.duplicates.iter().filter(|d| d.is_socket()).map(|d| d.number).collect()
    }

    /// Its sockets, but for TCP connections that were seen to be quiet.
    pub(super) fn busy_sockets(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.duplicates.iter().filter(|d| d.is_socket() && !self.is_quiet(d)).map(|d| d.ours.as_fd())
    }
}

/// All descriptors of a process, and its descriptions.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) pid: Tid,
    /// It changes while it is read.
    pub(super) running: bool,
    /// Ascending by number.
    pub(super) opens: Vec<Open>,
    /// For each of `opens` the index of its description.
    pub(super) description_of: Vec<usize>,
    /// For each description the index of the first of `opens` that leads to it.
    pub(super) first: Vec<usize>,
}

impl Table {
    /// Reads the table of a running process. Descriptors that vanish meanwhile are passed over, and so are sockets that
    /// are new ([`lasting`]).
    ///
    /// Those of connections are given back one by one, when `at_once` has seen what there is to be seen, by number: what
    /// the process closes while somebody has a duplicate is not closed, and its epoll goes on to tell of it.
    pub(super) fn read<T: Send>(
        pid: Tid,
        at_once: impl Fn(&Open) -> T + Sync,
    ) -> Result<(Self, HashMap<i32, T>), CaptureFilesError> {
        let (pidfd, numbers) = numbers_of(pid)?;
        let lasting = lasting::wait(pid, &numbers)?;
        let nothing = File::open("/dev/null").map_err(|error| CaptureFilesError::Process {
            step: "opening /dev/null",
            pid,
            errno: errno_of(&error),
        })?;
        let read = many::map(&numbers, |number| {
            let socket = procfs::socket_behind(format!("/proc/{pid}/fd/{number}"));
            if socket.is_some_and(|inode| !lasting.contains(&inode)) {
                return Ok(None);
            }
            let duplicate = duplicate(&pidfd, *number)?;
            let mut open = look(pid, &duplicate, None)?.of(duplicate);
            open.domain = open.socket_domain();
            let connection = is_connection(&open);
            let seen = connection.then(|| at_once(&open));
            if connection {
                open.ours = nothing.try_clone().map_err(|error| ("duplicating", errno_of(&error)))?;
            }
            Ok(Some((open, seen)))
        });
        let (mut opens, mut seen) = (Vec::with_capacity(numbers.len()), HashMap::new());
        for (number, read) in numbers.into_iter().zip(read) {
            match read {
                Ok(None) | Err((_, Errno::EBADF | Errno::ENOENT)) => {}
                Ok(Some((open, what))) => {
                    seen.extend(what.map(|what| (number, what)));
                    opens.push(open);
                }
                Err(cause) => return Err(cause_of(pid, number, cause)),
            }
        }
        Ok((Self::group(pid, opens, true)?, seen))
    }

    /// The table of a stopped process whose descriptors were taken already. `seen`: what is known of its sockets.
    pub(super) fn of(descriptors: Descriptors, seen: Option<&Seen>) -> Result<Self, CaptureFilesError> {
        let Descriptors { pid, duplicates, .. } = descriptors;
        let looks = many::map(&duplicates, |duplicate| match duplicate.look {
            Some(_) => Ok(None),
            None => look(pid, duplicate, seen).map(Some),
        });
        let mut opens = Vec::with_capacity(duplicates.len());
        for (mut duplicate, look) in duplicates.into_iter().zip(looks) {
            let number = duplicate.number;
            let look = look.map_err(|cause| cause_of(pid, number, cause))?;
            let look = look.or(duplicate.look.take()).ok_or(CaptureFilesError::Gone(pid))?;
            opens.push(look.of(duplicate));
        }
        Self::group(pid, opens, false)
    }

    fn group(pid: Tid, opens: Vec<Open>, running: bool) -> Result<Self, CaptureFilesError> {
        let (description_of, first) = group(pid, &opens, running)?;
        Ok(Self { pid, running, opens, description_of, first })
    }

    /// The first descriptor that leads to a description.
    pub(super) fn open(&self, description: usize) -> Option<&Open> {
        self.first.get(description).and_then(|i| self.opens.get(*i))
    }

    /// Whether an object is also behind one of the standard streams.
    pub(super) fn is_standard(&self, link: &OsStr) -> bool {
        self.opens.iter().take_while(|o| o.number <= 2).any(|o| o.link == link)
    }
}

/// A process that may run, and the numbers of its descriptors, ascending.
pub(super) fn numbers_of(pid: Tid) -> Result<(pidfd::PidFd, Vec<i32>), CaptureFilesError> {
    let pidfd = pidfd::PidFd::open(pid.unsigned_abs()).map_err(|errno| match errno {
        Errno::ESRCH => CaptureFilesError::Gone(pid),
        errno => CaptureFilesError::Process { step: "opening a pidfd", pid, errno },
    })?;
    let failed = |e: std::io::Error| CaptureFilesError::Process {
        step: "listing the descriptors",
        pid,
        errno: errno_of(&e),
    };
    let mut numbers = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        numbers.extend(name.to_str().and_then(|s| s.parse::<i32>().ok()));
    }
    numbers.sort_unstable();
    Ok((pidfd, numbers))
}

/// What failed, and the kernel's answer.
type Cause = (&'static str, Errno);

fn cause_of(pid: Tid, number: i32, (step, errno): Cause) -> CaptureFilesError {
    match errno {
        Errno::ESRCH => CaptureFilesError::Gone(pid),
        errno => CaptureFilesError::Descriptor { step, pid, number, errno },
    }
}

fn duplicate(pidfd: &pidfd::PidFd, number: i32) -> Result<Duplicate, Cause> {
    let ours = File::from(pidfd::take_fd(pidfd.as_fd(), number).map_err(|e| ("duplicating", e))?);
    let stat = ours.metadata().map_err(|e| ("reading attributes", errno_of(&e)))?;
    Ok(Duplicate { number, ours, stat, cloexec: None, look: None })
}

/// What /proc shows one of ours as.
fn link(ours: &File) -> std::io::Result<OsString> {
    fs::read_link(format!("/proc/self/fd/{}", ours.as_raw_fd())).map(PathBuf::into_os_string)
}

/// Whether it is one end of a TCP connection: of these a server closes one after the other.
fn is_connection(open: &Open) -> bool {
    matches!(open.socket_domain(), Some(libc::AF_INET | libc::AF_INET6))
        && socket::int_option(open.fd(), libc::SOL_SOCKET, libc::SO_TYPE) == Ok(libc::SOCK_STREAM)
        && socket::int_option(open.fd(), libc::SOL_SOCKET, libc::SO_ACCEPTCONN) == Ok(0)
}

/// What is asked of a duplicate when the state is captured.
#[derive(Debug)]
struct Look {
    cloexec: bool,
    link: OsString,
    flags: i32,
    position: u64,
    info: String,
}

impl Look {
    fn of(self, Duplicate { number, ours, stat, .. }: Duplicate) -> Open {
        let Self { cloexec, link, flags, position, info } = self;
        Open { number, cloexec, ours, domain: None, link, stat, flags, position, info }
    }
}

fn look(pid: Tid, duplicate: &Duplicate, seen: Option<&Seen>) -> Result<Look, Cause> {
    let failed = |step: &'static str| move |e: std::io::Error| (step, errno_of(&e));
    let flags = match seen
        .and_then(|seen| seen.flags(duplicate.number, duplicate.stat.ino()))
        .filter(|_| duplicate.is_socket())
    {
        Some(flags) => flags,
        None => fds::status_flags(duplicate.ours.as_fd()).map_err(|e| ("reading flags", e))?,
    };
    // A socket's link says nothing more, and a server has them by the thousand.
    let socket = duplicate.is_socket().then(|| OsString::from(format!("socket:[{}]", duplicate.stat.ino())));
    if let (Some(link), Some(cloexec)) = (&socket, duplicate.cloexec) {
        // Nor is there anything else in its fdinfo.
        return Ok(Look { cloexec, link: link.clone(), flags, position: 0, info: String::new() });
    }
    // The target's own fdinfo: locks are listed only for the table that took them.
    let info = procfs::read_text(format!("/proc/{pid}/fdinfo/{}", duplicate.number))
        .map_err(failed("reading fdinfo"))?;
    let link = match socket {
        Some(link) => link,
        None => link(&duplicate.ours).map_err(failed("reading the link"))?,
    };
    let field = |name| info.lines().find_map(|l| field_of(l, name));
    let all_flags = field("flags").and_then(|s| i32::from_str_radix(s, 8).ok());
    let position = field("pos").and_then(|s| s.parse().ok());
    let (Some(all_flags), Some(position)) = (all_flags, position) else {
        return Err(("understanding fdinfo", Errno::EPROTO));
    };
    Ok(Look { cloexec: all_flags & libc::O_CLOEXEC != 0, link, flags, position, info })
}

/// Finds which descriptors share a description: only those that look alike are compared, by sorting
/// them in the kernel's order, so that a table of many does not need a comparison of each with each.
fn group(pid: Tid, opens: &[Open], running: bool) -> Result<(Vec<usize>, Vec<usize>), CaptureFilesError> {
    let mut buckets: HashMap<_, Vec<usize>> = HashMap::new();
    for (i, o) in opens.iter().enumerate() {
        // A running process moves the position between two looks.
        let position = if running { 0 } else { o.position };
        let inode = (o.stat.dev(), o.stat.ino(), &o.link);
        // eventfds all have one inode and are often many; the kernel numbers them.
        let key = (inode, o.flags, position, o.field("eventfd-id"));
        buckets.entry(key).or_default().push(i);
    }
    let mut representative: Vec<usize> = (0..opens.len()).collect();
    for mut bucket in buckets.into_values() {
        if bucket.len() < 2 {
            continue;
        }
        let mut failure = None;
        let mut compare = |a: usize, b: usize| {
            let (a, b) = (opens.get(a).map_or(-1, |o| o.number), opens.get(b).map_or(-1, |o| o.number));
            fds::kcmp_file(pid, a, b).unwrap_or_else(|errno| {
                failure = Some((a, errno));
                a.cmp(&b)
            })
        };
        bucket.sort_by(|a, b| compare(*a, *b));
        let mut at = 0;
        for i in 1..bucket.len() {
            let (Some(&a), Some(&b)) = (bucket.get(at), bucket.get(i)) else { continue };
            if compare(a, b).is_eq() {
                if let Some(slot) = representative.get_mut(b) {
                    *slot = a;
                }
            } else {
                at = i;
            }
        }
        if let Some((number, errno)) = failure.filter(|_| !running) {
            return Err(CaptureFilesError::Descriptor { step: "comparing (kcmp)", pid, number, errno });
        }
    }
    let (mut description_of, mut first) = (Vec::new(), Vec::new());
    let mut index_of: HashMap<usize, usize> = HashMap::new();
    for (i, r) in representative.into_iter().enumerate() {
        let description = *index_of.entry(r).or_insert_with(|| {
            first.push(i);
            first.len() - 1
        });
        description_of.push(description);
    }
    Ok((description_of, first))
}
