//! Credentials: ids, groups, capabilities, securebits, no_new_privs, dumpable.
//!
//! All but dumpable belong to each thread, and each thread must set its own. Threads of one process whose
//! credentials differ are refused: programs change them for all threads (nptl(7)), and what the others
//! are for nobody knows.
//!
//! Order within a thread: what needs privileges first. With SECBIT_NO_SETUID_FIXUP a change of the user id
//! touches no capability, so that the sets are free until the end; inheritable ones before the bounding
//! set shrinks (they can only come from it), ambient ones when both others are there, no_new_privs last.
//! Dumpable comes after every thread has its ids: a change of those resets it.

use super::calls::{AttrError, Named, read, read_as};
use crate::engine::procfs::{Status, parse_status};
use crate::engine::reason::Reason;
use crate::engine::remote::{Batch, Outcome, Tid};
use crate::proto::image::Creds;

/// Most supplementary groups that are carried.
pub const MAX_GROUPS: usize = 4096;

const CAP_SETGID: u64 = 1 << 6;
const CAP_SETUID: u64 = 1 << 7;
const CAP_SETPCAP: u64 = 1 << 8;
const SECBIT_NO_SETUID_FIXUP: u32 = 1 << 2;
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;
const PR_CAP_AMBIENT: u64 = 47;
const PR_CAP_AMBIENT_RAISE: u64 = 2;
const PR_CAP_AMBIENT_CLEAR_ALL: u64 = 4;
/// Dumpable as it is after a change of ids where `fs.suid_dumpable` is 2: only root may have the core.
const DUMPABLE_ROOT_ONLY: u32 = 2;

/// Our own credentials, which a skeleton inherits.
///
/// # Errors
/// If /proc cannot be read.
pub fn here() -> Result<Status, AttrError> {
    read_as("/proc/thread-self/status".into(), parse_status)
}

/// Whether two threads have the same credentials, as far as their status tells.
pub fn same(a: &Status, b: &Status) -> bool {
    of_status(a) == of_status(b) && a.seccomp == b.seccomp
}

/// The credentials as /proc shows them: all but securebits and dumpable.
pub fn of_status(s: &Status) -> Creds {
    let [inheritable, permitted, effective, bounding, ambient] = s.caps;
    Creds {
        uids: s.uids.to_vec(),
        gids: s.gids.to_vec(),
        groups: s.groups.clone(),
        cap_inheritable: inheritable,
        cap_permitted: permitted,
        cap_effective: effective,
        cap_bounding: bounding,
        cap_ambient: ambient,
        securebits: 0,
        no_new_privs: s.no_new_privs,
        dumpable: 0,
    }
}

/// What is in the way of carrying the credentials of these threads of `pid`, leader first.
pub fn preflight(pid: Tid, threads: &[Status]) -> Vec<Reason> {
    let mut reasons = Vec::new();
    let Some(leader) = threads.first() else { return reasons };
    for thread in threads {
        let object = format!("thread {}", thread.pid);
        if thread.seccomp != 0 {
            reasons.push(filtered(thread.pid));
        }
        if !same(leader, thread) {
            let why = format!("has other credentials than the leader, thread {}", leader.pid);
            reasons.push(Reason::new(&object, why, ""));
        }
        if thread.groups.len() > MAX_GROUPS {
            reasons.push(Reason::new(&object, format!("is in more than {MAX_GROUPS} groups"), ""));
        }
        if let Some(label) = label(pid, thread.pid) {
            let why = format!("is confined by a security module (label {label}), which cannot be carried");
            reasons.push(Reason::new(&object, why, "start the process unconfined"));
        }
    }
    reasons
}

fn filtered(tid: Tid) -> Reason {
    let why = "is under a seccomp filter, which cannot be carried yet";
    Reason::new(format!("thread {tid}"), why, "start the process without it")
}

/// The label of a security module, unless it says that there is no confinement. Without any module the
/// file is there and cannot be read.
fn label(pid: Tid, tid: Tid) -> Option<String> {
    let bytes = read(format!("/proc/{pid}/task/{tid}/attr/current")).ok()?;
    let label = String::from_utf8_lossy(&bytes);
    let label = label.trim_matches(['\0', '\n', ' ']);
    (!label.is_empty() && !label.starts_with("unconfined")).then(|| label.to_owned())
}

/// The question for what /proc does not tell.
#[derive(Debug)]
pub struct CredsProbe {
    calls: Named,
    securebits: usize,
    dumpable: usize,
}

impl CredsProbe {
    /// Adds it to a batch that the leader will run.
    pub fn ask(batch: &mut Batch) -> Self {
        let mut calls = Named::new();
        let securebits =
            calls.add(batch, "reading the securebits", libc::SYS_prctl, &[libc::PR_GET_SECUREBITS.into()]);
        let dumpable = calls.add(batch, "reading dumpable", libc::SYS_prctl, &[libc::PR_GET_DUMPABLE.into()]);
        Self { calls, securebits, dumpable }
    }

    /// The credentials, with `status` being the leader's.
    ///
    /// # Errors
    /// If a call failed, and for a filter of system calls, which may have come since preflight.
    pub fn read(&self, status: &Status, outcome: &Outcome) -> Result<Creds, AttrError> {
        self.calls.check(status.pid, outcome)?;
        if status.seccomp != 0 {
            return Err(AttrError::Refused(vec![filtered(status.pid)]));
        }
        let small = |index| outcome.ret(index).ok().and_then(|v| u32::try_from(v).ok()).unwrap_or(0);
        Ok(Creds { securebits: small(self.securebits), dumpable: small(self.dumpable), ..of_status(status) })
    }
}

/// What is in the way of having these credentials here, with `ours` being the service's.
pub fn check_here(wanted: &Creds, ours: &Status) -> Vec<Reason> {
    let [_, permitted, effective, bounding, _] = ours.caps;
    let mut reasons = Vec::new();
    let mut refuse =
        |what: &str, why: String| reasons.push(Reason::new(what, why, "run the service as root"));
    let lacking = |set: u64, of: u64| -> Vec<u32> { (0..64).filter(|c| set & !of & (1 << c) != 0).collect() };
    for (name, set, of) in
        [("permitted", wanted.cap_permitted, permitted), ("bounding", wanted.cap_bounding, bounding)]
    {
        let missing = lacking(set, of);
        if !missing.is_empty() {
            refuse("capabilities", format!("numbers {missing:?} of the {name} set are not to be had here"));
        }
    }
    let needed = CAP_SETPCAP | CAP_SETUID | CAP_SETGID;
    if needed & !effective != 0 {
        refuse(
            "credentials",
            "cannot be set by a service without CAP_SETPCAP, CAP_SETUID, CAP_SETGID".into(),
        );
    }
    if ours.no_new_privs && !wanted.no_new_privs {
        refuse("no_new_privs", "is set on the service here, and would be on the process".into());
    }
    reasons
}

/// Everything but dumpable, in one thread of a skeleton that has `ours` as yet.
///
/// # Errors
/// If the credentials are not valid.
pub fn restore_calls(wanted: &Creds, ours: &Status, batch: &mut Batch) -> Result<Named, AttrError> {
    let invalid = |why: &str| AttrError::Refused(vec![Reason::new("credentials", why, "")]);
    let ids =
        |ids: &[u32]| <[u32; 4]>::try_from(ids).map_err(|_| invalid("must have four user and group ids"));
    let ([ruid, euid, suid, fsuid], [rgid, egid, sgid, fsgid]) = (ids(&wanted.uids)?, ids(&wanted.gids)?);
    if wanted.groups.len() > MAX_GROUPS {
        return Err(invalid("have too many groups"));
    }
    let mut calls = Named::new();
    let c = &mut calls;
    let prctl = libc::SYS_prctl;
    let securebits = |bits: u32| [libc::PR_SET_SECUREBITS.into(), bits.into()];
    let ambient =
        |op: u64, cap: u64| [PR_CAP_AMBIENT.into(), op.into(), cap.into(), 0u64.into(), 0u64.into()];
    c.add(batch, "detaching capabilities from ids", prctl, &securebits(SECBIT_NO_SETUID_FIXUP));
    c.add(batch, "clearing ambient capabilities", prctl, &ambient(PR_CAP_AMBIENT_CLEAR_ALL, 0));
    let tools = wanted.cap_permitted | CAP_SETPCAP | CAP_SETUID | CAP_SETGID;
    capset(c, batch, "setting inheritable capabilities", [tools, tools, wanted.cap_inheritable]);
    for cap in (0..64u64).filter(|cap| ours.caps[3] & !wanted.cap_bounding & (1 << cap) != 0) {
        let args = [libc::PR_CAPBSET_DROP.into(), cap.into()];
        c.add(batch, "dropping a capability from the bounding set", prctl, &args);
    }
    let groups: Vec<u8> = wanted.groups.iter().flat_map(|g| g.to_ne_bytes()).collect();
    let list = batch.input(&groups);
    c.add(batch, "setting groups", libc::SYS_setgroups, &[wanted.groups.len().into(), list]);
    c.add(batch, "setting group ids", libc::SYS_setresgid, &[rgid.into(), egid.into(), sgid.into()]);
    c.add(batch, "setting user ids", libc::SYS_setresuid, &[ruid.into(), euid.into(), suid.into()]);
    for (what, number, id) in [
        ("setting the file system group id", libc::SYS_setfsgid, fsgid),
        ("setting the file system user id", libc::SYS_setfsuid, fsuid),
    ] {
        // These return the id of before and never an error: the second call tells what came of the first.
        batch.call(number, &[id.into()]);
        c.expect(batch, what, (number, &[id.into()]), u64::from(id));
    }
    for cap in (0..64u64).filter(|cap| wanted.cap_ambient & (1 << cap) != 0) {
        c.add(batch, "raising an ambient capability", prctl, &ambient(PR_CAP_AMBIENT_RAISE, cap));
    }
    c.add(batch, "setting securebits", prctl, &securebits(wanted.securebits));
    let sets = [wanted.cap_effective, wanted.cap_permitted, wanted.cap_inheritable];
    capset(c, batch, "setting capabilities", sets);
    if wanted.no_new_privs {
        let args = [libc::PR_SET_NO_NEW_PRIVS.into(), 1u64.into(), 0u64.into(), 0u64.into(), 0u64.into()];
        c.add(batch, "setting no_new_privs", prctl, &args);
    }
    Ok(calls)
}

fn capset(calls: &mut Named, batch: &mut Batch, what: &'static str, sets: [u64; 3]) {
    let mut header = CAPABILITY_VERSION_3.to_ne_bytes().to_vec();
    header.extend_from_slice(&[0; 4]); // the calling thread
    let header = batch.input(&header);
    let bytes: Vec<[u8; 8]> = sets.iter().map(|s| s.to_le_bytes()).collect();
    // Effective, permitted, inheritable: the low words of all, then the high words.
    let data: Vec<u8> = [0..4, 4..8]
        .into_iter()
        .flat_map(|half| bytes.iter().flat_map(move |b| b[half.clone()].to_vec()))
        .collect();
    let data = batch.input(&data);
    calls.add(batch, what, libc::SYS_capset, &[header, data]);
}

/// Dumpable, once all threads have their ids. The value that says "for root only" cannot be set; it
/// becomes "not at all", which is stricter.
pub fn finish_calls(wanted: &Creds, batch: &mut Batch) -> Named {
    let mut calls = Named::new();
    let value = if wanted.dumpable == DUMPABLE_ROOT_ONLY { 0 } else { wanted.dumpable };
    let args = [libc::PR_SET_DUMPABLE.into(), value.into()];
    calls.add(batch, "setting dumpable", libc::SYS_prctl, &args);
    calls
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_plain_service_cannot_give() {
        let root = Status { caps: [0, 0xff_ffff, 0xff_ffff, 0xff_ffff, 0], ..Status::default() };
        let creds = Creds { cap_permitted: 1 << 24, cap_bounding: 1 << 24, ..Creds::default() };
        let reasons = check_here(&creds, &root);
        assert_eq!(reasons.len(), 2, "{reasons:?}");
        assert!(reasons[0].why.contains("[24]"));
        assert!(check_here(&Creds::default(), &root).is_empty());
        let nnp = Status { no_new_privs: true, ..root };
        assert_eq!(check_here(&Creds::default(), &nnp)[0].object, "no_new_privs");
    }

    #[test]
    fn threads_that_differ_and_filters_are_refused() {
        let pid = Tid::try_from(std::process::id()).unwrap();
        let ours = here().unwrap();
        assert!(preflight(pid, &[ours.clone(), ours.clone()]).is_empty());
        let other = Status { uids: [1, 0, 0, 0], seccomp: 2, ..ours.clone() };
        let reasons = preflight(pid, &[ours, other]);
        assert_eq!(reasons.len(), 2, "{reasons:?}");
    }

    #[test]
    fn broken_ids_are_refused() {
        let ours = here().unwrap();
        assert!(restore_calls(&Creds::default(), &ours, &mut Batch::new()).is_err());
        let ids = vec![0; 4];
        let many =
            Creds { uids: ids.clone(), gids: ids, groups: vec![1; MAX_GROUPS + 1], ..Creds::default() };
        assert!(restore_calls(&many, &ours, &mut Batch::new()).is_err());
    }
}
