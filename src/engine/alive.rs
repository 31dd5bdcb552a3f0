//! Whether a process named in a journal still exists, and is still the same one.

use std::io;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::PollTimeout;
use nix::unistd::Pid;

use crate::engine::procfs;
use crate::engine::sys::pidfd::PidFd;
use crate::engine::sys::seize;

/// A dying tracer lets go of its tracees within milliseconds; a living one is another matter.
const TRACER_PATIENCE: Duration = Duration::from_secs(5);
/// How much of a `/proc` file of one process we read.
const MAX_PROC_BYTES: usize = 64 * 1024;

/// Why we cannot tell.
#[derive(Debug, thiserror::Error)]
pub enum AliveError {
    /// A system call failed.
    #[error("{step} of process {pid}")]
    Sys {
        /// What was being done.
        step: &'static str,
        /// The process.
        pid: u32,
        /// The kernel's answer.
        #[source]
        errno: Errno,
    },
    /// A file of `/proc` cannot be read.
    #[error("reading /proc/{pid}/{file}")]
    Proc {
        /// The process.
        pid: u32,
        /// Which file.
        file: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Somebody is still tracing it.
    #[error("process {pid} is still traced by process {tracer}")]
    Traced {
        /// The process.
        pid: u32,
        /// Its tracer.
        tracer: u32,
    },
}

/// When process `pid` started, in clock ticks since boot; `None` if there is none or it is a zombie.
///
/// # Errors
/// If `/proc` cannot be read.
pub fn start_ticks(pid: u32) -> Result<Option<u64>, AliveError> {
    let Some(stat) = proc_file(pid, "stat")? else { return Ok(None) };
    Ok(parse_stat(&stat).filter(|(state, _)| !matches!(state, 'Z' | 'X')).map(|(_, start)| start))
}

/// Opens the process with this number and start time; `None` if it is gone (or a zombie).
///
/// # Errors
/// If the kernel cannot be asked.
pub fn open(pid: u32, start: u64) -> Result<Option<PidFd>, AliveError> {
    let fd = match PidFd::open(pid) {
        Ok(fd) => fd,
        Err(Errno::ESRCH) => return Ok(None),
        Err(errno) => return Err(AliveError::Sys { step: "opening a descriptor", pid, errno }),
    };
    // Read after the descriptor was made: if the number was reused in between, the start time differs.
    Ok((start_ticks(pid)? == Some(start)).then_some(fd))
}

/// Like [`open`], for a process whose tracer has died: `None` also if it is dying with its tracer.
///
/// The kernel closes a dying service's files and sockets before it kills the tracees that are bound to it,
/// so a new service can be there before the old one's skeletons are dead. This waits until the old tracer
/// has let go, then makes the process stop once: a process that is being killed cannot.
///
/// # Errors
/// If the kernel cannot be asked, or somebody goes on tracing the process.
pub fn open_untraced(pid: u32, start: u64) -> Result<Option<PidFd>, AliveError> {
    let sys = |step| move |errno| AliveError::Sys { step, pid, errno };
    let Some(fd) = open(pid, start)? else { return Ok(None) };
    let ending = PollTimeout::try_from(TRACER_PATIENCE).unwrap_or(PollTimeout::MAX);
    let patience = Instant::now() + TRACER_PATIENCE;
    loop {
        let Some(status) = proc_file(pid, "status")? else { return Ok(None) };
        match tracer(&status) {
            0 => break,
            tracer if Instant::now() >= patience => return Err(AliveError::Traced { pid, tracer }),
            _ => {}
        }
        if fd.ended(PollTimeout::from(1u8)).map_err(sys("waiting for the end"))? {
            return Ok(None);
        }
    }
    let number = i32::try_from(pid).map_err(|_| Errno::ESRCH);
    match number.and_then(|pid| seize::stops(Pid::from_raw(pid))) {
        Ok(stops) => Ok(stops.then_some(fd)),
        // So it is when somebody else traces the process, but also when it is half-way gone.
        Err(Errno::EPERM) if fd.ended(ending).map_err(sys("waiting for the end"))? => Ok(None),
        Err(errno) => Err(sys("stopping the leader")(errno)),
    }
}

/// A file of a process; `None` if the process is gone.
fn proc_file(pid: u32, file: &'static str) -> Result<Option<String>, AliveError> {
    match procfs::read(format!("/proc/{pid}/{file}")) {
        Ok(mut bytes) => {
            bytes.truncate(MAX_PROC_BYTES);
            Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH) => Ok(None),
        Err(source) => Err(AliveError::Proc { pid, file, source }),
    }
}

/// State and start time. The name in parentheses may contain anything, so fields count from its end.
fn parse_stat(stat: &str) -> Option<(char, u64)> {
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    let start = fields.nth(18)?.parse().ok()?;
    Some((state, start))
}

fn tracer(status: &str) -> u32 {
    let line = status.lines().find_map(|line| line.strip_prefix("TracerPid:"));
    line.and_then(|number| number.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use nix::sys::signal::Signal;

    use super::*;
    use crate::engine::trial::{Killed, until};

    #[test]
    fn a_name_cannot_forge_the_start_time() {
        let rest = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20";
        assert_eq!(parse_stat(&format!("7 (a) b) {rest}")), Some(('S', 4242)));
        assert_eq!(parse_stat("7 (a"), None);
        assert_eq!(parse_stat("7 (a) S 1 2"), None);
    }

    #[test]
    fn alive_then_stopped_then_dead() {
        let mut child = Killed::sleeper();
        let start = start_ticks(child.id()).unwrap().unwrap();
        assert!(open(child.id(), start + 1).unwrap().is_none(), "another process with this number");
        let fd = open_untraced(child.id(), start).unwrap().unwrap();

        fd.signal(Signal::SIGSTOP).unwrap();
        let stat =
            || parse_stat(&std::fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap()).unwrap().0;
        until("its stop", || stat() == 'T');
        assert!(open_untraced(child.id(), start).unwrap().is_some());
        // Let go of, it wakes up in the kernel and goes back to its stop.
        until("its stop", || stat() == 'T');

        fd.signal(Signal::SIGKILL).unwrap();
        assert!(fd.ended(PollTimeout::NONE).unwrap());
        assert!(open(child.id(), start).unwrap().is_none(), "a zombie counts as dead");
        assert!(open_untraced(child.id(), start).unwrap().is_none());
        let _ = child.wait(); // the look above may have reaped it: here its tracer is its parent
        assert_eq!(fd.signal(Signal::SIGKILL), Err(Errno::ESRCH));
    }

    #[test]
    fn a_process_that_is_being_killed_is_not_alive() {
        // Asked at once after the signal, the process may look alive in /proc in every way.
        for _ in 0..200 {
            let mut child = Killed::sleeper();
            let start = start_ticks(child.id()).unwrap().unwrap();
            let fd = open(child.id(), start).unwrap().unwrap();
            fd.signal(Signal::SIGKILL).unwrap();
            assert!(open_untraced(child.id(), start).unwrap().is_none());
            let _ = child.wait();
        }
    }
}
