//! The programs that are moved: built from `workloads/`, started, and asked whether they are still right.
//!
//! Each prints `ready` when it is set up and then verifies itself all the time; what is wrong is a line
//! `FAIL ...` and the end of the program. On SIGUSR1 it checks everything and prints `ok N`, where N
//! grows with the work done.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use migrate::testbed::{Host, Job, Spawn};

use crate::case::{Result, ensure, fail};

/// How long a program may take to set itself up or to check itself.
const PATIENCE: Duration = Duration::from_secs(30);

/// The folder of the sources.
pub(crate) fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/netns/workloads")
}

/// Builds `workloads/NAME.c` unless that is done, and returns the program.
pub(crate) fn build(name: &str) -> Result<String> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _building = ONE_AT_A_TIME.lock();
    let source = sources().join(format!("{name}.c"));
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("workloads");
    std::fs::create_dir_all(&folder)?;
    let program = folder.join(name);
    let built = std::fs::metadata(&program).and_then(|file| file.modified()).ok();
    let changed = [source.as_path(), &sources().join("workload.h")]
        .iter()
        .filter_map(|file| std::fs::metadata(file).and_then(|file| file.modified()).ok())
        .max();
    if built.is_none() || built < changed {
        let output = Command::new("cc")
            .args(["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", "-o"])
            .arg(&program)
            .arg(&source)
            .arg("-lrt")
            .output()?;
        if !output.status.success() {
            return fail(format!("cc {name}.c: {}", String::from_utf8_lossy(&output.stderr)));
        }
    }
    Ok(program.to_string_lossy().into_owned())
}

/// Compiles `workloads/NAME.java`; the folder of its classes.
pub(crate) fn java(name: &str) -> Result<String> {
    let classes = Path::new(env!("CARGO_TARGET_TMPDIR")).join("workloads/classes");
    std::fs::create_dir_all(&classes)?;
    let source = sources().join(format!("{name}.java"));
    let output = Command::new("javac").arg("-d").arg(&classes).arg(source).output()?;
    if !output.status.success() {
        return fail(format!("javac {name}.java: {}", String::from_utf8_lossy(&output.stderr)));
    }
    Ok(classes.to_string_lossy().into_owned())
}

/// A running program from `workloads/`, on whichever host it is now.
pub(crate) struct Workload {
    /// Its process and its output.
    pub(crate) job: Job,
    /// How much of its output was looked at.
    seen: usize,
    /// The N of the last `ok N`.
    progress: u64,
}

impl Workload {
    /// Starts a C program and waits until it is ready.
    pub(crate) fn start(host: &Host, name: &str, arguments: &[&str]) -> Result<Self> {
        let program = build(name)?;
        Self::spawn(host, &Spawn::new(std::iter::once(program.as_str()).chain(arguments.iter().copied())))
    }

    /// Starts a C program as the child of a shell that stays, and has the same output.
    pub(crate) fn under_shell(host: &Host, name: &str) -> Result<Self> {
        let script = format!("{} & echo child $!; wait", build(name)?);
        let job = host.spawn(&Spawn::new(["/bin/sh", "-c", &script]))?;
        let (line, _) = host.wait_line(&job, "child ", 0, PATIENCE)?;
        let (_, seen) = host.wait_line(&job, "ready", 0, PATIENCE)?;
        let pid = line["child ".len()..].trim().parse()?;
        Ok(Self { job: Job { pid, ..job }, seen, progress: 0 })
    }

    /// Starts a Python program and waits until it is ready.
    pub(crate) fn python(host: &Host, name: &str, arguments: &[&str]) -> Result<Self> {
        let script = sources().join(format!("{name}.py")).to_string_lossy().into_owned();
        let words = ["/usr/bin/python3", "-u", &script];
        Self::spawn(host, &Spawn::new(words.iter().chain(arguments)))
    }

    /// Starts any program that keeps the rules above.
    pub(crate) fn spawn(host: &Host, spawn: &Spawn) -> Result<Self> {
        let job = host.spawn(spawn)?;
        let (_, seen) = host.wait_line(&job, "ready", 0, PATIENCE)?;
        Ok(Self { job, seen, progress: 0 })
    }

    /// The PID, the same on every host.
    pub(crate) fn pid(&self) -> i32 {
        self.job.pid
    }

    /// Asks it to check itself, on the host where it is; an error if something is wrong with it.
    pub(crate) fn check(&mut self, host: &Host) -> Result {
        host.signal(self.job.pid, libc::SIGUSR1)?;
        let (line, seen) = host.wait_line(&self.job, "ok ", self.seen, PATIENCE)?;
        self.seen = seen;
        let progress = line[3..].split(' ').next().unwrap_or_default().parse()?;
        ensure(progress > self.progress, || {
            format!("process {} stands still: {line:?} after {}", self.job.pid, self.progress)
        })?;
        self.progress = progress;
        Ok(())
    }

    /// Checks it, lets it work on for at least `more` steps, and checks it again.
    pub(crate) fn check_going_on(&mut self, host: &Host) -> Result {
        self.check(host)?;
        self.check(host)
    }
}
