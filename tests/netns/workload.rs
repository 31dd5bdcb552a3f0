//! The programs that are moved: built from `workloads/`, started, and asked whether they are still right.
//!
//! Each prints `ready` when it is set up and then verifies itself all the time; what is wrong is a line
//! `FAIL ...` and the end of the program. On SIGUSR1 it checks everything and prints `ok N`, where N
//! grows with the work done.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use migrate::testbed::{Host, Job, Spawn};
use nix::fcntl::{Flock, FlockArg};

use crate::case::{Result, ensure, fail};

/// How long a program may take to set itself up or to check itself.
const PATIENCE: Duration = Duration::from_secs(30);

/// The folder of the sources.
pub(crate) fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/netns/workloads")
}

/// Has `command` make `target`, a file in the folder of what is built, from `sources`, unless it is newer than they are.
/// It makes it in a folder of its own, from where all it has made is brought in when it is whole: whoever is killed in
/// the middle leaves nothing half made behind.
fn make(target: &str, from: &[&str], command: impl FnOnce(&Path, &Path) -> Command) -> Result<PathBuf> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("workloads");
    std::fs::create_dir_all(&folder)?;
    // Cases run at the same time, each in a process of its own.
    let lock = File::create(folder.join("lock"))?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
    let (name, target) = (target, folder.join(target));
    let modified = |path: &Path| std::fs::metadata(path).and_then(|file| file.modified()).ok();
    let built = modified(&target);
    if built.is_none() || built < from.iter().filter_map(|file| modified(&sources().join(file))).max() {
        let fresh = folder.join("fresh");
        match std::fs::remove_dir_all(&fresh) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => std::fs::create_dir(&fresh)?,
        }
        let output = command(&folder, &fresh.join(name)).output()?;
        if !output.status.success() {
            return fail(format!("{}: {}", from[0], String::from_utf8_lossy(&output.stderr)));
        }
        // What comes beside it first: the target tells that all is there.
        for entry in std::fs::read_dir(&fresh)? {
            let beside = entry?.file_name();
            if beside != name {
                std::fs::rename(fresh.join(&beside), folder.join(&beside))?;
            }
        }
        std::fs::rename(fresh.join(name), &target)?;
    }
    Ok(target)
}

/// Builds `workloads/NAME.c` unless that is done, and returns the program.
pub(crate) fn build(name: &str) -> Result<String> {
    let source = format!("{name}.c");
    let program = make(name, &[&source, "workload.h", "zoo.h", "storm.h"], |_, program| {
        let mut command = Command::new("cc");
        command.args(["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", "-o"]);
        command.arg(program).arg(sources().join(&source)).arg("-lrt");
        command
    })?;
    Ok(program.to_string_lossy().into_owned())
}

/// Compiles `workloads/NAME.java` unless that is done; the folder of its classes.
pub(crate) fn java(name: &str) -> Result<String> {
    let source = format!("{name}.java");
    let class = make(&format!("{name}.class"), &[&source], |_, class| {
        let mut command = Command::new("javac");
        command.arg("-d").args(class.parent()).arg(sources().join(&source));
        command
    })?;
    Ok(class.parent().unwrap_or(&class).to_string_lossy().into_owned())
}

/// Builds `workloads/NAME.go` unless that is done.
pub(crate) fn go(name: &str) -> Result<String> {
    let source = format!("{name}.go");
    let program = make(name, &[&source], |folder, program| {
        let mut command = Command::new("go");
        command.args(["build", "-o"]).arg(program).arg(sources().join(&source));
        command.env("GOCACHE", folder.join("go-cache")).env("GO111MODULE", "off");
        command
    })?;
    Ok(program.to_string_lossy().into_owned())
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
