//! Local ends that are locked as a whole. The connections that a server has accepted at one place are thousands, and to
//! add each to the table, and to take it out again, takes milliseconds while the process stands still. Where
//! nobody else has a connection with the same local end, that end says the same.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;

use super::Connection;

/// Fewer connections are added one by one.
const WORTH_IT: usize = 64;

/// The local ends that many of these have.
pub(super) fn crowded(connections: &[Connection]) -> HashSet<SocketAddr> {
    let mut counts: HashMap<SocketAddr, usize> = HashMap::new();
    if connections.len() < WORTH_IT {
        return HashSet::new();
    }
    for connection in connections.iter().filter(|c| c.remote.is_some()) {
        *counts.entry(connection.local).or_default() += 1;
    }
    counts.into_iter().filter(|(_, count)| *count >= WORTH_IT).map(|(local, _)| local).collect()
}
