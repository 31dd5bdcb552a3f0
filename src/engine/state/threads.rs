//! What belongs to each thread besides registers, mask and credentials: name, alternate stack, the
//! addresses it has told the kernel (clear_child_tid, robust list, rseq), personality, timer slack, the
//! signal for its parent's death.

use nix::errno::Errno;

use super::calls::{AttrError, Named, failed, read, u32_of, words};
use crate::engine::reason::Reason;
use crate::engine::remote::{Arg, Batch, Outcome, Tid};
use crate::engine::sys::attrs;
use crate::proto::image::Thread;

const PR_GET_TID_ADDRESS: u64 = 40;
/// `ss_flags`: the thread runs on the alternate stack now; there is none.
const SS_ONSTACK: u32 = 1;
const SS_DISABLE: u32 = 2;
/// Bytes of `stack_t`: address, flags, padding, size.
const STACK_T_BYTES: usize = 24;
const PERSONALITY_QUERY: u64 = 0xffff_ffff;
const PR_TSC_ENABLE: u32 = 1;
const MPOL_DEFAULT: u32 = 0;

/// The question for what only a thread itself can tell.
#[derive(Debug)]
pub struct ThreadProbe {
    tid: Tid,
    calls: Named,
    stack: Arg,
    child_tid: Arg,
    parent_death: Arg,
    slack: usize,
    personality: usize,
    securebits: usize,
    tsc: Arg,
    machine_checks: usize,
    policy_call: usize,
    policy: Arg,
}

/// What [`ThreadProbe`] found out.
#[derive(Debug)]
pub struct ThreadAttrs {
    /// Everything but registers, mask, pending signals and scheduling.
    pub thread: Thread,
    /// As personality(2) has it; must be the same in all threads.
    pub personality: u32,
    /// Must be the same in all threads.
    pub securebits: u32,
}

impl ThreadProbe {
    /// Adds it to a batch that this thread will run.
    pub fn ask(tid: Tid, batch: &mut Batch) -> Self {
        let mut calls = Named::new();
        let c = &mut calls;
        let prctl = libc::SYS_prctl;
        let stack = batch.output(STACK_T_BYTES);
        c.add(batch, "reading the alternate stack", libc::SYS_sigaltstack, &[0u64.into(), stack]);
        let child_tid = batch.output(8);
        c.add(batch, "reading clear_child_tid", prctl, &[PR_GET_TID_ADDRESS.into(), child_tid]);
        let parent_death = batch.output(4);
        let args = [libc::PR_GET_PDEATHSIG.into(), parent_death];
        c.add(batch, "reading the signal for the parent's death", prctl, &args);
        let slack = c.add(batch, "reading the timer slack", prctl, &[libc::PR_GET_TIMERSLACK.into()]);
        let number = libc::SYS_personality;
        let personality = c.add(batch, "reading the personality", number, &[PERSONALITY_QUERY.into()]);
        let securebits = c.add(batch, "reading securebits", prctl, &[libc::PR_GET_SECUREBITS.into()]);
        let tsc = batch.output(4);
        c.add(batch, "reading the TSC switch", prctl, &[libc::PR_GET_TSC.into(), tsc]);
        // Not on every machine.
        let machine_checks = batch.call(prctl, &[libc::PR_MCE_KILL_GET.into()]);
        // A kernel without NUMA has no such call.
        let policy = batch.output(4);
        let args = [policy, 0u64.into(), 0u64.into(), 0u64.into(), 0u64.into()];
        let policy_call = batch.call(libc::SYS_get_mempolicy, &args);
        Self {
            tid,
            calls,
            stack,
            child_tid,
            parent_death,
            slack,
            personality,
            securebits,
            tsc,
            machine_checks,
            policy_call,
            policy,
        }
    }

    /// The attributes of this stopped thread of `pid`, which the caller traces.
    ///
    /// # Errors
    /// If a call failed, and for what cannot be carried.
    pub fn read(&self, pid: Tid, outcome: &Outcome) -> Result<ThreadAttrs, AttrError> {
        let tid = self.tid;
        self.calls.check(tid, outcome)?;
        let mut reasons = Vec::new();
        let mut refuse = |why| reasons.push(Reason::new(format!("thread {tid}"), why, ""));
        if u32_of(outcome.data(self.tsc, 4)) != PR_TSC_ENABLE {
            refuse("may not read the time stamp counter (PR_SET_TSC), which cannot be carried");
        }
        let default = libc::PR_MCE_KILL_DEFAULT.unsigned_abs();
        if outcome.ret(self.machine_checks).is_ok_and(|policy| policy != u64::from(default)) {
            refuse("has a policy for memory failures (PR_MCE_KILL), which cannot be carried");
        }
        if outcome.ret(self.policy_call).is_ok() && u32_of(outcome.data(self.policy, 4)) != MPOL_DEFAULT {
            refuse("has a NUMA memory policy (set_mempolicy), which cannot be carried");
        }
        if attrs::traced_dispatches_calls(tid).map_err(failed("reading the system call dispatch", tid))? {
            refuse("handles its own system calls (syscall user dispatch), which cannot be carried");
        }
        if u32_of(outcome.data(self.parent_death, 4)) != 0 {
            // At the destination the parent is the service, or a thread of it that soon ends.
            refuse("is to be told when its parent dies (PR_SET_PDEATHSIG), and its parent does not move");
        }
        if !reasons.is_empty() {
            return Err(AttrError::Refused(reasons));
        }
        let rseq = match attrs::traced_rseq(tid) {
            Ok(rseq) => rseq,
            // A kernel without rseq.
            Err(Errno::EIO | Errno::EINVAL) => attrs::RseqConfig::default(),
            Err(errno) => return Err(failed("reading the rseq area", tid)(errno)),
        };
        let (robust_list, robust_list_len) =
            attrs::robust_list(tid).map_err(failed("reading the robust list", tid))?;
        let mut comm = read(format!("/proc/{pid}/task/{tid}/comm"))?;
        comm.pop_if(|last| *last == b'\n');
        let stack = words(outcome.data(self.stack, STACK_T_BYTES));
        let number = |index| outcome.ret(index).unwrap_or(0);
        let thread = Thread {
            tid: tid.unsigned_abs(),
            altstack_sp: stack.first().copied().unwrap_or(0),
            altstack_flags: u32_of(outcome.data(self.stack, STACK_T_BYTES).get(8..).unwrap_or_default()),
            altstack_size: stack.get(2).copied().unwrap_or(0),
            clear_child_tid: words(outcome.data(self.child_tid, 8)).first().copied().unwrap_or(0),
            robust_list,
            robust_list_len,
            rseq_area: rseq.area,
            rseq_len: rseq.len,
            rseq_signature: rseq.signature,
            comm,
            pdeath_signal: u32_of(outcome.data(self.parent_death, 4)),
            timer_slack_ns: number(self.slack),
            ..Thread::default()
        };
        let small = |index| u32::try_from(number(index)).unwrap_or(u32::MAX);
        Ok(ThreadAttrs { thread, personality: small(self.personality), securebits: small(self.securebits) })
    }
}

/// What the thread must set itself, before its credentials. Its memory must be there: registering rseq
/// writes to its area.
pub fn restore_calls(thread: &Thread, personality: u32, batch: &mut Batch) -> Named {
    let mut calls = Named::new();
    let c = &mut calls;
    let prctl = libc::SYS_prctl;
    let name = batch.input_c_string(&thread.comm);
    c.add(batch, "naming a thread", prctl, &[libc::PR_SET_NAME.into(), name]);
    let number = libc::SYS_personality;
    // Returns the one of before.
    batch.call(number, &[personality.into()]);
    let args = [PERSONALITY_QUERY.into()];
    c.expect(batch, "setting the personality", (number, &args), u64::from(personality));
    let args = [thread.clear_child_tid.into()];
    c.add(batch, "setting clear_child_tid", libc::SYS_set_tid_address, &args);
    if thread.robust_list != 0 {
        let args = [thread.robust_list.into(), thread.robust_list_len.into()];
        c.add(batch, "setting the robust list", libc::SYS_set_robust_list, &args);
    }
    if thread.altstack_flags & SS_DISABLE == 0 && thread.altstack_size != 0 {
        // That a thread runs on it is seen by its stack pointer, not set.
        let flags = u64::from(thread.altstack_flags & !SS_ONSTACK);
        let words = [thread.altstack_sp, flags, thread.altstack_size];
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        let stack = batch.input(&bytes);
        c.add(batch, "setting the alternate stack", libc::SYS_sigaltstack, &[stack, 0u64.into()]);
    }
    let args = [libc::PR_SET_TIMERSLACK.into(), thread.timer_slack_ns.into()];
    // A real-time thread has none, and asking for none means the usual.
    if thread.timer_slack_ns != 0 {
        c.add(batch, "setting the timer slack", prctl, &args);
    }
    if thread.rseq_area != 0 {
        let args =
            [thread.rseq_area.into(), thread.rseq_len.into(), 0u64.into(), thread.rseq_signature.into()];
        c.add(batch, "registering the rseq area", libc::SYS_rseq, &args);
    }
    calls
}

/// What the thread must set after its credentials, whose change resets it.
pub fn finish_calls(thread: &Thread, batch: &mut Batch) -> Named {
    let mut calls = Named::new();
    let args = [libc::PR_SET_PDEATHSIG.into(), thread.pdeath_signal.into()];
    calls.add(batch, "setting the signal for the parent's death", libc::SYS_prctl, &args);
    calls
}

/// Where a stopped thread must go on that was stopped inside a restartable sequence: the kernel would
/// have sent it to the sequence's abort handler, but the first injected call makes it forget. `area` is
/// the address of its `struct rseq` (0: none) and `read` reads its memory. The pointer at `area + 8`
/// must then be set to zero, as the kernel does.
pub fn rseq_abort(area: u64, rip: u64, read: impl Fn(u64, &mut [u8]) -> bool) -> Option<u64> {
    /// Where `struct rseq` points to the sequence that is under way.
    const RSEQ_CS: u64 = 8;
    let mut pointer = [0u8; 8];
    if area == 0 || !read(area.checked_add(RSEQ_CS)?, &mut pointer) {
        return None;
    }
    let sequence = u64::from_ne_bytes(pointer);
    // struct rseq_cs: version and flags, start, length, abort handler.
    let mut fields = [0u8; 32];
    if sequence == 0 || !read(sequence, &mut fields) {
        return None;
    }
    let [_, start, len, abort] = words(&fields)[..] else { return None };
    (rip.wrapping_sub(start) < len).then_some(abort)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sequence_is_aborted_only_inside() {
        let read = |at: u64, into: &mut [u8]| {
            let words: &[u64] = match at {
                0x108 => &[0x200],
                0x308 => &[0],
                0x200 => &[0, 0x1000, 0x20, 0x5000],
                _ => return false,
            };
            for (chunk, word) in into.chunks_exact_mut(8).zip(words) {
                chunk.copy_from_slice(&word.to_ne_bytes());
            }
            true
        };
        assert_eq!(rseq_abort(0x100, 0x1000, read), Some(0x5000));
        assert_eq!(rseq_abort(0x100, 0x101f, read), Some(0x5000));
        assert_eq!(rseq_abort(0x100, 0x1020, read), None);
        assert_eq!(rseq_abort(0x100, 0xfff, read), None);
        assert_eq!(rseq_abort(0x300, 0x1000, read), None);
        assert_eq!(rseq_abort(0, 0x1000, read), None);
        assert_eq!(rseq_abort(0x900, 0x1000, read), None);
        assert_eq!(rseq_abort(u64::MAX, 0x1000, read), None);
    }
}
