//! Why a process cannot be moved: what preflight collects, all at once, and the operator reads. Also what an
//! operator reads of an error.

use std::fmt;

/// An error and its causes, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// One obstacle to a move.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Reason {
    /// The object, as the operator finds it: `pid 12`, `fd 5`, `mapping 7f00000000-7f00001000`.
    pub object: String,
    /// What is in the way: `is an inotify descriptor, which cannot be carried yet`.
    pub why: String,
    /// What to do about it; empty where nothing helps.
    pub remedy: String,
}

impl Reason {
    /// Builds a reason from its three parts.
    pub fn new(object: impl Into<String>, why: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { object: object.into(), why: why.into(), remedy: remedy.into() }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.object, self.why)?;
        if !self.remedy.is_empty() {
            write!(f, " ({})", self.remedy)?;
        }
        Ok(())
    }
}

impl From<Reason> for crate::proto::control::Reason {
    fn from(r: Reason) -> Self {
        Self { object: r.object, why: r.why, remedy: r.remedy }
    }
}

impl From<crate::proto::control::Reason> for Reason {
    fn from(r: crate::proto::control::Reason) -> Self {
        // Shown to a person: cut to a length that a person reads.
        let cut = |text: String| text.chars().take(500).collect::<String>();
        Self { object: cut(r.object), why: cut(r.why), remedy: cut(r.remedy) }
    }
}
