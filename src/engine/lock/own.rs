//! The lock on what a process has by its own sockets. To list all sockets of the host, and to pick those of the process,
//! takes longer than all else that the lock does while the process stands still. What only that list can tell, of
//! connections that wait to be accepted and of others at the same local end, is known beforehand, or told by the sockets
//! themselves; if it is not, the list is made.

use std::collections::HashSet;

use super::{Connection, Lock, LockError, Locked, diag, whole};

/// The sockets of a process, as found by itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Own {
    /// The inodes of all, of whatever kind.
    pub inodes: HashSet<u64>,
    /// The connections among them, and those that are on their way there.
    pub connections: Vec<Connection>,
    /// There are no others that are the process's, or will be: nobody waits where it listens, no handshake goes on
    /// there, and all of its protocols are such that we know it.
    pub is_all: bool,
}

/// Whether a TCP socket in this state has a connection, or is on its way there.
pub fn is_connection(state: u32) -> bool {
    diag::CONNECTED.contains(&state)
}

impl Lock {
    /// To be called before the freeze, which may take longer than [`Lock::close_on_own`]: finds out at which local ends
    /// of these many connections no other process has one. Where that changes afterwards, connections of that other
    /// process are locked as well, as long as these are.
    ///
    /// # Errors
    /// If the sockets cannot be listed.
    pub fn look_for_others(&mut self, connections: &[Connection]) -> Result<(), LockError> {
        let crowded = whole::crowded(connections);
        self.ends.clear();
        if !crowded.is_empty() {
            let others = diag::others_at(&crowded, connections).map_err(LockError::List)?;
            self.ends = crowded.into_iter().map(|end| (end, others.contains(&end))).collect();
        }
        Ok(())
    }

    /// The same as [`Lock::close_on_process`] for the sockets of a process that stands still. Costs less if nobody waits
    /// where it listens, and that was locked before the process was stopped: then nobody can have come meanwhile.
    ///
    /// # Errors
    /// If the sockets cannot be listed, or not locked.
    pub fn close_on_own(&mut self, own: &Own) -> Result<Locked, LockError> {
        let (listeners, are_waiting) = diag::listeners_and_waiting(&own.inodes).map_err(LockError::List)?;
        let mut whole = whole::crowded(&own.connections);
        // A connection may be on its way from one list to the other when `own` is made: here it shows.
        let is_all = own.is_all
            && !are_waiting
            && listeners.iter().all(|place| self.closed.contains(place))
            && whole.iter().all(|end| self.ends.contains_key(end));
        if !is_all {
            tracing::debug!(own.is_all, are_waiting, "all connections of the host are listed");
            return self.close_on_process(&own.inodes);
        }
        whole.retain(|end| self.ends.get(end) == Some(&false));
        self.close(&own.connections, &whole)?;
        let all = [&own.connections[..], &listeners].concat();
        Ok(Locked { all, ..Locked::default() })
    }
}
