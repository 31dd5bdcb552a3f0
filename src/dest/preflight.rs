//! What this host has against taking a process: everything at once, before anything is made.

use super::network;
use super::steps::{parse_addresses, parse_remaps};
use crate::engine::address::{self, AddressSet};
use crate::engine::kernel::{self, Host};
use crate::engine::lock;
use crate::engine::pids;
use crate::engine::reason::{Reason, chain};
use crate::engine::remap;
use crate::engine::remote::Tid;
use crate::engine::state::calls::AttrError;
use crate::engine::state::files::{self, ListenPort};
use crate::engine::state::{creds, limits, objects, sched, timers};
use crate::proto::control::Begin;
use crate::proto::image::Process;

/// Checks the plan against this host. Also finds the devices of the addresses that move. `has_hooks`: ours may
/// bring addresses that are not here yet.
pub(super) fn check(
    begin: &Begin,
    host: &Host,
    same_kernel: bool,
    has_hooks: bool,
) -> (Vec<Reason>, Option<AddressSet>) {
    let tids: Vec<Tid> = begin.tids.iter().filter_map(|t| Tid::try_from(*t).ok()).collect();
    let mut reasons = pids::check_pids_free(&tids);
    if tids.len() != begin.tids.len() {
        reasons.push(Reason::new("plan", "names thread ids that cannot exist", ""));
    }
    if let (Some(cpu), Some(needs)) = (&begin.cpu, &begin.kernel) {
        reasons.extend(kernel::missing_here(cpu, needs, host));
    } else {
        reasons.push(Reason::new("plan", "says nothing about processor and kernel", ""));
    }
    reasons.extend(begin.files.iter().filter_map(|f| files::compare_here(f, same_kernel)));
    let pid = Tid::try_from(begin.pid).unwrap_or(0);
    reasons.extend(objects::check_here(pid, &begin.objects, &begin.huge_pages));
    let remaps = match parse_remaps(&begin.tcp_remaps) {
        Ok(remaps) => remaps,
        Err(reason) => {
            reasons.push(reason);
            Vec::new()
        }
    };
    for port in &begin.ports {
        match ListenPort::try_from(port) {
            Ok(port) => {
                let address = remap::of(port.address, &remaps);
                reasons.extend(files::port_free(&ListenPort { address, ..port }));
            }
            Err(reason) => reasons.push(reason),
        }
    }
    if begin.tcp_established {
        reasons.extend(lock::missing_here());
    }
    if let Some(early) = &begin.early {
        match attributes(early) {
            Ok(found) => reasons.extend(found),
            Err(error) => reasons.push(Reason::new("this host", chain(&error), "")),
        }
    }
    let addresses = match parse_addresses(&begin.move_ips) {
        Ok(addresses) => addresses,
        Err(reason) => {
            reasons.push(reason);
            return (reasons, None);
        }
    };
    if !has_hooks {
        reasons.extend(network::missing(begin, &addresses, &remaps));
    }
    let specs: Vec<_> = addresses.iter().map(|a| a.spec.clone()).collect();
    match address::check_destination(&specs) {
        Ok(found) => reasons.extend(found),
        Err(error) => reasons.push(Reason::new("addresses", chain(&error), "")),
    }
    if addresses.is_empty() || !reasons.is_empty() {
        return (reasons, None);
    }
    match AddressSet::of(&addresses) {
        Ok(set) => (reasons, Some(set)),
        Err(error) => {
            reasons.push(Reason::new("addresses", chain(&error), ""));
            (reasons, None)
        }
    }
}

/// Limits, credentials, timers and CPUs that we cannot give.
fn attributes(early: &Process) -> Result<Vec<Reason>, AttrError> {
    let ours = creds::here()?;
    let mut reasons = sched::check_here(&early.threads)?;
    reasons.extend(timers::check_here(&early.timers));
    if let Some(attrs) = &early.attrs {
        reasons.extend(limits::check_here(attrs, &ours)?);
    }
    if let Some(creds) = &early.creds {
        reasons.extend(creds::check_here(creds, &ours));
    }
    Ok(reasons)
}
