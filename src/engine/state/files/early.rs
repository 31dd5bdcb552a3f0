//! The options of connections, read while the process runs.
//!
//! A connection has some sixty, each takes a call, and a server has connections by the thousand: to read them takes
//! longer than all else that is done to a stopped process. Only setsockopt(2) changes them, so it is counted: if the
//! process has not called it since before the look, what was seen is so still. If it has, or if calls cannot be counted
//! here, the options are read again when it stands still.
//!
//! What is not an option is seen at a glance when the process stands still (`tcp::glance`), where the kernel has that;
//! what takes time of it is done here.
//!
//! Counted are ends of calls, not beginnings: one that is under way when the counting begins may have its effect after
//! the look. A thread does not stop within such a call, so all that had an effect are counted at the freeze.

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;

use super::scan::numbers_of;
use super::tcp::{self, Glance, Known, Seen, Sets};
use super::{CaptureFilesError, Trouble};
use crate::engine::freeze::thread_ids;
use crate::engine::lock::Own;
use crate::engine::many;
use crate::engine::procfs;
use crate::engine::reason::chain;
use crate::engine::remote::Tid;
use crate::engine::sys::{perf, pidfd};
use crate::proto::files::Ahead;

/// Fewer sockets are read as fast when the process stands still.
const WORTH_IT: usize = 100;
/// With more threads the counting costs more than it saves.
const MOST_THREADS: usize = 256;
/// What changes options. What comes by io_uring is no call of its own; most kernels have it.
const COUNTED: [(&str, bool); 3] = [
    ("syscalls/sys_exit_setsockopt", true),
    ("syscalls/sys_exit_io_uring_enter", false),
    ("syscalls/sys_exit_io_uring_setup", false),
];

/// What was seen of the connections of a running process, and whether it is so still.
#[derive(Debug)]
pub struct EarlyLook {
    sets: Sets,
    /// By inode.
    known: HashMap<u64, Known>,
    calls: Calls,
    glance: Option<Glance>,
}

impl EarlyLook {
    /// Looks at a running process with these sockets, and at the options of connections that are `lasting`. `None`: it is
    /// not worth it, or it cannot be done here.
    pub fn at(pid: Tid, sockets: &HashSet<u64>, lasting: &HashSet<u64>) -> Option<Self> {
        if sockets.len() < WORTH_IT { None } else { Self::with(pid, lasting, None) }
    }

    /// Looks again, with what was made ready the first time.
    pub fn again(self, pid: Tid, lasting: &HashSet<u64>) -> Option<Self> {
        Self::with(pid, lasting, self.glance)
    }

    fn with(pid: Tid, sockets: &HashSet<u64>, glance: Option<Glance>) -> Option<Self> {
        let look = Calls::count(pid).and_then(|calls| {
            let (sets, known) = look(pid, sockets)?;
            // One that was being born when its parent began to be counted is not counted, and shows only now.
            let threads = thread_ids(pid).map_err(listing)?;
            if threads.iter().any(|tid| !calls.seen.contains(tid)) {
                return Err(Trouble::Step("counting the calls of all threads", Errno::EAGAIN));
            }
            let prepare = || Glance::prepare(pid).inspect_err(|error| say_unseen(error)).ok();
            let glance = glance.or_else(prepare);
            Ok(Self { sets, known, calls, glance })
        });
        look.inspect_err(|error| tracing::debug!(%error, "options are not read early")).ok()
    }

    /// Whether no option can have changed since. For sure once the process stands still.
    pub fn holds(&self) -> bool {
        self.calls.are_none()
    }

    /// The quiet connections as they are now: those that are established, with nothing in their queues and nothing
    /// unusual. They may have changed by the time that this returns. Their options are the ones that were seen before.
    /// It disturbs neither the process nor the connections. None where the kernel cannot do it.
    pub fn quiet_connections(&self) -> Ahead {
        let Some(seen) = self.glance() else { return Ahead::default() };
        let known = |(inode, image)| tcp::with_options(image, self.known.get(&inode)?);
        Ahead { connections: seen.all_quiet().filter_map(known).collect(), option_sets: self.sets.all() }
    }

    /// The sockets that the process has now; `None` where the kernel cannot tell as fast.
    pub fn own_sockets(&self) -> Option<Own> {
        self.glance.as_ref()?.own().inspect_err(|error| say_unseen(error)).ok()
    }

    /// What is to be seen of the connections now; `None` where the kernel cannot do it.
    pub(super) fn glance(&self) -> Option<Seen> {
        let start = std::time::Instant::now();
        let seen = self.glance.as_ref()?.look().inspect_err(|error| say_unseen(error)).ok()?;
        tracing::debug!(took = ?start.elapsed(), "connections were seen at a glance");
        Some(seen)
    }

    /// What was seen, if it is so still.
    pub(super) fn into_known(self) -> Option<(Sets, HashMap<u64, Known>)> {
        let holds = self.holds();
        tracing::debug!(holds, connections = self.known.len(), "options were read early");
        holds.then_some((self.sets, self.known))
    }
}

fn say_unseen(error: &dyn std::error::Error) {
    tracing::debug!(error = chain(error), "connections are not seen at a glance");
}

fn listing(error: std::io::Error) -> Trouble {
    Trouble::Step("listing threads", super::errno_of(&error))
}

/// Counters of the calls of all threads.
#[derive(Debug)]
struct Calls {
    counters: Vec<OwnedFd>,
    seen: HashSet<Tid>,
}

impl Calls {
    fn count(pid: Tid) -> Result<Self, Trouble> {
        let step = Trouble::step;
        let files = perf::trace_files().map_err(step("opening the trace events"))?;
        let mut events = Vec::new();
        for (name, is_needed) in COUNTED {
            match perf::trace_event(files.as_fd(), name) {
                Ok(event) => events.push(event),
                Err(Errno::ENOENT) if !is_needed => {}
                Err(errno) => return Err(Trouble::Step("looking for a trace event", errno)),
            }
        }
        let mut calls = Self { counters: Vec::new(), seen: HashSet::new() };
        // Threads of a thread that is counted are counted too: when a list has no new one, none is missing.
        loop {
            let threads = thread_ids(pid).map_err(listing)?;
            let new: Vec<Tid> = threads.into_iter().filter(|tid| calls.seen.insert(*tid)).collect();
            if new.is_empty() {
                return Ok(calls);
            }
            if calls.seen.len() > MOST_THREADS {
                return Err(Trouble::Step("counting the calls of so many threads", Errno::E2BIG));
            }
            for tid in new {
                for event in &events {
                    match perf::count(tid, *event) {
                        Ok(counter) => calls.counters.push(counter),
                        // Gone: what it has done is done.
                        Err(Errno::ESRCH) => {}
                        Err(errno) => return Err(Trouble::Step("counting calls", errno)),
                    }
                }
            }
        }
    }

    fn are_none(&self) -> bool {
        self.counters.iter().all(|counter| perf::counted(counter.as_fd()) == Ok(0))
    }
}

impl Drop for Calls {
    fn drop(&mut self) {
        let counters = std::mem::take(&mut self.counters);
        // The last one waits until no processor counts any more, some 30 ms.
        let _ = std::thread::Builder::new().name("counters".into()).spawn(move || drop(counters));
    }
}

/// Each by a duplicate of ours that is closed at once: what the process closes meanwhile must be closed.
fn look(pid: Tid, sockets: &HashSet<u64>) -> Result<(Sets, HashMap<u64, Known>), Trouble> {
    let (process, numbers) = numbers_of(pid).map_err(|error| match error {
        CaptureFilesError::Process { step, errno, .. } => Trouble::Step(step, errno),
        _ => Trouble::Step("finding the process", Errno::ESRCH),
    })?;
    let sets = Sets::default();
    let known = many::map(&numbers, |number| {
        // What was closed meanwhile, or cannot be read, is left for later.
        let inode = procfs::socket_behind(format!("/proc/{pid}/fd/{number}"));
        let inode = inode.filter(|inode| sockets.contains(inode))?;
        let fd = pidfd::take_fd(process.as_fd(), *number).ok()?;
        let is_the_same = nix::sys::stat::fstat(&fd).is_ok_and(|seen| seen.st_ino == inode);
        let options = is_the_same.then(|| tcp::options_of_connection(fd.as_fd(), &sets))??;
        Some((inode, options))
    });
    Ok((sets, known.into_iter().flatten().collect()))
}
