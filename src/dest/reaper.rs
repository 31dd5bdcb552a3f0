//! Processes that were moved here are our children: somebody has to take their exit status.

use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

/// Waits for the process in a small thread of its own, until it ends or moves on.
pub(super) fn adopt(pid: u32) {
    const STACK_BYTES: usize = 64 * 1024;
    let Ok(raw) = i32::try_from(pid) else { return };
    let wait = move || {
        let status = waitpid(Pid::from_raw(raw), Some(WaitPidFlag::__WALL));
        tracing::info!(pid, ?status, "a process that was moved here has ended");
    };
    let thread = std::thread::Builder::new().name(format!("reap-{pid}")).stack_size(STACK_BYTES).spawn(wait);
    if let Err(error) = thread {
        tracing::error!(pid, %error, "its exit status will not be taken");
    }
}
