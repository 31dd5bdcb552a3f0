//! Orphans: connections that a process has closed, and whose peers have not got everything yet. The kernel goes on
//! sending for them. Nobody has a descriptor of them, so nobody can take them along; and where their address leaves
//! the host, what is left is lost.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};

use super::{Connection, LockError, diag};

/// So often is a segment repeated to a peer that is most likely gone: for more than a second.
const UNANSWERED: u8 = 3;
/// Where the kernel tells how many orphans it has, in all namespaces.
const SOCKSTAT: &str = "/proc/net/sockstat";

/// A connection that was closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Orphan {
    /// Its ends.
    pub connection: Connection,
    /// What its peer has not acknowledged; the end counts as one.
    pub bytes: u32,
    /// Some of it was never sent.
    pub unsent: bool,
    /// The same was sent again and again, and nobody answers.
    pub unanswered: bool,
}

/// Which orphans are concerned when a process leaves.
#[derive(Debug, Default)]
pub struct Concerned {
    ips: HashSet<IpAddr>,
    places: HashSet<SocketAddr>,
}

impl Concerned {
    /// Those of addresses that leave this host, whosesoever they were; and those where the process has these
    /// connections, or listens.
    pub fn new(ips: impl IntoIterator<Item = IpAddr>, ends: &[Connection]) -> Self {
        Self { ips: ips.into_iter().collect(), places: ends.iter().map(|end| end.local).collect() }
    }

    /// Those that there are now.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn look(&self) -> Result<Vec<Orphan>, LockError> {
        // To list sockets takes milliseconds on a large host, and somebody may be waiting.
        if std::fs::read_to_string(SOCKSTAT).is_ok_and(|text| orphans(&text) == Some(0)) {
            return Ok(Vec::new());
        }
        let found = diag::closed(&self.ips, &self.places).map_err(LockError::List)?;
        let orphan = |(connection, bytes, unsent, repeated)| {
            let unanswered = repeated >= UNANSWERED;
            Orphan { connection, bytes, unsent, unanswered }
        };
        Ok(found.into_iter().map(orphan).collect())
    }
}

/// `TCP: inuse 5 orphan 0 tw 0 alloc 7 mem 1`.
fn orphans(sockstat: &str) -> Option<u64> {
    let line = sockstat.lines().find_map(|line| line.strip_prefix("TCP:"))?;
    let mut words = line.split_whitespace().skip_while(|word| *word != "orphan").skip(1);
    words.next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_count() {
        let text = "sockets: used 100\nTCP: inuse 5 orphan 12 tw 0 alloc 7 mem 1\nUDP: inuse 1 mem 0\n";
        assert_eq!(orphans(text), Some(12));
        assert_eq!(orphans("TCP: inuse 5 orphan"), None);
        assert_eq!(orphans("UDP: orphan 1\n"), None);
        assert!(orphans(&std::fs::read_to_string(SOCKSTAT).unwrap()).is_some());
    }
}
