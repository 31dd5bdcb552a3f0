//! Which other processes hold an object too: one walk over all descriptors of the machine.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;

use super::scan::Table;
use crate::engine::remote::Tid;

/// Other processes by the link text (`pipe:[12]`) of what they hold.
#[derive(Debug, Default)]
pub(super) struct Holders(HashMap<OsString, Vec<Tid>>);

impl Holders {
    /// Walks /proc, if any of the table's objects could be held elsewhere: pipes and sockets.
    pub(super) fn find(table: &Table) -> Self {
        let is_shared_kind = |link: &[u8]| link.starts_with(b"pipe:[") || link.starts_with(b"socket:[");
        let mut found = HashMap::<OsString, Vec<Tid>>::new();
        if !table.opens.iter().any(|o| is_shared_kind(o.link.as_bytes())) {
            return Self(found);
        }
        let us = Tid::try_from(std::process::id()).unwrap_or(0);
        let duplicates: HashSet<i32> = table.opens.iter().map(|o| o.ours.as_raw_fd()).collect();
        let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
        for pid in pids.filter_map(|e| e.file_name().to_str()?.parse::<Tid>().ok()) {
            if pid == table.pid {
                continue;
            }
            // A process that vanishes meanwhile holds nothing any more.
            for entry in fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
                let number = entry.file_name().to_str().and_then(|s| s.parse().ok()).unwrap_or(-1);
                if pid == us && duplicates.contains(&number) {
                    continue;
                }
                let Ok(link) = fs::read_link(entry.path()) else { continue };
                let link = link.into_os_string();
                if is_shared_kind(link.as_bytes()) {
                    let pids = found.entry(link).or_default();
                    if !pids.contains(&pid) {
                        pids.push(pid);
                    }
                }
            }
        }
        Self(found)
    }

    /// Other processes that hold an object, in words: `pid 3, 4`.
    pub(super) fn others(&self, link: &OsString) -> Option<String> {
        let pids = self.0.get(link)?;
        let list: Vec<String> = pids.iter().map(ToString::to_string).collect();
        Some(format!("pid {}", list.join(", ")))
    }
}
