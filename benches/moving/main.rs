//! The numbers that this program is judged by, side by side in one run: `cargo bench --bench moving`.
//!
//! Two hosts in namespaces of this machine, a real redis-server that is moved back and forth between them
//! while clients use it. `docs/benchmarks.md` explains the tables. As root, with redis-server installed;
//! words after `--` choose parts: `calls`, `faults`, `link`,
//! `downtime`, `throughput`.

#![allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, reason = "numbers for people")]

mod calls;
mod client;
mod data;
mod faults;
mod grounds;
mod link;
mod table;

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use migrate::testbed::{Lan, Service, Tools, agent};

use client::Seen;
use grounds::{Grounds, Moved, hosts, peak};
use table::median;

/// The word that makes this program the first process of a host.
const AGENT: &str = "--node-agent";
/// Sizes of the data, MiB.
const SIZES: [usize; 4] = [64, 512, 1024, 2048];
/// Moves per size; the first is not counted.
const MOVES: [usize; 4] = [12, 8, 6, 6];
/// Phases inside the downtime: those of the source follow one another, those of the destination are inside
/// its `apply` and `commit`.
const PHASES: [&str; 9] =
    ["freeze", "addresses", "scan", "pages", "capture", "apply", "dest_build", "dest_restore", "commit"];
/// The speed of the limited link.
const MBIT: u32 = 1000;

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let [first, name, pid, run] = words.as_slice()
        && first == AGENT
    {
        return Ok(agent::run(name, pid.parse()?, run == "whole-run")?);
    }
    let parts: Vec<&str> = words.iter().map(String::as_str).filter(|word| !word.starts_with("--")).collect();
    let wanted = |part: &str| parts.is_empty() || parts.contains(&part);
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    println!("kernel {}, {cpus} CPUs shared by both hosts and the clients\n", kernel.trim());
    if wanted("calls") {
        remote_calls()?;
    }
    let agent = vec![std::env::current_exe()?.into_os_string(), AGENT.into()];
    let tools = Tools { migrate: env!("CARGO_BIN_EXE_migrate").into(), agent };
    if wanted("faults") {
        faults::run(&tools, MBIT)?;
    }
    if !["downtime", "throughput", "link"].into_iter().any(wanted) {
        return Ok(());
    }
    let lan = Lan::start(&tools)?;
    lan.share_identity()?;
    let services = [lan.serve(&lan.a)?, lan.serve(&lan.b)?];
    warm();
    if wanted("downtime") {
        downtime(&lan, &services)?;
    }
    if wanted("throughput") {
        throughput(&lan, &services)?;
    }
    if wanted("link") {
        links(&lan, &services)?;
    }
    Ok(())
}

/// Touches as much memory as the largest move needs twice: fresh memory comes from the host at a tenth of the
/// speed of memory that was used before.
fn warm() {
    let start = Instant::now();
    let bytes = 5_usize << 30;
    let mut memory = vec![0_u8; bytes];
    memory.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
    std::hint::black_box(&memory);
    println!("Memory warmed: {} GiB in {:.1} s.\n", bytes >> 30, start.elapsed().as_secs_f64());
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

fn downtime(lan: &Lan, services: &[Service; 2]) -> Result<()> {
    println!("## Downtime, ms (medians; one client: SET and PING in turn, every 0.25 ms)\n");
    let (mut rows, mut details, mut seen_by_size) = (Vec::new(), Vec::new(), Vec::new());
    for (mib, moves) in SIZES.into_iter().zip(MOVES) {
        let load = load_average();
        let mut grounds = Grounds::start(lan, services, mib)?;
        let seen = Seen::new();
        let client = grounds.client(client::pauses, &seen)?;
        let (mut moved, mut gaps, mut stalls) = (Vec::new(), Vec::new(), Vec::new());
        let result = (0..moves).try_for_each(|turn| -> Result<()> {
            std::thread::sleep(Duration::from_millis(300));
            let _ = seen.take_gaps();
            let one = grounds.shift()?;
            std::thread::sleep(Duration::from_millis(100));
            let [gap, stall] = seen.take_gaps();
            if turn > 0 {
                moved.push(one);
                gaps.push(gap.context("the connection did not break")?);
                stalls.push(stall.map_or(0.0, |gap| gap.whole.as_secs_f64() * 1e3));
            }
            Ok(())
        });
        seen.stop.store(true, Ordering::Relaxed);
        client.join().map_err(|_| anyhow!("the client panicked"))???;
        result?;
        let of = |value: &dyn Fn(&Moved) -> f64| median(&mut moved.iter().map(value).collect::<Vec<_>>());
        let gap = |value: &dyn Fn(&client::Gap) -> Duration| {
            median(&mut gaps.iter().map(|g| value(g).as_secs_f64() * 1e3).collect::<Vec<_>>())
        };
        let whole = gap(&|g| g.whole);
        let worst = gaps.iter().map(|g| g.whole).max().unwrap_or_default().as_secs_f64() * 1e3;
        seen_by_size.push(whole);
        rows.push(vec![
            mib.to_string(),
            load.clone(),
            (moves - 1).to_string(),
            format!("{whole:.1}"),
            format!("{worst:.1}"),
            format!("{:.1}", gap(&|g| g.until_closed)),
            format!("{:.1}", gap(&|g| g.until_connected)),
            format!("{:.1}", median(&mut stalls)),
            format!("{:.1}", of(&|m| m.number("downtime_ms"))),
            format!("{:.0}", of(&|m| m.number("pages_after_freeze"))),
            format!("{:.0}", of(&|m| m.report["rounds"].as_array().map_or(0, Vec::len) as f64)),
            format!("{:.0}", of(&|m| m.number("total_ms"))),
            format!("{:.0}", of(&|m| m.number("bytes_wire") / 1e6)),
            format!("{:.1}", moved.iter().map(|m| m.peak_kib).max().unwrap_or(0) as f64 / 1024.0),
        ]);
        let phases = PHASES.iter().map(|phase| format!("{:.2}", of(&|m| m.phase(phase))));
        details.push(std::iter::once(mib.to_string()).chain(phases).collect::<Vec<_>>());
    }
    table::print(
        &words(&[
            "MiB",
            "load",
            "moves",
            "client",
            "worst",
            "to close",
            "to connect",
            "report",
            "pages",
            "rounds",
            "total",
            "wire MB",
            "peak MiB",
        ]),
        &rows,
    );
    let most = seen_by_size.iter().copied().fold(0.0, f64::max);
    let least = seen_by_size.iter().copied().fold(f64::MAX, f64::min);
    println!("largest / smallest, as the client sees it: {:.2}\n", most / least);
    println!("Phases of the downtime, ms\n");
    table::print(&words(&[&["MiB"], &PHASES[..]].concat()), &details);
    for (host, service) in hosts(lan).into_iter().zip(services) {
        println!(
            "peak resident memory of serve on {}: {:.1} MiB",
            host.name(),
            peak(host, service.job.pid) as f64 / 1024.0
        );
    }
    println!();
    Ok(())
}

/// Pre-copy with what keeps it from the process's CPU time: nothing but our threads' nice values; the nice
/// value of both hosts' sessions, which is what counts between sessions where the kernel groups by session;
/// a limit of bytes per second.
fn throughput(lan: &Lan, services: &[Service; 2]) -> Result<()> {
    const MIB: usize = 512;
    println!("## Throughput of redis with {MIB} MiB: one client, 16 requests in flight, SET and EXISTS\n");
    let mut grounds = Grounds::start(lan, services, MIB)?;
    let seen = Seen::new();
    let client = grounds.client(client::throughput, &seen)?;
    let mut rows = Vec::new();
    let ways: [(&str, i32, &[&str]); 3] = [
        ("as it is", 0, &[]),
        ("sessions at nice 10", 10, &[]),
        ("--bandwidth 40M", 0, &["--bandwidth", "40M"]),
    ];
    let result = ways.into_iter().try_for_each(|(name, nice, options)| -> Result<()> {
        for host in hosts(lan) {
            std::fs::write(host.proc(1).join("autogroup"), nice.to_string())?;
        }
        let (mut befores, mut durings, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        let (mut copying, mut downtimes) = (Vec::new(), Vec::new());
        for _ in 0..3 {
            // The memory of the killed source is taken apart first.
            std::thread::sleep(Duration::from_millis(1500));
            let before = seen.rate(Instant::now() - Duration::from_millis(1000), Instant::now());
            let one = grounds.shift_with(options)?;
            let took = one.phase("prepare") + one.phase("track") + one.phase("precopy");
            let during = seen.rate(one.started, one.started + Duration::from_secs_f64(took / 1e3));
            befores.push(before);
            durings.push(during);
            ratios.push(during / before);
            copying.push(took);
            downtimes.push(one.number("downtime_ms"));
        }
        rows.push(vec![
            name.to_owned(),
            format!("{:.0}", median(&mut befores)),
            format!("{:.0}", median(&mut durings)),
            format!("{:.2}", median(&mut ratios)),
            format!("{:.0}", median(&mut copying)),
            format!("{:.1}", median(&mut downtimes)),
        ]);
        Ok(())
    });
    for host in hosts(lan) {
        let _ = std::fs::write(host.proc(1).join("autogroup"), "0");
    }
    seen.stop.store(true, Ordering::Relaxed);
    client.join().map_err(|_| anyhow!("the client panicked"))???;
    result?;
    table::print(
        &words(&["way", "before, 1/s", "pre-copy, 1/s", "ratio", "pre-copy, ms", "downtime"]),
        &rows,
    );
    Ok(())
}

fn links(lan: &Lan, services: &[Service; 2]) -> Result<()> {
    const MIB: usize = 512;
    println!("## Total time against the link ({MIB} MiB of data, one client as above)\n");
    let mut rows = Vec::new();
    for limit in [None, Some(MBIT)] {
        if let Some(mbit) = limit {
            lan.limit_rate(&lan.a, mbit)?;
            lan.limit_rate(&lan.b, mbit)?;
        }
        let link = link::measure(lan, if limit.is_some() { 250_000_000 } else { 1_000_000_000 })?;
        let mut grounds = Grounds::start(lan, services, MIB)?;
        let seen = Seen::new();
        let client = grounds.client(client::pauses, &seen)?;
        let moves: Result<Vec<Moved>> = (0..4).map(|_| grounds.shift()).collect();
        seen.stop.store(true, Ordering::Relaxed);
        client.join().map_err(|_| anyhow!("the client panicked"))???;
        let moves = moves?;
        let of =
            |value: &dyn Fn(&Moved) -> f64| median(&mut moves[1..].iter().map(value).collect::<Vec<_>>());
        let (wire, total) = (of(&|m| m.number("bytes_wire")), of(&|m| m.number("total_ms")));
        let ideal = wire / link * 1e3;
        rows.push(vec![
            limit.map_or("veth".to_owned(), |mbit| format!("tbf {mbit} Mbit/s")),
            format!("{:.0}", link / 1e6),
            format!("{:.0}", wire / 1e6),
            format!("{ideal:.0}"),
            format!("{total:.0}"),
            format!("{:.2}", total / ideal),
            format!("{:.1}", of(&|m| m.number("downtime_ms"))),
        ]);
    }
    table::print(
        &words(&["link", "carries, MB/s", "wire, MB", "ideal, ms", "total, ms", "ratio", "downtime"]),
        &rows,
    );
    Ok(())
}

/// How busy the machine is with other things, too: many of them queue for the same CPUs.
fn load_average() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or_default().to_owned()
}

fn words(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|text| (*text).to_owned()).collect()
}
