//! A child with a chosen PID: clone3(2) with `set_tid`, up to its execve(2).

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use nix::errno::Errno;

use crate::engine::remote::Tid;

#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}
const _: () = assert!(size_of::<CloneArgs>() == 88);

/// How many bytes of `struct clone_args` the calls here use.
pub const CLONE_ARGS_BYTES: usize = size_of::<CloneArgs>();

/// Where `struct clone_args` points to the wanted thread id.
pub const SET_TID_OFFSET: usize = std::mem::offset_of!(CloneArgs, set_tid);

/// `struct clone_args` for a thread of a skeleton, as bytes for a remote clone3; its pointer to the
/// wanted id (at [`SET_TID_OFFSET`]) is left to the caller.
pub fn thread_clone_args() -> [u8; CLONE_ARGS_BYTES] {
    let flags = libc::CLONE_VM
        | libc::CLONE_FS
        | libc::CLONE_FILES
        | libc::CLONE_SIGHAND
        | libc::CLONE_THREAD
        | libc::CLONE_SYSVSEM
        | libc::CLONE_PTRACE;
    let words: [u64; 11] = [u64::from(flags.unsigned_abs()), 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
    let mut bytes = [0u8; CLONE_ARGS_BYTES];
    for (chunk, word) in bytes.chunks_exact_mut(8).zip(words) {
        chunk.copy_from_slice(&word.to_ne_bytes());
    }
    bytes
}

/// Starts a child with PID `pid` that keeps only `keep` (at the same number), tells of that by one byte on `keep`,
/// waits for one on `go`, and executes the file `exe`. It dies with the calling thread until it has executed.
///
/// Raw: the child shares nothing with us but a copy of our memory, so it may use nothing but system calls.
///
/// # Errors
/// EEXIST: the PID is in use. EINVAL: larger than pid_max. EPERM: no CAP_SYS_ADMIN and no
/// CAP_CHECKPOINT_RESTORE in the PID namespace.
pub fn spawn_with_pid(
    pid: Tid,
    exe: BorrowedFd<'_>,
    go: BorrowedFd<'_>,
    keep: BorrowedFd<'_>,
) -> Result<(), Errno> {
    let exe: RawFd = exe.as_raw_fd();
    let go: RawFd = go.as_raw_fd();
    let keep: RawFd = keep.as_raw_fd();
    let argv0: &CStr = c"migrate-skeleton";
    let argv = [argv0.as_ptr(), std::ptr::null()];
    let envp = [std::ptr::null::<libc::c_char>()];
    let mut kept = [exe, go, keep];
    kept.sort_unstable();
    let set_tid = [pid];
    let mut args = CloneArgs {
        exit_signal: u64::from(libc::SIGCHLD.unsigned_abs()),
        set_tid: set_tid.as_ptr().addr() as u64,
        set_tid_size: 1,
        ..CloneArgs::default()
    };
    // SAFETY: without CLONE_VM this is fork(2): the child gets a copy of our memory. It has only this
    // thread, locks of other threads may be held for ever in its copy, so up to execve or _exit it makes
    // direct system calls on values that were prepared above: no allocation, no lock, no destructor.
    unsafe {
        let rc = libc::syscall(libc::SYS_clone3, &raw mut args, CLONE_ARGS_BYTES);
        if rc != 0 {
            return Errno::result(rc).map(drop);
        }
        libc::syscall(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
        // A session of its own: the one it had stays with its leader, which does not move.
        libc::syscall(libc::SYS_setsid);
        // It may wait for long, and must not hold what others of us want to close meanwhile: a
        // userfaultfd that somebody still holds goes on stopping its process.
        let mut from = 0;
        for fd in kept {
            if fd > from {
                libc::syscall(libc::SYS_close_range, from, fd - 1, 0);
            }
            from = fd + 1;
        }
        libc::syscall(libc::SYS_close_range, from, u32::MAX, 0);
        let mut byte = 0u8;
        libc::syscall(libc::SYS_write, keep, &raw const byte, 1);
        if libc::syscall(libc::SYS_read, go, &raw mut byte, 1) == 1 {
            // `keep` must survive the exec; everything else goes by close-on-exec.
            libc::syscall(libc::SYS_fcntl, keep, libc::F_SETFD, 0);
            libc::syscall(
                libc::SYS_execveat,
                exe,
                c"".as_ptr(),
                argv.as_ptr(),
                envp.as_ptr(),
                libc::AT_EMPTY_PATH,
            );
        }
        libc::syscall(libc::SYS_exit_group, 127);
    }
    Err(Errno::ENOSYS)
}
