//! What the engine builds on, tried on ourselves: for `migrate check`, which shows what a missing feature
//! costs.

use std::fmt;
use std::fs::File;
use std::os::fd::AsFd;

use nix::errno::Errno;

use super::kernel::Host;
use super::lock;
use super::memory::PAGE_BYTES;
use super::remote::Tid;
use super::state::creds;
use super::sys::pagemap::{self, PageRegion};
use super::sys::vm::RemoteRange;
use super::sys::{attrs, pidfd, probe, uffd, vm};

const CAP_NET_ADMIN: u32 = 12;
const CAP_SYS_PTRACE: u32 = 19;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_SYS_RESOURCE: u32 = 24;
const CAP_CHECKPOINT_RESTORE: u32 = 40;

/// One feature of this host.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Feature {
    /// Its name.
    pub name: &'static str,
    /// Whether it is there.
    pub available: bool,
    /// Whether nothing can be moved without it.
    pub required: bool,
    /// What it is for: what is lost without it.
    pub purpose: &'static str,
    /// What was found; why it is missing.
    pub detail: String,
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match (self.available, self.required) {
            (true, _) => "ok",
            (false, true) => "MISSING",
            (false, false) => "missing",
        };
        write!(f, "{state:8}{:24}{}", self.name, self.purpose)?;
        if !self.detail.is_empty() {
            write!(f, " ({})", self.detail)?;
        }
        Ok(())
    }
}

/// Tries everything that the engine builds on; for `migrate check`.
pub fn features() -> Vec<Feature> {
    let outcome = |result: Result<(), Errno>| match result {
        Ok(()) => (true, String::new()),
        Err(errno) => (false, errno.desc().to_owned()),
    };
    let effective = creds::here().map_or(0, |status| status.caps[2]);
    let have = |number: u32| effective >> number & 1 == 1;
    let capability = |number: u32, name: &str| match have(number) {
        true => (true, String::new()),
        false => (false, format!("the service lacks {name}")),
    };
    let clone3 = match (probe::has_clone3(), [CAP_SYS_ADMIN, CAP_CHECKPOINT_RESTORE].map(have)) {
        (false, _) => (false, "this kernel has no clone3".to_owned()),
        (true, [false, false]) => (false, "needs CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE".to_owned()),
        _ => (true, String::new()),
    };
    let vdso = match Host::probe().map(|host| host.kernel_needs()) {
        Ok(needs) => {
            let id: String = needs.vdso_build_id.iter().map(|b| format!("{b:02x}")).collect();
            (!id.is_empty(), format!("build id {id}, {} pages", needs.vdso_pages))
        }
        Err(error) => (false, error.to_string()),
    };
    let page = match nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE) {
        Ok(Some(bytes)) => (u64::try_from(bytes) == Ok(PAGE_BYTES), format!("{bytes} bytes")),
        _ => (false, "unknown".to_owned()),
    };
    let dirty = "finding what a running process writes";
    let rows = [
        ("userfaultfd", true, "asynchronous write-protection", outcome(try_userfaultfd())),
        ("PAGEMAP_SCAN", true, dirty, outcome(try_pagemap_scan())),
        ("clone3 set_tid", true, "the same process and thread ids", clone3),
        ("ptrace", true, "stopping processes", try_ptrace(have(CAP_SYS_PTRACE))),
        ("pidfd_getfd", true, "looking at descriptors", outcome(try_pidfd_getfd())),
        ("process_vm_readv", true, "reading memory", outcome(try_vm_read())),
        ("page size", true, "pages of the one known size", page),
        ("vdso", true, "the kernel's code in programs", vdso),
        ("timer ids", false, "POSIX timers (Linux 6.16)", (attrs::timer_ids_can_be_chosen(), String::new())),
        ("CAP_NET_ADMIN", false, "moving addresses", capability(CAP_NET_ADMIN, "CAP_NET_ADMIN")),
        ("nf_tables", false, "TCP connections that move along", lock()),
        (
            "CAP_SYS_RESOURCE",
            false,
            "hard limits above our own, negative oom_score_adj",
            capability(CAP_SYS_RESOURCE, "CAP_SYS_RESOURCE"),
        ),
    ];
    rows.into_iter()
        .map(|(name, required, purpose, (available, detail))| Feature {
            name,
            available,
            required,
            purpose,
            detail,
        })
        .collect()
}

fn lock() -> (bool, String) {
    match lock::missing_here() {
        None => (true, String::new()),
        Some(reason) => (false, reason.why),
    }
}

fn try_userfaultfd() -> Result<(), Errno> {
    let fd = probe::userfaultfd(uffd::USER_MODE_ONLY)?;
    uffd::api(fd.as_fd(), uffd::FEATURE_WP_ASYNC | uffd::FEATURE_WP_UNPOPULATED)
}

fn try_pagemap_scan() -> Result<(), Errno> {
    let file = File::open("/proc/self/pagemap")
        .map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))?;
    // A page of ours that is there.
    let here = Box::new(1u8);
    let start = std::ptr::from_ref(here.as_ref()).addr() as u64 & !(PAGE_BYTES - 1);
    let mut found = [PageRegion::default(); 1];
    let query = pagemap::Query { all: pagemap::PRESENT, report: pagemap::PRESENT, ..Default::default() };
    match pagemap::scan(file.as_fd(), start, start + PAGE_BYTES, query, &mut found)? {
        (1, _) => Ok(()),
        _ => Err(Errno::ENODATA),
    }
}

fn try_ptrace(capable: bool) -> (bool, String) {
    // 3: nobody may, up to the next boot. Where there is no Yama, there is no file.
    let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").unwrap_or_default();
    if scope.trim() == "3" {
        (false, "kernel.yama.ptrace_scope is 3".to_owned())
    } else if !capable {
        (false, "the service lacks CAP_SYS_PTRACE".to_owned())
    } else {
        (true, String::new())
    }
}

fn try_pidfd_getfd() -> Result<(), Errno> {
    let (one, _other) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    let ourselves = pidfd::PidFd::open(std::process::id())?;
    pidfd::take_fd(ourselves.as_fd(), std::os::fd::AsRawFd::as_raw_fd(&one)).map(drop)
}

fn try_vm_read() -> Result<(), Errno> {
    let (from, mut into) = ([7u8; 16], [0u8; 16]);
    let range = RemoteRange { start: from.as_ptr().addr() as u64, len: from.len() };
    let us = Tid::try_from(std::process::id()).map_err(|_| Errno::ESRCH)?;
    vm::read(us, &mut into, &[range])?;
    if into == from { Ok(()) } else { Err(Errno::EIO) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_has_what_the_engine_needs() {
        let missing: Vec<String> =
            features().iter().filter(|f| f.required && !f.available).map(ToString::to_string).collect();
        assert!(missing.is_empty(), "{missing:#?}");
    }

    /// Capabilities are asked of the thread that would use them.
    #[test]
    fn what_is_missing_is_shown_so() {
        let all = std::thread::spawn(|| {
            probe::drop_effective_capabilities().unwrap();
            features()
        });
        let all = all.join().unwrap();
        for name in ["clone3 set_tid", "ptrace", "CAP_NET_ADMIN", "CAP_SYS_RESOURCE"] {
            let feature = all.iter().find(|f| f.name == name).unwrap();
            assert!(!feature.available && feature.detail.contains("CAP_"), "{feature}");
            let word = if feature.required { "MISSING" } else { "missing" };
            assert!(feature.to_string().starts_with(word));
        }
    }
}
