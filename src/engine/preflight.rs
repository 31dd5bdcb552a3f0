//! What stands in the way of moving a process, at its source, before anything is touched: all reasons at
//! once. What only the process itself can tell is found at the freeze, and is a refusal then.

mod groups;
mod ipc;
mod sharing;
mod undo;

use std::collections::HashSet;
use std::fs::File;
use std::io::Read;

use super::freeze::thread_ids;
use super::procfs::{self, Stat, Status, parse_stat, parse_status};
use super::reason::{Reason, chain};
use super::remote::Tid;
use super::state::{calls::AttrError, creds, limits, timers};

/// What preflight found.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// Why the process cannot be moved; empty: nothing known is in the way.
    pub reasons: Vec<Reason>,
    /// What will be different afterwards, and is no obstacle.
    pub notes: Vec<Reason>,
}

/// Kernel's flag of a task: a helper thread of io_uring.
const PF_IO_WORKER: u32 = 0x10;
/// Uninterruptible waits shorter than this are no obstacle: it is how often a thread is looked at again,
/// a millisecond apart.
const LOOKS_AT_A_WAIT: u32 = 20;

/// Namespaces that must be ours. Not among them: the time namespace, whose clocks the move carries.
const NAMESPACES: [&str; 8] = ["mnt", "pid", "net", "ipc", "uts", "user", "cgroup", "pid_for_children"];

/// Checks the process `pid`. With `shell_job` it may have a controlling terminal, which is left behind.
///
/// Files, mappings and descriptors have checks of their own (`state`).
pub fn check(pid: Tid, shell_job: bool) -> Findings {
    let object = format!("pid {pid}");
    let mut found = Findings::default();
    let refuse = |why: &str, remedy: &str| Findings {
        reasons: vec![Reason::new(&object, why, remedy)],
        notes: Vec::new(),
    };
    let Some((stat, status)) = look(pid, pid) else {
        return refuse("there is no such process", "");
    };
    if status.tgid != status.pid {
        return refuse(&format!("is a thread of process {}", status.tgid), "name the process");
    }
    // Nothing else can be asked of these.
    if status.kernel_thread || is_kernel_thread(&stat, &status) {
        return refuse("is a thread of the kernel", "");
    }
    if stat.state == b'Z' || stat.state == b'X' {
        let why =
            if status.threads > 1 { "its main thread has exited" } else { "is a zombie: it has exited" };
        return refuse(why, "");
    }
    if let Some(why) = is_ourselves(pid) {
        return refuse(why, "");
    }
    let mut add = |why: String, remedy: &str| found.reasons.push(Reason::new(&object, why, remedy));
    if is_32_bit(pid) {
        add("runs 32-bit code".into(), "");
    }
    if status.pinned_kib > 0 {
        let why = format!(
            "has {} KiB of memory pinned (io_uring, RDMA), whose changes nobody sees",
            status.pinned_kib
        );
        add(why, "");
    }
    if status.untag_mask.is_some_and(|mask| mask != u64::MAX) {
        add("uses linear address masking, which cannot be carried".into(), "");
    }
    for (what, state) in
        [("store bypass", &status.store_bypass), ("indirect branch", &status.indirect_branch)]
    {
        if state.starts_with("thread force") || state.starts_with("conditional force") {
            add(format!("has set its {what} speculation for good ({state}), which cannot be carried"), "");
        }
    }
    if stat.tty_nr != 0 && !shell_job {
        let remedy = "with --shell-job it leaves the terminal behind";
        add("has a controlling terminal".into(), remedy);
    }
    for (whose, id) in [("session", stat.session), ("process group", stat.pgrp)] {
        if id != pid {
            let why = format!("is in the {whose} of process {id}, and will be in one of its own");
            found.notes.push(Reason::new(&object, why, ""));
        }
    }
    found.reasons.extend(namespaces(pid));
    found.reasons.extend(groups::frozen(pid));
    found.reasons.extend(sharing::with_other_processes(pid));
    found.reasons.extend(undo::semaphores(pid, &stat, &status));
    found.reasons.extend(ipc::used(pid, &stat));
    found.reasons.extend(children(pid));
    threads(pid, &mut found);
    for part in [limits::preflight(pid), timers::preflight(pid)] {
        found.reasons.extend(part.unwrap_or_else(|error| vec![unreadable(pid, &error)]));
    }
    found
}

/// What was looked at before the process was touched, and leaves nothing behind at the process itself by which its
/// capture would notice it: children, and objects of System V that it was the last to use. To be called when it stands
/// still.
pub fn begun_since(pid: Tid) -> Vec<Reason> {
    let Some((stat, _)) = look(pid, pid) else { return Vec::new() };
    children(pid).into_iter().chain(ipc::used(pid, &stat)).collect()
}

fn unreadable(pid: Tid, error: &AttrError) -> Reason {
    Reason::new(format!("pid {pid}"), format!("could not be examined: {}", chain(error)), "")
}

/// Stat and status of a thread; `None` if it is gone.
fn look(pid: Tid, tid: Tid) -> Option<(Stat, Status)> {
    let read = |file: &str| procfs::read(format!("/proc/{pid}/task/{tid}/{file}")).ok();
    Some((parse_stat(&read("stat")?).ok()?, parse_status(&read("status")?).ok()?))
}

fn is_kernel_thread(stat: &Stat, status: &Status) -> bool {
    const PF_KTHREAD: u32 = 0x0020_0000;
    stat.flags & PF_KTHREAD != 0 && !status.has_memory
}

fn is_ourselves(pid: Tid) -> Option<&'static str> {
    let us = Tid::try_from(std::process::id()).unwrap_or(0);
    if pid == us {
        return Some("is this very process");
    }
    let mut at = us;
    // Parents have smaller distances to init each time, but another process may take a PID over.
    for _ in 0..1000 {
        let (stat, _) = look(at, at)?;
        if stat.ppid == pid {
            return Some("is an ancestor of this very process");
        }
        at = stat.ppid;
        if at == 0 {
            break;
        }
    }
    None
}

/// Whether its program is for a 32-bit machine. A thread that runs such code in a 64-bit process shows at
/// the freeze, by its registers.
fn is_32_bit(pid: Tid) -> bool {
    const CLASS_32: u8 = 1;
    let mut head = [0u8; 5];
    let read = File::open(format!("/proc/{pid}/exe")).and_then(|mut f| f.read_exact(&mut head));
    read.is_ok() && head.starts_with(b"\x7fELF") && head[4] == CLASS_32
}

fn namespaces(pid: Tid) -> Vec<Reason> {
    let mut reasons = Vec::new();
    let link = |of: &str, name: &str| std::fs::read_link(format!("/proc/{of}/ns/{name}")).ok();
    for name in NAMESPACES {
        let theirs = link(&pid.to_string(), name);
        // The PID namespace of children is unset until the first one is born in a new one.
        if theirs.is_some() && theirs != link("self", name) {
            let why =
                format!("is in another {name} namespace than this service, which cannot be carried yet");
            reasons.push(Reason::new(format!("pid {pid}"), why, "run the service in that namespace"));
        }
    }
    let time = |name| link(&pid.to_string(), name);
    if time("time") != time("time_for_children") {
        // Its children would be born into other clocks, which it cannot be given from outside.
        let why = "has another time namespace for its children, which cannot be carried yet";
        reasons.push(Reason::new(format!("pid {pid}"), why, ""));
    }
    reasons
}

fn children(pid: Tid) -> Option<Reason> {
    let mut all: Vec<String> = Vec::new();
    for tid in thread_ids(pid).ok()? {
        let text = procfs::read_text(format!("/proc/{pid}/task/{tid}/children")).unwrap_or_default();
        all.extend(text.split_ascii_whitespace().map(str::to_owned));
    }
    let why = format!("has child processes ({}), which cannot be carried yet", all.join(", "));
    (!all.is_empty()).then(|| Reason::new(format!("pid {pid}"), why, ""))
}

/// What is to be seen of each thread.
fn threads(pid: Tid, found: &mut Findings) {
    let mut statuses = Vec::new();
    let mut tracers = HashSet::new();
    for tid in thread_ids(pid).unwrap_or_default() {
        let Some((stat, status)) = look(pid, tid) else { continue };
        let mut add = |why: String| found.reasons.push(Reason::new(format!("thread {tid}"), why, ""));
        if stat.flags & PF_IO_WORKER != 0 {
            add("is a worker of io_uring, which cannot be carried".into());
            continue;
        }
        if stat.state == b'D' && stays_uninterruptible(pid, tid) {
            add("is in an uninterruptible wait: vfork, a dead disk, a frozen control group".into());
        }
        if status.tracer != 0 && tracers.insert(status.tracer) {
            add(format!("is traced by process {}", status.tracer));
        }
        found.reasons.extend(sharing::within(pid, tid));
        statuses.push(status);
    }
    statuses.sort_by_key(|s| (s.pid != pid, s.pid));
    found.reasons.extend(creds::preflight(pid, &statuses));
}

fn stays_uninterruptible(pid: Tid, tid: Tid) -> bool {
    for _ in 0..LOOKS_AT_A_WAIT {
        if look(pid, tid).is_none_or(|(stat, _)| stat.state != b'D') {
            return false;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    true
}

#[cfg(test)]
mod tests;
