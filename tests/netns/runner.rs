//! Runs the chosen cases, each in a process of its own and several at a time: most of them wait for something most of
//! the time. What a case prints comes out in one piece, when it has ended.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::num::NonZeroUsize;
use std::panic::AssertUnwindSafe;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use migrate::engine::reason::chain;
use migrate::engine::sys::pidfd::PidFd;
use nix::poll::PollTimeout;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::Signal;

use crate::backlog::Room;
use crate::case::{self, Case, Need};

/// The option with which this program runs one case, in this process.
pub(crate) const ONE: &str = "--one";
/// How long a case may take before it counts as hung.
const LIMIT: Duration = Duration::from_secs(600);
/// More at a time than this help little: each case has three hosts, and programs under load in them.
const MOST_JOBS: NonZeroUsize = NonZeroUsize::new(4).unwrap();

/// How a case ended.
enum End {
    Passed,
    Skipped(String),
    Failed(String),
}

/// As many cases at a time as there are processors, within reason.
pub(crate) fn usual_jobs() -> NonZeroUsize {
    std::thread::available_parallelism().map_or(NonZeroUsize::MIN, |cpus| cpus.min(MOST_JOBS))
}

/// Runs the cases, `jobs` at a time; those that need what all cases share (huge pages) one by one, last.
pub(crate) fn run(cases: &[&Case], jobs: NonZeroUsize) -> ExitCode {
    println!("kernel {}, seed {}, {} cases, {jobs} at a time", kernel(), case::seed(), cases.len());
    let shares = |case: &&&Case| case.needs.iter().any(|need| matches!(need, Need::HugePages(_)));
    let (alone, together): (Vec<&Case>, Vec<&Case>) = cases.iter().partition(shares);
    let _room = Room::make();
    let mut tally = Tally::default();
    for (queue, jobs) in [(together, jobs.get()), (alone, 1)] {
        let queue: Mutex<VecDeque<_>> =
            Mutex::new(queue.iter().map(|case| (case.name.as_str(), case.needs.as_slice())).collect());
        let results = Mutex::new(&mut tally);
        std::thread::scope(|scope| {
            for _ in 0..jobs {
                scope.spawn(|| {
                    loop {
                        let Some((name, needs)) = queue.lock().unwrap().pop_front() else { return };
                        let start = Instant::now();
                        let end = in_a_process(name, needs);
                        results.lock().unwrap().add(name, start.elapsed().as_secs_f32(), end);
                    }
                });
            }
        });
    }
    tally.close()
}

#[derive(Default)]
struct Tally {
    passed: usize,
    skipped: usize,
    failed: Vec<String>,
}

impl Tally {
    fn add(&mut self, name: &str, seconds: f32, end: End) {
        match end {
            End::Passed => {
                println!("{name} ... ok ({seconds:.1} s)");
                self.passed += 1;
            }
            End::Skipped(missing) => {
                println!("{name} ... skipped: {missing}");
                self.skipped += 1;
            }
            End::Failed(why) => {
                println!("{name} ... FAILED ({seconds:.1} s)\n{}", indented(&why));
                self.failed.push(name.to_owned());
            }
        }
    }

    fn close(self) -> ExitCode {
        if !self.failed.is_empty() {
            println!("\nfailed:\n    {}", self.failed.join("\n    "));
        }
        println!("\n{} passed, {} failed, {} skipped", self.passed, self.failed.len(), self.skipped);
        let no_skips = std::env::var_os("NO_SKIPS").is_some_and(|value| value == "1");
        let good = self.failed.is_empty() && !(no_skips && self.skipped > 0);
        if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

fn in_a_process(name: &str, needs: &[Need]) -> End {
    if let Some(missing) = needs.iter().find_map(|need| need.missing()) {
        return End::Skipped(missing);
    }
    let run = || -> case::Result<(bool, String)> {
        let mut printed = File::from(memfd_create(c"printed", MFdFlags::MFD_CLOEXEC)?);
        let mut child = Command::new(std::env::current_exe()?)
            .args([ONE, "--exact", name])
            .env("SEED", case::seed().to_string())
            .stdin(Stdio::null())
            .stdout(printed.try_clone()?)
            .stderr(printed.try_clone()?)
            .spawn()?;
        let in_time = PidFd::open(child.id())?.ended(PollTimeout::try_from(LIMIT)?)?;
        let had = if in_time { String::new() } else { story(child.id()) };
        if !in_time {
            child.kill()?;
        }
        let good = child.wait()?.success();
        printed.seek(SeekFrom::Start(0))?;
        let mut bytes = Vec::new();
        printed.read_to_end(&mut bytes)?;
        let mut text = String::from_utf8_lossy(&bytes).into_owned();
        if !in_time {
            text.push_str("it did not end; it had these threads:\n");
            text.push_str(&had);
        }
        Ok((good && in_time, text))
    };
    match run() {
        Ok((true, _)) => End::Passed,
        Ok((false, text)) => End::Failed(text),
        Err(error) => End::Failed(chain(error.as_ref())),
    }
}

/// Runs one case in this process, in new hosts, and says why it failed.
pub(crate) fn one(case: &Case) -> ExitCode {
    // Its hosts end with it, and it ends with the one who waits for it.
    if let Err(error) = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL) {
        eprintln!("{error}");
        return ExitCode::FAILURE;
    }
    let result = std::panic::catch_unwind(AssertUnwindSafe(|| (case.run)(&crate::hosts()?)));
    match result {
        Ok(Ok(())) => return ExitCode::SUCCESS,
        Ok(Err(error)) => eprintln!("{}", chain(error.as_ref())),
        Err(_) => eprintln!("panicked"),
    }
    ExitCode::FAILURE
}

/// What a process and all its descendants do, thread by thread: those of the hosts are among them.
fn story(pid: u32) -> String {
    let mut text = String::new();
    let mut left = vec![pid];
    while let Some(pid) = left.pop() {
        let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else { continue };
        for thread in threads.flatten().map(|entry| entry.path()) {
            let read = |name: &str| std::fs::read_to_string(thread.join(name)).unwrap_or_default();
            let (status, place, stack) = (read("status"), read("wchan"), read("stack"));
            let field =
                |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or("").trim();
            let stack: Vec<&str> =
                stack.lines().map(|line| line.rsplit(' ').next().unwrap_or(line)).collect();
            let _ = writeln!(
                text,
                "{pid} {} ({} in its host): {}, traced by {}, in {place}: {}",
                field("Name:"),
                field("NSpid:").rsplit('\t').next().unwrap_or(""),
                field("State:"),
                field("TracerPid:"),
                stack.join(" < ")
            );
            left.extend(read("children").split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
        }
    }
    text
}

fn kernel() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned()
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("    {line}")).collect::<Vec<_>>().join("\n")
}
