//! Objects that tasks share although they are not threads of one process, and threads that do not share
//! what threads do.

use crate::engine::reason::Reason;
use crate::engine::remote::Tid;
use crate::engine::sys::attrs::{Shared, share};

/// Whom `pid` shares memory, descriptors, directories or handlers with. Every process of this PID
/// namespace is looked at, which costs 2 µs each.
pub(super) fn with_other_processes(pid: Tid) -> Vec<Reason> {
    let mut reasons = Vec::new();
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    for other in entries.filter_map(|e| e.file_name().to_str()?.parse::<Tid>().ok()).filter(|o| *o != pid) {
        for (what, name) in [
            (Shared::Memory, "its memory"),
            (Shared::Files, "its table of descriptors"),
            (Shared::Directories, "its working directory and umask"),
            (Shared::Handlers, "its signal handlers"),
        ] {
            // An error means that the other one is gone, or has none of these left.
            if share(pid, other, what) == Ok(true) {
                let why = format!("shares {name} with process {other}, which cannot be carried yet");
                reasons.push(Reason::new(format!("pid {pid}"), why, ""));
            }
        }
    }
    reasons
}

/// What thread `tid` of `pid` has for itself alone.
pub(super) fn within(pid: Tid, tid: Tid) -> Vec<Reason> {
    let mut reasons = Vec::new();
    if tid == pid {
        return reasons;
    }
    for (what, name) in
        [(Shared::Files, "table of descriptors"), (Shared::Directories, "working directory and umask")]
    {
        if share(pid, tid, what) == Ok(false) {
            let why = format!("has a {name} of its own (unshare), which cannot be carried");
            reasons.push(Reason::new(format!("thread {tid}"), why, ""));
        }
    }
    for name in ["mnt", "net", "ipc", "uts", "cgroup", "pid_for_children", "time_for_children"] {
        let link = |tid: Tid| std::fs::read_link(format!("/proc/{pid}/task/{tid}/ns/{name}")).ok();
        // A thread that has ended has none, nor has a PID namespace that nobody has been born in.
        if let (Some(theirs), Some(leaders)) = (link(tid), link(pid))
            && theirs != leaders
        {
            let why = format!("is in another {name} namespace than its process, which cannot be carried");
            reasons.push(Reason::new(format!("thread {tid}"), why, ""));
        }
    }
    reasons
}
