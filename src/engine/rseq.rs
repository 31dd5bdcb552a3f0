//! Takes stopped threads out of restartable sequences, as a preemption would have.
//!
//! A thread in the middle of one must go on at the sequence's abort handler. The kernel sees to that when
//! the thread returns to its own code, but the first injected call makes the kernel forget the sequence,
//! and the registers that injection puts back are in its middle.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::inject::{StoppedThread, io, sys};
use super::remote::InjectError;
use super::state::threads;
use super::sys::{attrs, ptrace};

/// Where `struct rseq` points to the sequence that is under way.
const RSEQ_CS: u64 = 8;

/// Sends a thread to the abort handler of the sequence that it was stopped in, if it was in one. `mem` is
/// the memory of its process.
pub(super) fn leave_section(thread: &mut StoppedThread, mem: &File) -> Result<(), InjectError> {
    let tid = thread.tid;
    // A kernel without rseq.
    let Ok(rseq) = attrs::traced_rseq(tid) else { return Ok(()) };
    let read = |at: u64, into: &mut [u8]| mem.read_exact_at(into, at).is_ok();
    let Some(abort) = threads::rseq_abort(rseq.area, thread.regs.rip, read) else { return Ok(()) };
    thread.regs.rip = abort;
    // There are no system calls in a sequence: nothing may be restarted at the new place.
    thread.regs.orig_rax = u64::MAX;
    // In the thread itself too: one that runs no injected calls is let go with the registers it has. And
    // before the pointer goes: if we die in between, the kernel finds the thread outside the sequence.
    ptrace::set_regs(tid, &thread.regs).map_err(|e| sys("leaving a restartable sequence", tid, e))?;
    mem.write_all_at(&[0; 8], rseq.area + RSEQ_CS).map_err(|e| io("clearing rseq_cs", tid, &e))
}
