//! Attributes of threads that the kernel tells or sets from outside. Functions whose name begins with
//! `traced_` assume that the caller traces the thread and that it is stopped.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "sizes of kernel structures and ids, all far below the limits of their types"
)]
#![allow(
    clippy::disallowed_methods,
    reason = "requests of ptrace(2) that the tracer thread makes through here"
)]

use nix::errno::Errno;

use crate::engine::remote::Tid;

/// Bytes of a `siginfo_t`.
pub const SIGINFO_BYTES: usize = 128;

const PTRACE_PEEKSIGINFO: u32 = 0x4209;
const PTRACE_PEEKSIGINFO_SHARED: u32 = 1;
const PTRACE_GET_RSEQ_CONFIGURATION: u32 = 0x420f;
const PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG: u32 = 0x4211;

#[repr(C)]
struct PeekSiginfoArgs {
    offset: u64,
    flags: u32,
    count: i32,
}
const _: () = assert!(size_of::<PeekSiginfoArgs>() == 16);

/// A thread's registration with rseq(2); an area of 0 means none.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RseqConfig {
    /// Address of its `struct rseq`.
    pub area: u64,
    /// Length of the area.
    pub len: u32,
    /// Signature in front of abort handlers.
    pub signature: u32,
    flags: u32,
    pad: u32,
}
const _: () = assert!(size_of::<RseqConfig>() == 24);

/// `struct sched_attr`, first version.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SchedAttr {
    /// Filled in by [`set_sched_attr`].
    pub size: u32,
    /// SCHED_*.
    pub policy: u32,
    /// SCHED_FLAG_*.
    pub flags: u64,
    /// For SCHED_OTHER and SCHED_BATCH.
    pub nice: i32,
    /// For SCHED_FIFO and SCHED_RR.
    pub priority: u32,
    /// For SCHED_DEADLINE; for SCHED_OTHER the length of a slice.
    pub runtime: u64,
    /// For SCHED_DEADLINE.
    pub deadline: u64,
    /// For SCHED_DEADLINE.
    pub period: u64,
}
const SCHED_ATTR_BYTES: usize = 48;
const _: () = assert!(size_of::<SchedAttr>() == SCHED_ATTR_BYTES);

/// The queued signals of one thread, or those of its whole process: `siginfo_t` as they are, at most
/// `count` of them, from the `offset`th on.
pub fn traced_pending(tid: Tid, shared: bool, offset: u64, count: u16) -> Result<Vec<Vec<u8>>, Errno> {
    let args = PeekSiginfoArgs {
        offset,
        flags: if shared { PTRACE_PEEKSIGINFO_SHARED } else { 0 },
        count: i32::from(count),
    };
    let mut infos = vec![0u8; usize::from(count) * SIGINFO_BYTES];
    // SAFETY: `args` is read and `infos`, which has room for `count` siginfo_t, is written by the kernel
    // during the call only; both live until it returns.
    let rc = unsafe { libc::ptrace(PTRACE_PEEKSIGINFO, tid, &raw const args, infos.as_mut_ptr()) };
    let got = usize::try_from(Errno::result(rc)?).unwrap_or(0);
    Ok(infos.chunks_exact(SIGINFO_BYTES).take(got).map(<[u8]>::to_vec).collect())
}

/// The thread's rseq registration.
pub fn traced_rseq(tid: Tid) -> Result<RseqConfig, Errno> {
    let mut config = RseqConfig::default();
    let size = size_of::<RseqConfig>();
    // SAFETY: the kernel writes at most `size` bytes to `config`, which lives until the call returns.
    let rc = unsafe { libc::ptrace(PTRACE_GET_RSEQ_CONFIGURATION, tid, size, &raw mut config) };
    Errno::result(rc)?;
    Ok(config)
}

/// Whether the thread has its system calls dispatched to itself (prctl(PR_SET_SYSCALL_USER_DISPATCH)).
pub fn traced_dispatches_calls(tid: Tid) -> Result<bool, Errno> {
    // mode, selector, offset, len
    let mut config = [0u64; 4];
    let size = size_of_val(&config);
    // SAFETY: the kernel writes at most `size` bytes to `config`, which lives until the call returns.
    let rc = unsafe { libc::ptrace(PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, tid, size, &raw mut config) };
    match Errno::result(rc) {
        Ok(_) => Ok(config[0] != 0),
        // A kernel without the request (before 6.4) may have the feature; nobody could tell.
        Err(Errno::EIO | Errno::EINVAL) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// Head and length of a thread's list of robust futexes.
pub fn robust_list(tid: Tid) -> Result<(u64, u64), Errno> {
    let (mut head, mut len) = (0u64, 0u64);
    // SAFETY: the kernel writes one word to each of two live, writable words.
    let rc = unsafe { libc::syscall(libc::SYS_get_robust_list, tid, &raw mut head, &raw mut len) };
    Errno::result(rc)?;
    Ok((head, len))
}

/// How a thread is scheduled; 0 means the caller.
pub fn sched_attr(tid: Tid) -> Result<SchedAttr, Errno> {
    let mut attr = SchedAttr::default();
    // SAFETY: the kernel writes at most the given size to `attr`, which lives until the call returns.
    let rc = unsafe { libc::syscall(libc::SYS_sched_getattr, tid, &raw mut attr, SCHED_ATTR_BYTES, 0) };
    Errno::result(rc)?;
    Ok(attr)
}

/// Changes how a thread is scheduled.
pub fn set_sched_attr(tid: Tid, attr: SchedAttr) -> Result<(), Errno> {
    let attr = SchedAttr { size: SCHED_ATTR_BYTES as u32, ..attr };
    // SAFETY: the kernel reads `attr.size` bytes of `attr`, which lives until the call returns.
    let rc = unsafe { libc::syscall(libc::SYS_sched_setattr, tid, &raw const attr, 0) };
    Errno::result(rc).map(drop)
}

/// The CPUs a thread may run on, one bit each.
pub fn affinity(tid: Tid) -> Result<Vec<u8>, Errno> {
    let mut mask = vec![0u8; 1024];
    // SAFETY: the kernel writes at most `mask.len()` bytes to `mask`.
    let rc = unsafe { libc::syscall(libc::SYS_sched_getaffinity, tid, mask.len(), mask.as_mut_ptr()) };
    mask.truncate(usize::try_from(Errno::result(rc)?).unwrap_or(0));
    Ok(mask)
}

/// Sets the CPUs a thread may run on; those that do not exist are left out by the kernel.
pub fn set_affinity(tid: Tid, mask: &[u8]) -> Result<(), Errno> {
    // SAFETY: the kernel reads `mask.len()` bytes of `mask`.
    let rc = unsafe { libc::syscall(libc::SYS_sched_setaffinity, tid, mask.len(), mask.as_ptr()) };
    Errno::result(rc).map(drop)
}

const IOPRIO_WHO_PROCESS: i32 = 1;

/// Class and level of a thread's disk priority.
pub fn ioprio(tid: Tid) -> Result<u32, Errno> {
    // SAFETY: plain values only.
    let rc = unsafe { libc::syscall(libc::SYS_ioprio_get, IOPRIO_WHO_PROCESS, tid) };
    Ok(Errno::result(rc)? as u32)
}

/// Sets a thread's disk priority.
pub fn set_ioprio(tid: Tid, value: u32) -> Result<(), Errno> {
    // SAFETY: plain values only.
    let rc = unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, tid, value) };
    Errno::result(rc).map(drop)
}

/// What two tasks may have in common: the types of kcmp(2) that need no index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum Shared {
    /// The memory.
    Memory = 1,
    /// The table of descriptors.
    Files = 2,
    /// Working directory, root, umask.
    Directories = 3,
    /// Signal handlers.
    Handlers = 4,
    /// The list of System V semaphore adjustments; those that have none are alike.
    SemaphoreUndo = 6,
}

/// Whether two tasks share this object.
pub fn share(a: Tid, b: Tid, what: Shared) -> Result<bool, Errno> {
    // SAFETY: plain values only.
    let rc = unsafe { libc::syscall(libc::SYS_kcmp, a, b, what as i32, 0, 0) };
    Ok(Errno::result(rc)? == 0)
}

/// Whether timer_create can be told which id to give (prctl(PR_TIMER_CREATE_RESTORE_IDS), Linux 6.16).
pub fn timer_ids_can_be_chosen() -> bool {
    const PR_TIMER_CREATE_RESTORE_IDS: i32 = 77;
    const GET: u64 = 2;
    // SAFETY: plain values only; this asks and changes nothing.
    let rc = unsafe { libc::prctl(PR_TIMER_CREATE_RESTORE_IDS, GET, 0u64, 0u64, 0u64) };
    rc >= 0
}

/// The kinds of extended state the kernel has switched on (XCR0), and how many bytes they take in the
/// standard format of XSAVE, which is ptrace's.
#[cfg(target_arch = "x86_64")]
pub fn extended_state() -> (u64, u32) {
    if !std::is_x86_feature_detected!("xsave") {
        return (3, 576);
    }
    // SAFETY: the CPU has XSAVE and the kernel has switched it on (that is what was just asked, OSXSAVE
    // included), so XGETBV of register 0 is allowed.
    let xcr0 = unsafe { xgetbv() };
    (xcr0, std::arch::x86_64::__cpuid_count(0xd, 0).ebx)
}

/// Reads XCR0.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "xsave")]
fn xgetbv() -> u64 {
    // SAFETY: callers have the feature, by the attribute; register 0 always exists then.
    unsafe { std::arch::x86_64::_xgetbv(0) }
}
