//! What tests of several rooms need: conditions with a deadline, and children that end with their test.

use std::ops::{Deref, DerefMut};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::freeze::thread_ids;
use super::procfs;
use super::remote::Tid;
use super::sys::{perf, ptrace};

/// How long what must happen may take, also on a busy host.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until something is so.
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < end, "{what} does not happen");
        std::thread::yield_now();
    }
}

/// The state of a thread, as /proc has it.
pub fn state_of(pid: Tid, tid: Tid) -> Option<u8> {
    let stat = std::fs::read(format!("/proc/{pid}/task/{tid}/stat")).ok()?;
    Some(procfs::parse_stat(&stat).ok()?.state)
}

/// `spawn` returns when the new program is being started; it sleeps (clock_nanosleep) when it has loaded its libraries.
pub fn until_asleep(pid: u32) {
    let call = || std::fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap_or_default();
    until("the sleep of the child", || call().starts_with("230 "));
}

/// The calls of a kind that this thread makes, and those that it starts, in `work`.
pub fn counted<T>(call: &str, work: impl FnOnce() -> T) -> (u64, T) {
    let files = perf::trace_files().unwrap();
    let event = perf::trace_event(files.as_fd(), &format!("syscalls/sys_exit_{call}")).unwrap();
    let counter = perf::count(nix::unistd::gettid().as_raw(), event).unwrap();
    let done = work();
    (perf::counted(counter.as_fd()).unwrap(), done)
}

/// A child that is killed and reaped with its test, also if that panics.
#[derive(Debug)]
pub struct Killed(Child);

impl Killed {
    /// Starts it.
    pub fn spawn(command: &mut Command) -> Self {
        Self(command.spawn().unwrap())
    }

    /// A program that sleeps, and holds nothing open that is the test's.
    pub fn sleeper() -> Self {
        let mut command = Command::new("sleep");
        let quiet = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Self::spawn(quiet.arg("1000"))
    }

    /// As the kernel numbers it.
    pub fn pid(&self) -> Tid {
        Tid::try_from(self.0.id()).unwrap()
    }
}

impl Deref for Killed {
    type Target = Child;
    fn deref(&self) -> &Child {
        &self.0
    }
}

impl DerefMut for Killed {
    fn deref_mut(&mut self) -> &mut Child {
        &mut self.0
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        end(&mut self.0);
    }
}

/// Kills a child and reaps it. If this process still traces threads of it, each of them is left as a zombie until
/// somebody waits for it, and the leader's end is told after the last: whoever only waited for that would wait for ever.
pub fn end(child: &mut Child) {
    let _ = child.kill();
    let Ok(pid) = Tid::try_from(child.id()) else { return };
    let latest = Instant::now() + PATIENCE;
    while matches!(child.try_wait(), Ok(None)) && Instant::now() < latest {
        for tid in thread_ids(pid).unwrap_or_default() {
            if tid != pid && state_of(pid, tid) == Some(b'Z') {
                let _ = ptrace::poll(tid);
            }
        }
        std::thread::yield_now();
    }
}

/// Another process than a child, likewise killed.
#[derive(Debug)]
pub struct KilledPid(pub Tid);

impl Drop for KilledPid {
    fn drop(&mut self) {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.0), nix::sys::signal::Signal::SIGKILL);
    }
}

#[test]
fn a_child_is_reaped_although_we_trace_a_thread_of_it() {
    use std::io::Read;
    let code = "import signal, threading; threading.Thread(target=signal.pause, daemon=True).start()
print(end='.', flush=True); signal.pause()";
    let mut child = Killed::spawn(Command::new("python3").args(["-c", code]).stdout(Stdio::piped()));
    child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    let pid = child.pid();
    let other = thread_ids(pid).unwrap().into_iter().find(|tid| *tid != pid).unwrap();
    ptrace::seize(other, 0).unwrap();
    drop(child);
    assert_eq!(state_of(pid, pid), None);
}
