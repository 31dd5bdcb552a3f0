//! The whole state of a frozen process, but for its memory: one kind after the other, in few batches.

use std::os::fd::OwnedFd;
use std::time::Instant;

use super::clocks::ClocksProbe;
use super::freeze::{Frozen, signal_is_due};
use super::late::Seen;
use super::memory::MemoryError;
use super::procfs::{Status, parse_stat, parse_status};
use super::reason::Reason;
use super::regs;
use super::remote::{Batch, InjectError, RemoteCalls, Tid};
use super::sleep::SleepBook;
use super::state::calls::{AttrError, read_as};
use super::state::creds::{self, CredsProbe};
use super::state::files::{self, CaptureFilesError, Descriptors, FilesOptions, ScannedProcesses};
use super::state::keys::{self, KeysProbe};
use super::state::limits::LimitsProbe;
use super::state::mm::{self, MapError};
use super::state::sched;
use super::state::signals::{self, ActionsProbe};
use super::state::threads::ThreadProbe;
use super::state::timers::{self, TimersProbe};
use super::sys::ptrace;
use crate::proto::image::{Process, Thread};

/// Only root may have the core: what a change of ids leaves where fs.suid_dumpable is 2.
const DUMPABLE_ROOT_ONLY: u32 = 2;

/// Why the state of a process could not be captured.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The process could not be driven.
    #[error("driving the process")]
    Inject(#[from] InjectError),
    /// Its memory map.
    #[error("capturing the memory map")]
    Map(#[from] MapError),
    /// Its descriptors.
    #[error("capturing descriptors")]
    Files(#[from] CaptureFilesError),
    /// Its attributes: signals, timers, credentials, limits, threads.
    #[error("capturing attributes")]
    Attributes(#[from] AttrError),
    /// Its memory could not be reached.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The registers of a thread.
    #[error("reading the extended registers of thread {tid}")]
    Xstate {
        /// The thread.
        tid: Tid,
        /// The kernel's answer.
        #[source]
        errno: nix::errno::Errno,
    },
}

impl CaptureError {
    /// Refusals that showed only now, to be named one by one.
    pub fn reasons(&self) -> Option<Vec<Reason>> {
        match self {
            CaptureError::Files(CaptureFilesError::Refused { reasons, .. })
            | CaptureError::Attributes(AttrError::Refused(reasons))
            | CaptureError::Map(MapError::Refused(reasons)) => Some(reasons.clone()),
            _ => None,
        }
    }
}

/// What was captured.
#[derive(Debug)]
pub struct Captured {
    /// The state to send.
    pub process: Process,
    /// Established connections, to be closed for their peers after the commit.
    pub closing: Vec<OwnedFd>,
    /// Connections that are carried, to be dropped silently after the commit.
    pub carried: Vec<OwnedFd>,
    /// The pending signals that are in it, for [`Frozen::late_signals`].
    pub seen: Seen,
}

/// Captures the state of a frozen process. Nothing of it is consumed or changed. `scanned` are processes
/// that preflight has looked at already, `descriptors` its own, if they were taken already. `asked` is called as soon as
/// its threads have told all that they are asked: until then they need processors, and others should leave them some.
///
/// # Errors
/// See [`CaptureError`].
pub fn capture(
    frozen: &mut Frozen,
    options: &FilesOptions,
    sleeps: &SleepBook,
    scanned: &ScannedProcesses,
    descriptors: Option<Descriptors>,
    asked: impl FnOnce(),
) -> Result<Captured, CaptureError> {
    let pid = frozen.pid();
    // Before any injection: registers as the freeze found them.
    let mut process =
        Process { pid: pid.unsigned_abs(), threads: registers(frozen, sleeps)?, ..Process::default() };
    let statuses = pending_signals(frozen, &mut process)?;
    let leader = statuses.first().ok_or(InjectError::Gone(pid))?;

    let mut batch = Batch::new();
    let brk = mm::ask_brk(&mut batch);
    let actions = ActionsProbe::ask(&mut batch);
    let time = ClocksProbe::ask(&mut batch);
    let clocks = TimersProbe::ask(pid, &mut batch)?;
    let rights = CredsProbe::ask(&mut batch);
    let bounds = LimitsProbe::ask(pid, &mut batch);
    let since = Instant::now();
    let outcome = frozen.run(&batch)?;
    let mut descriptors = descriptors.map_or_else(|| Descriptors::take(pid), Ok)?;
    descriptors.ask(frozen)?;
    let personality = thread_attributes(frozen, &mut process, leader.uids[0])?;
    asked();
    let mut memory = mm::capture_mm(pid)?;
    memory.brk = outcome.ret(brk).map_err(|errno| InjectError::Call {
        what: "reading the end of the heap".into(),
        tid: pid,
        errno,
    })?;
    process.mm = Some(memory);
    process.actions = actions.read(pid, &outcome)?;
    process.clocks = Some(time.read(pid, &outcome)?);
    (process.itimers, process.timers) = clocks.read(pid, &outcome)?;
    let creds = rights.read(leader, &outcome)?;
    if creds.dumpable == DUMPABLE_ROOT_ONLY {
        // prctl(2) does not set this value, and another one would say something else about its core dumps.
        let why = "has dumpable 2 (fs.suid_dumpable), which cannot be carried";
        return Err(AttrError::Refused(vec![Reason::new(format!("pid {pid}"), why, "")]).into());
    }
    process.creds = Some(creds);
    let stat = read_as(format!("/proc/{pid}/stat"), parse_stat)?;
    let mut attrs = bounds.read(leader, &stat, &outcome)?;
    attrs.personality = personality.unwrap_or(attrs.personality);
    process.attrs = Some(attrs);

    // Who reads from a connection in TCP_REPAIR is refused: not even our death may let the process run meanwhile.
    if options.tcp_established {
        frozen.fence()?;
    }
    let captured = files::capture_after(descriptors, options, scanned);
    frozen.lift_fence()?;
    let captured = captured?;
    process.files = Some(captured.image);
    // Once more, last: what a timer has sent since the first look would be lost.
    let before = signals::all_pending(&process);
    pending_signals(frozen, &mut process)?;
    timers::account_for_fired(&before, since.elapsed(), &mut process);
    let seen = Seen::of(&process);
    process.stopped = signals::take_stop(&mut process, frozen.is_to_stop());
    Ok(Captured { process, closing: captured.closing, carried: captured.carried, seen })
}

/// Pending signals of the process and of each thread; the status of each thread, on the way.
fn pending_signals(frozen: &Frozen, process: &mut Process) -> Result<Vec<Status>, CaptureError> {
    let pid = frozen.pid();
    let mut statuses = Vec::with_capacity(process.threads.len());
    for (thread, stopped) in process.threads.iter_mut().zip(frozen.threads()) {
        let status = read_as(format!("/proc/{pid}/task/{}/status", stopped.tid), parse_status)?;
        thread.pending = signals::capture_pending(stopped.tid, false, status.pending)?;
        if stopped.tid == pid {
            process.pending = signals::capture_pending(pid, true, status.shared_pending)?;
        }
        if statuses.first().is_some_and(|leader| !creds::same(leader, &status)) {
            let why = "has other credentials than the leader, which cannot be carried";
            let reason = Reason::new(format!("thread {}", stopped.tid), why, "");
            return Err(AttrError::Refused(vec![reason]).into());
        }
        statuses.push(status);
    }
    Ok(statuses)
}

/// What each thread tells itself, all at the same time, and how it is scheduled. Returns the personality of all.
fn thread_attributes(
    frozen: &mut Frozen,
    process: &mut Process,
    user: u32,
) -> Result<Option<u32>, CaptureError> {
    let pid = frozen.pid();
    let mut probes = Vec::with_capacity(process.threads.len());
    let mut work = Vec::with_capacity(process.threads.len());
    for thread in frozen.threads() {
        let mut batch = Batch::new();
        let keys = KeysProbe::ask(thread.tid, &mut batch);
        probes.push((ThreadProbe::ask(thread.tid, &mut batch), keys));
        work.push((thread.tid, batch));
    }
    let outcomes = frozen.run_in_threads(&work)?;
    keys::check(frozen, user, probes.iter().map(|(_, keys)| keys).zip(&outcomes))?;
    let defaults = sched::Defaults::here()?;
    let mut common = None;
    for ((thread, (probe, _)), outcome) in process.threads.iter_mut().zip(&probes).zip(&outcomes) {
        let attrs = probe.read(pid, outcome)?;
        let of_process = (attrs.personality, attrs.securebits);
        if *common.get_or_insert(of_process) != of_process {
            let why = "has another personality or other securebits than the leader, which cannot be carried";
            let reason = Reason::new(format!("thread {}", thread.tid), why, "");
            return Err(AttrError::Refused(vec![reason]).into());
        }
        let known = std::mem::take(thread);
        *thread = Thread {
            tid: known.tid,
            gpregs: known.gpregs,
            xstate: known.xstate,
            sigmask: known.sigmask,
            pending: known.pending,
            restart_remaining_ns: known.restart_remaining_ns,
            sched: Some(sched::capture(Tid::try_from(known.tid).unwrap_or(0), &defaults)?),
            ..attrs.thread
        };
    }
    Ok(common.map(|(personality, _)| personality))
}

/// General and extended registers and masks; calls that only our stop has ended are issued again.
fn registers(frozen: &mut Frozen, sleeps: &SleepBook) -> Result<Vec<Thread>, CaptureError> {
    let pid = frozen.pid();
    let mut threads = Vec::with_capacity(frozen.threads().len());
    frozen.leave_rseq_sections()?;
    for thread in frozen.threads() {
        let tid = thread.tid;
        let mut r = thread.regs;
        let mut remaining = -1;
        if regs::ended_by_stop(&r) && !signal_is_due(pid, tid, thread.mask) {
            regs::rewind_call(&mut r);
            remaining = sleeps.remaining(thread).map_or(-1, |call| call.remaining_ns);
        } else if let Some(call) = sleeps.remaining(thread) {
            r.orig_rax = regs::unsigned(call.number);
            remaining = call.remaining_ns;
        } else if sleeps.is_unknown(thread) {
            let why = "was stopped in a call that had been interrupted before; which one it is shows only while it \
                       sleeps in it";
            let reason =
                Reason::new(format!("thread {tid}"), why, "let the process go on (SIGCONT), or try again");
            return Err(AttrError::Refused(vec![reason]).into());
        }
        threads.push(Thread {
            tid: tid.unsigned_abs(),
            gpregs: regs::to_bytes(&r),
            xstate: ptrace::xstate(tid).map_err(|errno| CaptureError::Xstate { tid, errno })?,
            sigmask: thread.mask,
            restart_remaining_ns: remaining,
            ..Default::default()
        });
    }
    Ok(threads)
}
