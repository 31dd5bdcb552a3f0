//! Which other processes hold an object too, or an open file description: one walk over all descriptors of the
//! machine.

use std::cmp::Ordering;
use std::collections::{HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirEntryExt, MetadataExt};

use super::scan::{Open, Table};
use crate::engine::lock;
use crate::engine::procfs;
use crate::engine::remote::Tid;
use crate::engine::state::objects::id_of_memfd;
use crate::engine::sys::fds;

/// What is told by its name; eventfds and the like are all alike by their links.
const SHARED_KINDS: [&[u8]; 2] = [b"pipe:[", b"socket:["];
const MEMFD: &[u8] = b"/memfd:";
/// Objects that have one description for all their life.
const ANONYMOUS: [&[u8]; 4] =
    [b"anon_inode:[eventfd]", b"anon_inode:[eventpoll]", b"anon_inode:[timerfd]", b"anon_inode:[signalfd]"];

/// Processes whose descriptors preflight has looked at. A look at the stopped process need not read them
/// again: what is held elsewhere was refused then, and only a process started since can have inherited
/// something. (One that was there before could only be sent it over a unix socket, in the moment between the
/// two looks; that is not noticed.)
#[derive(Debug, Clone, Default)]
pub struct ScannedProcesses(HashSet<(Tid, u64)>);

/// Other processes by what they hold.
#[derive(Debug, Default)]
pub(super) struct Holders {
    /// Pipes and sockets by their link text (`pipe:[12]`).
    by_link: HashMap<OsString, Vec<Tid>>,
    /// memfds, whose names need not differ, by their ids.
    by_id: HashMap<u64, Vec<Tid>>,
    /// What is to be told from others of the same name, by its index in the table.
    by_description: HashMap<usize, Vec<Tid>>,
    pub(super) scanned: ScannedProcesses,
}

impl Holders {
    /// Walks /proc, if anything of the table could be held elsewhere and that would matter. Processes in `known`
    /// are passed over.
    pub(super) fn find(table: &Table, known: &ScannedProcesses) -> Self {
        let mut holders = Self::default();
        let mut sought = Sought::of(table);
        let objects = |o: &Open| is_shared_kind(&o.link) || is_memfd(&o.link);
        if sought.by_link.is_empty() && !table.opens.iter().any(objects) {
            return holders;
        }
        let us = own_pid();
        let duplicates: HashSet<i32> = table.opens.iter().map(|o| o.ours.as_raw_fd()).collect();
        for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = process.file_name().to_str().and_then(|s| s.parse::<Tid>().ok()) else {
                continue;
            };
            // The inode tells a process from an earlier one with the same number.
            let identity = (pid, process.ino());
            if pid == table.pid || known.0.contains(&identity) {
                continue;
            }
            holders.scanned.0.insert(identity);
            if is_about_to_exec(pid) {
                continue;
            }
            // A process that vanishes meanwhile holds nothing any more.
            for entry in fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
                let number = entry.file_name().to_str().and_then(|s| s.parse().ok()).unwrap_or(-1);
                // Our duplicates.
                if pid == us && duplicates.contains(&number) {
                    continue;
                }
                let Ok(link) = fs::read_link(entry.path()) else { continue };
                let link = link.into_os_string();
                let pids = if is_memfd(&link) {
                    let id = fs::metadata(entry.path()).ok().and_then(|meta| id_of_memfd(&meta));
                    // The service keeps the objects open that it carries.
                    let Some((id, _)) = id.filter(|_| pid != us) else { continue };
                    holders.by_id.entry(id).or_default()
                } else if is_shared_kind(&link) {
                    holders.by_link.entry(link).or_default()
                } else if let Some(description) = sought.find(&link, (pid, number)) {
                    holders.by_description.entry(description).or_default()
                } else {
                    continue;
                };
                if !pids.contains(&pid) {
                    pids.push(pid);
                }
            }
        }
        if table.running {
            holders.doubt_holders_of_new(table);
        }
        holders
    }

    /// A socket that is not in the table of a running process, because it is new, may be held by others as well: those are
    /// looked at again.
    fn doubt_holders_of_new(&mut self, table: &Table) {
        let known: HashSet<u64> = table.opens.iter().map(|open| open.stat.ino()).collect();
        let now = lock::socket_inodes(table.pid).unwrap_or_default();
        let new = now.difference(&known).map(|inode| OsString::from(format!("socket:[{inode}]")));
        let doubted: HashSet<Tid> =
            new.filter_map(|link| self.by_link.get(&link)).flatten().copied().collect();
        self.scanned.0.retain(|(pid, _)| !doubted.contains(pid));
    }

    /// Other processes that hold an object, in words: `pid 3, 4`.
    pub(super) fn others(&self, link: &OsString) -> Option<String> {
        self.by_link.get(link).map(|pids| words(pids))
    }

    /// Other processes that have a memfd open, likewise.
    pub(super) fn others_of_memfd(&self, open: &Open) -> Option<String> {
        let (id, _) = id_of_memfd(&open.stat)?;
        self.by_id.get(&id).map(|pids| words(pids))
    }

    /// Other processes that share a description with the process, likewise: where that matters.
    pub(super) fn others_of_description(&self, description: usize) -> Option<String> {
        self.by_description.get(&description).map(|pids| words(pids))
    }
}

/// Descriptions that may be shared, by their link: only a descriptor with the same one need be compared. The
/// kernel's order keeps that short where there are many of one name on both sides (eventfds).
#[derive(Debug, Default)]
struct Sought<'a> {
    by_link: HashMap<&'a OsStr, Alike>,
}

/// Descriptions of one name: index in the table and our duplicate.
#[derive(Debug, Default)]
struct Alike {
    descriptions: Vec<(usize, RawFd)>,
    sorted: bool,
}

impl<'a> Sought<'a> {
    fn of(table: &'a Table) -> Self {
        let mut sought = Self::default();
        for description in 0..table.first.len() {
            let Some(open) = table.open(description) else { continue };
            if ANONYMOUS.contains(&open.link.as_bytes()) || matters(table, description, open) {
                let alike = sought.by_link.entry(&open.link).or_default();
                alike.descriptions.push((description, open.ours.as_raw_fd()));
            }
        }
        sought
    }

    /// The description behind a descriptor of another process, if it is one of these.
    fn find(&mut self, link: &OsStr, theirs: (Tid, RawFd)) -> Option<usize> {
        let alike = self.by_link.get_mut(link)?;
        let us = own_pid();
        let compare = |ours: RawFd, other| fds::kcmp_files((us, ours), other).unwrap_or(Ordering::Less);
        if !alike.sorted {
            alike.descriptions.sort_by(|(_, a), (_, b)| compare(*a, (us, *b)));
            alike.sorted = true;
        }
        let at = alike.descriptions.binary_search_by(|(_, ours)| compare(*ours, theirs)).ok()?;
        alike.descriptions.get(at).map(|(description, _)| *description)
    }
}

/// Whether it matters that a file or directory is shared: its position then moves with what the others do.
fn matters(table: &Table, description: usize, open: &Open) -> bool {
    let kind = open.stat.file_type();
    // Devices that are carried have no position, nor has what only stands for a path.
    if !(kind.is_file() || kind.is_dir()) || is_memfd(&open.link) || open.is_path_only() {
        return false;
    }
    // A standard stream that a shell, a supervisor or a test harness gave to the process and has open still: it
    // moves with the position it has, and from then on each side goes its own way. To refuse it would be to refuse
    // most of what is started with its output in a file.
    let leads_to = |(o, d): (&Open, &usize)| o.number <= 2 && *d == description;
    if table.opens.iter().zip(&table.description_of).any(leads_to) {
        return false;
    }
    let appends_only = open.flags & libc::O_APPEND != 0 && open.access() == libc::O_WRONLY;
    !(appends_only || kind.is_dir() && open.position == 0)
}

fn is_shared_kind(link: &OsStr) -> bool {
    SHARED_KINDS.iter().any(|prefix| link.as_bytes().starts_with(prefix))
}

fn is_memfd(link: &OsStr) -> bool {
    link.as_bytes().starts_with(MEMFD)
}

fn own_pid() -> Tid {
    Tid::try_from(std::process::id()).unwrap_or(0)
}

fn words(pids: &[Tid]) -> String {
    let list: Vec<String> = pids.iter().map(ToString::to_string).collect();
    format!("pid {}", list.join(", "))
}

/// Whether it is a child of ours that has just been forked: it has copies of what we have open, and nothing else,
/// and they close when it becomes another program.
fn is_about_to_exec(pid: Tid) -> bool {
    /// linux/sched.h: forked, and not executed yet.
    const PF_FORKNOEXEC: u32 = 0x40;
    let stat = procfs::read(format!("/proc/{pid}/stat")).ok().and_then(|text| procfs::parse_stat(&text).ok());
    let Some(stat) = stat.filter(|stat| stat.ppid == own_pid()) else { return false };
    if stat.flags & PF_FORKNOEXEC != 0 {
        return true;
    }
    // The flag goes a moment before those descriptors do, both under a lock of the process that kcmp(2) takes too: it
    // answers when they are gone. What it answers does not matter.
    let _ = fds::kcmp_tables(own_pid(), pid);
    false
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn who_holds_a_socket_that_is_new_is_looked_at_again() {
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let link = |inode: u64| OsString::from(format!("socket:[{inode}]"));
        let inode = nix::sys::stat::fstat(&socket).unwrap().st_ino;
        let table =
            Table { pid: own_pid(), running: true, opens: vec![], description_of: vec![], first: vec![] };
        let mut holders = Holders {
            by_link: HashMap::from([(link(inode), vec![3, 4]), (link(u64::MAX), vec![5])]),
            scanned: ScannedProcesses(HashSet::from([(3, 1), (4, 1), (5, 1), (6, 1)])),
            ..Holders::default()
        };
        holders.doubt_holders_of_new(&table);
        assert_eq!(holders.scanned.0, HashSet::from([(5, 1), (6, 1)]));
    }
}
