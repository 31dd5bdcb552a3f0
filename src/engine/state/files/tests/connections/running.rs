//! What is looked at while the process runs.

use std::fs;
use std::os::unix::fs::MetadataExt;

use super::glance::inode;
use super::many::crowd;
use super::*;
use crate::engine::state::files::scan::Table;

/// Whether a descriptor of ours leads to it.
fn is_held(inode: u64) -> bool {
    let wanted = format!("socket:[{inode}]");
    let entries = fs::read_dir("/proc/self/fd").unwrap();
    entries
        .flatten()
        .any(|entry| fs::read_link(entry.path()).is_ok_and(|link| link.as_os_str() == wanted.as_str()))
}

/// What a process closes while we hold it is not closed.
#[test]
fn connections_are_given_back_one_by_one() {
    with_network(|network| {
        let (s, ends, _clients) = crowd(network, 5);
        let inodes: Vec<u64> = ends.iter().map(|fd| inode(&s, *fd)).collect();
        let held = || inodes.iter().filter(|inode| is_held(**inode)).count();
        let (table, seen) = Table::read(s.pid(), |open| (open.stat.ino(), held())).unwrap();
        let seen: Vec<_> = ends.iter().map(|fd| seen[fd]).collect();
        let expected: Vec<_> = inodes.iter().map(|inode| (*inode, 1)).collect();
        assert_eq!(seen, expected);
        assert_eq!(held(), 0);
        assert!(ends.iter().all(|fd| table.opens.iter().any(|open| open.number == *fd)));
    });
}
