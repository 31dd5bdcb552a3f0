//! Migrations as a table for people.

use std::fmt;
use std::time::Duration;

use super::protocol::{MigrationStatus, Phase, Side};
use crate::report::bytes;

/// Digits of an id that are shown: enough to name it by.
const ID_DIGITS: usize = 12;
const PAGE_BYTES: u64 = 4096;
const HEAD: [&str; 11] =
    ["ID", "SIDE", "PID", "COMMAND", "PHASE", "LEFT", "RATE", "MEAN", "DIRTY", "ELAPSED", "PEER"];

/// Shows migrations, one a line, then what people have to know of single ones.
#[derive(Debug)]
pub struct Table<'a>(pub &'a [MigrationStatus]);

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return writeln!(f, "no migrations");
        }
        let mut rows = vec![HEAD.map(str::to_owned)];
        rows.extend(self.0.iter().map(row));
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: [usize; HEAD.len()] = std::array::from_fn(width);
        for row in &rows {
            let cells: Vec<_> =
                row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
            writeln!(f, "{}", cells.join("  ").trim_end())?;
        }
        for migration in self.0 {
            let id = short(migration);
            if let Some(faults) = migration.faults.filter(|faults| faults.count > 0) {
                writeln!(f, "{id}: faults: {faults}")?;
            }
            if let Some(command) = &migration.resolve_with {
                writeln!(f, "{id}: left behind; resolve it with: {command}")?;
            }
        }
        Ok(())
    }
}

fn short(migration: &MigrationStatus) -> String {
    migration.migration_id.to_string().chars().take(ID_DIGITS).collect()
}

fn row(m: &MigrationStatus) -> [String; HEAD.len()] {
    let nothing = || "-".to_owned();
    let per_second = |rate: u64| if rate == 0 { nothing() } else { format!("{}/s", bytes(rate)) };
    let phase = match (m.phase, m.round) {
        (Phase::Precopy, Some(round)) => format!("{} round {round}", m.phase),
        (phase, _) => phase.to_string(),
    };
    [
        short(m),
        match m.side {
            Side::Source => "source".to_owned(),
            Side::Destination => "destination".to_owned(),
        },
        m.pid.to_string(),
        if m.command.is_empty() { nothing() } else { m.command.clone() },
        phase,
        m.pages_remaining.map_or_else(nothing, |pages| bytes(pages.saturating_mul(PAGE_BYTES)).to_string()),
        per_second(m.bytes_per_second),
        per_second(m.bytes_per_second_mean),
        m.dirty_pages_per_second
            .map_or_else(nothing, |pages| format!("{}/s", bytes(pages.saturating_mul(PAGE_BYTES)))),
        m.elapsed_ms.map_or_else(nothing, |ms| format!("{:.1} s", Duration::from_millis(ms).as_secs_f64())),
        m.peer.clone(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migration::{ID_BYTES, MigrationId};
    use crate::report::Latency;

    fn status() -> MigrationStatus {
        MigrationStatus {
            migration_id: MigrationId::new([0xab; ID_BYTES]),
            side: Side::Source,
            pid: 4242,
            command: "redis-server".into(),
            phase: Phase::Precopy,
            round: Some(2),
            pages_remaining: Some(256),
            bytes_per_second: 5 << 20,
            bytes_per_second_mean: 3 << 20,
            dirty_pages_per_second: Some(512),
            faults: None,
            elapsed_ms: Some(1250),
            peer: "b:7077".into(),
            migrate_pid: Some(1),
            resolve_with: None,
        }
    }

    #[test]
    fn columns_stand_below_one_another() {
        let other = MigrationStatus {
            side: Side::Destination,
            phase: Phase::Paused,
            pages_remaining: None,
            faults: Some(Latency { count: 3, p50: 80.0, p99: 90.0, max: 90.0 }),
            ..status()
        };
        let left = MigrationStatus {
            command: String::new(),
            phase: Phase::Limbo,
            elapsed_ms: None,
            resolve_with: Some("migrate resume abab".into()),
            ..status()
        };
        let text = Table(&[status(), other, left]).to_string();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 6, "{text}");
        for word in
            ["abababababab", "4242", "redis-server", "pre-copy round 2", "1.0 MiB", "5.0 MiB/s", "1.2 s"]
        {
            assert!(lines[1].contains(word), "{word}: {text}");
        }
        let column = |name: &str| lines[0].find(name).unwrap_or(0);
        assert_eq!(&lines[2][column("PHASE")..column("LEFT")].trim_end(), &"paused (link lost)");
        assert_eq!(&lines[3][column("ELAPSED")..column("PEER")].trim_end(), &"-");
        assert!(lines[4].contains("faults: 3, p50 80.0 µs"), "{text}");
        assert!(lines[5].ends_with("migrate resume abab"), "{text}");
        assert_eq!(Table(&[]).to_string(), "no migrations\n");
    }
}
