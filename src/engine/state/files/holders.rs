//! Which other processes hold an object too: one walk over all descriptors of the machine.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;

use super::scan::{Open, Table};
use crate::engine::remote::Tid;
use crate::engine::state::objects::id_of_memfd;

/// Processes whose descriptors preflight has looked at. A look at the stopped process need not read them
/// again: what is held elsewhere was refused then, and only a process started since can have inherited
/// something. (One that was there before could only be sent it over a unix socket, in the moment between the
/// two looks; that is not noticed.)
#[derive(Debug, Clone, Default)]
pub struct ScannedProcesses(HashSet<(Tid, u64)>);

/// Other processes by the link text (`pipe:[12]`) of what they hold.
#[derive(Debug, Default)]
pub(super) struct Holders {
    by_link: HashMap<OsString, Vec<Tid>>,
    /// memfds, whose names need not differ, by their ids.
    by_id: HashMap<u64, Vec<Tid>>,
    pub(super) scanned: ScannedProcesses,
}

impl Holders {
    /// Walks /proc, if any of the table's objects could be held elsewhere: pipes, sockets, memfds. Processes in
    /// `known` are passed over.
    pub(super) fn find(table: &Table, known: &ScannedProcesses) -> Self {
        let is_memfd = |link: &[u8]| link.starts_with(b"/memfd:");
        let is_shared_kind =
            |link: &[u8]| link.starts_with(b"pipe:[") || link.starts_with(b"socket:[") || is_memfd(link);
        let mut holders = Self::default();
        if !table.opens.iter().any(|o| is_shared_kind(o.link.as_bytes())) {
            return holders;
        }
        let us = Tid::try_from(std::process::id()).unwrap_or(0);
        let duplicates: HashSet<i32> = table.opens.iter().map(|o| o.ours.as_raw_fd()).collect();
        for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = process.file_name().to_str().and_then(|s| s.parse::<Tid>().ok()) else {
                continue;
            };
            // The inode tells a process from an earlier one with the same number.
            let identity = (pid, process.metadata().map_or(0, |m| m.ino()));
            if pid == table.pid || known.0.contains(&identity) {
                continue;
            }
            holders.scanned.0.insert(identity);
            // A process that vanishes meanwhile holds nothing any more.
            for entry in fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
                let number = entry.file_name().to_str().and_then(|s| s.parse().ok()).unwrap_or(-1);
                // Our duplicates; a child of ours that is about to exec has copies of them.
                if duplicates.contains(&number) && (pid == us || parent_of(pid) == Some(us)) {
                    continue;
                }
                let Ok(link) = fs::read_link(entry.path()) else { continue };
                let link = link.into_os_string();
                let pids = if is_memfd(link.as_bytes()) {
                    // The service keeps the objects open that it carries; so may a child about to exec.
                    let ours = pid == us || parent_of(pid) == Some(us);
                    let id = fs::metadata(entry.path()).ok().and_then(|meta| id_of_memfd(&meta));
                    let Some((id, _)) = id.filter(|_| !ours) else { continue };
                    holders.by_id.entry(id).or_default()
                } else if is_shared_kind(link.as_bytes()) {
                    holders.by_link.entry(link).or_default()
                } else {
                    continue;
                };
                if !pids.contains(&pid) {
                    pids.push(pid);
                }
            }
        }
        holders
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
}

fn words(pids: &[Tid]) -> String {
    let list: Vec<String> = pids.iter().map(ToString::to_string).collect();
    format!("pid {}", list.join(", "))
}

fn parent_of(pid: Tid) -> Option<Tid> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Number, name in parentheses (which may hold anything), state, parent.
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}
