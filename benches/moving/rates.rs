//! Downtime, and what comes after it, by the rate of writes: the mode auto against pre-copy.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use migrate::testbed::{Lan, Service};

use crate::client::{self, Seen};
use crate::downtime::MODES;
use crate::grounds::Grounds;
use crate::table::{self, median, words};

const MIB: usize = 1024;
/// Writes per second, each of a value of 1,000 bytes somewhere in the memory.
const RATES: [usize; 3] = [0, 1_000, 20_000];
/// Moves of each kind; the first is not counted.
const MOVES: usize = 4;
/// How long after the gap requests are looked at.
const AFTER: Duration = Duration::from_secs(3);

pub(crate) fn run(lan: &Lan, services: &[Service; 2], limit: Option<u32>) -> Result<()> {
    let link = limit.map_or("unlimited".to_owned(), |mbit| format!("{mbit} Mbit/s"));
    println!("## Downtime by the rate of writes, ms ({MIB} MiB, {link} link; medians)\n");
    let mut rows = Vec::new();
    for rate in RATES {
        let load = crate::load_average();
        let mut grounds = Grounds::start(lan, services, MIB)?;
        let (looking, writing) = (Seen::new(), Seen::new());
        let mut clients = vec![grounds.client(client::looks, &looking)?];
        if rate > 0 {
            clients.push(grounds.client(move |a, d, s| client::writes(a, d, s, rate), &writing)?);
        }
        let mut shown: [[Vec<f64>; 9]; MODES.len()] = Default::default();
        let result = (0..MOVES * MODES.len()).try_for_each(|turn| -> Result<()> {
            let way = turn % MODES.len();
            std::thread::sleep(Duration::from_millis(1500));
            let now = Instant::now();
            let second = Duration::from_secs(1);
            let wrote = writing.rate(now - second, now);
            let before = looking.wait_ms(99, now - second, now);
            let _ = looking.take_gaps();
            let one = grounds.shift_with(&["--mode", MODES[way]])?;
            std::thread::sleep(Duration::from_millis(100));
            let [gap, _] = looking.take_gaps();
            let gap = gap.context("the connection did not break")?;
            std::thread::sleep((gap.ended + AFTER).saturating_duration_since(Instant::now()));
            if turn >= MODES.len() {
                let values = [
                    wrote,
                    gap.whole.as_secs_f64() * 1e3,
                    before,
                    looking.wait_ms(99, gap.ended, gap.ended + AFTER),
                    one.number("pages_after_freeze"),
                    one.number("pages_postcopy"),
                    one.report["rounds"].as_array().map_or(0, Vec::len) as f64,
                    one.number("bytes_wire") / 1e6,
                    one.number("total_ms"),
                ];
                shown[way].iter_mut().zip(values).for_each(|(all, value)| all.push(value));
            }
            Ok(())
        });
        looking.stop.store(true, Ordering::Relaxed);
        writing.stop.store(true, Ordering::Relaxed);
        for client in clients {
            client.join().map_err(|_| anyhow!("a client panicked"))???;
        }
        result?;
        for (way, values) in shown.iter_mut().enumerate() {
            let worst = values[1].iter().copied().fold(0.0, f64::max);
            let [wrote, gap, before, after, pages, late, rounds, wire, total] =
                values.each_mut().map(|all| median(all));
            rows.push(vec![
                rate.to_string(),
                MODES[way].to_owned(),
                load.clone(),
                format!("{wrote:.0}"),
                format!("{gap:.1}"),
                format!("{worst:.1}"),
                format!("{before:.2}"),
                format!("{after:.2}"),
                format!("{pages:.0}"),
                format!("{late:.0}"),
                format!("{rounds:.0}"),
                format!("{wire:.0}"),
                format!("{total:.0}"),
            ]);
        }
    }
    let head = [
        "writes/s",
        "mode",
        "load",
        "reached",
        "client",
        "worst",
        "p99 before",
        "p99 after",
        "pages",
        "late",
        "rounds",
        "wire MB",
        "total",
    ];
    table::print(&words(&head), &rows);
    crate::print_peaks(lan, services);
    Ok(())
}
