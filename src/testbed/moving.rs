//! `migrate` itself, run in the hosts.

use std::path::Path;
use std::time::Duration;

use super::{Exit, Host, Job, Lan, Result, STATE, Spawn, TestbedError, step};

/// How long `migrate serve` may take until it listens.
const LISTENING: Duration = Duration::from_secs(10);
/// The port of the service.
const PORT: u16 = 7077;

/// A running `migrate serve`.
#[derive(Debug, Clone)]
pub struct Service {
    /// The process.
    pub job: Job,
    /// Where it is reached from the other hosts.
    pub address: String,
}

/// How a `migrate --to` ended.
#[derive(Debug)]
pub struct Outcome {
    /// How the command ended.
    pub exit: Exit,
    /// The report: the last line of its standard output; null if that is no JSON.
    pub report: serde_json::Value,
    /// All it wrote to its standard error.
    pub stderr: String,
}

impl Outcome {
    /// Whether the process was moved, by the exit status and the report alike.
    pub fn moved(&self) -> bool {
        self.exit.code == Some(0) && self.report["outcome"] == "moved"
    }

    /// The reasons in the report, as text, one a line.
    pub fn reasons(&self) -> String {
        let list = self.report["reasons"].as_array().map(Vec::as_slice).unwrap_or_default();
        list.iter()
            .map(|reason| match reason {
                serde_json::Value::String(text) => text.clone(),
                other => other.to_string(),
            })
            .collect::<Vec<_>>()
            .join("\n")
    }

    /// An error that shows everything, unless the process was moved.
    ///
    /// # Errors
    /// It was not.
    pub fn expect_moved(self) -> Result<Self> {
        if self.moved() {
            return Ok(self);
        }
        Err(TestbedError::Program(format!(
            "the move failed: {:?}\nreport: {}\n{}",
            self.exit,
            self.report,
            self.stderr.trim_end()
        )))
    }
}

impl Lan {
    fn migrate(&self, words: &[&str]) -> Spawn {
        let binary = self.migrate.to_string_lossy().into_owned();
        let words = words.iter().map(|word| (*word).to_owned());
        Spawn::new(std::iter::once(binary).chain(words)).in_agents_session().private_output()
    }

    /// Gives both hosts one identity, as nodes that share a state directory have: they trust each other.
    ///
    /// # Errors
    /// `migrate id` failed.
    pub fn share_identity(&self) -> Result<()> {
        self.identity(&self.a)?;
        let source = self.a.outside(STATE);
        copy_directory(&source, &self.b.outside(STATE))
    }

    /// What `migrate id` prints on a host; makes the identity on first use.
    ///
    /// # Errors
    /// The command failed.
    pub fn identity(&self, host: &Host) -> Result<String> {
        let (exit, stdout, stderr) =
            host.run(&self.migrate(&["id", "--state-dir", STATE]), Duration::from_secs(20))?;
        if exit.code != Some(0) {
            return Err(TestbedError::Program(format!("migrate id: {exit:?} {stderr}")));
        }
        Ok(stdout.trim().to_owned())
    }

    /// Runs any `migrate` command on a host and waits for its end.
    ///
    /// # Errors
    /// It could not be started or did not end in time.
    pub fn run(&self, host: &Host, words: &[&str], limit: Duration) -> Result<Outcome> {
        let (exit, stdout, stderr) = host.run(&self.migrate(words), limit)?;
        Ok(outcome(exit, &stdout, stderr))
    }

    /// Starts any `migrate` command on a host without waiting for its end.
    ///
    /// # Errors
    /// It could not be started.
    pub fn begin(&self, host: &Host, words: &[&str]) -> Result<Job> {
        host.spawn(&self.migrate(words))
    }

    /// Starts `migrate serve` on a host and waits until it listens.
    ///
    /// # Errors
    /// It ended, or did not listen in time.
    pub fn serve(&self, host: &Host) -> Result<Service> {
        self.serve_with(host, &[])
    }

    /// Starts `migrate serve` with further options, and waits until it listens.
    ///
    /// # Errors
    /// It ended, or did not listen in time.
    pub fn serve_with(&self, host: &Host, options: &[&str]) -> Result<Service> {
        let address = format!("{}:{PORT}", self.address(host));
        let words = ["serve", "--listen", &address, "--state-dir", STATE, "-v"];
        let job = host.spawn(&self.migrate(&[&words, options].concat()))?;
        host.wait_line(&job, "listening on", 0, LISTENING)?;
        Ok(Service { job, address })
    }

    /// Starts `migrate --to` on a host without waiting for its end.
    ///
    /// # Errors
    /// It could not be started.
    pub fn start_move(&self, from: &Host, to: &str, pid: i32, options: &[&str]) -> Result<Job> {
        let pid = pid.to_string();
        let mut words = vec!["--to", to, "--state-dir", STATE, "--json"];
        words.extend_from_slice(options);
        words.push(&pid);
        from.spawn(&self.migrate(&words))
    }

    /// Waits for the end of a `migrate --to` that was started before.
    ///
    /// # Errors
    /// It did not end in time.
    pub fn finish_move(&self, from: &Host, job: &Job, limit: Duration) -> Result<Outcome> {
        let exit = from.wait_exit(job.pid, limit).map_err(|error| {
            TestbedError::Program(format!("{error}; migrate wrote: {}", from.stderr(job)))
        })?;
        Ok(outcome(exit, &from.stdout(job), from.stderr(job)))
    }

    /// Moves a process to a running service and waits for the end of the command.
    ///
    /// # Errors
    /// The command could not be started or did not end in time; a refusal is an [`Outcome`].
    pub fn move_to(
        &self,
        from: &Host,
        service: &Service,
        pid: i32,
        options: &[&str],
        limit: Duration,
    ) -> Result<Outcome> {
        let job = self.start_move(from, &service.address, pid, options)?;
        self.finish_move(from, &job, limit)
    }
}

fn outcome(exit: Exit, stdout: &str, stderr: String) -> Outcome {
    let report = stdout.lines().last().and_then(|line| serde_json::from_str(line).ok());
    Outcome { exit, report: report.unwrap_or_default(), stderr }
}

/// Copies the files of a directory, and of those in it, with their permissions.
fn copy_directory(from: &Path, to: &Path) -> Result<()> {
    let naming = || format!("copying {} to {}", from.display(), to.display());
    step(std::fs::create_dir_all(to), naming)?;
    for entry in step(std::fs::read_dir(from), naming)? {
        let entry = step(entry, naming)?;
        let kind = step(entry.file_type(), naming)?;
        let target = to.join(entry.file_name());
        if kind.is_dir() {
            copy_directory(&entry.path(), &target)?;
        } else if kind.is_file() {
            step(std::fs::copy(entry.path(), &target), naming)?;
        }
    }
    Ok(())
}
