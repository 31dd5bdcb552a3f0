//! Downtime as a client sees it, by the size of the memory, with what it is made of.

use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use migrate::testbed::{Lan, Service};

use crate::client::{self, Gap, Seen};
use crate::grounds::{Grounds, Moved};
use crate::table::{self, median, words};

/// Both ways to move it, in turn.
pub(crate) const MODES: [&str; 2] = ["auto", "precopy"];
/// Phases inside the downtime. Those of the source follow one another, but for the `beside_` ones, which
/// happen during `capture`; those of the destination are inside its `apply` and `commit`.
const PHASES: [&str; 14] = [
    "freeze",
    "addresses",
    "scan",
    "beside_scan",
    "beside_pages",
    "pages",
    "capture",
    "apply",
    "dest_build",
    "dest_watch",
    "dest_restore",
    "commit",
    "dest_accept",
    "downtime_ms",
];

/// What one way of moving one size has shown.
#[derive(Default)]
struct Shown {
    moved: Vec<Moved>,
    gaps: Vec<Gap>,
    stalls: Vec<f64>,
}

/// Moves per size and mode; the first of each is not counted.
fn moves(mib: usize) -> usize {
    match mib {
        0..=128 => 12,
        129..=1024 => 8,
        1025..=4096 => 6,
        // The first is not counted, and each takes half a minute.
        _ => 4,
    }
}

pub(crate) fn run(lan: &Lan, services: &[Service; 2], sizes: &[usize]) -> Result<()> {
    println!("## Downtime, ms (medians; one client: SET and PING in turn, every 0.25 ms)\n");
    let (mut rows, mut details) = (Vec::new(), Vec::new());
    let mut smallest = [0.0; MODES.len()];
    for &mib in sizes {
        let load = crate::load_average();
        let mut grounds = Grounds::start(lan, services, mib)?;
        let seen = Seen::new();
        let client = grounds.client(client::pauses, &seen)?;
        let mut shown: [Shown; MODES.len()] = Default::default();
        let result = (0..moves(mib) * MODES.len()).try_for_each(|turn| -> Result<()> {
            let way = turn % MODES.len();
            // The memory of the killed source is taken apart first.
            std::thread::sleep(Duration::from_millis(300 + mib as u64 / 8));
            let _ = seen.take_gaps();
            let one = grounds.shift_with(&["--mode", MODES[way]])?;
            std::thread::sleep(Duration::from_millis(100));
            let [gap, stall] = seen.take_gaps();
            if turn >= MODES.len() {
                shown[way].moved.push(one);
                shown[way].gaps.push(gap.context("the connection did not break")?);
                shown[way].stalls.push(stall.map_or(0.0, |gap| gap.whole.as_secs_f64() * 1e3));
            }
            Ok(())
        });
        seen.stop.store(true, Ordering::Relaxed);
        client.join().map_err(|_| anyhow!("the client panicked"))???;
        result?;
        for (way, shown) in shown.iter_mut().enumerate() {
            let whole = shown.gap(|g| g.whole);
            if smallest[way] == 0.0 {
                smallest[way] = whole;
            }
            let names = [mib.to_string(), MODES[way].to_owned()];
            rows.push([&names[..], &shown.cells(whole, whole / smallest[way], &load)].concat());
            let phases = PHASES.iter().map(|phase| format!("{:.2}", shown.of(|m| phase_of(m, phase))));
            details.push(names.iter().cloned().chain(phases).collect());
        }
    }
    let head = [
        "MiB",
        "mode",
        "load",
        "moves",
        "client",
        "÷ least MiB",
        "worst",
        "to close",
        "to connect",
        "stall",
        "report",
        "pages",
        "late",
        "rounds",
        "total",
        "wire MB",
        "peak MiB",
    ];
    table::print(&words(&head), &rows);
    println!("Phases of the downtime, ms\n");
    table::print(&words(&[&["MiB", "mode"], &PHASES[..]].concat()), &details);
    crate::print_peaks(lan, services);
    Ok(())
}

fn phase_of(moved: &Moved, phase: &str) -> f64 {
    if phase.ends_with("_ms") { moved.number(phase) } else { moved.phase(phase) }
}

impl Shown {
    fn of(&self, value: impl Fn(&Moved) -> f64) -> f64 {
        median(&mut self.moved.iter().map(value).collect::<Vec<_>>())
    }

    fn gap(&self, value: impl Fn(&Gap) -> Duration) -> f64 {
        median(&mut self.gaps.iter().map(|g| value(g).as_secs_f64() * 1e3).collect::<Vec<_>>())
    }

    fn cells(&mut self, whole: f64, ratio: f64, load: &str) -> Vec<String> {
        let worst = self.gaps.iter().map(|g| g.whole).max().unwrap_or_default().as_secs_f64() * 1e3;
        vec![
            load.to_owned(),
            self.moved.len().to_string(),
            format!("{whole:.1}"),
            format!("{ratio:.2}"),
            format!("{worst:.1}"),
            format!("{:.1}", self.gap(|g| g.until_closed)),
            format!("{:.1}", self.gap(|g| g.until_connected)),
            format!("{:.1}", median(&mut self.stalls)),
            format!("{:.1}", self.of(|m| m.number("downtime_ms"))),
            format!("{:.0}", self.of(|m| m.number("pages_after_freeze"))),
            format!("{:.0}", self.of(|m| m.number("pages_postcopy"))),
            format!("{:.0}", self.of(|m| m.report["rounds"].as_array().map_or(0, Vec::len) as f64)),
            format!("{:.0}", self.of(|m| m.number("total_ms"))),
            format!("{:.0}", self.of(|m| m.number("bytes_wire") / 1e6)),
            format!("{:.1}", self.moved.iter().map(|m| m.peak_kib).max().unwrap_or(0) as f64 / 1024.0),
        ]
    }
}
