//! The whole table at the source: every description to its kind, pipes and socket pairs put together
//! from their ends, reasons collected.

mod sockets;
mod unix;

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use nix::errno::Errno;

use super::holders::{Holders, ScannedProcesses};
use super::scan::{Descriptors, Open, Table};
use super::tcp::{self, Captures};
use super::{
    CaptureFilesError, EarlyLook, FilesCheck, FilesOptions, Stop, anycast, epoll, eventfd, memfd, path, pipe,
    reuseport, signalfd, timerfd,
};
use crate::engine::clocks::{self, Shift};
use crate::engine::lock;
use crate::engine::many;
use crate::engine::procfs;
use crate::engine::reason::Reason;
use crate::engine::remote::Tid;
use crate::engine::sys::fds;
use crate::proto::files::description::Kind;
use crate::proto::files::{Description, Fd, Files, LeftBehind, OptionSet, Pipe, PipeEnd, UnixPair};
use sockets::Seen;

/// The descriptors of a stopped process.
#[derive(Debug)]
pub struct CapturedFiles {
    /// What the destination needs.
    pub image: Files,
    /// Connections to end after the commit, by [`super::close_peers`]. Until then, they keep the
    /// connections alive even if the process is gone.
    pub closing: Vec<OwnedFd>,
    /// Connections that are carried: to be dropped after the commit, by [`super::drop_silently`].
    pub carried: Vec<OwnedFd>,
}

/// Looks at a running process: every reason against a move at once.
///
/// # Errors
/// If the process is gone or cannot be looked at; what cannot be carried is in the answer.
pub fn check(pid: Tid, options: &FilesOptions) -> Result<FilesCheck, CaptureFilesError> {
    let (looker, captures) = (Looker::new(pid, options), Captures::new(false));
    let (table, connections) = Table::read(pid, |open| looker.look(open, &captures))?;
    let collector = Collector::new(&table, looker, false, &ScannedProcesses::default());
    let collected = collector.collect(captures, connections);
    let reasons = collected.reasons(&table, true)?;
    let highest = table.opens.last().map_or(0, |open| open.number.unsigned_abs());
    let is_socket = |open: &&Open| open.stat.file_type().is_socket();
    let sockets = table.opens.iter().filter(is_socket).map(|open| open.stat.ino()).collect();
    let scanned = collected.scanned;
    let mut found = FilesCheck { reasons, scanned, highest, sockets, ..FilesCheck::default() };
    for kind in collected.kinds.into_iter().flatten() {
        match kind {
            Kind::Path(image) => {
                found.files.extend(image.file.filter(|file| !path::is_kernel_view(file)).map(|mut file| {
                    // Without contents (unreadable, gone meanwhile) the file is compared by size and time.
                    if path::add_content(&mut file).is_err() {
                        file.content = None;
                    }
                    file
                }))
            }
            Kind::Tcp(image) => found.ports.extend(tcp::listen_port(&image)),
            _ => {}
        }
    }
    Ok(found)
}

/// Reads the descriptors of a stopped process, from outside and without consuming anything.
///
/// # Errors
/// [`CaptureFilesError::Refused`] if something cannot be carried, with every such thing.
pub fn capture(pid: Tid, options: &FilesOptions) -> Result<CapturedFiles, CaptureFilesError> {
    capture_after(Descriptors::take(pid)?, options, &ScannedProcesses::default())
}

/// Like [`capture`], after [`check`]: passes over the other processes that it has looked at
/// ([`FilesCheck::scanned`]), which on a busy machine is most of the time.
///
/// # Errors
/// As [`capture`].
pub fn capture_after(
    mut descriptors: Descriptors,
    options: &FilesOptions,
    scanned: &ScannedProcesses,
) -> Result<CapturedFiles, CaptureFilesError> {
    let (early, seen) = descriptors.take_early();
    let captures = Captures::after(early.and_then(EarlyLook::into_known), seen);
    let table = Table::of(descriptors, captures.seen())?;
    let pid = table.pid;
    let collector = Collector::new(&table, Looker::new(pid, options), true, scanned);
    let collected = collector.collect(captures, HashMap::new());
    let reasons = collected.reasons(&table, false)?;
    if !reasons.is_empty() {
        return Err(CaptureFilesError::Refused { pid, reasons });
    }
    let to_close: HashSet<usize> = collected.closing.iter().copied().collect();
    let image = collected.into_files(&table);
    let (mut closing, mut carried) = (Vec::new(), Vec::new());
    for (index, open) in table.opens.into_iter().enumerate() {
        let Some(description) = table.description_of.get(index) else { continue };
        if table.first.get(*description) != Some(&index) {
            continue;
        }
        let kind = image.descriptions.get(*description).and_then(|d| d.kind.as_ref());
        if to_close.contains(description) {
            closing.push(OwnedFd::from(open.ours));
        } else if matches!(kind, Some(Kind::TcpConnection(_))) {
            carried.push(OwnedFd::from(open.ours));
        }
    }
    Ok(CapturedFiles { image, closing, carried })
}

/// What became of each description, and the objects that several of them share.
struct Collected {
    kinds: Vec<Result<Kind, Stop>>,
    signals: Vec<(bool, u32)>,
    pipes: Vec<Pipe>,
    pairs: Vec<UnixPair>,
    closing: Vec<usize>,
    foreign_tables: Vec<Tid>,
    /// What stands in the way and shows only in the network as a whole.
    network: Vec<Reason>,
    scanned: ScannedProcesses,
    option_sets: Vec<OptionSet>,
}

/// What is seen of a description by itself: of all of them at the same time.
struct Look {
    /// Whether the process asked for SIGIO, and by which signal.
    signal: Result<(bool, u32), Stop>,
    socket: Option<Result<Seen, Stop>>,
}

/// Looks at single descriptions.
struct Looker<'a> {
    pid: Tid,
    options: &'a FilesOptions,
    other_network: bool,
}

struct Collector<'a> {
    table: &'a Table,
    looker: Looker<'a>,
    contents: bool,
    holders: Holders,
    /// How much more its clocks read than ours; nothing if that cannot be found out.
    shift: Option<Shift>,
    pipes: Vec<Pipe>,
    /// By link text: the pipe's index and whether it is all inside.
    pipe_index: HashMap<OsString, Result<u32, Stop>>,
    pairs: Vec<UnixPair>,
    /// By inode: pair and end.
    unix_index: HashMap<u64, Result<(u32, u32), Stop>>,
    closing: Vec<usize>,
    /// Connections of which all is known.
    quiet: HashSet<usize>,
}

fn index(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

impl<'a> Looker<'a> {
    fn new(pid: Tid, options: &'a FilesOptions) -> Self {
        let network = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/net")).ok();
        // Of the thread: tests give theirs another one.
        Self { pid, options, other_network: network(&pid.to_string()) != network("thread-self") }
    }

    fn look(&self, open: &Open, captures: &Captures) -> Look {
        let seen = || match self.other_network {
            true => Err(Stop::refuse("is a socket of another network namespace than ours")),
            false => sockets::look(open, self.options, captures),
        };
        Look { signal: self.signal(open, captures), socket: open.link_starts_with("socket:[").then(seen) }
    }

    fn signal(&self, open: &Open, captures: &Captures) -> Result<(bool, u32), Stop> {
        if open.is_path_only() {
            return Ok((false, 0));
        }
        let is_socket = open.stat.file_type().is_socket();
        let seen = captures.seen().filter(|_| is_socket);
        if let Some(signal) = seen.and_then(|seen| seen.signal_for_nobody(open.number, open.stat.ino())) {
            return Ok((false, signal));
        }
        let (owner, signal) =
            fds::signal_owner(open.fd()).map_err(Stop::failed("asking for the SIGIO owner"))?;
        if owner.pid != 0 && open.stat.is_dir() {
            // Nobody else gives a directory an owner, and it shows nowhere else.
            let why =
                format!("is told of changes in {} (F_NOTIFY), which cannot be carried", open.link.display());
            return Err(Stop::refuse(why));
        }
        match (owner.kind, owner.pid) {
            (_, 0) => Ok((false, signal.unsigned_abs())),
            (1, pid) if pid == self.pid => Ok((true, signal.unsigned_abs())),
            (_, pid) => {
                Err(Stop::refuse(format!("sends its SIGIO to another process, group or thread ({pid})")))
            }
        }
    }
}

impl<'a> Collector<'a> {
    fn new(table: &'a Table, looker: Looker<'a>, contents: bool, known: &ScannedProcesses) -> Self {
        Self {
            table,
            looker,
            contents,
            holders: Holders::find(table, known),
            shift: clocks::shift_of(table.pid).ok(),
            pipes: Vec::new(),
            pipe_index: HashMap::new(),
            pairs: Vec::new(),
            unix_index: HashMap::new(),
            closing: Vec::new(),
            quiet: HashSet::new(),
        }
    }

    /// `looks`: what was seen before of descriptors that are not ours any more, by number.
    fn collect(mut self, captures: Captures, mut looks: HashMap<i32, Look>) -> Collected {
        let table = self.table;
        let mut kinds = Vec::new();
        let mut signals = Vec::new();
        let opens: Vec<&Open> = (0..table.first.len()).filter_map(|at| table.open(at)).collect();
        let left: Vec<&Open> = opens.iter().copied().filter(|o| !looks.contains_key(&o.number)).collect();
        let seen = many::map(&left, |open| self.looker.look(open, &captures));
        looks.extend(left.into_iter().map(|open| open.number).zip(seen));
        let option_sets = captures.into_sets();
        for (description, open) in opens.into_iter().enumerate() {
            let gone =
                || Look { signal: Err(Stop::Failed { step: "looking", errno: Errno::EBADF }), socket: None };
            let look = looks.remove(&open.number).unwrap_or_else(gone);
            signals.push(look.signal.clone().unwrap_or_default());
            kinds.push(look.signal.and_then(|_| match look.socket {
                Some(seen) => self.socket(description, open, seen?),
                None => self.kind(description, open),
            }));
        }
        // A left-behind stream leads to another kind of file there, which an epoll may not be able to watch.
        for description in 0..kinds.len() {
            let Some(Ok(Kind::Epoll(image))) = kinds.get(description) else { continue };
            let left = |w: &&crate::proto::files::Watch| {
                matches!(kinds.get(w.description as usize), Some(Ok(Kind::LeftBehind(_))))
            };
            if let Some(number) = image.watches.iter().find(left).map(|w| w.number) {
                let why =
                    format!("is an epoll that watches fd {number}, a standard stream that is left behind");
                if let Some(kind) = kinds.get_mut(description) {
                    *kind = Err(Stop::refuse(why));
                }
            }
        }
        self.examine_connections(&mut kinds);
        let tasks = fs::read_dir(format!("/proc/{}/task", table.pid)).into_iter().flatten().flatten();
        let foreign_tables = tasks
            .filter_map(|e| e.file_name().to_str()?.parse::<Tid>().ok())
            .filter(|tid| matches!(fds::kcmp_tables(table.pid, *tid), Ok(false)))
            .collect();
        let mut network = reuseport::reasons(table, &kinds);
        // The sockets of another network are refused each.
        if !self.looker.other_network {
            network.extend(anycast::reasons(table));
        }
        let Self { pipes, pairs, closing, holders, .. } = self;
        let scanned = holders.scanned;
        Collected { kinds, signals, pipes, pairs, closing, foreign_tables, network, scanned, option_sets }
    }

    /// What shows only when all connections are known.
    fn examine_connections(&self, kinds: &mut [Result<Kind, Stop>]) {
        let connections = kinds.iter().enumerate().filter_map(|(at, kind)| match kind {
            Ok(Kind::TcpConnection(image)) => Some((at, image)),
            _ => None,
        });
        let mut connections = connections.peekable();
        let Some(first) = connections.peek().map(|(at, _)| *at) else { return };
        let takes_queued = self.looker.options.tcp_queued || !self.contents;
        let listening = kinds.iter().filter_map(|kind| match kind {
            Ok(Kind::Tcp(socket)) if takes_queued => Some(lock::places_of(socket)),
            _ => None,
        });
        let places: HashSet<_> = listening.flatten().map(|place| place.local).collect();
        let stops = match tcp::examine(connections, &self.quiet, &places, self.contents) {
            Ok(found) => found.into_iter().map(|(at, why)| (at, Stop::refuse(why))).collect(),
            Err(errno) => vec![(first, Stop::Failed { step: "asking the kernel about connections", errno })],
        };
        for (at, stop) in stops {
            if let Some(kind) = kinds.get_mut(at) {
                *kind = Err(stop);
            }
        }
    }

    fn kind(&mut self, description: usize, open: &Open) -> Result<Kind, Stop> {
        if let Some(name) = open.link.to_str().and_then(|l| l.strip_prefix("anon_inode:")) {
            let name = name.trim_matches(['[', ']']);
            if let Some(pids) = self.holders.others_of_description(description) {
                let what = anonymous_words(name);
                return Err(Stop::refuse(format!("is {what} that another process holds too ({pids})")));
            }
            return match name {
                "eventfd" => eventfd::capture(open).map(Kind::Eventfd),
                "timerfd" => {
                    let unknown =
                        || Stop::refuse("is a timerfd, and the clocks of its process cannot be told");
                    timerfd::capture(open, &self.shift.ok_or_else(unknown)?).map(Kind::Timerfd)
                }
                "signalfd" => signalfd::capture(open).map(Kind::Signalfd),
                "eventpoll" => epoll::capture(self.table, open).map(Kind::Epoll),
                other => {
                    Err(Stop::refuse(format!("is {}, which cannot be carried yet", anonymous_words(other))))
                }
            };
        }
        if open.link_starts_with("pipe:[") {
            return self.pipe_end(open);
        }
        if path::is_terminal(open) && self.is_left(open) {
            return Ok(left_behind());
        }
        if !open.link_starts_with("/") {
            let link = open.link.to_string_lossy();
            return Err(Stop::refuse(format!("is {link}, a kind that cannot be carried yet")));
        }
        if let Some(image) = memfd::capture(open) {
            if let Some(pids) = self.holders.others_of_memfd(open) {
                return Err(Stop::refuse(format!("is a memfd that another process has open too ({pids})")));
            }
            return image.map(Kind::Memfd);
        }
        let image = path::capture(open, self.table.pid);
        match image {
            Err(Stop::Refused { why, .. }) if path::is_terminal(open) => {
                Err(Stop::advise(why, "use --shell-job to leave standard streams behind"))
            }
            image => {
                let image = image?;
                if let Some(pids) = self.holders.others_of_description(description)
                    && !self.looker.options.shell_job
                {
                    let why = format!(
                        "shares its open file {} with another process ({pids}), and so the position in it",
                        open.link.display()
                    );
                    let remedy = "with --shell-job it goes on with a position of its own";
                    return Err(Stop::advise(why, remedy));
                }
                Ok(Kind::Path(image))
            }
        }
    }

    fn is_left(&self, open: &Open) -> bool {
        self.looker.options.shell_job && self.table.is_standard(&open.link)
    }

    /// An object whose other side is not in the process.
    fn outside(&self, open: &Open, other_side: &OsString, what: &str) -> Result<Kind, Stop> {
        if self.is_left(open) {
            return Ok(left_behind());
        }
        let by = self.holders.others(other_side).map(|p| format!(" ({p})")).unwrap_or_default();
        let remedy = match self.table.is_standard(&open.link) {
            true => "use --shell-job to leave standard streams behind",
            false => "",
        };
        Err(Stop::advise(format!("is {what} that leads out of the process{by}"), remedy))
    }

    fn pipe_end(&mut self, open: &Open) -> Result<Kind, Stop> {
        let ends =
            |access: i32| self.table.opens.iter().find(|o| o.link == open.link && o.access() == access);
        let (reader, writer) = (ends(libc::O_RDONLY), ends(libc::O_WRONLY));
        if ends(libc::O_RDWR).is_some() || open.is_path_only() {
            return Err(Stop::refuse("is a pipe opened by its path, which cannot be carried yet"));
        }
        if (reader.is_none() || writer.is_none()) && !pipe::other_side_closed(open) {
            return self.outside(open, &open.link, "a pipe");
        }
        if let Some(pids) = self.holders.others(&open.link) {
            if self.is_left(open) {
                return Ok(left_behind());
            }
            return Err(Stop::refuse(format!("is a pipe that another process holds too ({pids})")));
        }
        let contents = self.contents;
        let pipes = &mut self.pipes;
        let made = self.pipe_index.entry(open.link.clone()).or_insert_with(|| {
            pipes.push(pipe::capture(reader, writer.unwrap_or(open), contents)?);
            Ok(index(pipes.len() - 1))
        });
        let pipe = made.clone()?;
        Ok(Kind::PipeEnd(PipeEnd { pipe, write: open.access() == libc::O_WRONLY }))
    }
}

impl Collected {
    /// Refusals in words; the first failed look as an error. With `running`, objects that vanished while
    /// they were looked at are passed over.
    fn reasons(&self, table: &Table, running: bool) -> Result<Vec<Reason>, CaptureFilesError> {
        let mut reasons = Vec::new();
        let pid = table.pid;
        for tid in &self.foreign_tables {
            let why = "has a descriptor table of its own, which cannot be carried yet";
            reasons.push(Reason::new(format!("thread {tid}"), why, ""));
        }
        for (description, kind) in self.kinds.iter().enumerate() {
            let number = table.open(description).map_or(-1, |o| o.number);
            match kind {
                Ok(_) => {}
                Err(Stop::Refused { why, remedy }) => {
                    reasons.push(Reason::new(format!("fd {number}"), why.clone(), *remedy));
                }
                Err(Stop::Failed {
                    errno: Errno::EBADF | Errno::ENOENT | Errno::ESRCH | Errno::ENOTCONN,
                    ..
                }) if running => {}
                Err(Stop::Failed { step, errno }) => {
                    return Err(CaptureFilesError::Descriptor { step, pid, number, errno: *errno });
                }
            }
        }
        reasons.extend(self.network.iter().cloned());
        Ok(reasons)
    }

    fn into_files(self, table: &Table) -> Files {
        let mut files = Files {
            pipes: self.pipes,
            pairs: self.pairs,
            boot_id: boot_id(),
            option_sets: self.option_sets,
            ..Files::default()
        };
        for ((kind, (owned, signal)), first) in self.kinds.into_iter().zip(self.signals).zip(&table.first) {
            let flags = table.opens.get(*first).map_or(0, |o| o.flags).cast_unsigned();
            files.descriptions.push(Description { flags, owned, signal, kind: kind.ok() });
        }
        // Input and output of a left-behind stream part ways, even where one description was both.
        let mut inputs = HashMap::new();
        for (open, description) in table.opens.iter().zip(&table.description_of) {
            let mut description = index(*description);
            let is_left = |d: &Description| matches!(d.kind, Some(Kind::LeftBehind(_)));
            let input = open.number == 0 || open.access() == libc::O_RDONLY;
            if let Some(left) = files.descriptions.get(description as usize).filter(|d| is_left(d) && input) {
                let copy = Description { kind: Some(Kind::LeftBehind(LeftBehind { input })), ..left.clone() };
                description = *inputs.entry(description).or_insert_with(|| {
                    files.descriptions.push(copy);
                    index(files.descriptions.len() - 1)
                });
            }
            let number = open.number.unsigned_abs();
            files.fds.push(Fd { number, description, cloexec: open.cloexec });
        }
        files
    }
}

fn left_behind() -> Kind {
    Kind::LeftBehind(LeftBehind { input: false })
}

/// Identifies the running kernel.
pub(super) fn boot_id() -> Vec<u8> {
    procfs::read("/proc/sys/kernel/random/boot_id").unwrap_or_default()
}

fn anonymous_words(name: &str) -> String {
    match name {
        "inotify" | "fanotify" | "userfaultfd" | "io_uring" | "pidfd" => format!("an {name} descriptor"),
        "eventfd" => "an eventfd".to_owned(),
        "eventpoll" => "an epoll".to_owned(),
        "timerfd" | "signalfd" => format!("a {name}"),
        "perf_event" => "a performance counter".to_owned(),
        bpf if bpf.starts_with("bpf") => format!("a BPF object ({bpf})"),
        other => format!("an object of kind {other}"),
    }
}
