//! What is said of connections that were closed and whose peers have not got everything, when a process is about to
//! leave with their address.

use crate::config::Allowed;
use crate::engine::lock::{self, Concerned, LockError, Orphan};
use crate::engine::reason::{Reason, chain};
use crate::engine::remote::Tid;

/// So many are named one by one.
const NAMED: usize = 10;
const REMEDY: &str = "try again when their peers have read it, or end them with ss -K";

/// Those that a move concerns; `None` if nothing of the network goes with the process.
pub(super) fn concerned(pid: Tid, allowed: &Allowed) -> Result<Option<Concerned>, LockError> {
    if allowed.move_ips.is_empty() && !allowed.files.tcp_established && allowed.hooks.is_empty() {
        return Ok(None);
    }
    let ends = lock::connections(&lock::socket_inodes(pid)?)?;
    Ok(Some(Concerned::new(allowed.move_ips.iter().map(|spec| spec.address), &ends)))
}

/// What `migrate check` says of those that there are now.
pub(super) fn notes(pid: Tid, allowed: &Allowed) -> Vec<Reason> {
    let found = concerned(pid, allowed).and_then(|concerned| concerned.map_or(Ok(Vec::new()), |c| c.look()));
    match found {
        Ok(orphans) => named(&orphans, "the move waits for that, but not long", ""),
        Err(error) => vec![unseen(&error)],
    }
}

/// Why the process does not leave.
pub(super) fn reasons(orphans: &[Orphan]) -> Vec<Reason> {
    named(orphans, "that would be lost, as nobody can take it along", REMEDY)
}

/// What is lost.
pub(super) fn losses(orphans: &[Orphan]) -> Vec<Reason> {
    named(orphans, "what it had not got at the move is lost", "")
}

/// That nobody could look.
pub(super) fn unseen(error: &LockError) -> Reason {
    let why = format!(
        "those that were closed and whose peers have not got everything yet are not seen: {}",
        chain(error)
    );
    Reason::new("TCP connections", why, "")
}

fn named(orphans: &[Orphan], then: &str, remedy: &str) -> Vec<Reason> {
    let mut named: Vec<Reason> = orphans
        .iter()
        .take(NAMED)
        .map(|orphan| {
            let local = orphan.connection.local;
            let remote = orphan.connection.remote.map_or_else(String::new, |remote| format!(" to {remote}"));
            let silent = if orphan.unanswered { " and does not answer" } else { "" };
            let why = format!(
                "was closed, but its peer has not taken {} bytes yet (its end counts as one){silent}: {then}",
                orphan.bytes
            );
            Reason::new(format!("connection {local}{remote}"), why, remedy)
        })
        .collect();
    let more = orphans.len().saturating_sub(NAMED);
    if more > 0 {
        named.push(Reason::new(format!("{more} more connections"), format!("likewise: {then}"), remedy));
    }
    named
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::lock::Connection;

    #[test]
    fn some_are_named_and_all_are_counted() {
        let orphan = |port: u16| Orphan {
            connection: Connection {
                local: ([10, 0, 0, 1], 80).into(),
                remote: Some(([10, 0, 0, 9], port).into()),
            },
            bytes: 1000,
            unsent: true,
            unanswered: port == 2,
        };
        let all: Vec<Orphan> = (1..=12).map(orphan).collect();
        let told = reasons(&all);
        assert_eq!(told.len(), NAMED + 1);
        assert_eq!(told[0].object, "connection 10.0.0.1:80 to 10.0.0.9:1");
        assert!(told[0].why.contains("1000 bytes") && !told[0].why.contains("does not answer"));
        assert!(told[1].why.contains("does not answer"));
        assert!(told[NAMED].object.starts_with("2 more"));
        assert_eq!(reasons(&all[..1]).len(), 1);
        assert!(reasons(&[]).is_empty());
    }
}
