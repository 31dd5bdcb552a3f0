//! The captured state into a skeleton, one stage after the other; the order is the type.

use std::os::fd::AsFd;
use std::time::Duration;

use nix::errno::Errno;

use super::reason::{Reason, chain};
use super::regs;
use super::remote::{Batch, InjectError, RemoteCalls, Tid};
use super::skeleton::{Skeleton, SkeletonError};
use super::sleep;
use super::state::calls::{AttrError, Named};
use super::state::files::{self, Built, RestoreFilesError};
use super::state::timers::restore::Timers;
use super::state::{creds, keys, limits, mm, sched, signals, threads};
use super::sys::{attrs, ptrace};
use crate::proto::image::{Mm, Process, Thread};

/// The stages of a restore, in their order, each with the reason for its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// First: needs capabilities (locks, exe link) and descriptor 0 for a moment; all pages are in.
    Memory,
    /// The limit of open files must not stand in the way of them; and dispositions come before anything can be
    /// pending: queuing an ignored signal would lose it.
    Process,
    /// While the process still may open everything, and before its own limits are set.
    Files,
    /// Registers that live in the kernel by system call: TLS-related addresses, alternate stacks, names.
    Threads,
    /// Blocked until the end, each thread's own by itself. Before them the timers are made, which queue theirs.
    Pending,
    /// After what they would have limited. Then timers go, as late as possible: they run.
    Limits,
    /// Nothing privileged comes after them, but what has to.
    Credentials,
    /// Our code leaves the process, its own registers come back. Then it is ready.
    Registers,
}

/// Why a stage failed.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The process could not be driven.
    #[error("{stage:?}: driving the process")]
    Inject {
        /// The stage.
        stage: Stage,
        /// What failed.
        #[source]
        source: InjectError,
    },
    /// Descriptors.
    #[error("restoring descriptors")]
    Files(#[from] RestoreFilesError),
    /// The skeleton itself.
    #[error("{stage:?}")]
    Skeleton {
        /// The stage.
        stage: Stage,
        /// What failed.
        #[source]
        source: SkeletonError,
    },
    /// A kind of state that is not valid or not possible here.
    #[error("{stage:?}")]
    State {
        /// The stage.
        stage: Stage,
        /// What, and why.
        #[source]
        source: AttrError,
    },
    /// The state is incomplete or does not fit the threads of the skeleton.
    #[error("the state is not complete: {0}")]
    Incomplete(&'static str),
}

impl RestoreError {
    /// As a reason for the source's operator.
    pub fn reason(&self, pid: Tid) -> Reason {
        Reason::new(format!("pid {pid}"), format!("cannot be restored: {}", chain(self)), "")
    }
}

/// Restores all state but the memory's contents; `elapsed` is how long ago it was captured. Afterwards every
/// thread waits with its own registers.
///
/// # Errors
/// See [`RestoreError`]; the skeleton is then of no use.
pub fn restore(
    skeleton: &mut Skeleton,
    process: &Process,
    built: Built,
    elapsed: Duration,
) -> Result<(), RestoreError> {
    let memory = process.mm.as_ref().ok_or(RestoreError::Incomplete("memory"))?;
    let creds = process.creds.as_ref().ok_or(RestoreError::Incomplete("credentials"))?;
    let attrs = process.attrs.as_ref().ok_or(RestoreError::Incomplete("attributes"))?;
    check_threads(skeleton, process)?;
    choose_doorbell(skeleton, process)?;

    let ours = creds::here().map_err(state(Stage::Credentials))?;

    finish_memory(skeleton, memory)?;
    skeleton
        .finish_objects()
        .map_err(|source| RestoreError::Skeleton { stage: Stage::Memory, source: source.into() })?;

    let stage = Stage::Process;
    let mut batch = Batch::new();
    let room = limits::make_room_calls(&mut batch).map_err(state(stage))?;
    let actions = signals::restore_actions(&process.actions, &mut batch).map_err(state(stage))?;
    run(skeleton, stage, &batch, &room.and(actions))?;

    let stage = Stage::Files;
    let (number, channel) = skeleton.channel().map_err(|source| RestoreError::Skeleton { stage, source })?;
    files::install(skeleton, number, channel.as_fd(), built)?;

    // Before the timer slack, which changing the scheduling may reset and a real-time thread does not take.
    for thread in &process.threads {
        if let (Some(sched), Ok(tid)) = (&thread.sched, Tid::try_from(thread.tid)) {
            sched::restore(tid, sched).map_err(state(Stage::Threads))?;
        }
    }
    in_threads(skeleton, Stage::Threads, process, |thread, batch| {
        Ok(threads::restore_calls(thread, attrs.personality, batch))
    })?;

    let mut clocks = Timers::make(skeleton, process).map_err(state(Stage::Pending))?;
    signals::restore_pending(skeleton, process, &mut clocks).map_err(state(Stage::Pending))?;

    let stage = Stage::Limits;
    limits::restore_outside(skeleton.pid(), attrs).map_err(state(stage))?;
    let mut batch = Batch::new();
    let bounds = limits::restore_calls(attrs, &mut batch).map_err(state(stage))?;
    let clocks = clocks.start(&mut batch).map_err(state(stage))?;
    keys::restore_calls(creds, &mut batch);
    run(skeleton, stage, &batch, &bounds.and(clocks))?;

    let stage = Stage::Credentials;
    in_threads(skeleton, stage, process, |_, batch| creds::restore_calls(creds, &ours, batch))?;
    in_threads(skeleton, stage, process, |thread, batch| {
        // The leader speaks for the process.
        let whole = if thread.tid == process.pid { creds::finish_calls(creds, batch) } else { Named::new() };
        Ok(whole.and(threads::finish_calls(thread, batch)))
    })?;

    registers(skeleton, process, elapsed)
}

fn state(stage: Stage) -> impl Fn(AttrError) -> RestoreError {
    move |source| RestoreError::State { stage, source }
}

/// One thread of the state for each of the skeleton, the same ids, the leader first.
fn check_threads(skeleton: &Skeleton, process: &Process) -> Result<(), RestoreError> {
    let mut wanted: Vec<Tid> = process.threads.iter().filter_map(|t| Tid::try_from(t.tid).ok()).collect();
    let mut here = skeleton.tids();
    let leader_first = wanted.first() == Some(&skeleton.pid());
    wanted.sort_unstable();
    here.sort_unstable();
    if wanted == here && leader_first { Ok(()) } else { Err(RestoreError::Incomplete("threads")) }
}

/// The bell must not be a signal that will be pending, nor one that a timer sends.
fn choose_doorbell(skeleton: &mut Skeleton, process: &Process) -> Result<(), RestoreError> {
    const UNFIT: [i32; 8] = [
        libc::SIGKILL,
        libc::SIGSTOP,
        libc::SIGTRAP,
        libc::SIGSEGV,
        libc::SIGCONT,
        libc::SIGALRM,
        libc::SIGVTALRM,
        libc::SIGPROF,
    ];
    let (_, pending) = signals::caught_and_pending(process);
    let free = (1..32).rev().find(|s| {
        let of_timer = process.timers.iter().any(|t| t.signal == *s);
        !UNFIT.contains(s) && !of_timer && pending & super::inject::signal_bit(*s) == 0
    });
    skeleton.set_doorbell(free.ok_or(RestoreError::Incomplete("a signal that is not pending"))?);
    Ok(())
}

fn finish_memory(skeleton: &mut Skeleton, memory: &Mm) -> Result<(), RestoreError> {
    let stage = Stage::Memory;
    let layout = skeleton.layout().clone();
    mm::finish(skeleton, &layout, memory).map_err(|source| RestoreError::Inject { stage, source })
}

fn run(skeleton: &mut Skeleton, stage: Stage, batch: &Batch, named: &Named) -> Result<(), RestoreError> {
    let wrap = |source| RestoreError::Inject { stage, source };
    if batch.is_empty() {
        return Ok(());
    }
    let outcome = skeleton.run(batch).map_err(wrap)?;
    named.check(skeleton.pid(), &outcome).map_err(wrap)
}

/// One batch in each thread, at the same time.
fn in_threads(
    skeleton: &mut Skeleton,
    stage: Stage,
    process: &Process,
    calls: impl Fn(&Thread, &mut Batch) -> Result<Named, AttrError>,
) -> Result<(), RestoreError> {
    let wrap = |source| RestoreError::Inject { stage, source };
    let mut work = Vec::with_capacity(process.threads.len());
    let mut all = Vec::with_capacity(process.threads.len());
    for thread in &process.threads {
        let mut batch = Batch::new();
        let named = calls(thread, &mut batch).map_err(state(stage))?;
        if !batch.is_empty() {
            work.push((Tid::try_from(thread.tid).unwrap_or(0), batch));
            all.push(named);
        }
    }
    let outcomes = skeleton.run_in_threads(&work).map_err(wrap)?;
    for (((tid, _), outcome), named) in work.iter().zip(&outcomes).zip(&all) {
        named.check(*tid, outcome).map_err(wrap)?;
    }
    Ok(())
}

/// The last stage: interrupted sleeps are begun again, our code goes, the registers come back.
fn registers(skeleton: &mut Skeleton, process: &Process, elapsed: Duration) -> Result<(), RestoreError> {
    let stage = Stage::Registers;
    let wrap = |source| RestoreError::Skeleton { stage, source };
    let bad =
        |tid, step, errno| RestoreError::Inject { stage, source: InjectError::Sys { step, tid, errno } };
    let mut ready = Vec::with_capacity(process.threads.len());
    for thread in &process.threads {
        let tid = Tid::try_from(thread.tid).unwrap_or(0);
        let template = ptrace::regs(tid).map_err(|e| bad(tid, "reading registers", e))?;
        let mut r = regs::from_bytes(&thread.gpregs, &template)
            .ok_or_else(|| bad(tid, "decoding registers", Errno::EINVAL))?;
        sleep::arm(skeleton, thread, elapsed, &mut r)
            .map_err(|source| RestoreError::Inject { stage, source })?;
        ready.push((tid, r, thread));
    }
    skeleton.remove_stub().map_err(wrap)?;
    let here = attrs::extended_state().1 as usize;
    for (tid, r, thread) in ready {
        let mut xstate = padded(&thread.xstate, here);
        ptrace::set_xstate(tid, &mut xstate).map_err(|e| bad(tid, "setting extended registers", e))?;
        ptrace::set_regs(tid, &r).map_err(|e| bad(tid, "setting registers", e))?;
        ptrace::set_sigmask(tid, thread.sigmask).map_err(|e| bad(tid, "setting the signal mask", e))?;
    }
    Ok(())
}

/// Extended registers in the size that the kernel takes here. The format has fixed places, and its header
/// says which parts are there: a CPU that has more of them finds the rest in their first state.
fn padded(xstate: &[u8], here: usize) -> Vec<u8> {
    let mut bytes = xstate.to_vec();
    bytes.resize(here.max(xstate.len()), 0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::trial::Killed;

    #[test]
    fn registers_of_a_smaller_cpu_are_taken() {
        let child = Killed::sleeper();
        let tid = child.pid();
        ptrace::seize(tid, 0).unwrap();
        ptrace::interrupt(tid).unwrap();
        ptrace::wait(tid).unwrap();
        let whole = ptrace::xstate(tid).unwrap();
        // Legacy area and header, with x87 and SSE only.
        let mut small = whole[..576].to_vec();
        small[512..520].copy_from_slice(&3u64.to_ne_bytes());
        small[160..176].copy_from_slice(&[7; 16]);
        let refused = ptrace::set_xstate(tid, &mut small.clone());
        let taken = ptrace::set_xstate(tid, &mut padded(&small, whole.len()));
        let after = ptrace::xstate(tid);
        assert!(whole.len() == 576 || refused.is_err());
        assert_eq!(taken, Ok(()));
        assert_eq!(after.unwrap()[160..176], [7; 16]);
    }
}
