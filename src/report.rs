//! What became of a migration: the report at its end, the clock behind it, the lines while it runs.

pub mod histogram;
mod postcopy;

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use serde::{Serialize, Serializer};

use crate::engine::reason::Reason;

pub use histogram::{Histogram, Latency};
pub use postcopy::Postcopy;

/// How a migration ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The process runs at the destination.
    Moved,
    /// The process runs at the source, as before.
    NotMoved,
    /// The source gave the right to run away and does not know whether it was taken.
    Unknown,
}

/// When the memory travelled, as it turned out: what was asked for may have left the choice open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// All of it before the process ran at the destination.
    Precopy,
    /// All of it after.
    Postcopy,
    /// Some in rounds before, the rest after.
    Hybrid,
}

/// One round of copying.
#[derive(Debug, Clone, Serialize)]
pub struct Round {
    /// Pages sent, zero pages included.
    pub pages: u64,
    /// Bytes of all frames of the round.
    pub bytes_wire: u64,
    /// Time from the scan to the last frame handed over, in ms.
    #[serde(rename = "ms", serialize_with = "as_ms")]
    pub took: Duration,
    /// Pages found written since they were sent, at the next scan.
    pub dirty_after: u64,
}

/// The report at the end of a migration. Serialised, durations are milliseconds.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Names the migration on both nodes.
    pub migration_id: String,
    /// The process.
    pub pid: i32,
    /// The destination as the operator named it.
    pub destination: String,
    /// When its memory travelled: see [`Report::settle_mode`].
    pub mode: Mode,
    /// How it ended.
    pub outcome: Outcome,
    /// What stood in the way, or what the operator has to look after.
    pub reasons: Vec<Reason>,
    /// What is different after the move, and was no obstacle to it.
    pub notes: Vec<Reason>,
    /// From the start of the command to its end.
    #[serde(rename = "total_ms", serialize_with = "as_ms")]
    pub total: Duration,
    /// From the freeze to the resume.
    #[serde(rename = "downtime_ms", serialize_with = "as_ms")]
    pub downtime: Duration,
    /// Time by phase, in ms; those inside the downtime add up to it.
    pub phases: Phases,
    /// The rounds, in order.
    pub rounds: Vec<Round>,
    /// Resident memory of the process.
    pub memory_bytes: u64,
    /// Bytes of all frames and control messages.
    pub bytes_wire: u64,
    /// Pages sent as zeros.
    pub pages_zero: u64,
    /// Pages sent with contents.
    pub pages_data: u64,
    /// Of both, those sent after the freeze.
    pub pages_after_freeze: u64,
    /// Live TCP connections that were carried.
    pub connections: u64,
    /// Of these, those whose sockets were made at the destination before the state came.
    pub connections_ahead: u64,
    /// What was done after the resume.
    #[serde(flatten)]
    pub postcopy: Postcopy,
    /// Bytes of pages with contents by the bytes they took on the wire; 1 if none were sent.
    pub compression_ratio: f64,
}

impl Report {
    /// The report of a migration that has just begun: not moved.
    pub fn new(migration_id: String, pid: i32, destination: String) -> Self {
        Self {
            migration_id,
            pid,
            destination,
            mode: Mode::Precopy,
            outcome: Outcome::NotMoved,
            reasons: Vec::new(),
            notes: Vec::new(),
            total: Duration::ZERO,
            downtime: Duration::ZERO,
            phases: Phases::default(),
            rounds: Vec::new(),
            memory_bytes: 0,
            bytes_wire: 0,
            pages_zero: 0,
            pages_data: 0,
            pages_after_freeze: 0,
            connections: 0,
            connections_ahead: 0,
            postcopy: Postcopy::default(),
            compression_ratio: 1.0,
        }
    }

    /// Says in `mode` what rounds and post-copy have become.
    pub fn settle_mode(&mut self) {
        self.mode = match (self.postcopy.happened(), self.rounds.is_empty()) {
            (false, _) => Mode::Precopy,
            (true, false) => Mode::Hybrid,
            (true, true) => Mode::Postcopy,
        };
    }

    /// The exit status that says the same: 0 moved, 1 not moved, 3 somebody has to look.
    pub fn exit_status(&self) -> u8 {
        match self.outcome {
            Outcome::Moved => 0,
            Outcome::NotMoved => 1,
            Outcome::Unknown => 3,
        }
    }
}

/// Time by named phase. Phases may be added to, and come from the other node too.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Phases(BTreeMap<String, Duration>);

impl Phases {
    /// Adds to a phase.
    pub fn add(&mut self, name: &str, took: Duration) {
        *self.0.entry(name.to_owned()).or_default() += took;
    }

    /// Adds the phases that the other node timed, in microseconds, each behind `prefix`.
    pub fn add_remote<'a>(&mut self, prefix: &str, phases: impl IntoIterator<Item = (&'a String, &'a u64)>) {
        for (name, us) in phases {
            self.add(&format!("{prefix}{name}"), Duration::from_micros(*us));
        }
    }

    /// Takes over all phases of another set.
    pub fn merge(&mut self, other: Phases) {
        other.0.into_iter().for_each(|(name, took)| self.add(&name, took));
    }

    /// The time of a phase, zero if it did not happen.
    pub fn of(&self, name: &str) -> Duration {
        self.0.get(name).copied().unwrap_or_default()
    }

    /// All phases in microseconds, for the other node.
    pub fn to_micros(&self) -> impl Iterator<Item = (String, u64)> {
        self.0.iter().map(|(name, took)| (name.clone(), u64::try_from(took.as_micros()).unwrap_or(u64::MAX)))
    }
}

impl Serialize for Phases {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, took)| (name, ms(*took))))
    }
}

/// Times phases that follow one another.
#[derive(Debug)]
pub struct PhaseClock {
    start: Instant,
    phases: Phases,
    running: Option<(&'static str, Instant)>,
}

impl PhaseClock {
    /// A clock that starts now, in no phase.
    pub fn start() -> Self {
        Self { start: Instant::now(), phases: Phases::default(), running: None }
    }

    /// Ends the phase that runs and begins another.
    pub fn begin(&mut self, name: &'static str) {
        self.end();
        self.running = Some((name, Instant::now()));
    }

    /// Ends the phase that runs.
    pub fn end(&mut self) {
        if let Some((name, since)) = self.running.take() {
            self.phases.add(name, since.elapsed());
        }
    }

    /// Time since the clock was started.
    pub fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    /// The phases that have ended.
    pub fn so_far(&self) -> &Phases {
        &self.phases
    }

    /// Ends the phase that runs and gives the phases out.
    pub fn finish(mut self) -> Phases {
        self.end();
        self.phases
    }
}

fn ms(duration: Duration) -> f64 {
    // Microseconds are what the clocks are good for.
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

fn as_ms<S: Serializer>(duration: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(ms(*duration))
}

/// Bytes with a unit that keeps the number short.
struct Bytes(f64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = ["B", "KiB", "MiB", "GiB", "TiB"];
        let mut value = self.0;
        let mut unit = 0;
        while value >= 1024.0 && unit + 1 < units.len() {
            value /= 1024.0;
            unit += 1;
        }
        let unit = units.get(unit).copied().unwrap_or("B");
        if unit == "B" { write!(f, "{value:.0} B") } else { write!(f, "{value:.1} {unit}") }
    }
}

/// A number of bytes as people read it.
#[allow(clippy::cast_precision_loss, reason = "shown with two digits")]
pub fn bytes(count: u64) -> impl fmt::Display {
    Bytes(count as f64)
}

#[allow(clippy::cast_precision_loss, reason = "shown with two digits")]
fn rate(count: u64, took: Duration) -> Bytes {
    Bytes(count as f64 / took.as_secs_f64().max(1e-6))
}

impl fmt::Display for Report {
    /// The block that people read: one fact per line, as QEMU's `info migrate` has it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let status = match self.outcome {
            Outcome::Moved => "moved",
            Outcome::NotMoved => "not moved: it runs here as before",
            Outcome::Unknown => "unknown: a look is needed",
        };
        writeln!(f, "migration {} of pid {} to {}", self.migration_id, self.pid, self.destination)?;
        writeln!(f, "status: {status}")?;
        for reason in &self.reasons {
            writeln!(f, "  {reason}")?;
        }
        for note in &self.notes {
            writeln!(f, "  note: {note}")?;
        }
        writeln!(f, "total time: {:.1} ms", ms(self.total))?;
        if self.rounds.is_empty() && !self.postcopy.happened() {
            return Ok(());
        }
        writeln!(f, "downtime: {:.1} ms", ms(self.downtime))?;
        let copying = self.rounds.iter().map(|round| round.took).sum();
        writeln!(
            f,
            "memory: {}, transferred: {} at {}/s, compression: {:.2}x",
            bytes(self.memory_bytes),
            bytes(self.bytes_wire),
            rate(self.rounds.iter().map(|round| round.bytes_wire).sum(), copying),
            self.compression_ratio
        )?;
        writeln!(
            f,
            "pages: {} data, {} zero, {} after the freeze; rounds: {}",
            self.pages_data,
            self.pages_zero,
            self.pages_after_freeze,
            self.rounds.len()
        )?;
        if self.connections > 0 {
            writeln!(f, "connections: {}, {} made ahead", self.connections, self.connections_ahead)?;
        }
        if self.postcopy.happened() {
            writeln!(f, "{}", self.postcopy)?;
        }
        let phases: Vec<_> =
            self.phases.0.iter().map(|(name, took)| format!("{name} {:.2}", ms(*took))).collect();
        writeln!(f, "phases (ms): {}", phases.join(", "))
    }
}

/// What is known at the end of a round, for the line on the terminal.
#[derive(Debug, Clone, Copy)]
pub struct RoundProgress {
    /// Number of the round, from 1.
    pub number: u32,
    /// Pages sent.
    pub pages: u64,
    /// Bytes of their frames.
    pub bytes_wire: u64,
    /// How long it took.
    pub took: Duration,
    /// Pages written per second, as measured since the last scan.
    pub dirty_pages_per_second: u64,
    /// The downtime if the freeze came now.
    pub expected_downtime: Duration,
}

impl fmt::Display for RoundProgress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "round {}: {} pages, {} in {:.0} ms ({}/s), dirty rate {} pages/s, expected downtime {:.1} ms",
            self.number,
            self.pages,
            bytes(self.bytes_wire),
            ms(self.took),
            rate(self.bytes_wire, self.took),
            self.dirty_pages_per_second,
            ms(self.expected_downtime)
        )
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn report() -> Report {
        let mut report = Report::new("m1".into(), 42, "b:7077".into());
        report.outcome = Outcome::Moved;
        report.downtime = Duration::from_micros(8125);
        report.total = Duration::from_millis(1500);
        report.phases.add("freeze", Duration::from_micros(500));
        report.phases.add("freeze", Duration::from_micros(250));
        report.phases.add_remote("dest.", [(&"place".to_owned(), &1000)]);
        let took = Duration::from_millis(100);
        report.rounds.push(Round { pages: 2560, bytes_wire: 5 << 20, took, dirty_after: 7 });
        report.memory_bytes = 10 << 20;
        report
    }

    #[test]
    fn the_json_has_every_key_and_milliseconds() {
        let json: serde_json::Value = serde_json::to_value(report()).unwrap();
        for key in [
            "migration_id",
            "pid",
            "mode",
            "outcome",
            "reasons",
            "total_ms",
            "downtime_ms",
            "phases",
            "rounds",
            "memory_bytes",
            "bytes_wire",
            "pages_zero",
            "pages_data",
            "pages_after_freeze",
            "connections",
            "connections_ahead",
            "compression_ratio",
            "pages_postcopy",
            "pages_faulted",
            "pages_pushed",
            "fault_latency_us",
            "postcopy_ms",
            "recoveries",
            "paused_ms",
        ] {
            assert!(json.get(key).is_some(), "{key}");
        }
        assert_eq!(json["mode"], "precopy");
        assert_eq!(json["outcome"], "moved");
        assert_eq!(json["downtime_ms"], 8.125);
        assert_eq!(json["phases"]["freeze"], 0.75);
        assert_eq!(json["phases"]["dest.place"], 1.0);
        for key in ["pages", "bytes_wire", "ms", "dirty_after"] {
            assert!(json["rounds"][0].get(key).is_some(), "{key}");
        }
    }

    #[test]
    fn people_read_a_block() {
        let text = report().to_string();
        assert!(text.contains("downtime: 8.1 ms"), "{text}");
        assert!(text.contains("5.0 MiB") || text.contains("50.0 MiB/s"), "{text}");
        let mut refused = report();
        refused.outcome = Outcome::NotMoved;
        refused.rounds.clear();
        refused.reasons.push(Reason::new("fd 5", "is an inotify descriptor", ""));
        let text = refused.to_string();
        assert!(text.contains("runs here as before") && text.contains("fd 5: is an inotify"), "{text}");
        assert_eq!((report().exit_status(), refused.exit_status()), (0, 1));
    }

    #[test]
    fn the_mode_is_what_happened() {
        let mut report = report();
        report.settle_mode();
        assert_eq!(report.mode, Mode::Precopy);
        assert!(!report.to_string().contains("post-copy"));
        report.postcopy.took = Duration::from_millis(250);
        report.postcopy.pages_postcopy = 1000;
        report.settle_mode();
        assert_eq!(report.mode, Mode::Hybrid);
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!((&json["mode"], &json["postcopy_ms"]), (&"hybrid".into(), &250.0.into()));
        report.rounds.clear();
        report.settle_mode();
        assert_eq!(report.mode, Mode::Postcopy);
        let text = report.to_string();
        assert!(text.contains("post-copy: 1000 pages in 250.0 ms") && text.contains("downtime"), "{text}");
    }

    #[test]
    fn the_clock_adds_up() {
        let started = Instant::now();
        let mut clock = PhaseClock::start();
        clock.begin("a");
        clock.begin("b");
        clock.begin("a");
        let phases = clock.finish();
        assert!(phases.of("a") > Duration::ZERO && phases.of("c") == Duration::ZERO);
        assert!(phases.of("a") + phases.of("b") <= started.elapsed());
    }
}
