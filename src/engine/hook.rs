//! Hooks: commands of the operator's, run at named stages of a migration.
//!
//! What the network around a host needs when a process moves (an address at a cloud, a route, a balancer) only its
//! operator knows. Each command is run by `/bin/sh -c` with the stage and the migration in its environment, its
//! output goes to our standard error. A stage ends within [`LIMIT`], or what runs is killed with all that it has
//! started.
//!
//! | stage | at the source | at the destination |
//! | --- | --- | --- |
//! | pre-freeze | before the process is stopped; its failure ends the move | |
//! | network-lock | it is stopped and its connections are locked; its failure ends the move | |
//! | network-unlock | it will go on here: before it runs | it will run here: before it runs |
//! | post-resume | it runs at the destination | it runs here |
//! | failed | the move has failed | the move has failed |
//!
//! After a crash whoever puts a migration right runs them too, so that a stage may come a second time.

use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::str::FromStr;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::PollTimeout;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::engine::sys::pidfd::PidFd;

/// How long all commands of a stage may take. An operator who waits for a cloud needs seconds; but the process
/// may stand still meanwhile, and the other node waits no longer than this can be often.
pub const LIMIT: Duration = Duration::from_secs(20);
/// Longest command: journals keep them.
const MAX_COMMAND_BYTES: usize = 1024;
/// Most commands of one migration.
pub const MAX_COMMANDS: usize = 8;

/// A command for `/bin/sh -c`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Hook(String);

/// A text that cannot be a hook.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a hook is a command for /bin/sh of 1 to {MAX_COMMAND_BYTES} bytes")]
pub struct BadHook;

impl FromStr for Hook {
    type Err = BadHook;

    fn from_str(text: &str) -> Result<Self, BadHook> {
        let good = !text.trim().is_empty() && text.len() <= MAX_COMMAND_BYTES && !text.contains('\0');
        if good { Ok(Self(text.to_owned())) } else { Err(BadHook) }
    }
}

impl TryFrom<String> for Hook {
    type Error = BadHook;

    fn try_from(text: String) -> Result<Self, BadHook> {
        text.parse()
    }
}

impl From<Hook> for String {
    fn from(hook: Hook) -> Self {
        hook.0
    }
}

/// When a hook is run: see the table above.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Before the process is stopped.
    PreFreeze,
    /// Nobody is to reach the process any more.
    NetworkLock,
    /// It may be reached here again.
    NetworkUnlock,
    /// It runs at the destination.
    PostResume,
    /// It was not moved.
    Failed,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Stage::PreFreeze => "pre-freeze",
            Stage::NetworkLock => "network-lock",
            Stage::NetworkUnlock => "network-unlock",
            Stage::PostResume => "post-resume",
            Stage::Failed => "failed",
        })
    }
}

/// What hooks are told of a migration.
#[derive(Debug, Clone)]
pub struct About {
    /// `MIGRATE_ID`.
    pub id: String,
    /// `MIGRATE_PID`.
    pub pid: u32,
    /// `MIGRATE_SIDE`: `source` or `destination`.
    pub side: &'static str,
    /// `MIGRATE_DEST`: where the destination is reached, as this side knows it.
    pub destination: String,
}

/// Why a stage failed: by the first command that did.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// It could not be run or waited for.
    #[error("{stage} hook {command:?}: {step}")]
    Run {
        /// The stage.
        stage: Stage,
        /// The command.
        command: String,
        /// What was being done.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// It said no.
    #[error("{stage} hook {command:?} ended with {status}")]
    Refused {
        /// The stage.
        stage: Stage,
        /// The command.
        command: String,
        /// How it ended.
        status: std::process::ExitStatus,
    },
    /// It took too long.
    #[error("{stage} hook {command:?} was killed: the stage has {} s", LIMIT.as_secs())]
    TooSlow {
        /// The stage.
        stage: Stage,
        /// The command.
        command: String,
    },
    /// The thread that runs them is gone.
    #[error("{stage} hooks cannot be run any more")]
    NoRunner {
        /// The stage.
        stage: Stage,
    },
}

struct Order {
    stage: Stage,
    about: About,
    answer: Sender<Result<(), HookError>>,
}

/// The hooks of a command or a service, and the thread that runs them: whoever traces a process may be in
/// another time namespace, or more urgent, than its hooks should be.
#[derive(Debug, Clone, Default)]
pub struct Hooks {
    runner: Option<Sender<Order>>,
}

impl Hooks {
    /// To be called early, before the calling thread is given anything that threads inherit.
    ///
    /// # Errors
    /// If there is no thread to be had.
    pub fn start(hooks: &[Hook]) -> io::Result<Self> {
        if hooks.is_empty() {
            return Ok(Self::default());
        }
        let (runner, orders) = channel::<Order>();
        let hooks = hooks.to_vec();
        std::thread::Builder::new().name("hooks".into()).spawn(move || {
            while let Ok(Order { stage, about, answer }) = orders.recv() {
                let hooks = hooks.clone();
                let work = {
                    let answer = answer.clone();
                    // Each migration has its own pace.
                    move || {
                        if let Err(unheard) = answer.send(run(&hooks, stage, &about)) {
                            log(unheard.0);
                        }
                    }
                };
                if std::thread::Builder::new().name("hook".into()).spawn(work).is_err() {
                    let _ = answer.send(Err(HookError::NoRunner { stage }));
                }
            }
        })?;
        Ok(Self { runner: Some(runner) })
    }

    /// Whether there is nothing to run.
    pub fn is_empty(&self) -> bool {
        self.runner.is_none()
    }

    /// Runs this stage and waits for its end.
    ///
    /// # Errors
    /// See [`HookError`].
    pub fn run(&self, stage: Stage, about: &About) -> Result<(), HookError> {
        self.begin(stage, about).finish()
    }

    /// Begins this stage. If nobody waits for its end, it is reported in the log.
    pub fn begin(&self, stage: Stage, about: &About) -> Running {
        let answer = self.runner.as_ref().map(|runner| {
            let (answer, receiver) = channel();
            // If the thread is gone, so is the other end of `receiver`.
            let _ = runner.send(Order { stage, about: about.clone(), answer });
            receiver
        });
        Running { stage, answer }
    }

    /// Runs a stage whose failure changes nothing any more, and reports it in the log. Waits for its end.
    pub fn tell(&self, stage: Stage, about: &About) {
        log(self.run(stage, about));
    }
}

fn log(outcome: Result<(), HookError>) {
    if let Err(error) = outcome {
        tracing::error!(error = &error as &dyn std::error::Error, "a hook");
    }
}

/// A stage under way.
#[derive(Debug)]
pub struct Running {
    stage: Stage,
    answer: Option<Receiver<Result<(), HookError>>>,
}

impl Running {
    /// Waits for its end.
    ///
    /// # Errors
    /// See [`HookError`].
    pub fn finish(self) -> Result<(), HookError> {
        let Some(answer) = self.answer else { return Ok(()) };
        answer.recv().unwrap_or(Err(HookError::NoRunner { stage: self.stage }))
    }
}

/// Runs a stage in this thread: its hooks one after the other. After the first failure the rest is run only
/// where the stage puts things right.
///
/// # Errors
/// The first failure.
pub fn run(hooks: &[Hook], stage: Stage, about: &About) -> Result<(), HookError> {
    let mut outcome = Ok(());
    let end = Instant::now() + LIMIT;
    for hook in hooks {
        let ended = run_one(hook, stage, about, end.saturating_duration_since(Instant::now()));
        outcome = outcome.and(ended);
        if outcome.is_err() && matches!(stage, Stage::PreFreeze | Stage::NetworkLock) {
            break;
        }
    }
    outcome
}

fn run_one(hook: &Hook, stage: Stage, about: &About, limit: Duration) -> Result<(), HookError> {
    let command = || hook.0.clone();
    let failed = |step| move |source: io::Error| HookError::Run { stage, command: command(), step, source };
    tracing::info!(%stage, hook = hook.0, "running a hook");
    // The last line of our standard output may be a report.
    let output = io::stderr().as_fd().try_clone_to_owned().map_err(failed("duplicating standard error"))?;
    let mut child = Command::new("/bin/sh")
        .args(["-c", &hook.0])
        .env("MIGRATE_STAGE", stage.to_string())
        .env("MIGRATE_ID", &about.id)
        .env("MIGRATE_PID", about.pid.to_string())
        .env("MIGRATE_SIDE", about.side)
        .env("MIGRATE_DEST", &about.destination)
        .stdin(Stdio::null())
        .stdout(output)
        // A group of its own, to be killed as one.
        .process_group(0)
        .spawn()
        .map_err(failed("starting it"))?;
    let limit = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
    let ended = PidFd::open(child.id()).and_then(|process| process.ended(limit));
    if !matches!(ended, Ok(true)) {
        kill_group(&mut child);
    }
    let status = child.wait().map_err(failed("waiting for it"))?;
    match ended {
        Err(errno) => Err(failed("waiting for it")(errno.into())),
        Ok(false) => Err(HookError::TooSlow { stage, command: command() }),
        Ok(true) if status.success() => Ok(()),
        Ok(true) => Err(HookError::Refused { stage, command: command(), status }),
    }
}

fn kill_group(child: &mut Child) {
    let killed = i32::try_from(child.id())
        .map_err(|_| Errno::ESRCH)
        .and_then(|pid| killpg(Pid::from_raw(pid), Signal::SIGKILL));
    if killed.is_err() {
        let _ = child.kill();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn about() -> About {
        let destination = "node:7077".to_owned();
        About { id: "a1".into(), pid: 42, side: "source", destination }
    }

    fn hooks(texts: &[&str]) -> Vec<Hook> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn it_is_told_what_it_is_about() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let text = format!(
            "echo $MIGRATE_STAGE $MIGRATE_ID $MIGRATE_PID $MIGRATE_SIDE $MIGRATE_DEST >> {}",
            out.display()
        );
        let hooks = Hooks::start(&hooks(&[&text])).unwrap();
        hooks.run(Stage::PreFreeze, &about()).unwrap();
        hooks.begin(Stage::PostResume, &about()).finish().unwrap();
        let said = std::fs::read_to_string(out).unwrap();
        assert_eq!(said, "pre-freeze a1 42 source node:7077\npost-resume a1 42 source node:7077\n");
    }

    #[test]
    fn one_that_fails_ends_a_stage_that_may_fail_only() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let last = format!("echo $MIGRATE_STAGE >> {}", out.display());
        let hooks = hooks(&["exit 3", &last]);
        let error = run(&hooks, Stage::NetworkLock, &about()).unwrap_err();
        assert_eq!(error.to_string(), "network-lock hook \"exit 3\" ended with exit status: 3");
        assert!(!out.exists());
        run(&hooks, Stage::NetworkUnlock, &about()).unwrap_err();
        assert_eq!(std::fs::read_to_string(out).unwrap(), "network-unlock\n");
    }

    #[test]
    fn one_that_does_not_end_is_killed_with_what_it_has_started() {
        let dir = tempfile::tempdir().unwrap();
        let pid = dir.path().join("pid");
        let text = format!("sleep 1000 & echo $! > {}; wait", pid.display());
        let hook = &hooks(&[&text])[0];
        let mut limit = Duration::from_millis(50);
        let child = loop {
            let error = run_one(hook, Stage::Failed, &about(), limit).unwrap_err();
            assert!(matches!(error, HookError::TooSlow { .. }), "{error}");
            // On a busy machine it may not have come so far.
            match std::fs::read_to_string(&pid).ok().and_then(|text| text.trim().parse::<u32>().ok()) {
                Some(child) => break child,
                None => limit *= 2,
            }
        };
        // Whoever reaps it, it does not run any more.
        let alive = |process: &PidFd| !process.ended(PollTimeout::from(10_000u16)).unwrap();
        assert!(!PidFd::open(child).is_ok_and(|process| alive(&process)));
    }

    #[test]
    fn without_hooks_nothing_is_done() {
        assert!(Hooks::default().is_empty());
        Hooks::default().run(Stage::PreFreeze, &about()).unwrap();
        for bad in ["", "  ", "a\0b", &"x".repeat(MAX_COMMAND_BYTES + 1)] {
            assert_eq!(bad.parse::<Hook>(), Err(BadHook), "{bad:?}");
        }
    }
}
