//! Handshakes that were half open when the process left its host. Until the peers' last words come, this host answers for
//! them as the kernel would, by a thread of its own, which has the lock: what comes for them is kept from a kernel that
//! does not know them.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::queued::Came;
use crate::engine::address;
use crate::engine::handshake::{Heard, Held};
use crate::engine::lock::{self, Connection, Lock, LockError};
use crate::engine::queued::Placer;
use crate::engine::reason::chain;
use crate::engine::strays::{self, Keeps, Strays, StraysError};
use crate::proto::files::TcpConnection;

/// How long the source may take to pass on what has come to it.
const FROM_SOURCE: Duration = Duration::from_secs(5);
/// How long one looks at what comes by the network while the source may have something.
const IN_TURN: Duration = Duration::from_millis(2);

/// Why they are lost.
#[derive(Debug, thiserror::Error)]
enum HoldError {
    #[error(transparent)]
    Lock(#[from] LockError),
    #[error(transparent)]
    Strays(#[from] StraysError),
}

/// What the thread has.
pub(super) struct Holding {
    lock: Lock,
    placer: Placer,
    held: Held,
    /// Hears what their peers send.
    tap: Strays,
    /// Those that are over.
    over: Vec<Connection>,
}

impl Holding {
    /// Until all have come to an end, or are given up. Then the lock is lifted. `tap` hears all that comes to the ports,
    /// and `packets` have come so far.
    pub(super) fn run(
        lock: Lock,
        placer: Placer,
        mut held: Held,
        tap: Option<Strays>,
        packets: Vec<Vec<u8>>,
        inbox: &Receiver<Came>,
    ) {
        // What comes from a client of this very host comes by a device that is not listened to.
        let remotes: Vec<IpAddr> = held.ends().iter().filter_map(|one| Some(one.remote?.ip())).collect();
        let absent = address::absent_here(&remotes).unwrap_or(remotes);
        held.retain(|one| {
            let is_elsewhere = one.remote.is_some_and(|remote| absent.contains(&remote.ip()));
            if !is_elsewhere {
                tracing::error!(?one, "a handshake is lost: its peer is on this host");
            }
            is_elsewhere
        });
        let ends = held.ends();
        tracing::debug!(count = ends.len(), "handshakes are held");
        // Of a busy server most of what comes to its port is for others.
        let narrow = Strays::prepare(&ends, Keeps::OfPeers).and_then(|tap| tap.listen().map(|()| tap));
        let narrow = match narrow {
            Ok(narrow) => narrow,
            Err(error) => {
                tracing::error!(count = ends.len(), error = chain(&error), "handshakes are lost");
                return lift(lock);
            }
        };
        let mut holding = Self { lock, placer, held, tap: narrow, over: Vec::new() };
        if let Err(error) = holding.hold(tap, packets, inbox) {
            tracing::error!(lost = ?holding.held.ends(), error = chain(&error), "handshakes are lost");
        }
        lift(holding.lock);
    }

    fn hold(
        &mut self,
        tap: Option<Strays>,
        mut packets: Vec<Vec<u8>>,
        inbox: &Receiver<Came>,
    ) -> Result<(), HoldError> {
        self.lock.release_but(&self.held.ends())?;
        packets.extend(tap.map(|mut tap| tap.take(&goals(&self.held.ends()))).unwrap_or_default());
        let mut inbox = Some((inbox, Instant::now() + FROM_SOURCE));
        loop {
            let more = self.hear(&packets)?;
            if self.held.is_empty() {
                return Ok(());
            }
            packets = more;
            if packets.is_empty() {
                inbox = inbox.filter(|(_, until)| Instant::now() < *until);
                let due =
                    self.held.due().map_or(IN_TURN, |due| due.saturating_duration_since(Instant::now()));
                self.tap.wait(if inbox.is_some() { due.min(IN_TURN) } else { due });
                packets = self.tap.take_of_peers(&self.held.ends());
            }
            if let Some((source, _)) = inbox {
                match source.recv_timeout(Duration::ZERO) {
                    Ok(Came::Strays(strays)) => packets.extend(strays),
                    Ok(Came::Connections { .. }) | Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => inbox = None,
                }
            }
        }
    }

    /// Does what these packets ask for, and what is due. Returns what has come meanwhile.
    fn hear(&mut self, packets: &[Vec<u8>]) -> Result<Vec<Vec<u8>>, HoldError> {
        let before = self.held.ends();
        let (mut asked, mut ended, mut forgotten) = (Vec::new(), HashMap::new(), Vec::new());
        for (ends, heard) in packets.iter().filter_map(|packet| self.held.hear(packet)) {
            match heard {
                Heard::Nothing => {}
                Heard::Again => asked.push(ends),
                Heard::Other => forgotten.push(ends),
                // The first word of several counts.
                Heard::End(image) => drop(ended.entry(ends).or_insert(*image)),
            }
        }
        self.held.retain(|one| !forgotten.contains(one));
        if !ended.is_empty() {
            self.place(ended);
        }
        if !self.held.is_empty() && (!asked.is_empty() || self.held.due() <= Some(Instant::now())) {
            self.forget_unwanted();
            if let Err(error) = self.held.answer(&asked) {
                tracing::warn!(error = chain(&error), "answers to handshakes do not go out");
            }
        }
        let left = self.held.ends();
        let mut more = Vec::new();
        if left.len() < before.len() {
            self.over.extend(before.iter().filter(|one| !left.contains(one)));
            self.lock.release_but(&left)?;
            // From here on the kernel hears of what comes for those that are over.
            more = self.tap.take_of_peers(&before);
            self.tap.narrow(&left)?;
        }
        let all: Vec<Vec<u8>> = packets.iter().chain(&more).cloned().collect();
        if !self.over.is_empty()
            && !all.is_empty()
            && let Err(error) = strays::put_in(&all, &goals(&self.over))
        {
            // Their peers send it again.
            tracing::warn!(error = chain(&error), "strays are lost");
        }
        Ok(more)
    }

    /// Those that are there then are held no more. If there is no room for one, its peer gets the answer again, and says
    /// its word again: as it would be with a kernel.
    fn place(&mut self, ended: HashMap<Connection, TcpConnection>) {
        tracing::debug!(count = ended.len(), "handshakes come to their end");
        let (ends, images): (HashSet<Connection>, Vec<TcpConnection>) = ended.into_iter().unzip();
        match self.placer.place(&images) {
            Ok(lost) => lost.iter().for_each(|reason| tracing::warn!(%reason, "a handshake does not end")),
            Err(error) => tracing::warn!(error = chain(&error), "handshakes do not end"),
        }
        match lock::reachable(&ends) {
            Ok(there) => self.held.retain(|one| !there.contains(one)),
            Err(error) => {
                tracing::warn!(error = chain(&error), "connections are not seen");
                self.held.retain(|one| !ends.contains(one));
            }
        }
    }

    /// Where nobody listens any more, nothing is to be answered.
    fn forget_unwanted(&mut self) {
        let places = goals(&self.held.ends()).into_iter().filter(|goal| goal.remote.is_none()).collect();
        let Ok(listening) = lock::reachable(&places) else { return };
        self.held.retain(|one| goals(&[*one]).iter().any(|goal| listening.contains(goal)));
    }
}

fn lift(mut lock: Lock) {
    if let Err(error) = lock.release() {
        // The end of its socket lifts it as well.
        tracing::error!(error = chain(&error), "the lock");
    }
}

/// Whatever comes from their peers: requests are for the places where somebody listens, at that address or at all.
pub(super) fn goals(ends: &[Connection]) -> Vec<Connection> {
    let mut goals = ends.to_vec();
    for Connection { local, .. } in ends {
        let everywhere: IpAddr =
            if local.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let places = [*local, SocketAddr::new(everywhere, local.port())];
        goals.extend(places.map(|local| Connection { local, remote: None }));
    }
    goals
}
