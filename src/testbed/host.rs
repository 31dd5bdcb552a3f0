//! One simulated host: its agent, the programs started in it, and its files and `/proc` seen from outside.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io::{BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::agent::{Event, Request, hear};
use super::{Result, TestbedError, step, wait_for};

/// How long an agent may take for an answer.
const ANSWER: Duration = Duration::from_secs(10);

/// How a child of the host's agent ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// Its exit status, if it ended by itself.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
}

/// A program started in a host.
#[derive(Debug, Clone)]
pub struct Job {
    /// Its PID as numbered in the host. It keeps it when it is moved.
    pub pid: i32,
    /// Its standard output, as a path inside the host.
    pub stdout: String,
    /// Its standard error, as a path inside the host.
    pub stderr: String,
}

/// What to start in a host.
#[derive(Debug, Clone)]
pub struct Spawn {
    argv: Vec<String>,
    env: Vec<(String, String)>,
    cwd: String,
    session: bool,
    private_output: bool,
}

impl Spawn {
    /// A program with its arguments, in a session of its own, as daemons are.
    pub fn new<S: AsRef<str>>(argv: impl IntoIterator<Item = S>) -> Self {
        Self {
            argv: argv.into_iter().map(|word| word.as_ref().to_owned()).collect(),
            env: Vec::new(),
            cwd: "/".to_owned(),
            session: true,
            private_output: false,
        }
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<S: AsRef<str>>(mut self, words: impl IntoIterator<Item = S>) -> Self {
        self.argv.extend(words.into_iter().map(|word| word.as_ref().to_owned()));
        self
    }

    /// Adds a variable to the environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Sets the working directory.
    #[must_use]
    pub fn cwd(mut self, directory: &str) -> Self {
        directory.clone_into(&mut self.cwd);
        self
    }

    /// Leaves the program in the session of the host's first process.
    #[must_use]
    pub fn in_agents_session(mut self) -> Self {
        self.session = false;
        self
    }

    /// Sends the output to the host's own disk, which the other host does not see.
    #[must_use]
    pub fn private_output(mut self) -> Self {
        self.private_output = true;
        self
    }
}

/// A host; it ends, with all that runs in it, when this value is dropped.
#[derive(Debug)]
pub struct Host {
    name: String,
    init: i32,
    agent: Child,
    control: Mutex<Control>,
    exits: Arc<Mutex<HashMap<i32, Exit>>>,
    reader: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Control {
    requests: Option<ChildStdin>,
    answers: Receiver<Event>,
    started: u32,
}

impl Host {
    /// Makes the namespaces and their agent. `agent` is the command that calls [`super::agent::run`] with
    /// the three words appended to it: name, first PID, and `whole-run` or `private`. A host that shares
    /// the disk of another is made inside that one's mount namespace.
    pub(super) fn start(
        agent: &[OsString],
        name: &str,
        first_pid: u32,
        shared_from: Option<&Host>,
    ) -> Result<Self> {
        let mut command = match shared_from {
            Some(other) => {
                let mut command = Command::new("nsenter");
                command.arg(format!("--mount=/proc/{}/ns/mnt", other.init)).args(["--", "unshare"]);
                command
            }
            None => Command::new("unshare"),
        };
        let mut agent = command
            .args(["--net", "--mount", "--ipc", "--uts", "--pid", "--fork", "--kill-child", "--"])
            .args(agent)
            .args([name, &first_pid.to_string(), if shared_from.is_some() { "private" } else { "whole-run" }])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(|source| TestbedError::Io { step: "starting unshare".to_owned(), source })?;
        let requests = agent.stdin.take();
        let Some(output) = agent.stdout.take() else {
            return Err(TestbedError::Agent { host: name.to_owned(), what: "has no output".to_owned() });
        };
        let exits = Arc::new(Mutex::new(HashMap::new()));
        let (sender, answers) = channel();
        let seen = Arc::clone(&exits);
        let reader = std::thread::Builder::new()
            .name(format!("host-{name}"))
            .spawn(move || {
                let mut output = BufReader::new(output);
                while let Ok(Some(event)) = hear(&mut output) {
                    match event {
                        Event::Exited { pid, code, signal } => {
                            locked(&seen).insert(pid, Exit { code, signal });
                        }
                        answer => {
                            // An earlier process with this number is forgotten here, in the order of the
                            // events: the new one may have ended before anybody reads this answer.
                            if let Event::Started(Ok(pid)) = &answer {
                                locked(&seen).remove(pid);
                            }
                            if sender.send(answer).is_err() {
                                return;
                            }
                        }
                    }
                }
            })
            .map_err(|source| TestbedError::Io { step: "starting a thread".to_owned(), source })?;
        let mut host = Self {
            name: name.to_owned(),
            init: 0,
            agent,
            control: Mutex::new(Control { requests, answers, started: 0 }),
            exits,
            reader: Some(reader),
        };
        match host.answer(&locked(&host.control))? {
            Event::Ready(init) => host.init = init,
            other => return Err(host.trouble(format!("said {other:?} at the start"))),
        }
        Ok(host)
    }

    /// The host's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The PID of the host's first process, as seen from outside.
    pub fn init(&self) -> i32 {
        self.init
    }

    /// Where a path of the host is found from outside.
    pub fn outside(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        Path::new(&format!("/proc/{}/root", self.init)).join(path.strip_prefix("/").unwrap_or(path))
    }

    /// The host's own `/proc/PID` for one of its processes, found from outside.
    pub fn proc(&self, pid: i32) -> PathBuf {
        self.outside(format!("/proc/{pid}"))
    }

    /// Starts a program and returns at once.
    ///
    /// # Errors
    /// The program could not be started, or the agent is gone.
    pub fn spawn(&self, spawn: &Spawn) -> Result<Job> {
        let mut control = locked(&self.control);
        control.started += 1;
        let program = spawn.argv.first().map_or("", String::as_str);
        let program = program.rsplit('/').next().unwrap_or(program);
        let disk = if spawn.private_output { super::PRIVATE } else { super::SHARED };
        let output = format!("{disk}/{}-{:03}-{program}", self.name, control.started);
        let (stdout, stderr) = (format!("{output}.out"), format!("{output}.err"));
        let mut argv = spawn.argv.clone();
        if spawn.session {
            argv.insert(0, "setsid".to_owned());
        }
        let request = Request::Start {
            argv,
            env: spawn.env.clone(),
            cwd: spawn.cwd.clone(),
            stdout: stdout.clone(),
            stderr: stderr.clone(),
        };
        match self.ask(&mut control, &request)? {
            Event::Started(Ok(pid)) => Ok(Job { pid, stdout, stderr }),
            Event::Started(Err(why)) => Err(self.trouble(format!("cannot start {:?}: {why}", spawn.argv))),
            other => Err(self.trouble(format!("said {other:?} to a start"))),
        }
    }

    /// Starts a program, waits for its end, and returns it with all it wrote.
    ///
    /// # Errors
    /// It could not be started, or did not end in time (it is killed then).
    pub fn run(&self, spawn: &Spawn, limit: Duration) -> Result<(Exit, String, String)> {
        let job = self.spawn(spawn)?;
        match self.wait_exit(job.pid, limit) {
            Ok(exit) => Ok((exit, self.stdout(&job), self.stderr(&job))),
            Err(error) => {
                let _ = self.signal(job.pid, libc::SIGKILL);
                let _ = self.wait_exit(job.pid, ANSWER);
                Err(TestbedError::Program(format!("{error}; it wrote: {}", self.stderr(&job))))
            }
        }
    }

    /// Sends a signal to a process of the host.
    ///
    /// # Errors
    /// There is no such process, or the agent is gone.
    pub fn signal(&self, pid: i32, signal: i32) -> Result<()> {
        match self.ask(&mut locked(&self.control), &Request::Signal { pid, signal })? {
            Event::Signalled(Ok(())) => Ok(()),
            Event::Signalled(Err(why)) => {
                Err(self.trouble(format!("cannot send signal {signal} to {pid}: {why}")))
            }
            other => Err(self.trouble(format!("said {other:?} to a signal"))),
        }
    }

    /// How a child of the agent ended, if it did. A process that was moved away and came back lives.
    pub fn exit_of(&self, pid: i32) -> Option<Exit> {
        let exit = locked(&self.exits).get(&pid).copied()?;
        (!self.proc(pid).exists()).then_some(exit)
    }

    /// Waits until a child of the agent has ended.
    ///
    /// # Errors
    /// It did not end in time.
    pub fn wait_exit(&self, pid: i32, limit: Duration) -> Result<Exit> {
        wait_for(&format!("the end of process {pid} on {}", self.name), limit, || Ok(self.exit_of(pid)))
    }

    /// Kills a process with SIGKILL and waits until it is gone.
    ///
    /// # Errors
    /// There is no such process, or it stays.
    pub fn kill(&self, pid: i32) -> Result<()> {
        self.signal(pid, libc::SIGKILL)?;
        wait_for(
            &format!("the end of process {pid}"),
            ANSWER,
            || Ok((!self.proc(pid).exists()).then_some(())),
        )
    }

    /// All processes of the host but its agent, with their names.
    ///
    /// # Errors
    /// `/proc` of the host cannot be read.
    pub fn processes(&self) -> Result<Vec<(i32, String)>> {
        let list = step(std::fs::read_dir(self.outside("/proc")), || format!("listing {}", self.name))?;
        let mut found: Vec<(i32, String)> = list
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter(|pid| *pid != 1)
            .filter_map(|pid| {
                let comm = std::fs::read_to_string(self.proc(pid).join("comm")).ok()?;
                Some((pid, comm.trim_end().to_owned()))
            })
            .collect();
        found.sort_unstable();
        Ok(found)
    }

    /// What a job wrote to its standard output so far.
    pub fn stdout(&self, job: &Job) -> String {
        self.text(&job.stdout)
    }

    /// What a job wrote to its standard error so far.
    pub fn stderr(&self, job: &Job) -> String {
        self.text(&job.stderr)
    }

    fn text(&self, path: &str) -> String {
        let bytes = std::fs::read(self.outside(path)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits until the job's output, from byte `from` on, has a whole line that starts with `start`;
    /// returns the line and where it ends.
    ///
    /// # Errors
    /// The line did not come in time, or the job wrote a line starting with `FAIL`, or ended before.
    pub fn wait_line(&self, job: &Job, start: &str, from: usize, limit: Duration) -> Result<(String, usize)> {
        let what = format!("a line {start:?} from process {} on {}", job.pid, self.name);
        wait_for(&what, limit, || {
            // Looked at before the output: what an ended process wrote is complete then.
            let exit = self.exit_of(job.pid);
            let text = self.stdout(job);
            let mut end = from.min(text.len());
            for line in text.get(from..).unwrap_or_default().split_inclusive('\n') {
                end += line.len();
                if !line.ends_with('\n') {
                    break;
                }
                if line.starts_with(start) {
                    return Ok(Some((line.trim_end().to_owned(), end)));
                }
                if line.starts_with("FAIL") {
                    return Err(TestbedError::Program(format!("process {}: {}", job.pid, line.trim_end())));
                }
            }
            match exit {
                Some(exit) => Err(TestbedError::Program(format!(
                    "process {} ended ({exit:?}) before it said {start:?}; it wrote: {}",
                    job.pid,
                    self.stderr(job)
                ))),
                None => Ok(None),
            }
        })
        .map_err(|error| match error {
            TestbedError::Deadline { what, seconds } => TestbedError::Program(format!(
                "{what} did not come within {seconds} s; it wrote: {}{}",
                last(&self.stdout(job)),
                last(&self.stderr(job))
            )),
            other => other,
        })
    }

    /// Runs `ip` (or `tc`) in the host's network namespace.
    ///
    /// # Errors
    /// The command failed.
    pub fn net(&self, words: &[&str]) -> Result<String> {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/proc/{}/ns/net", self.init)).arg("--").args(words);
        let output = step(command.output(), || format!("running {words:?}"))?;
        if !output.status.success() {
            return Err(TestbedError::Command {
                command: format!("{} on {}", words.join(" "), self.name),
                stderr: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
            });
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn ask(&self, control: &mut Control, request: &Request) -> Result<Event> {
        let mut line = serde_json::to_vec(request).map_err(|error| self.trouble(error.to_string()))?;
        line.push(b'\n');
        let Some(requests) = control.requests.as_mut() else {
            return Err(self.trouble("is gone".to_owned()));
        };
        step(requests.write_all(&line), || format!("talking to the agent of {}", self.name))?;
        self.answer(control)
    }

    fn answer(&self, control: &Control) -> Result<Event> {
        control.answers.recv_timeout(ANSWER).map_err(|error| {
            self.trouble(match error {
                RecvTimeoutError::Timeout => "does not answer".to_owned(),
                RecvTimeoutError::Disconnected => "is gone".to_owned(),
            })
        })
    }

    fn trouble(&self, what: String) -> TestbedError {
        TestbedError::Agent { host: self.name.clone(), what }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // The agent ends at the end of its input, and everything in the host with it.
        locked(&self.control).requests = None;
        let _ = self.agent.wait();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

/// A lock that a panicking test thread may have poisoned: the value behind it is whole all the same.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn last(text: &str) -> &str {
    let start = text.len().saturating_sub(600);
    text.get(start..).unwrap_or(text)
}
