//! What follows after the resume: how long the process waits for a page, how fast the rest comes, and the
//! total time, against what the link gives in the same run.

use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Result, anyhow};
use migrate::testbed::{Lan, Service};

use crate::client::{self, Seen};
use crate::faults;
use crate::grounds::Grounds;
use crate::link;
use crate::table::{self, median, words};

const MIB: usize = 1024;
/// Moves of each mode; the first is not counted.
const MOVES: usize = 4;
const MODES: [&str; 2] = ["precopy", "postcopy"];

pub(crate) fn run(lan: &Lan, services: &[Service; 2], limit: Option<u32>) -> Result<()> {
    let name = limit.map_or("unlimited".to_owned(), |mbit| format!("{mbit} Mbit/s"));
    println!("## Post-copy against pre-copy and the link ({MIB} MiB, {name} link; medians)\n");
    let round_trip = median(&mut faults::echo(lan)?);
    let link = link::measure(lan, if limit.is_some() { 250_000_000 } else { 1_000_000_000 })?;
    println!(
        "Round trip of a small packet, idle: {round_trip:.0} us; the link carries {:.0} MB/s.\n",
        link / 1e6
    );
    let load = crate::load_average();
    let mut grounds = Grounds::start(lan, services, MIB)?;
    let seen = Seen::new();
    let client = grounds.client(client::looks, &seen)?;
    let mut shown: [[Vec<f64>; 8]; MODES.len()] = Default::default();
    let result = (0..MOVES * MODES.len()).try_for_each(|turn| -> Result<()> {
        let way = turn % MODES.len();
        std::thread::sleep(Duration::from_millis(1500));
        let one = grounds.shift_with(&["--mode", MODES[way]])?;
        if turn >= MODES.len() {
            let first = &one.report["rounds"][0];
            let of = |name: &str| first[name].as_f64().unwrap_or_default();
            // Pages a second: how much of them travels depends on their contents, which are the same.
            let rate = match MODES[way] {
                "precopy" => of("pages") / of("ms"),
                _ => one.number("pages_postcopy") / one.number("postcopy_ms"),
            };
            let fault = |name: &str| one.report["fault_latency_us"][name].as_f64().unwrap_or_default();
            let wire = one.number("bytes_wire");
            let values = [
                one.number("downtime_ms"),
                rate,
                fault("count"),
                fault("p50"),
                fault("p99"),
                one.number("total_ms"),
                wire / 1e6,
                one.number("total_ms") / (wire / link * 1e3),
            ];
            shown[way].iter_mut().zip(values).for_each(|(all, value)| all.push(value));
        }
        Ok(())
    });
    seen.stop.store(true, Ordering::Relaxed);
    client.join().map_err(|_| anyhow!("the client panicked"))???;
    result?;
    let mut rows = Vec::new();
    let plain = median(&mut shown[0][1]);
    for (way, values) in shown.iter_mut().enumerate() {
        let [downtime, rate, faults, p50, p99, total, wire, ratio] = values.each_mut().map(|all| median(all));
        rows.push(vec![
            MODES[way].to_owned(),
            load.clone(),
            format!("{downtime:.1}"),
            format!("{:.0}", rate * 4096.0 / 1e3),
            format!("{:.2}", rate / plain),
            format!("{faults:.0}"),
            format!("{p50:.0}"),
            format!("{p99:.0}"),
            format!("{:.0}", p50 - round_trip),
            format!("{total:.0}"),
            format!("{wire:.0}"),
            format!("{ratio:.2}"),
        ]);
    }
    let head = [
        "mode",
        "load",
        "downtime",
        "memory, MB/s",
        "of pre-copy",
        "faults",
        "p50, us",
        "p99, us",
        "p50 - rt",
        "total",
        "wire MB",
        "÷ (wire ÷ link)",
    ];
    table::print(&words(&head), &rows);
    crate::print_peaks(lan, services);
    Ok(())
}
