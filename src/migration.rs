//! What both sides of a migration agree on: its id, the process it moves, the right to run it, its fate.
//!
//! Plain values without I/O, shared by the two state machines, the journals and the sentinel.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Bytes of a migration id; twice as many hexadecimal digits in its text form.
pub const ID_BYTES: usize = 16;

/// Names one attempt to move one process. Made at random by the source, never used twice.
///
/// Its text form is a file name of the journals, so nothing but hexadecimal digits gets through the parser.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MigrationId([u8; ID_BYTES]);

/// A text that is no migration id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a migration id is {} lower-case hexadecimal digits", ID_BYTES * 2)]
pub struct BadId;

impl MigrationId {
    /// The id made of these (random) bytes.
    pub const fn new(bytes: [u8; ID_BYTES]) -> Self {
        Self(bytes)
    }
}

impl fmt::Display for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for MigrationId {
    type Err = BadId;

    fn from_str(text: &str) -> Result<Self, BadId> {
        if text.len() != ID_BYTES * 2 {
            return Err(BadId);
        }
        let mut bytes = [0; ID_BYTES];
        for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            *byte = hex(pair[0])? << 4 | hex(pair[1])?;
        }
        Ok(Self(bytes))
    }
}

/// One lower-case digit. Upper case is refused, so that an id has one text form and one file.
fn hex(digit: u8) -> Result<u8, BadId> {
    match digit {
        b'0'..=b'9' => Ok(digit - b'0'),
        b'a'..=b'f' => Ok(digit - b'a' + 10),
        _ => Err(BadId),
    }
}

impl TryFrom<String> for MigrationId {
    type Error = BadId;

    fn try_from(text: String) -> Result<Self, BadId> {
        text.parse()
    }
}

impl From<MigrationId> for String {
    fn from(id: MigrationId) -> Self {
        id.to_string()
    }
}

/// The beginning of a migration's id, as operators type it: as many digits as tell it from others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdPrefix(String);

/// A text that no id begins with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a migration is named by its id or the beginning of it: 1 to {} hexadecimal digits", ID_BYTES * 2)]
pub struct BadPrefix;

impl IdPrefix {
    /// Whether the id begins so.
    pub fn matches(&self, id: MigrationId) -> bool {
        id.to_string().starts_with(&self.0)
    }
}

impl fmt::Display for IdPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for IdPrefix {
    type Err = BadPrefix;

    fn from_str(text: &str) -> Result<Self, BadPrefix> {
        let good = (1..=ID_BYTES * 2).contains(&text.len()) && text.bytes().all(|b| hex(b).is_ok());
        if good { Ok(Self(text.to_owned())) } else { Err(BadPrefix) }
    }
}

/// A process that cannot be mistaken for a later one with the same number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessKey {
    /// Its number in our own PID namespace.
    pub pid: u32,
    /// When it started, in clock ticks since boot: field 22 of `/proc/PID/stat`.
    pub start_ticks: u64,
}

/// What became of a migration, by the word of the destination. Either answer is final.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// The destination gave it up, or never heard of it, and will refuse any later commit.
    NotAccepted,
    /// The destination holds the right to run.
    Accepted,
}

/// The right to let the process run: one value for each side, and never both of them in use.
///
/// Not `Clone`: a machine that hands it out in an action (`Thaw`, `Kill`, `Resume`, ...) cannot hand it out
/// again. The source's machine starts with it; the destination's gets it by accepting the commit.
#[derive(Debug, PartialEq, Eq)]
pub struct RunRight(ProcessKey);

impl RunRight {
    /// Called in two places: where a migration starts at the source, and where the destination accepts.
    pub(crate) fn of(process: ProcessKey) -> Self {
        Self(process)
    }

    /// The process it is about.
    pub fn process(&self) -> ProcessKey {
        self.0
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn an_id_has_one_text_form() {
        let id = MigrationId::new([0xa0; ID_BYTES]);
        assert_eq!(id.to_string().parse(), Ok(id));
        for bad in
            ["", "a0", "../../../../etc/passwd0000000000", &id.to_string().to_uppercase(), &"é".repeat(16)]
        {
            assert_eq!(bad.parse::<MigrationId>(), Err(BadId), "{bad}");
        }
    }
    #[test]
    fn a_prefix_is_the_beginning_of_an_id() {
        let id = MigrationId::new([0xa0; ID_BYTES]);
        for good in ["a", "a0a", &id.to_string()] {
            assert!(good.parse::<IdPrefix>().unwrap().matches(id), "{good}");
        }
        assert!(!"0a".parse::<IdPrefix>().unwrap().matches(id));
        for bad in ["", "A0", "x", "../", &format!("{id}a")] {
            assert_eq!(bad.parse::<IdPrefix>(), Err(BadPrefix), "{bad}");
        }
    }
}
