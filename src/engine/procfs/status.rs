//! /proc/PID/status and /proc/PID/task/TID/status.

use super::{ProcfsError, bad};

/// What matters here of a process's or thread's status (proc_pid_status(5)).
///
/// Signal and capability sets have bit n-1 for signal n, bit n for capability n. Lines that an older
/// kernel does not have keep their default.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Status {
    /// File mode creation mask; `None` for a zombie, which has none any more.
    pub umask: Option<u32>,
    /// One letter, as in stat.
    pub state: u8,
    /// Thread group.
    pub tgid: i32,
    /// Thread.
    pub pid: i32,
    /// Parent.
    pub ppid: i32,
    /// Who traces it; 0: nobody.
    pub tracer: i32,
    /// Real, effective, saved, file system.
    pub uids: [u32; 4],
    /// Real, effective, saved, file system.
    pub gids: [u32; 4],
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Whether it is a thread of the kernel.
    pub kernel_thread: bool,
    /// Whether it has memory; zombies and kernel threads have none.
    pub has_memory: bool,
    /// Memory pinned by the kernel for a device or io_uring, KiB.
    pub pinned_kib: u64,
    /// Number of threads.
    pub threads: u32,
    /// Pending for this thread.
    pub pending: u64,
    /// Pending for the whole process.
    pub shared_pending: u64,
    /// Blocked.
    pub blocked: u64,
    /// Ignored.
    pub ignored: u64,
    /// Caught by a handler.
    pub caught: u64,
    /// Inheritable, permitted, effective, bounding, ambient.
    pub caps: [u64; 5],
    /// prctl(PR_SET_NO_NEW_PRIVS).
    pub no_new_privs: bool,
    /// 0: none, 1: strict, 2: filters.
    pub seccomp: u32,
    /// Bits of an address that the CPU looks at; all of them unless LAM is on.
    pub untag_mask: Option<u64>,
    /// State of prctl(PR_SPEC_STORE_BYPASS), as the kernel words it.
    pub store_bypass: String,
    /// State of prctl(PR_SPEC_INDIRECT_BRANCH), as the kernel words it.
    pub indirect_branch: String,
}

/// Parses a status file.
///
/// # Errors
/// On a line whose value is not what proc(5) promises, and if the identity lines are missing.
pub fn parse_status(text: &[u8]) -> Result<Status, ProcfsError> {
    let mut status = Status::default();
    let mut seen = 0;
    for line in text.split(|b| *b == b'\n') {
        let Some(colon) = line.iter().position(|b| *b == b':') else { continue };
        let (name, value) = (&line[..colon], &line[colon + 1..]);
        // The name of the process may be any bytes; no line that we read is.
        let Ok(value) = std::str::from_utf8(value) else { continue };
        seen += usize::from(take(&mut status, name, value.trim()).ok_or_else(|| bad(line))?);
    }
    if seen < 5 {
        return Err(bad(text));
    }
    Ok(status)
}

/// Takes over one line; whether it is one that every status has.
fn take(s: &mut Status, name: &[u8], value: &str) -> Option<bool> {
    let number = || value.parse::<i32>().ok();
    let hex = || u64::from_str_radix(value, 16).ok();
    match name {
        b"Umask" => s.umask = Some(u32::from_str_radix(value, 8).ok()?),
        b"State" => s.state = *value.as_bytes().first()?,
        b"Tgid" => s.tgid = number()?,
        b"Pid" => s.pid = number()?,
        b"PPid" => s.ppid = number()?,
        b"TracerPid" => s.tracer = number()?,
        b"Uid" => s.uids = four(value)?,
        b"Gid" => s.gids = four(value)?,
        b"Groups" => {
            s.groups = value.split_ascii_whitespace().map(str::parse).collect::<Result<_, _>>().ok()?;
        }
        b"Kthread" => s.kernel_thread = value == "1",
        b"VmSize" => s.has_memory = true,
        b"VmPin" => s.pinned_kib = value.split_ascii_whitespace().next()?.parse().ok()?,
        b"Threads" => s.threads = value.parse().ok()?,
        b"SigPnd" => s.pending = hex()?,
        b"ShdPnd" => s.shared_pending = hex()?,
        b"SigBlk" => s.blocked = hex()?,
        b"SigIgn" => s.ignored = hex()?,
        b"SigCgt" => s.caught = hex()?,
        b"CapInh" => s.caps[0] = hex()?,
        b"CapPrm" => s.caps[1] = hex()?,
        b"CapEff" => s.caps[2] = hex()?,
        b"CapBnd" => s.caps[3] = hex()?,
        b"CapAmb" => s.caps[4] = hex()?,
        b"NoNewPrivs" => s.no_new_privs = value == "1",
        b"Seccomp" => s.seccomp = value.parse().ok()?,
        b"untag_mask" => {
            s.untag_mask = Some(u64::from_str_radix(value.strip_prefix("0x")?, 16).ok()?);
        }
        b"Speculation_Store_Bypass" => value.clone_into(&mut s.store_bypass),
        b"SpeculationIndirectBranch" => value.clone_into(&mut s.indirect_branch),
        _ => {}
    }
    Some(matches!(name, b"State" | b"Tgid" | b"Pid" | b"Uid" | b"Gid"))
}

fn four(value: &str) -> Option<[u32; 4]> {
    let mut ids = [0; 4];
    let mut fields = value.split_ascii_whitespace();
    for id in &mut ids {
        *id = fields.next()?.parse().ok()?;
    }
    Some(ids)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_our_own() {
        let status = parse_status(&std::fs::read("/proc/self/status").unwrap()).unwrap();
        assert_eq!(status.pid, i32::try_from(std::process::id()).unwrap());
        assert!(status.has_memory && !status.kernel_thread && status.umask.is_some());
        assert_eq!(status.uids[1], nix::unistd::geteuid().as_raw());
        let kernel = parse_status(&std::fs::read("/proc/2/status").unwrap_or_default());
        assert!(kernel.map_or(true, |s| !s.has_memory));
    }

    #[test]
    fn a_sample_with_groups_and_a_name_that_lies() {
        let text =
            b"Name:\tx\nUmask:\t0077\nState:\tS (sleeping)\nTgid:\t7\nPid:\t8\nPPid:\t1\nTracerPid:\t0\n\
            Uid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t10 20 30 \nVmPin:\t      64 kB\nThreads:\t2\n\
            SigPnd:\t0000000000000001\nShdPnd:\t8000000000000000\nCapBnd:\t000001ffffffffff\nNoNewPrivs:\t1\n\
            Seccomp:\t2\nuntag_mask:\t0xffffffffffffffff\n";
        let status = parse_status(text).unwrap();
        assert_eq!((status.umask, status.state, status.tgid, status.pid), (Some(0o77), b'S', 7, 8));
        assert_eq!((status.uids, status.gids), ([1, 2, 3, 4], [5, 6, 7, 8]));
        assert_eq!((status.groups.as_slice(), status.pinned_kib), (&[10, 20, 30][..], 64));
        assert_eq!((status.pending, status.shared_pending), (1, 1 << 63));
        assert_eq!((status.caps[3], status.no_new_privs, status.seccomp), (0x1ff_ffff_ffff, true, 2));
        assert!(parse_status(b"Tgid:\tseven\n").is_err());
        assert!(parse_status(b"").is_err());
    }

    proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300), name in "(Uid|Groups|VmPin|State|untag_mask):.{0,20}") {
            let _ = parse_status(&bytes);
            let _ = parse_status(name.as_bytes());
        }
    }
}
