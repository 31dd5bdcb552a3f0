//! Resource limits and the other numbers of a whole process: umask, working directory, personality,
//! OOM score, core filter, subreaper, huge page and memory protection switches, what it has registered for
//! membarrier(2), and whether it locks what it will map.
//!
//! Not carried, as they count rather than say: CPU time used so far (so an RLIMIT_CPU starts anew), I/O
//! counters, the control group, the autogroup.

use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;

use nix::errno::Errno;

use super::calls::{AttrError, Named, read, read_as, u32_of};
use crate::engine::memory::PAGE_BYTES;
use crate::engine::procfs::{Stat, Status, limit_name, parse_limits, parse_maps};
use crate::engine::reason::Reason;
use crate::engine::remote::{Arg, Batch, Outcome, Tid};
use crate::proto::files::FileRef;
use crate::proto::image::{ProcessAttrs, Rlimit};

const CAP_SYS_RESOURCE: u64 = 1 << 24;
/// Number of RLIMIT_* values.
const LIMITS: u32 = 16;
const RLIMIT_NOFILE: u32 = 7;
const PR_SET_MDWE: u64 = 65;
const PR_GET_MDWE: u64 = 66;
const PR_GET_MEMORY_MERGE: u64 = 68;
const PR_GET_IO_FLUSHER: u64 = 58;
const MEMBARRIER_GET_REGISTRATIONS: u64 = 1 << 9;
/// What is mapped above (the vsyscall page) is not the process's.
const USER_END: u64 = 1 << 47;
const LDT_ENTRY_BYTES: usize = 8;
const MCL_FUTURE: u32 = 2;
const MCL_ONFAULT: u32 = 4;
/// PR_GET_THP_DISABLE: off, and off except where madvise asks.
const THP_DISABLED: u64 = 1;
const THP_EXCEPT_ADVISED: u64 = 2;

/// What is in the way of carrying these attributes of `pid`, running or stopped.
///
/// # Errors
/// If /proc cannot be read.
pub fn preflight(pid: Tid) -> Result<Vec<Reason>, AttrError> {
    Ok(working_directory(pid)?.err().into_iter().chain(other_root(pid)?).collect())
}

fn stat(path: String) -> Result<std::fs::Metadata, AttrError> {
    std::fs::metadata(&path).map_err(|source| AttrError::Read { path, source })
}

fn working_directory(pid: Tid) -> Result<Result<FileRef, Reason>, AttrError> {
    let link = format!("/proc/{pid}/cwd");
    let meta = stat(link.clone())?;
    let path = std::fs::read_link(&link).map_err(|source| AttrError::Read { path: link, source })?;
    let there = std::fs::metadata(&path);
    if there.is_ok_and(|m| (m.dev(), m.ino()) == (meta.dev(), meta.ino())) {
        let path = path.as_os_str().as_bytes().to_vec();
        return Ok(Ok(FileRef {
            path,
            dev: meta.dev(),
            ino: meta.ino(),
            mode: meta.mode(),
            ..FileRef::default()
        }));
    }
    Ok(Err(Reason::new(
        format!("working directory {}", path.display()),
        "cannot be reached by its path: it was deleted, or something else is mounted there",
        "",
    )))
}

fn other_root(pid: Tid) -> Result<Option<Reason>, AttrError> {
    let (theirs, ours) = (stat(format!("/proc/{pid}/root"))?, stat("/".into())?);
    let same = (theirs.dev(), theirs.ino()) == (ours.dev(), ours.ino());
    Ok((!same).then(|| {
        let why = "has another root directory than the service (chroot), which cannot be carried yet";
        Reason::new(format!("pid {pid}"), why, "")
    }))
}

/// What is in the way of having these attributes here, with `ours` being the service's status.
///
/// # Errors
/// If /proc cannot be read.
pub fn check_here(wanted: &ProcessAttrs, ours: &Status) -> Result<Vec<Reason>, AttrError> {
    let mut reasons = Vec::new();
    let privileged = ours.caps[2] & CAP_SYS_RESOURCE != 0;
    let here = read_as("/proc/self/limits".into(), parse_limits)?;
    let most_files = std::fs::read_to_string("/proc/sys/fs/nr_open").ok().and_then(|t| t.trim().parse().ok());
    for limit in &wanted.limits {
        let Some(&(_, ours)) = here.get(limit.resource as usize) else { continue };
        let object = format!("limit \"{}\"", limit_name(limit.resource));
        let remedy = "start the service with that hard limit or with CAP_SYS_RESOURCE";
        if limit.hard > ours && !privileged {
            let why = format!("is {} (hard) there and can be {} here at most", show(limit.hard), show(ours));
            reasons.push(Reason::new(&object, why, remedy));
        }
        if limit.resource == RLIMIT_NOFILE && most_files.is_some_and(|most: u64| limit.hard > most) {
            let why = format!("is {} (hard) there, and fs.nr_open is lower here", show(limit.hard));
            reasons.push(Reason::new(object, why, "raise the sysctl fs.nr_open"));
        }
    }
    let score: i32 = number("/proc/self/oom_score_adj".into(), 10)?;
    if wanted.oom_score_adj < score.min(0) && !privileged {
        let why = format!("is {} there, below what the service may give here", wanted.oom_score_adj);
        reasons.push(Reason::new(
            "oom_score_adj",
            why,
            "start the service with that value or CAP_SYS_RESOURCE",
        ));
    }
    if let Some(cwd) = &wanted.cwd {
        let path = std::path::Path::new(std::ffi::OsStr::from_bytes(&cwd.path));
        if !path.is_absolute() || !path.is_dir() {
            let object = format!("working directory {}", path.display());
            reasons.push(Reason::new(object, "is not there", "make the directory"));
        }
    }
    Ok(reasons)
}

fn show(limit: u64) -> String {
    if limit == u64::MAX { "unlimited".into() } else { limit.to_string() }
}

/// A file of /proc that is one number.
fn number<T: TryFrom<i64>>(path: String, radix: u32) -> Result<T, AttrError> {
    read_as(path, |text| {
        let parsed = std::str::from_utf8(text).ok().and_then(|t| i64::from_str_radix(t.trim(), radix).ok());
        let bad = || crate::engine::procfs::ProcfsError { line: String::from_utf8_lossy(text).into_owned() };
        parsed.and_then(|n| T::try_from(n).ok()).ok_or_else(bad)
    })
}

/// The question for what /proc does not tell.
#[derive(Debug)]
pub struct LimitsProbe {
    calls: Named,
    subreaper: Arg,
    thp: usize,
    mdwe: usize,
    merge: usize,
    io_flusher: usize,
    barriers: usize,
    segments: usize,
    future: Option<Future>,
}

/// A page that is mapped for the question whether such pages are locked, which shows nowhere.
#[derive(Debug)]
struct Future {
    mapped: usize,
    cold: usize,
    present: Arg,
}

impl Future {
    /// Far from everything that is mapped.
    fn ask(pid: Tid, batch: &mut Batch) -> Option<Self> {
        let maps = parse_maps(&read(format!("/proc/{pid}/maps")).ok()?).ok()?;
        let above = maps.iter().skip(1).filter(|m| m.start < USER_END);
        let gaps = maps.iter().zip(above).map(|(a, b)| (b.start.saturating_sub(a.end), a.end));
        let (room, start) = gaps.max()?;
        let at = (start + room / 2) & !(PAGE_BYTES - 1);
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let page = [at.into(), PAGE_BYTES.into()];
        let nothing = [(-1i64).into(), 0u64.into()];
        let mapped = [&page[..], &[prot.into(), flags.into()], &nothing].concat();
        let mapped = batch.call(libc::SYS_mmap, &mapped);
        // Refused for locked memory, and does nothing otherwise.
        let cold = batch.call(libc::SYS_madvise, &[page[0], page[1], libc::MADV_COLD.into()]);
        let present = batch.output(1);
        batch.call(libc::SYS_mincore, &[page[0], page[1], present]);
        batch.call(libc::SYS_munmap, &page);
        Some(Self { mapped, cold, present })
    }

    /// What mlockall(2) was told.
    fn read(&self, outcome: &Outcome) -> u32 {
        match (outcome.ret(self.mapped), outcome.ret(self.cold)) {
            (Ok(_), Err(Errno::EINVAL)) if outcome.data(self.present, 1) == [1] => MCL_FUTURE,
            (Ok(_), Err(Errno::EINVAL)) => MCL_FUTURE | MCL_ONFAULT,
            // No more may be locked, and all that comes would be. (Whether as it comes or at once is not told.)
            (Err(Errno::EAGAIN), _) => MCL_FUTURE,
            _ => 0,
        }
    }
}

impl LimitsProbe {
    /// Adds it to a batch that the leader of the stopped process `pid` will run.
    pub fn ask(pid: Tid, batch: &mut Batch) -> Self {
        let mut calls = Named::new();
        let subreaper = batch.output(4);
        let args = [libc::PR_GET_CHILD_SUBREAPER.into(), subreaper];
        calls.add(batch, "reading child subreaper", libc::SYS_prctl, &args);
        let thp = calls.add(batch, "reading THP", libc::SYS_prctl, &[libc::PR_GET_THP_DISABLE.into()]);
        // These three an older kernel does not know, and then the process cannot have them.
        let mut ask = |what: u64| batch.call(libc::SYS_prctl, &[what.into()]);
        let (mdwe, merge, io_flusher) = (ask(PR_GET_MDWE), ask(PR_GET_MEMORY_MERGE), ask(PR_GET_IO_FLUSHER));
        let barriers = batch.call(libc::SYS_membarrier, &[MEMBARRIER_GET_REGISTRATIONS.into()]);
        let entry = batch.output(LDT_ENTRY_BYTES);
        let segments = batch.call(libc::SYS_modify_ldt, &[0u64.into(), entry, LDT_ENTRY_BYTES.into()]);
        let future = Future::ask(pid, batch);
        Self { calls, subreaper, thp, mdwe, merge, io_flusher, barriers, segments, future }
    }

    /// The attributes, with the leader's status and stat. `personality` is left to `threads`.
    ///
    /// # Errors
    /// If /proc cannot be read or a call failed, and for what cannot be carried.
    pub fn read(&self, status: &Status, stat: &Stat, outcome: &Outcome) -> Result<ProcessAttrs, AttrError> {
        let pid = status.tgid;
        self.calls.check(pid, outcome)?;
        let answer = |index| outcome.ret(index).unwrap_or(0);
        let mut reasons: Vec<Reason> = other_root(pid)?.into_iter().collect();
        for (index, what) in [
            (self.merge, "has all its memory merged by KSM (PR_SET_MEMORY_MERGE), which cannot be carried"),
            (self.io_flusher, "is an I/O flusher (PR_SET_IO_FLUSHER), which cannot be carried"),
            (self.segments, "has segments of its own (modify_ldt), which cannot be carried"),
        ] {
            if answer(index) != 0 {
                reasons.push(Reason::new(format!("pid {pid}"), what, ""));
            }
        }
        let cwd = working_directory(pid)?.map_err(|reason| reasons.push(reason)).ok();
        if !reasons.is_empty() {
            return Err(AttrError::Refused(reasons));
        }
        let limits = read_as(format!("/proc/{pid}/limits"), parse_limits)?;
        let limits = (0..LIMITS).zip(limits);
        let own = |id: i32| if id == pid { pid.unsigned_abs() } else { 0 };
        let thp = answer(self.thp);
        Ok(ProcessAttrs {
            limits: limits.map(|(resource, (soft, hard))| Rlimit { resource, soft, hard }).collect(),
            umask: status.umask.unwrap_or(0o22),
            cwd,
            personality: 0,
            oom_score_adj: number(format!("/proc/{pid}/oom_score_adj"), 10)?,
            coredump_filter: number(format!("/proc/{pid}/coredump_filter"), 16)?,
            child_subreaper: u32_of(outcome.data(self.subreaper, 4)) != 0,
            thp_disable: thp & THP_DISABLED != 0,
            thp_except_advised: thp & THP_EXCEPT_ADVISED != 0,
            mdwe: u32::try_from(answer(self.mdwe)).unwrap_or(0),
            membarrier: u32::try_from(answer(self.barriers)).unwrap_or(0),
            lock_future: self.future.as_ref().map_or(0, |future| future.read(outcome)),
            sid: own(stat.session),
            pgid: own(stat.pgrp),
        })
    }
}

/// The limit of open files of a process, soft and hard, if that tells.
pub fn of_open_files(pid: Tid) -> Option<(u64, u64)> {
    let limits = read_as(format!("/proc/{pid}/limits"), parse_limits).ok()?;
    limits.get(RLIMIT_NOFILE as usize).copied().filter(|(soft, hard)| soft < hard)
}

/// As many descriptors as we may have ourselves, for a skeleton that does not have its own limits yet.
///
/// # Errors
/// If our own limits cannot be read.
pub fn make_room_calls(batch: &mut Batch) -> Result<Named, AttrError> {
    let here = read_as("/proc/self/limits".into(), parse_limits)?;
    let mut calls = Named::new();
    if let Some(&(_, hard)) = here.get(RLIMIT_NOFILE as usize) {
        let bytes: Vec<u8> = [hard, hard].iter().flat_map(|v| v.to_ne_bytes()).collect();
        let new = batch.input(&bytes);
        let args = [0u64.into(), RLIMIT_NOFILE.into(), new, 0u64.into()];
        calls.add(batch, "making room for descriptors", libc::SYS_prlimit64, &args);
    }
    Ok(calls)
}

/// What the destination must be able to give, as far as it shows from outside: limits and the place in the
/// order of the OOM killer.
///
/// # Errors
/// If /proc cannot be read.
pub fn survey(pid: Tid) -> Result<ProcessAttrs, AttrError> {
    let limits = read_as(format!("/proc/{pid}/limits"), parse_limits)?;
    let limits = (0..LIMITS).zip(limits).map(|(resource, (soft, hard))| Rlimit { resource, soft, hard });
    let score = read(format!("/proc/{pid}/oom_score_adj"))?;
    let score = String::from_utf8_lossy(&score).trim().parse().unwrap_or(0);
    Ok(ProcessAttrs { limits: limits.collect(), oom_score_adj: score, ..ProcessAttrs::default() })
}

/// Everything that the leader sets itself. Limits last: some would bind the calls before them. After
/// this the process may make no more mappings executable, if it had forbidden that to itself.
pub fn restore_calls(wanted: &ProcessAttrs, batch: &mut Batch) -> Result<Named, AttrError> {
    let mut calls = Named::new();
    let c = &mut calls;
    if let Some(cwd) = &wanted.cwd {
        let path = batch.input_c_string(&cwd.path);
        c.add(batch, "entering the working directory", libc::SYS_chdir, &[path]);
    }
    // Returns the mask of before: nothing to check.
    batch.call(libc::SYS_umask, &[wanted.umask.into()]);
    let args = [libc::PR_SET_CHILD_SUBREAPER.into(), u64::from(wanted.child_subreaper).into()];
    c.add(batch, "setting child subreaper", libc::SYS_prctl, &args);
    let except = if wanted.thp_except_advised { THP_EXCEPT_ADVISED } else { 0 };
    let args = [libc::PR_SET_THP_DISABLE.into(), u64::from(wanted.thp_disable).into(), except.into()];
    c.add(batch, "switching transparent huge pages", libc::SYS_prctl, &args);
    if wanted.mdwe != 0 {
        let args = [PR_SET_MDWE.into(), wanted.mdwe.into()];
        c.add(batch, "forbidding new executable memory", libc::SYS_prctl, &args);
    }
    for bit in (0..u32::BITS).filter(|bit| wanted.membarrier & (1 << bit) != 0) {
        c.add(batch, "registering for membarrier(2)", libc::SYS_membarrier, &[(1u64 << bit).into()]);
    }
    if wanted.lock_future != 0 {
        c.add(batch, "locking what will be mapped", libc::SYS_mlockall, &[wanted.lock_future.into()]);
    }
    for limit in &wanted.limits {
        if limit.resource >= LIMITS {
            let object = format!("limit {}", limit.resource);
            return Err(AttrError::Refused(vec![Reason::new(object, "does not exist", "")]));
        }
        let bytes: Vec<u8> = [limit.soft, limit.hard].iter().flat_map(|v| v.to_ne_bytes()).collect();
        let new = batch.input(&bytes);
        let args = [0u64.into(), limit.resource.into(), new, 0u64.into()];
        c.add(batch, LIMIT_STEPS[limit.resource as usize], libc::SYS_prlimit64, &args);
    }
    Ok(calls)
}

/// What each call to prlimit64 is for, by RLIMIT_* number.
const LIMIT_STEPS: [&str; LIMITS as usize] = [
    "setting the limit of CPU time",
    "setting the limit of file size",
    "setting the limit of data size",
    "setting the limit of stack size",
    "setting the limit of core file size",
    "setting the limit of resident set",
    "setting the limit of processes",
    "setting the limit of open files",
    "setting the limit of locked memory",
    "setting the limit of address space",
    "setting the limit of file locks",
    "setting the limit of pending signals",
    "setting the limit of message queue size",
    "setting the limit of nice priority",
    "setting the limit of real-time priority",
    "setting the limit of real-time timeout",
];

/// What is set from outside.
///
/// # Errors
/// If a file of /proc cannot be written.
pub fn restore_outside(pid: Tid, wanted: &ProcessAttrs) -> Result<(), AttrError> {
    let put = |file: &str, value: String| {
        let path = format!("/proc/{pid}/{file}");
        // Only what differs: giving the value that is there already may be refused.
        let same = read(path.clone())? == format!("{value}\n").as_bytes();
        if same {
            Ok(())
        } else {
            std::fs::write(&path, value).map_err(|source| AttrError::Write { path, source })
        }
    };
    put("oom_score_adj", wanted.oom_score_adj.to_string())?;
    put("coredump_filter", format!("{:#x}", wanted.coredump_filter))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::state::creds;

    #[test]
    fn limits_that_cannot_be_had_are_named() {
        let ours = Status { caps: [0; 5], ..creds::here().unwrap() };
        let hard = read_as("/proc/self/limits".into(), parse_limits).unwrap();
        let as_here = (0..LIMITS).zip(hard).map(|(resource, (soft, hard))| Rlimit { resource, soft, hard });
        let mut wanted = ProcessAttrs { limits: as_here.collect(), ..ProcessAttrs::default() };
        assert_eq!(check_here(&wanted, &ours).unwrap(), []);
        wanted.limits[12].hard += 1;
        wanted.limits[7].hard = 1 << 40;
        wanted.oom_score_adj = -900;
        wanted.cwd = Some(FileRef { path: b"/nonexistent/dir".to_vec(), ..FileRef::default() });
        let reasons = check_here(&wanted, &ours).unwrap();
        let objects: Vec<&str> = reasons.iter().map(|r| r.object.as_str()).collect();
        assert_eq!(
            objects,
            [
                "limit \"Max open files\"",
                "limit \"Max open files\"",
                "limit \"Max msgqueue size\"",
                "oom_score_adj",
                "working directory /nonexistent/dir"
            ]
        );
    }

    #[test]
    fn a_deleted_working_directory_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut sleep = std::process::Command::new("sleep");
        let null = std::process::Stdio::null;
        let child = crate::engine::trial::Killed::spawn(
            sleep.arg("100").current_dir(dir.path()).stdin(null()).stdout(null()).stderr(null()),
        );
        let pid = child.pid();
        let before = preflight(pid);
        drop(dir);
        let after = preflight(pid);
        assert_eq!(before.unwrap(), []);
        assert_eq!(after.unwrap().len(), 1);
    }
}
