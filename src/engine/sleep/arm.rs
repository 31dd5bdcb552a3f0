//! The destination's half: a call that was interrupted at the source is interrupted again, for real.

use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::look::{self, Target};
use crate::engine::inject::{Injector, StoppedThread, sys};
use crate::engine::regs;
use crate::engine::remote::{InjectError, Tid};
use crate::engine::skeleton::Skeleton;
use crate::engine::sys::ptrace::{self, Regs, Stop};
use crate::proto::image::Thread;

const NS: u64 = 1_000_000_000;
const NS_PER_MS: u64 = 1_000_000;
/// For a call to begin to block: it may have to wait for a page.
const PATIENCE: Duration = Duration::from_secs(10);

/// Prepares a thread to go on with the call that its final registers `r` were interrupted in, with what
/// the image says is left of its timeout less `elapsed` since the capture, and changes `r` to what it must
/// then get.
///
/// The last calls that are run in the process: a restart block is overwritten by the next call that leaves
/// one. Memory and descriptors are complete by then, for the call looks at them: it may also find that it
/// has nothing to wait for. Needs the stub.
///
/// # Errors
/// If the thread is gone or cannot be driven.
pub fn arm(
    skeleton: &mut Skeleton,
    image: &Thread,
    elapsed: Duration,
    r: &mut Regs,
) -> Result<(), InjectError> {
    let (injector, threads) = skeleton.parts();
    let tid = Tid::try_from(image.tid).unwrap_or(0);
    let thread = threads.iter_mut().find(|t| t.tid == tid).ok_or(InjectError::Gone(tid))?;
    let elapsed = i64::try_from(elapsed.as_nanos()).unwrap_or(i64::MAX);
    let remaining = match image.restart_remaining_ns {
        unknown if unknown < 0 => unknown,
        left => left.saturating_sub(elapsed).max(0),
    };
    arm_thread(injector, thread, r, remaining)
}

pub(super) fn arm_thread(
    injector: &mut Injector,
    thread: &mut StoppedThread,
    r: &mut Regs,
    remaining_ns: i64,
) -> Result<(), InjectError> {
    let Some(number) = regs::interrupted_call(r) else {
        if let Ok(left) = u64::try_from(remaining_ns) {
            regs::shorten_wait(r, left.div_ceil(NS_PER_MS));
        }
        return Ok(());
    };
    if regs::signed(r.rax) != regs::ERESTART_RESTARTBLOCK {
        return Ok(());
    }
    let mut args = [r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9];
    let remaining = u64::try_from(remaining_ns).ok().filter(|_| look::is_relative(number, &args));
    let Some(remaining) = remaining else {
        // Sleeps until an instant, or for ever, or for who knows how long: the call is made again.
        // restart_syscall itself cannot be: it ends with EINTR.
        if number != libc::SYS_restart_syscall {
            r.rax = regs::unsigned(regs::ERESTARTNOHAND);
        }
        return Ok(());
    };
    match look::timeout_kind(number) {
        Some(look::Timeout::At(arg)) => {
            let time = [remaining / NS, remaining % NS].map(u64::to_ne_bytes).concat();
            args[arg] = injector.write_scratch(&time)?;
        }
        Some(look::Timeout::Milliseconds(arg)) => {
            args[arg] = remaining.div_ceil(NS_PER_MS).min(u64::from(i32::MAX.unsigned_abs()));
        }
        None => return Ok(()),
    }
    let [a, b, c, d, ..] = args;
    if let Some(returned) = interrupted(injector, thread, number, [a, b, c, d])? {
        // It is over before it was interrupted.
        r.rax = regs::unsigned(returned);
        r.orig_rax = u64::MAX;
    }
    Ok(())
}

/// Starts a call that blocks and interrupts it there; what it returned if it did not.
fn interrupted(
    injector: &mut Injector,
    thread: &mut StoppedThread,
    number: i64,
    args: [u64; 4],
) -> Result<Option<i64>, InjectError> {
    let tid = thread.tid;
    let step = |errno| sys("interrupting a call again", tid, errno);
    let target = Target { pid: injector.pid(), tid };
    let rang_at = injector.start_one(thread, number, args)?;
    let deadline = Instant::now() + PATIENCE;
    let mut interrupted = false;
    loop {
        match ptrace::poll(tid).map_err(step)? {
            None => {}
            Some((Stop::Gone, _)) => return Err(InjectError::Gone(tid)),
            Some((Stop::Signal(_), _)) if ptrace::regs(tid).map_err(step)?.rip == rang_at => {
                let returned = regs::signed(ptrace::regs(tid).map_err(step)?.rbx);
                if interrupted {
                    // Our interrupt is still on its way: it is met before any instruction.
                    ptrace::cont(tid, 0).map_err(step)?;
                    ptrace::wait(tid).map_err(step)?;
                }
                return Ok(Some(returned));
            }
            Some((Stop::Event(_), _)) => {
                let now = ptrace::regs(tid).map_err(step)?;
                if regs::interrupted_call(&now) == Some(number)
                    && regs::signed(now.rax) == regs::ERESTART_RESTARTBLOCK
                {
                    return Ok(None);
                }
                // It had not begun to wait, or was just through.
                interrupted = false;
                ptrace::cont(tid, 0).map_err(step)?;
            }
            Some((Stop::Signal(_), _)) => ptrace::cont(tid, 0).map_err(step)?,
            Some((Stop::Call | Stop::Other(_), status)) => {
                return Err(InjectError::UnexpectedStop { tid, status });
            }
        }
        if !interrupted && target.blocked().is_some_and(|b| b.number == number) {
            ptrace::interrupt(tid).map_err(step)?;
            interrupted = true;
        }
        if Instant::now() > deadline {
            return Err(step(Errno::ETIMEDOUT));
        }
        std::thread::yield_now();
    }
}
