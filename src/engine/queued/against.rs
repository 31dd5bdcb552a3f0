//! Which of those that wait to be accepted cannot be carried.

use std::collections::HashSet;
use std::net::SocketAddr;

use crate::engine::lock::{Connection, Locked};
use crate::engine::reason::Reason;
use crate::engine::state::files;

/// Why what waits to be accepted by a frozen process cannot be carried: whose it is cannot be told, it is too much, another
/// process of this very host has the other end, or that one's address belongs to a device.
///
/// Where the process has the other end itself, that comes along. One that was closed is nobody's: if all that it had to
/// say has come, nothing of it is left.
pub fn against(Locked { all, queued, queued_bytes, of_others, .. }: &Locked) -> Vec<Reason> {
    let own: HashSet<&Connection> = all.iter().collect();
    let mut reasons = Vec::new();
    if *of_others > 0 {
        reasons.push(Reason::new(
            "connections not accepted yet",
            format!(
                "cannot be told from {of_others} that wait for another process, which listens at the same place \
                 (SO_REUSEPORT)"
            ),
            "let that one accept them, or end it",
        ));
    }
    if *queued_bytes > files::MOST_QUEUED_BYTES as u64 {
        let (bytes, most) = (queued_bytes >> 20, files::MOST_QUEUED_BYTES >> 20);
        let why = format!("hold {bytes} MiB not read, of which {most} MiB can be carried");
        reasons.push(Reason::new("connections not accepted yet", why, "let the process accept them"));
    }
    let mut refuse = |Connection { local, remote }: Connection, why: &str| {
        let remote = remote.map(|remote| remote.to_string()).unwrap_or_default();
        let what = format!("connection not accepted yet at {local}");
        reasons.push(Reason::new(what, format!("is one {why} ({remote}), which cannot be carried"), ""));
    };
    let mut here = Vec::new();
    for connection in queued {
        let Some(other) = connection.reversed() else { continue };
        match other.local {
            SocketAddr::V6(v6) if v6.ip().is_unicast_link_local() => {
                refuse(*connection, "of a link-local address")
            }
            _ if connection.is_of_one_host() && !own.contains(&other) => here.push((*connection, other)),
            _ => {}
        }
    }
    let ends = |one: Connection| Some((one.local, one.remote?));
    let asked: Vec<_> = here.iter().flat_map(|(one, other)| [ends(*one), ends(*other)]).flatten().collect();
    let seen = files::ends_of(&asked).unwrap_or_else(|errno| {
        tracing::debug!(%errno, "asking for the ends of connections");
        Vec::new()
    });
    for (at, (connection, _)) in here.into_iter().enumerate() {
        let end = |at: usize| seen.get(at).copied().flatten();
        match (end(2 * at), end(2 * at + 1)) {
            (_, Some(other)) if other.is_held() => refuse(connection, "of this very host"),
            (Some(one), _) if one.has_all() => {}
            _ => refuse(
                connection,
                "of this very host, whose other end was closed with bytes that have not come",
            ),
        }
    }
    reasons
}
