//! Moves between two simulated hosts on this machine: the runner of the cases.
//!
//! `cargo test --test netns [-- [--list] [--exact] [--jobs=N] [FILTER...]]` as root. Each case gets hosts of its own
//! ([`migrate::testbed`]), and as many run at a time as there are processors. A case whose needs are not met is skipped and counted; set `NO_SKIPS=1` to
//! make that a failure. Random choices come from the seed that is printed; `SEED=N` repeats a run.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics has failed")]

mod backlog;
mod case;
mod cases;
mod grid;
mod memcached;
mod plain;
mod relay;
mod resets;
mod runner;
mod stranger;
mod visible;
mod workload;

use std::ffi::OsString;
use std::process::ExitCode;

use case::Case;
use migrate::testbed::{Lan, Tools, agent};

/// The word that makes this program the first process of a host.
const AGENT: &str = "--node-agent";

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let [first, name, pid, run] = words.as_slice()
        && first == AGENT
    {
        let first_pid = pid.parse().unwrap_or(1);
        return match agent::run(name, first_pid, run == "whole-run") {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("agent of {name}: {error}");
                ExitCode::FAILURE
            }
        };
    }
    let all = cases::all();
    let (options, filters): (Vec<&str>, Vec<&str>) =
        words.iter().map(String::as_str).partition(|word| word.starts_with("--"));
    let exact = options.contains(&"--exact");
    let wanted = |case: &&Case| {
        filters.is_empty()
            || filters.iter().any(|word| if exact { case.name == *word } else { case.name.contains(word) })
    };
    let chosen: Vec<&Case> = all.iter().filter(wanted).collect();
    if options.contains(&"--list") {
        for case in &chosen {
            println!("{}: test", case.name);
        }
        return ExitCode::SUCCESS;
    }
    if options.contains(&"--hold") {
        return hold();
    }
    if options.contains(&runner::ONE) {
        return chosen.first().map_or(ExitCode::FAILURE, |case| runner::one(case));
    }
    let jobs = options.iter().find_map(|option| option.strip_prefix("--jobs=")).map(str::parse);
    match jobs.unwrap_or_else(|| Ok(runner::usual_jobs())) {
        Ok(jobs) => runner::run(&chosen, jobs),
        Err(error) => {
            eprintln!("--jobs: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Makes hosts, says which, and waits to be killed: for the case that nothing is left then.
fn hold() -> ExitCode {
    match hosts() {
        Ok(lan) => {
            println!("{} {} {}", lan.a.init(), lan.b.init(), lan.middle.init());
            loop {
                std::thread::park();
            }
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn hosts() -> case::Result<Lan> {
    let agent = vec![std::env::current_exe()?.into_os_string(), OsString::from(AGENT)];
    Ok(Lan::start(&Tools { migrate: env!("CARGO_BIN_EXE_migrate").into(), agent })?)
}
