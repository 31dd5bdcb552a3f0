//! Handshakes that were half open when the process left its host. Until the peers' last words come, this host answers for
//! them as the kernel would, by a thread of its own, which has the lock: what comes for them is kept from a kernel that
//! does not know them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::queued::Came;
use crate::engine::handshake::{Heard, Held};
use crate::engine::lock::{Connection, Lock, LockError};
use crate::engine::queued::{Placer, QueuedError};
use crate::engine::reason::chain;
use crate::engine::strays::{self, Keeps, Strays, StraysError};

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
    #[error(transparent)]
    Queued(#[from] QueuedError),
}

/// What the thread has.
pub(super) struct Holding {
    pub lock: Lock,
    pub placer: Placer,
    pub held: Held,
    /// Hears all that comes to the ports.
    pub tap: Option<Strays>,
    /// What has come so far.
    pub packets: Vec<Vec<u8>>,
}

impl Holding {
    /// Until all have come to an end, or are given up. Then the lock is lifted.
    pub(super) fn run(mut self, inbox: &Receiver<Came>) {
        let count = self.held.ends().len();
        tracing::debug!(count, "handshakes are held");
        if let Err(error) = self.hold(inbox) {
            tracing::error!(count = self.held.ends().len(), error = chain(&error), "handshakes are lost");
        }
        if let Err(error) = self.lock.release() {
            // The end of its socket lifts it as well.
            tracing::error!(error = chain(&error), "the lock");
        }
    }

    fn hold(&mut self, inbox: &Receiver<Came>) -> Result<(), HoldError> {
        let wanted = goals(&self.held.ends());
        // Of a busy server most of what comes is for others.
        let mut tap = Strays::prepare(&wanted, Keeps::OfPeers)?;
        tap.listen()?;
        self.lock.release_but(&self.held.ends())?;
        let mut packets = std::mem::take(&mut self.packets);
        if let Some(mut before) = self.tap.take() {
            packets.extend(before.take(&wanted));
        }
        let mut inbox = Some((inbox, Instant::now() + FROM_SOURCE));
        loop {
            let more = self.hear(&packets, &mut tap, &wanted)?;
            if self.held.is_empty() {
                return Ok(());
            }
            packets = more;
            if packets.is_empty() {
                inbox = inbox.filter(|(_, until)| Instant::now() < *until);
                let due =
                    self.held.due().map_or(IN_TURN, |due| due.saturating_duration_since(Instant::now()));
                tap.wait(if inbox.is_some() { due.min(IN_TURN) } else { due });
                packets = tap.take(&wanted);
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

    /// Does what these packets ask for. Returns what has come meanwhile.
    fn hear(
        &mut self,
        packets: &[Vec<u8>],
        tap: &mut Strays,
        wanted: &[Connection],
    ) -> Result<Vec<Vec<u8>>, HoldError> {
        let (mut asked, mut over, mut images) = (Vec::new(), Vec::new(), Vec::new());
        let before = self.held.ends().len();
        for (ends, heard) in packets.iter().filter_map(|packet| self.held.hear(packet)) {
            match heard {
                Heard::Nothing => {}
                Heard::Again => asked.push(ends),
                Heard::Other => over.push(ends),
                Heard::End(image) => {
                    over.push(ends);
                    images.push(*image);
                }
            }
        }
        if !images.is_empty() {
            tracing::debug!(count = images.len(), "handshakes come to their end");
            for reason in self.placer.place(&images)? {
                tracing::error!(%reason, "a connection is lost");
            }
        }
        self.held.answer(&asked)?;
        let left = self.held.ends();
        if left.len() == before {
            return Ok(Vec::new());
        }
        self.lock.release_but(&left)?;
        // From here on the kernel hears of what comes for those that are over.
        let more = tap.take(wanted);
        let all: Vec<Vec<u8>> = packets.iter().chain(&more).cloned().collect();
        strays::put_in(&all, &goals(&over))?;
        Ok(more)
    }
}

/// Whatever comes from their peers: requests are for the places where somebody listens, at that address or at all.
fn goals(ends: &[Connection]) -> Vec<Connection> {
    let mut goals = ends.to_vec();
    for Connection { local, .. } in ends {
        let everywhere: IpAddr =
            if local.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let places = [*local, SocketAddr::new(everywhere, local.port())];
        goals.extend(places.map(|local| Connection { local, remote: None }));
    }
    goals
}
