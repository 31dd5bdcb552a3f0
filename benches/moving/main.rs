//! The numbers that this program is judged by, side by side in one run: `cargo bench --bench moving`.
//!
//! Two hosts in namespaces of this machine, a real redis-server that is moved back and forth between them
//! while clients use it. `docs/benchmarks.md` explains the tables. As root, with redis-server installed;
//! words after `--` choose parts: `calls`, `faults`, `downtime`, `rates`, `late`, `stall`, `throughput`, `link`.
//! Numbers among them are the sizes of `downtime`, in MiB. `MIGRATE_BIN` names another `migrate` than the one
//! built with this, to compare two of them under the same conditions.

#![allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "numbers for people"
)]

mod calls;
mod client;
mod data;
mod downtime;
mod faults;
mod grounds;
mod late;
mod link;
mod rates;
mod stall;
mod table;

use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use migrate::testbed::{Lan, Service, Tools, agent};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use client::Seen;
use grounds::{Grounds, Moved, hosts, peak};
use table::{median, words};

/// The word that makes this program the first process of a host.
const AGENT: &str = "--node-agent";
/// Sizes of the data, MiB, unless others are given as words.
const SIZES: [usize; 3] = [64, 1024, 4096];
/// The speed of the limited link.
const MBIT: u32 = 1000;

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let [first, name, pid, run] = words.as_slice()
        && first == AGENT
    {
        return Ok(agent::run(name, pid.parse()?, run == "whole-run")?);
    }
    let (sizes, parts): (Vec<&str>, Vec<&str>) = words
        .iter()
        .map(String::as_str)
        .filter(|word| !word.starts_with("--"))
        .partition(|word| word.parse::<usize>().is_ok());
    let sizes: Vec<usize> = sizes.iter().filter_map(|word| word.parse().ok()).collect();
    let sizes = if sizes.is_empty() { SIZES.to_vec() } else { sizes };
    let wanted = |part: &str| parts.is_empty() || parts.contains(&part);
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    println!("kernel {}, {cpus} CPUs shared by both hosts and the clients\n", kernel.trim());
    if wanted("calls") {
        remote_calls()?;
    }
    let agent = vec![std::env::current_exe()?.into_os_string(), AGENT.into()];
    let migrate = std::env::var_os("MIGRATE_BIN").unwrap_or(env!("CARGO_BIN_EXE_migrate").into());
    let tools = Tools { migrate: migrate.into(), agent };
    if wanted("faults") {
        faults::run(&tools, MBIT)?;
    }
    if !["downtime", "rates", "late", "stall", "throughput", "link"].into_iter().any(wanted) {
        return Ok(());
    }
    let lan = Lan::start(&tools)?;
    lan.share_identity()?;
    let services = [lan.serve(&lan.a)?, lan.serve(&lan.b)?];
    let largest = sizes.iter().copied().filter(|_| wanted("downtime")).max().unwrap_or(0);
    warm(largest.max(1024));
    if wanted("downtime") {
        downtime::run(&lan, &services, &sizes)?;
    }
    if wanted("stall") {
        stall::run(&lan, &services)?;
    }
    if wanted("throughput") {
        throughput(&lan, &services)?;
    }
    for limit in [None, Some(MBIT)] {
        if let Some(mbit) = limit {
            lan.limit_rate(&lan.a, mbit)?;
            lan.limit_rate(&lan.b, mbit)?;
        }
        if wanted("rates") {
            rates::run(&lan, &services, limit)?;
        }
        if wanted("late") {
            late::run(&lan, &services, limit)?;
        }
        if wanted("link") {
            total(&lan, &services, limit)?;
        }
    }
    Ok(())
}

/// Touches as much memory as the largest move needs twice: fresh memory comes from the host at a tenth of the
/// speed of memory that was used before.
fn warm(largest_mib: usize) {
    let start = Instant::now();
    let bytes = (largest_mib * 9 / 4) << 20;
    let mut memory = vec![0_u8; bytes];
    memory.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
    std::hint::black_box(&memory);
    println!("Memory warmed: {} MiB in {:.1} s.\n", bytes >> 20, start.elapsed().as_secs_f64());
}

fn remote_calls() -> Result<()> {
    let sizes = [1, 16, 256];
    let costs = calls::measure(&sizes)?;
    println!("## A remote system call (getppid of a sleeping process)\n");
    let rows: Vec<Vec<String>> =
        sizes.iter().zip(costs).map(|(n, us)| vec![n.to_string(), format!("{us:.2}")]).collect();
    table::print(&words(&["calls in a batch", "us per call"]), &rows);
    Ok(())
}

/// The most that each service has had in memory so far.
fn print_peaks(lan: &Lan, services: &[Service; 2]) {
    for (host, service) in hosts(lan).into_iter().zip(services) {
        println!(
            "peak resident memory of serve on {}: {:.1} MiB",
            host.name(),
            peak(host, service.job.pid) as f64 / 1024.0
        );
    }
    println!();
}

/// Pre-copy with what keeps it from the process's CPU time: nothing but our threads' nice values; the nice
/// value of both hosts' sessions, which is what counts between sessions where the kernel groups by session;
/// a limit of bytes per second.
///
/// The server is bound to one processor and its client to another, on which it goes before all else: it
/// stands for a machine of its own. `migrate` may use all. Left to the scheduler they run now on one, now on
/// two, and where waking another processor is slow (a virtual machine's) that alone changes their rate by a
/// factor of two.
fn throughput(lan: &Lan, services: &[Service; 2]) -> Result<()> {
    const MIB: usize = 512;
    println!(
        "## Throughput of redis with {MIB} MiB: one client, 64 to 128 requests in flight, SET and EXISTS\n"
    );
    let mut grounds = Grounds::start(lan, services, MIB)?;
    grounds.pin(0)?;
    let seen = Seen::new();
    let client = grounds.client(
        |address, data, seen| {
            let mut only = CpuSet::new();
            only.set(1)?;
            sched_setaffinity(Pid::from_raw(0), &only)?;
            client::throughput(address, data, seen)
        },
        &seen,
    )?;
    nice_of_session(Path::new("/proc/self"), -20)?;
    let mut rows = Vec::new();
    let ways: [(&str, i32, &[&str]); 2] =
        [("as it is", 0, &[]), ("--bandwidth 40M", 0, &["--bandwidth", "40M"])];
    let result = ways.into_iter().try_for_each(|(name, nice, options)| -> Result<()> {
        for host in hosts(lan) {
            nice_of_session(&host.proc(1), nice)?;
        }
        let (mut alones, mut durings, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        let (mut copying, mut downtimes) = (Vec::new(), Vec::new());
        for _ in 0..5 {
            let before = alone(&seen);
            let one = grounds.shift_with(options)?;
            let took = one.phase("prepare") + one.phase("track") + one.phase("precopy");
            let during = seen.rate(one.started, one.started + Duration::from_secs_f64(took / 1e3));
            // The machine's speed wanders: on both sides of the move.
            let alone = f64::midpoint(before, alone(&seen));
            alones.push(alone);
            durings.push(during);
            ratios.push(during / alone);
            copying.push(took);
            downtimes.push(one.number("downtime_ms"));
        }
        rows.push(vec![
            name.to_owned(),
            format!("{:.0}", median(&mut alones)),
            format!("{:.0}", median(&mut durings)),
            format!("{:.2}", median(&mut ratios)),
            format!("{:.0}", median(&mut copying)),
            format!("{:.1}", median(&mut downtimes)),
        ]);
        Ok(())
    });
    for host in hosts(lan) {
        nice_of_session(&host.proc(1), 0)?;
    }
    nice_of_session(Path::new("/proc/self"), 0)?;
    seen.stop.store(true, Ordering::Relaxed);
    client.join().map_err(|_| anyhow!("the client panicked"))???;
    result?;
    table::print(&words(&["way", "alone, 1/s", "pre-copy, 1/s", "ratio", "pre-copy, ms", "downtime"]), &rows);
    Ok(())
}

/// Its rate without a move.
fn alone(seen: &Seen) -> f64 {
    // The memory of the killed source is taken apart first.
    std::thread::sleep(Duration::from_millis(500));
    let start = Instant::now();
    std::thread::sleep(Duration::from_secs(3));
    seen.rate(start, Instant::now())
}

/// Where the kernel groups by session (`sched_autogroup`).
fn nice_of_session(process: &Path, nice: i32) -> Result<()> {
    let file = process.join("autogroup");
    if file.exists() {
        std::fs::write(file, nice.to_string())?;
    }
    Ok(())
}

fn total(lan: &Lan, services: &[Service; 2], limit: Option<u32>) -> Result<()> {
    const MIB: usize = 512;
    println!("## Total time against the link ({MIB} MiB of data, one client as above)\n");
    let link = link::measure(lan, if limit.is_some() { 250_000_000 } else { 1_000_000_000 })?;
    let mut grounds = Grounds::start(lan, services, MIB)?;
    let seen = Seen::new();
    let client = grounds.client(client::pauses, &seen)?;
    let moves: Result<Vec<Moved>> = (0..4).map(|_| grounds.shift()).collect();
    seen.stop.store(true, Ordering::Relaxed);
    client.join().map_err(|_| anyhow!("the client panicked"))???;
    let moves = moves?;
    let of = |value: &dyn Fn(&Moved) -> f64| median(&mut moves[1..].iter().map(value).collect::<Vec<_>>());
    let (wire, total) = (of(&|m| m.number("bytes_wire")), of(&|m| m.number("total_ms")));
    let ideal = wire / link * 1e3;
    let row = vec![
        limit.map_or("veth".to_owned(), |mbit| format!("tbf {mbit} Mbit/s")),
        format!("{:.0}", link / 1e6),
        format!("{:.0}", wire / 1e6),
        format!("{ideal:.0}"),
        format!("{total:.0}"),
        format!("{:.2}", total / ideal),
        format!("{:.1}", of(&|m| m.number("downtime_ms"))),
    ];
    table::print(
        &words(&["link", "carries, MB/s", "wire, MB", "ideal, ms", "total, ms", "ratio", "downtime"]),
        &[row],
    );
    Ok(())
}

/// How busy the machine is with other things, too: many of them queue for the same CPUs.
fn load_average() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or_default().to_owned()
}
