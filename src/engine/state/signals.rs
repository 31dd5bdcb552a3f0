//! Signal dispositions and pending signals. Masks go with the registers, alternate stacks with `threads`.

use super::calls::{AttrError, Named, failed, words};
use super::timers::restore::Timers;
use crate::engine::reason::Reason;
use crate::engine::remote::{Arg, Batch, InjectError, Outcome, RemoteCalls, Tid};
use crate::engine::sys::attrs::{SIGINFO_BYTES, traced_pending};
use crate::proto::image::{Process, SigAction};

/// Highest signal number.
const SIGNALS: i32 = 64;
/// Bytes of a kernel sigset.
const SIGSET_BYTES: u64 = 8;
/// Bytes of the kernel's `struct sigaction`: handler, flags, restorer, mask.
const ACTION_BYTES: usize = 32;
/// Most queued signals of one queue that are carried.
pub const MAX_PENDING: usize = 16 * 1024;
/// Queued signals that are sent to the process by one batch.
const PENDING_PER_BATCH: usize = 512;

/// Signals whose disposition nobody can change.
fn fixed(signal: i32) -> bool {
    signal == libc::SIGKILL || signal == libc::SIGSTOP
}

/// The question for all dispositions.
#[derive(Debug)]
pub struct ActionsProbe {
    calls: Named,
    answers: Vec<(i32, Arg)>,
}

impl ActionsProbe {
    /// Adds it to a batch that any thread of the process may run.
    pub fn ask(batch: &mut Batch) -> Self {
        let mut calls = Named::new();
        let mut answers = Vec::new();
        for signal in (1..=SIGNALS).filter(|s| !fixed(*s)) {
            let into = batch.output(ACTION_BYTES);
            let args = [signal.into(), 0u64.into(), into, SIGSET_BYTES.into()];
            calls.add(batch, "reading a signal disposition", libc::SYS_rt_sigaction, &args);
            answers.push((signal, into));
        }
        Self { calls, answers }
    }

    /// Those that are not the default.
    ///
    /// # Errors
    /// If a call failed.
    pub fn read(&self, pid: Tid, outcome: &Outcome) -> Result<Vec<SigAction>, InjectError> {
        self.calls.check(pid, outcome)?;
        let mut actions = Vec::new();
        for &(signal, at) in &self.answers {
            let [handler, flags, restorer, mask] = words(outcome.data(at, ACTION_BYTES))[..] else {
                continue;
            };
            if [handler, flags, restorer, mask] != [0; 4] {
                actions.push(SigAction { signo: signal.unsigned_abs(), handler, flags, restorer, mask });
            }
        }
        Ok(actions)
    }
}

/// Sets all dispositions, those that are not named to the default: a new process inherits ignored ones.
///
/// # Errors
/// If `actions` names a signal that does not exist or cannot be changed.
pub fn restore_actions(actions: &[SigAction], batch: &mut Batch) -> Result<Named, AttrError> {
    let invalid =
        |a: &&SigAction| i32::try_from(a.signo).map_or(true, |s| !(1..=SIGNALS).contains(&s) || fixed(s));
    if let Some(action) = actions.iter().find(invalid) {
        let object = format!("disposition of signal {}", action.signo);
        return Err(AttrError::Refused(vec![Reason::new(object, "is not one that a process can set", "")]));
    }
    let mut calls = Named::new();
    for signal in (1..=SIGNALS).filter(|s| !fixed(*s)) {
        let action = actions.iter().find(|a| a.signo == signal.unsigned_abs());
        let fields = action.map_or([0; 4], |a| [a.handler, a.flags, a.restorer, a.mask]);
        let bytes: Vec<u8> = fields.iter().flat_map(|w: &u64| w.to_ne_bytes()).collect();
        let from = batch.input(&bytes);
        let args = [signal.into(), from, 0u64.into(), SIGSET_BYTES.into()];
        calls.add(batch, "setting a signal disposition", libc::SYS_rt_sigaction, &args);
    }
    Ok(calls)
}

/// The queued signals of a stopped thread, or (`shared`) those of its process, in order. `bits` is the
/// matching line of its status: a signal for which the kernel had no memory is there without an entry.
///
/// # Errors
/// If the kernel does not tell, and for a queue longer than [`MAX_PENDING`].
pub fn capture_pending(tid: Tid, shared: bool, bits: u64) -> Result<Vec<Vec<u8>>, AttrError> {
    let mut all: Vec<Vec<u8>> = Vec::new();
    if bits == 0 {
        return Ok(all);
    }
    loop {
        let some = traced_pending(tid, shared, all.len() as u64, 64)
            .map_err(failed("reading the pending signals", tid))?;
        if some.is_empty() {
            break;
        }
        all.extend(some);
        if all.len() > MAX_PENDING {
            let why = format!("has more than {MAX_PENDING} signals pending");
            return Err(AttrError::Refused(vec![Reason::new(format!("thread {tid}"), why, "")]));
        }
    }
    let queued = all.iter().filter_map(|i| signal_of(i)).fold(0, |set, s| set | bit(s));
    for signal in (1..=SIGNALS).filter(|s| bits & !queued & bit(*s) != 0) {
        // What the kernel itself makes up for such a signal when it is taken: SI_USER from nobody.
        let mut info = vec![0u8; SIGINFO_BYTES];
        info[..4].copy_from_slice(&signal.to_ne_bytes());
        all.push(info);
    }
    Ok(all)
}

/// The sets of a process that decide which signal can be its doorbell: caught, and pending anywhere.
pub fn caught_and_pending(process: &Process) -> (u64, u64) {
    let caught = process.actions.iter().filter(|a| a.handler > 1);
    let caught = caught.filter_map(|a| i32::try_from(a.signo).ok()).fold(0, |set, s| set | bit(s));
    let private = process.threads.iter().flat_map(|t| &t.pending);
    let pending = process.pending.iter().chain(private).filter_map(|i| signal_of(i));
    (caught, pending.fold(0, |set, s| set | bit(s)))
}

/// All queued signals, of the process and of its threads.
pub fn all_pending(process: &Process) -> Vec<Vec<u8>> {
    process.pending.iter().chain(process.threads.iter().flat_map(|t| &t.pending)).cloned().collect()
}

/// Takes SIGSTOP out of the queues, where only our own hold keeps it from stopping the process; whether the
/// process is to be stopped. `held` tells of a stop that took effect already. The kernel lets a stop take
/// SIGCONT out of the queues: one that is there has come after every stop, and has ended it.
pub fn take_stop(process: &mut Process, held: bool) -> bool {
    let (_, pending) = caught_and_pending(process);
    let is_stop = |info: &Vec<u8>| signal_of(info) == Some(libc::SIGSTOP);
    process.pending.retain(|info| !is_stop(info));
    for thread in &mut process.threads {
        thread.pending.retain(|info| !is_stop(info));
    }
    (held || pending & bit(libc::SIGSTOP) != 0) && pending & bit(libc::SIGCONT) == 0
}

fn bit(signal: i32) -> u64 {
    1u64.checked_shl(signal.unsigned_abs().wrapping_sub(1)).unwrap_or(0)
}

/// The signal of a `siginfo_t`, if it is one that can be sent.
pub fn signal_of(info: &[u8]) -> Option<i32> {
    if info.len() != SIGINFO_BYTES {
        return None;
    }
    let signal = info.first_chunk().map(|c| i32::from_ne_bytes(*c))?;
    ((1..=SIGNALS).contains(&signal) && signal != libc::SIGKILL).then_some(signal)
}

/// Queues the pending signals again. Each thread sends its own to itself, and the leader those of the
/// process: only then may a signal say that it came from the kernel or from kill(2). Those of POSIX timers are
/// queued by their timer. They are blocked while injected calls run; the doorbell must be none of them (see
/// [`caught_and_pending`]).
///
/// # Errors
/// If an entry is not a signal, or the queue has no room for it (RLIMIT_SIGPENDING).
pub fn restore_pending(
    process: &mut dyn RemoteCalls,
    image: &Process,
    timers: &mut Timers<'_>,
) -> Result<(), AttrError> {
    let of_threads = image.threads.iter().map(|t| (Tid::try_from(t.tid).ok(), &t.pending));
    for (thread, queue) in std::iter::once((None, &image.pending)).chain(of_threads) {
        let mut rest = &queue[..];
        while !rest.is_empty() {
            let plain = rest.iter().take_while(|info| timers.whose(info).is_none());
            let (now, later) = rest.split_at(plain.take(PENDING_PER_BATCH).count());
            send(process, thread, now)?;
            rest = later;
            if let Some((timer, later)) = rest.split_first().and_then(|(i, l)| Some((timers.whose(i)?, l))) {
                timers.fire(process, timer)?;
                rest = later;
            }
        }
    }
    Ok(())
}

/// The process, or this thread of it, sends itself signals.
fn send(process: &mut dyn RemoteCalls, thread: Option<Tid>, infos: &[Vec<u8>]) -> Result<(), AttrError> {
    if infos.is_empty() {
        return Ok(());
    }
    let pid = process.pid();
    let (mut batch, mut calls) = (Batch::new(), Named::new());
    for info in infos {
        let (signal, info) = valid(info, &mut batch)?;
        match thread {
            None => {
                let args = [pid.into(), signal.into(), info];
                calls.add(&mut batch, "queueing a pending signal", libc::SYS_rt_sigqueueinfo, &args);
            }
            Some(tid) => {
                let args = [pid.into(), tid.into(), signal.into(), info];
                calls.add(&mut batch, "queueing a thread's signal", libc::SYS_rt_tgsigqueueinfo, &args);
            }
        }
    }
    match thread {
        None => calls.check(pid, &process.run(&batch)?)?,
        Some(tid) => {
            let outcomes = process.run_in_threads(&[(tid, batch)])?;
            calls.check(tid, outcomes.first().unwrap_or(&Outcome::default()))?;
        }
    }
    Ok(())
}

fn valid(info: &[u8], batch: &mut Batch) -> Result<(i32, Arg), AttrError> {
    match signal_of(info) {
        Some(signal) => Ok((signal, batch.input(info))),
        None => Err(AttrError::Refused(vec![Reason::new("a pending signal", "is not a valid one", "")])),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pending_stop_stops_and_is_not_queued() {
        let info = |signal: i32| {
            let mut info = vec![0; SIGINFO_BYTES];
            info[..4].copy_from_slice(&signal.to_ne_bytes());
            info
        };
        let with = |signals: &[i32]| Process {
            pending: signals.iter().map(|s| info(*s)).collect(),
            ..Process::default()
        };
        let mut process = with(&[libc::SIGUSR1, libc::SIGSTOP]);
        assert!(take_stop(&mut process, false));
        assert_eq!(process.pending, [info(libc::SIGUSR1)]);
        assert!(!take_stop(&mut process, false) && take_stop(&mut process, true));
        assert!(!take_stop(&mut with(&[libc::SIGCONT]), true));
    }

    #[test]
    fn invalid_entries_are_refused() {
        for signo in [0, 9, 19, 65, u32::MAX] {
            let action = SigAction { signo, ..SigAction::default() };
            assert!(matches!(restore_actions(&[action], &mut Batch::new()), Err(AttrError::Refused(_))));
        }
        assert_eq!(signal_of(&[1; 8]), None);
        let mut info = vec![0; SIGINFO_BYTES];
        assert_eq!(signal_of(&info), None);
        info[0] = 9;
        assert_eq!(signal_of(&info), None);
        info[0] = 64;
        assert_eq!(signal_of(&info), Some(64));
        let image = Process { pending: vec![info], ..Process::default() };
        assert_eq!(caught_and_pending(&image), (0, 1 << 63));
    }
}
