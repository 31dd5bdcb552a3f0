//! The first process of a simulated host: sets the namespaces up, starts programs on request, reaps.
//!
//! It speaks JSON lines: [`Request`]s on its input, [`Event`]s on its output. The end of its input is the
//! end of the host: the kernel kills whatever else is left in a PID namespace whose first process ends.

use std::io::{self, BufRead, Read, Write};
use std::os::fd::AsFd;
use std::process::{Command, Stdio};

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{sethostname, setsid};
use serde::{Deserialize, Serialize};

use crate::engine::sys::inherit::close_inherited;

/// How long the agent waits for a request before it looks for ended children.
const REAP_EVERY_MS: u16 = 10;

/// What the agent is asked to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Request {
    /// Start a program; answered by [`Event::Started`].
    Start {
        /// Program and arguments.
        argv: Vec<String>,
        /// Variables added to the environment.
        env: Vec<(String, String)>,
        /// Working directory.
        cwd: String,
        /// File that gets the standard output.
        stdout: String,
        /// File that gets the standard error.
        stderr: String,
    },
    /// Send a signal to a process of this host; answered by [`Event::Signalled`].
    Signal {
        /// The process, as numbered in the host.
        pid: i32,
        /// The number of the signal.
        signal: i32,
    },
}

/// What the agent says.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Event {
    /// The namespaces are set up; the agent's own PID as seen from outside.
    Ready(i32),
    /// The answer to [`Request::Start`]: the PID in the host, or why not.
    Started(Result<i32, String>),
    /// The answer to [`Request::Signal`].
    Signalled(Result<(), String>),
    /// A child ended, one started here or one that lost its parent.
    Exited {
        /// The process, as numbered in the host.
        pid: i32,
        /// Its exit status, if it ended by itself.
        code: Option<i32>,
        /// The signal that ended it.
        signal: Option<i32>,
    },
}

/// Runs the agent; the process must be the first of its PID namespace, with mount, UTS, IPC and network
/// namespaces of its own. `first_pid` is where the host's PIDs begin, `whole_run` whether `/run` becomes
/// a new file system (the lan) or only the private directory in it (a host).
///
/// # Errors
/// What the kernel says to the set-up; a broken pipe to the program that started it.
pub fn run(name: &str, first_pid: u32, whole_run: bool) -> io::Result<()> {
    // Read through the old /proc, which numbers processes as the outside does.
    let outer = std::fs::read_link("/proc/self")?;
    let outer = outer
        .to_str()
        .and_then(|pid| pid.parse().ok())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "/proc/self does not lead to a number"))?;
    // What the outside left open must not turn up in the programs that are moved.
    close_inherited()?;
    set_up(name, first_pid, whole_run)?;
    say(&Event::Ready(outer))?;
    serve()
}

fn set_up(name: &str, first_pid: u32, whole_run: bool) -> io::Result<()> {
    // A session of our own: without it `getsid` gives 0 for everything started here.
    if let Err(error) = setsid()
        && error != Errno::EPERM
    {
        return Err(error.into());
    }
    sethostname(name)?;
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    if whole_run {
        // No /proc of its own: the hosts made inside this mount namespace read the outer one once.
        mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), Some("mode=0755"))?;
        std::fs::create_dir(super::SHARED)?;
        std::fs::create_dir(super::PRIVATE)?;
    } else {
        mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none)?;
        mount(Some("tmpfs"), super::PRIVATE, Some("tmpfs"), MsFlags::empty(), Some("mode=0755"))?;
    }
    if first_pid > 1 {
        std::fs::write("/proc/sys/kernel/ns_last_pid", (first_pid - 1).to_string())?;
    }
    Ok(())
}

fn serve() -> io::Result<()> {
    let stdin = io::stdin();
    let mut unread = Vec::new();
    loop {
        let mut ready = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
        match poll(&mut ready, PollTimeout::from(REAP_EVERY_MS)) {
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => {
                let mut chunk = [0; 4096];
                // One read: poll promised that it does not block.
                let count = stdin.lock().read(&mut chunk)?;
                if count == 0 {
                    return Ok(());
                }
                unread.extend_from_slice(&chunk[..count]);
                while let Some(end) = unread.iter().position(|byte| *byte == b'\n') {
                    let line: Vec<u8> = unread.drain(..=end).collect();
                    answer(&line)?;
                }
            }
            Err(error) => return Err(error.into()),
        }
        reap()?;
    }
}

fn answer(line: &[u8]) -> io::Result<()> {
    match serde_json::from_slice(line)? {
        Request::Start { argv, env, cwd, stdout, stderr } => {
            let started = start(&argv, env, &cwd, &stdout, &stderr).map_err(|error| error.to_string());
            say(&Event::Started(started))
        }
        Request::Signal { pid, signal } => {
            // Also signals that have no name.
            let sent = crate::engine::sys::queue::send_to_process(pid, signal);
            say(&Event::Signalled(sent.map_err(|error| error.to_string())))
        }
    }
}

fn start(
    argv: &[String],
    env: Vec<(String, String)>,
    cwd: &str,
    stdout: &str,
    stderr: &str,
) -> io::Result<i32> {
    let [program, arguments @ ..] = argv else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "no program given"));
    };
    let child = Command::new(program)
        .args(arguments)
        .envs(env)
        .current_dir(cwd)
        .stdin(Stdio::null())
        .stdout(std::fs::File::create(stdout)?)
        .stderr(std::fs::File::create(stderr)?)
        .spawn()?;
    i32::try_from(child.id()).map_err(io::Error::other)
}

/// Reaps what has ended. The children of others come to the first process too, so "any child" is right
/// here, and only here.
fn reap() -> io::Result<()> {
    loop {
        let (pid, code, signal) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) => (pid, Some(code), None),
            Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, None, Some(signal as i32)),
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return Ok(()),
            Ok(_) | Err(Errno::EINTR) => continue,
            Err(error) => return Err(error.into()),
        };
        say(&Event::Exited { pid: pid.as_raw(), code, signal })?;
    }
}

fn say(event: &Event) -> io::Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer(&mut out, event)?;
    out.write_all(b"\n")?;
    out.flush()
}

/// Reads one event; `None` at the end.
pub(super) fn hear(from: &mut impl BufRead) -> io::Result<Option<Event>> {
    let mut line = String::new();
    if from.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    Ok(Some(serde_json::from_str(&line)?))
}
