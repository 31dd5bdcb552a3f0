//! The network of a process that comes: which addresses it needs here, the lock on its connections until it runs,
//! and the operator's hooks.

use std::net::IpAddr;

use super::driver::Driver;
use super::recover;
use super::steps::ActionError;
use crate::engine::address::{self, Address};
use crate::engine::hook::{self, Stage};
use crate::engine::lock::{self, Lock};
use crate::engine::reason::{Reason, chain};
use crate::engine::remap::{self, Remap};
use crate::proto::control::Begin;
use crate::proto::files::Files;

/// Addresses that the process will have connections or sockets with, and that are neither here nor come with it.
pub(super) fn missing(begin: &Begin, coming: &[Address], remaps: &[Remap]) -> Vec<Reason> {
    let comes = |ip: &IpAddr| coming.iter().any(|address| address.spec.address == *ip);
    let needed: Option<Vec<IpAddr>> = begin.needed_ips.iter().map(|bytes| address::ip_of(bytes)).collect();
    let Some(needed) = needed else {
        return vec![Reason::new("plan", "names an address that makes no sense", "")];
    };
    let targets: Vec<IpAddr> = remaps.iter().map(|remap| remap.new).collect();
    let absent = |ips: &[IpAddr]| {
        address::absent_here(ips).map(|ips| ips.into_iter().filter(|ip| !comes(ip)).collect())
    };
    let (needed, targets): (Vec<IpAddr>, Vec<IpAddr>) =
        match absent(&needed).and_then(|n| Ok((n, absent(&targets)?))) {
            Ok(both) => both,
            Err(error) => return vec![Reason::new("addresses", chain(&error), "")],
        };
    let mut reasons = Vec::new();
    for ip in needed.iter().filter(|ip| !targets.contains(ip)) {
        let bits = if ip.is_ipv4() { 32 } else { 128 };
        reasons.push(Reason::new(
            format!("address {ip}"),
            "TCP connections of the process have it, and the destination does not",
            format!(
                "--move-ip {ip}/{bits}@DEVICE takes it along, --tcp-remap {ip}=NEW changes it, --hook CMD (or migrate \
                 serve --hook CMD) moves it by a command of yours"
            ),
        ));
    }
    for remap in remaps.iter().filter(|remap| targets.contains(&remap.new)) {
        let object = format!("--tcp-remap {remap}");
        reasons.push(Reason::new(object, format!("the destination does not have {}", remap.new), ""));
    }
    reasons
}

impl Driver {
    /// Prepares the lock, where connections are carried. To be called before anything is made.
    pub(super) fn prepare_lock(&mut self) -> Option<Reason> {
        if !self.begin.tcp_established {
            return None;
        }
        // The source may be in the same network namespace.
        match Lock::open(&format!("migrate-{}-in", self.id)) {
            Ok(lock) => {
                self.lock = Some(lock);
                self.queued.prepare();
                None
            }
            Err(error) => Some(Reason::new("TCP connections", chain(&error), "")),
        }
    }

    /// Gives the sockets their addresses here, and locks them before they are made: where an address is here
    /// already, the peers reach it.
    pub(super) fn prepare_sockets(&mut self, files: &mut Files) -> Result<(), ActionError> {
        let queued = files.queued.clone();
        remap::apply(files, &self.remaps);
        let sockets = lock::of_image(files);
        if let Some(lock) = self.lock.as_mut() {
            lock.close_on(&sockets)?;
        }
        self.queued.expect(files, &sockets, queued);
        self.keep_strays(sockets);
        Ok(())
    }

    /// The process is ours, and so is its address. Called before it runs, which finds its sockets live.
    pub(super) fn open_network(&mut self) {
        if let Some(addresses) = self.addresses.as_mut()
            && let Err(error) = addresses.add()
        {
            tracing::error!(error = &error as &dyn std::error::Error, "adding addresses");
        }
        self.hooks.tell(Stage::NetworkUnlock, &self.about());
        // A service that died before us has made them, but may not have come so far.
        if let Some(process) = self.process.filter(|_| self.skeleton.is_none()) {
            recover::wake_connections(process);
        }
        // What makes a connection whole must be done before a packet can come, what it sends must get out.
        let mut connections = std::mem::take(&mut self.connections);
        let mut lost = connections.complete();
        let released = self.lock.as_mut().map(|lock| match self.queued.closed() {
            [] => lock.release(),
            kept => lock.release_but(kept),
        });
        if let Some(Err(error)) = released {
            // Without it nothing would be reached: the end of its socket lifts it in any case.
            tracing::error!(error = &error as &dyn std::error::Error, "the lock");
            self.lock = None;
        }
        lost.extend(connections.go_live());
        for reason in lost {
            tracing::error!(%reason, "a connection is lost");
        }
        self.put_own_strays_in();
    }

    /// The process runs.
    pub(super) fn network_is_open(&mut self) {
        if self.lock.is_none() {
            self.queued.give_up();
        }
        if let Some(lock) = self.lock.take().and_then(|lock| self.queued.start(lock)) {
            // Its table goes with it, which takes longer than the source should wait for our word.
            let _ = std::thread::Builder::new().name("unlock".into()).spawn(move || drop(lock));
        }
        drop(self.hooks.begin(Stage::PostResume, &self.about()));
    }

    /// The process will not run here.
    pub(super) fn tell_failure(&self) {
        if self.consented {
            drop(self.hooks.begin(Stage::Failed, &self.about()));
        }
    }

    fn about(&self) -> hook::About {
        hook::About {
            id: self.id.to_string(),
            pid: self.process.map_or(self.begin.pid, |process| process.pid),
            side: "destination",
            destination: self.listen.to_string(),
        }
    }
}
