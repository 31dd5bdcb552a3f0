//! What is found out before the process is touched: every reason against the move, and the plan that the
//! destination checks against its own host.

use std::collections::{BTreeSet, HashSet};
use std::net::IpAddr;

use crate::config::Allowed;
use crate::engine::address;
use crate::engine::clocks;
use crate::engine::kernel::Host;
use crate::engine::lock::{self, LockError};
use crate::engine::memory::Memory;
use crate::engine::preflight;
use crate::engine::procfs::parse_status;
use crate::engine::reason::{Reason, chain};
use crate::engine::remap;
use crate::engine::remote::Tid;
use crate::engine::state::calls::{AttrError, read_as};
use crate::engine::state::files::{self, ScannedProcesses};
use crate::engine::state::mm::{self, FlagCache};
use crate::engine::state::objects::{self, ObjectBook};
use crate::engine::state::{creds, limits, sched, timers};
use crate::migration::MigrationId;
use crate::proto::control::{Begin, Port};
use crate::proto::image::{Process, Thread, VmaKind};

/// The plan and what stands in its way here.
#[derive(Debug, Default)]
pub struct Plan {
    /// What the destination is to check and prepare.
    pub begin: Begin,
    /// Reasons of this host.
    pub reasons: Vec<Reason>,
    /// What will be different afterwards, and is no obstacle.
    pub notes: Vec<Reason>,
    /// Processes that were looked at for shared descriptors: not to be looked at again in the freeze.
    pub scanned: ScannedProcesses,
    /// Its sockets that have been there for a while, by inode.
    pub sockets: HashSet<u64>,
}

/// Examines the process; nothing of it is touched. What cannot even be examined is a reason too.
pub fn survey(id: MigrationId, pid: Tid, allowed: &Allowed, host: &Host) -> Plan {
    let found = preflight::check(pid, allowed.files.shell_job);
    let mut plan = Plan { reasons: found.reasons, notes: found.notes, ..Plan::default() };
    plan.begin.migration_id = id.to_string();
    plan.begin.pid = pid.unsigned_abs();
    plan.begin.cpu = Some(host.cpu());
    plan.begin.kernel = Some(host.kernel_needs());
    plan.begin.move_ips = allowed.move_ips.iter().map(ToString::to_string).collect();
    match address::check_source(&allowed.move_ips) {
        Ok(reasons) => plan.reasons.extend(reasons),
        Err(error) => plan.reasons.push(unreadable("the addresses that move", &error)),
    }
    plan.begin.tcp_remaps = allowed.tcp_remaps.iter().map(ToString::to_string).collect();
    plan.reasons.extend(remap::check(&allowed.tcp_remaps));
    if Memory::open(pid).is_err() {
        // Gone, a zombie, or nothing that has memory: there is nothing more to be found out.
        return plan;
    }
    match files::check(pid, &allowed.files) {
        Ok(check) => {
            plan.reasons.extend(check.reasons);
            plan.begin.files = check.files;
            (plan.scanned, plan.sockets) = (check.scanned, check.sockets);
            plan.begin.highest_fd = check.highest;
            plan.begin.ports = check.ports.iter().map(Port::from).collect();
        }
        Err(error) => plan.reasons.push(unreadable(format!("descriptors of pid {pid}"), &error)),
    }
    if allowed.files.tcp_established {
        plan.begin.tcp_established = true;
        plan.begin.network = address::network_here();
        match needed_addresses(pid, allowed) {
            Ok(addresses) => plan.begin.needed_ips = addresses,
            Err(error) => plan.reasons.push(unreadable(format!("connections of pid {pid}"), &error)),
        }
        plan.reasons.extend(lock::missing_here());
    }
    match FlagCache::look(pid).and_then(|flags| mm::capture(pid, &flags)) {
        Ok(mut map) => {
            plan.reasons.extend(map.reasons);
            let shared = ObjectBook::new(pid).look(&mut map.layout, true);
            let shared = shared.and_then(|found| {
                plan.reasons.extend(found);
                mm::check_shared(pid, &map.layout)
            });
            match shared {
                Ok(found) => plan.reasons.extend(found),
                Err(error) => plan.reasons.push(unreadable(format!("shared memory of pid {pid}"), &error)),
            }
            plan.begin.huge_pages = objects::huge_pages_needed(&map.layout);
            plan.begin.objects = map.layout.objects;
            for mut file in map.layout.files {
                if let Err(error) = files::add_content(&mut file) {
                    plan.reasons.push(unreadable(String::from_utf8_lossy(&file.path), &error));
                }
                plan.begin.files.push(file);
            }
            let anonymous = map.layout.vmas.iter().any(|v| v.kind() == VmaKind::VmaAnonPrivate);
            if !anonymous && plan.reasons.is_empty() {
                plan.reasons.push(Reason::new(format!("pid {pid}"), "has no memory of its own", ""));
            }
        }
        Err(error) => plan.reasons.push(unreadable(format!("memory map of pid {pid}"), &error)),
    }
    match attributes(pid) {
        Ok(early) => plan.begin.early = Some(early),
        Err(error) => plan.reasons.push(unreadable(format!("attributes of pid {pid}"), &error)),
    }
    match clocks::look(pid) {
        Ok(view) => (plan.begin.clocks, plan.begin.clock_offsets) = (Some(view.now), Some(view.offsets)),
        Err(error) => plan.reasons.push(unreadable(format!("clocks of pid {pid}"), &error)),
    }
    match crate::engine::freeze::thread_ids(pid) {
        Ok(tids) => plan.begin.tids = tids.into_iter().filter_map(|t| u32::try_from(t).ok()).collect(),
        Err(error) => plan.reasons.push(unreadable(format!("threads of pid {pid}"), &error)),
    }
    plan.begin.comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().into();
    plan.begin.memory_bytes = resident_bytes(pid);
    plan
}

/// Addresses of connections that have to be at the destination when the process runs there, and do not come with
/// it.
fn needed_addresses(pid: Tid, allowed: &Allowed) -> Result<Vec<Vec<u8>>, LockError> {
    if !allowed.hooks.is_empty() {
        return Ok(Vec::new());
    }
    let all = lock::connections(&lock::socket_inodes(pid)?)?;
    let connected = all.into_iter().filter(|connection| connection.remote.is_some());
    let ips: BTreeSet<IpAddr> =
        connected.map(|connection| remap::of(connection.local.ip(), &allowed.tcp_remaps)).collect();
    let comes = |ip: &IpAddr| ip.is_loopback() || allowed.move_ips.iter().any(|spec| spec.address == *ip);
    Ok(ips.into_iter().filter(|ip| !comes(ip)).map(address::octets).collect())
}

/// Credentials, limits, timers and scheduling: what the destination must be able to give.
fn attributes(pid: Tid) -> Result<Process, AttrError> {
    let tids = crate::engine::freeze::thread_ids(pid)
        .map_err(|source| AttrError::Read { path: format!("/proc/{pid}/task"), source })?;
    let mut statuses = Vec::with_capacity(tids.len());
    let mut threads = Vec::with_capacity(tids.len());
    let defaults = sched::Defaults::here()?;
    for tid in tids {
        // A thread that ends meanwhile is none.
        let Ok(status) = read_as(format!("/proc/{pid}/task/{tid}/status"), parse_status) else { continue };
        statuses.push(status);
        if let Ok(sched) = sched::capture(tid, &defaults) {
            threads.push(Thread { tid: tid.unsigned_abs(), sched: Some(sched), ..Thread::default() });
        }
    }
    Ok(Process {
        pid: pid.unsigned_abs(),
        attrs: Some(limits::survey(pid)?),
        creds: statuses.first().map(creds::of_status),
        threads,
        timers: timers::survey(pid)?,
        ..Process::default()
    })
}

fn unreadable(object: impl Into<String>, error: &dyn std::error::Error) -> Reason {
    Reason::new(object, format!("could not be examined: {}", chain(error)), "")
}

/// VmRSS, in bytes.
pub fn resident_bytes(pid: Tid) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kib = text.lines().find_map(|l| l.strip_prefix("VmRSS:"));
    kib.and_then(|v| v.trim().trim_end_matches("kB").trim().parse::<u64>().ok()).unwrap_or(0) * 1024
}
