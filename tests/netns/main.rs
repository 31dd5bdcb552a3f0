//! Moves between two simulated hosts on this machine: the runner of the cases.
//!
//! `cargo test --test netns [-- [--list] [--exact] [FILTER...]]` as root. Each case gets hosts of its own
//! ([`migrate::testbed`]). A case whose needs are not met is skipped and counted; set `NO_SKIPS=1` to
//! make that a failure. Random choices come from the seed that is printed; `SEED=N` repeats a run.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test that panics has failed")]

mod case;
mod cases;
mod grid;
mod memcached;
mod plain;
mod relay;
mod resets;
mod stranger;
mod visible;
mod workload;

use std::ffi::OsString;
use std::panic::AssertUnwindSafe;
use std::process::ExitCode;
use std::time::Instant;

use case::Case;
use migrate::engine::reason::chain;
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
    run(&chosen)
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

fn run(cases: &[&Case]) -> ExitCode {
    println!("kernel {}, seed {}, {} cases", kernel(), case::seed(), cases.len());
    let (mut passed, mut skipped, mut failed) = (0, 0, Vec::new());
    for case in cases {
        if let Some(missing) = case.needs.iter().find_map(|need| need.missing()) {
            println!("{} ... skipped: {missing}", case.name);
            skipped += 1;
            continue;
        }
        let start = Instant::now();
        let result = std::panic::catch_unwind(AssertUnwindSafe(|| in_new_hosts(case)));
        let seconds = start.elapsed().as_secs_f32();
        match result {
            Ok(Ok(())) => {
                println!("{} ... ok ({seconds:.1} s)", case.name);
                passed += 1;
            }
            Ok(Err(error)) => {
                println!("{} ... FAILED ({seconds:.1} s)", case.name);
                println!("{}", indented(&chain(error.as_ref())));
                failed.push(case.name.as_str());
            }
            Err(_) => {
                println!("{} ... FAILED ({seconds:.1} s): panicked", case.name);
                failed.push(case.name.as_str());
            }
        }
    }
    if !failed.is_empty() {
        println!("\nfailed:\n    {}", failed.join("\n    "));
    }
    println!("\n{passed} passed, {} failed, {skipped} skipped", failed.len());
    let no_skips = std::env::var_os("NO_SKIPS").is_some_and(|value| value == "1");
    if failed.is_empty() && !(no_skips && skipped > 0) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn in_new_hosts(case: &Case) -> case::Result {
    (case.run)(&hosts()?)
}

fn hosts() -> case::Result<Lan> {
    let agent = vec![std::env::current_exe()?.into_os_string(), OsString::from(AGENT)];
    Ok(Lan::start(&Tools { migrate: env!("CARGO_BIN_EXE_migrate").into(), agent })?)
}

fn kernel() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned()
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("    {line}")).collect::<Vec<_>>().join("\n")
}
