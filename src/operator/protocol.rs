//! The words on the control socket: one JSON object on one line each way.

use std::fmt;
use std::io::{self, BufRead, BufReader, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::migration::MigrationId;
use crate::report::Latency;

/// Longest request.
pub(super) const MAX_REQUEST_BYTES: u64 = 4096;
/// Longest answer: some thousand migrations.
pub(super) const MAX_ANSWER_BYTES: u64 = 4 << 20;

/// Which end of a migration this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// The process comes from here.
    Source,
    /// It comes here.
    Destination,
}

/// How far a migration is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Both sides look whether it can be done; the process is untouched.
    Asking,
    /// Memory is copied while the process runs at the source.
    Precopy,
    /// It stands still; the last pages and its state are on their way.
    Frozen,
    /// The right to run was offered to the destination.
    Committing,
    /// It runs at the destination, memory follows.
    Postcopy,
    /// As [`Phase::Postcopy`], but the link is lost.
    Paused,
    /// It runs at the destination, and nothing is missing.
    Complete,
    /// Left behind: held at the source, which must ask the destination who has it.
    Limbo,
    /// Left behind at any other step.
    Interrupted,
}

impl Phase {
    /// Whether the process stays at the source if the operator wants it to.
    pub fn can_cancel(self) -> bool {
        matches!(self, Phase::Asking | Phase::Precopy | Phase::Frozen)
    }

    /// Whether the process still runs at the source, so that it can be frozen.
    pub fn can_switch(self) -> bool {
        matches!(self, Phase::Asking | Phase::Precopy)
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Phase::Asking => "asking",
            Phase::Precopy => "pre-copy",
            Phase::Frozen => "frozen",
            Phase::Committing => "committing",
            Phase::Postcopy => "post-copy",
            Phase::Paused => "paused (link lost)",
            Phase::Complete => "complete",
            Phase::Limbo => "limbo",
            Phase::Interrupted => "interrupted",
        })
    }
}

/// What is known of a migration, on one side of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MigrationStatus {
    /// Names it on both nodes.
    pub migration_id: MigrationId,
    /// Which end this is.
    pub side: Side,
    /// The process.
    pub pid: i32,
    /// Its name.
    pub command: String,
    /// How far it is.
    pub phase: Phase,
    /// The round of pre-copy, from 1.
    pub round: Option<u32>,
    /// Pages still to be sent: of the round, or after it.
    pub pages_remaining: Option<u64>,
    /// Bytes of frames per second, during the last seconds.
    pub bytes_per_second: u64,
    /// The same since the first frame.
    pub bytes_per_second_mean: u64,
    /// Pages that the process wrote per second in the last round.
    pub dirty_pages_per_second: Option<u64>,
    /// Waits for missing pages so far, in microseconds.
    pub faults: Option<Latency>,
    /// Since it began here; unknown of what was left behind.
    pub elapsed_ms: Option<u64>,
    /// The other node.
    pub peer: String,
    /// The `migrate` that runs it; none if it was left behind.
    pub migrate_pid: Option<u32>,
    /// The command that resolves what was left behind.
    pub resolve_with: Option<String>,
}

/// What a client wants of one `migrate`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "want", rename_all = "snake_case")]
pub(super) enum Request {
    /// All its migrations.
    Status,
    /// Let the process stay.
    Cancel { id: MigrationId },
    /// Freeze it now, the rest follows.
    Postcopy { id: MigrationId },
}

/// What it says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub(super) enum Answer {
    /// To a status.
    Migrations { migrations: Vec<MigrationStatus> },
    /// To an order.
    Verdict { verdict: Verdict },
    /// The request was not understood.
    Error { text: String },
}

/// What became of an order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", content = "text", rename_all = "snake_case")]
pub enum Verdict {
    /// The process runs here, and nothing of the migration is left in it.
    Cancelled,
    /// The process is frozen, the rest of its memory follows.
    Switched,
    /// The process is no longer ours to decide about; why.
    TooLate(String),
    /// The order cannot be given here, or came to nothing; why.
    Refused(String),
    /// There is no such migration.
    Unknown,
}

/// Writes a message as one line.
pub(super) fn write<M: Serialize>(to: &mut impl Write, message: &M) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    to.write_all(&line)
}

/// Reads one line of at most `limit` bytes.
pub(super) fn read<M: DeserializeOwned>(from: impl Read, limit: u64) -> io::Result<M> {
    let mut line = Vec::new();
    BufReader::new(from.take(limit)).read_until(b'\n', &mut line)?;
    if line.last() != Some(&b'\n') {
        let (kind, text) = match line.len() as u64 >= limit {
            true => (io::ErrorKind::InvalidData, "the line is too long"),
            false => (io::ErrorKind::UnexpectedEof, "the connection ended within a line"),
        };
        return Err(io::Error::new(kind, text));
    }
    Ok(serde_json::from_slice(&line)?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_lines() {
        let id = MigrationId::new([1; crate::migration::ID_BYTES]);
        for request in [Request::Status, Request::Cancel { id }, Request::Postcopy { id }] {
            let mut bytes = Vec::new();
            write(&mut bytes, &request).unwrap();
            assert_eq!(read::<Request>(bytes.as_slice(), MAX_REQUEST_BYTES).unwrap(), request);
        }
        for verdict in [Verdict::Cancelled, Verdict::TooLate("a\nb".into()), Verdict::Unknown] {
            let answer = Answer::Verdict { verdict };
            let mut bytes = Vec::new();
            write(&mut bytes, &answer).unwrap();
            assert_eq!(bytes.iter().filter(|b| **b == b'\n').count(), 1);
            assert_eq!(read::<Answer>(bytes.as_slice(), MAX_ANSWER_BYTES).unwrap(), answer);
        }
    }

    #[test]
    fn what_is_no_line_of_ours_is_an_error() {
        let kind = |bytes: &[u8]| read::<Request>(bytes, 64).unwrap_err().kind();
        assert_eq!(kind(b""), io::ErrorKind::UnexpectedEof);
        assert_eq!(kind(br#"{"want":"status"}"#), io::ErrorKind::UnexpectedEof);
        assert_eq!(kind(&[b' '; 1000]), io::ErrorKind::InvalidData);
        for bad in [&b"{}\n"[..], b"\n", b"{\"want\":\"cancel\",\"id\":\"../x\"}\n", b"\xff\n"] {
            assert!(read::<Request>(bad, 64).is_err(), "{bad:?}");
        }
    }
}
