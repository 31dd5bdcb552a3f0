//! x86-64: interrupted system calls, and registers as bytes.

use nix::errno::Errno;

use crate::engine::sys::ptrace::Regs;

/// What an interrupted system call returned inside the kernel, before user space sees it
/// (include/linux/errno.h).
const ERESTARTSYS: i64 = -512;
const ERESTARTNOINTR: i64 = -513;
/// To be made again from the start, unless a handler runs first: then EINTR.
pub const ERESTARTNOHAND: i64 = -514;
/// To be gone on with by restart_syscall(2): the kernel keeps the remaining time in the task.
pub const ERESTART_RESTARTBLOCK: i64 = -516;

/// Bytes of a `syscall` instruction.
const SYSCALL_BYTES: u64 = 2;

/// Code segment of 64-bit user code.
const USER_CS_64: u64 = 0x33;

/// A value of a register as the signed number that system calls return.
pub fn signed(v: u64) -> i64 {
    i64::from_ne_bytes(v.to_ne_bytes())
}

/// A signed number as a register holds it.
pub fn unsigned(v: i64) -> u64 {
    u64::from_ne_bytes(v.to_ne_bytes())
}

/// The system call that the thread was stopped in, if it was in one.
pub fn interrupted_call(regs: &Regs) -> Option<i64> {
    let number = signed(regs.orig_rax);
    (number >= 0).then_some(number)
}

/// Whether the thread runs 32-bit code.
pub fn is_32_bit(regs: &Regs) -> bool {
    regs.cs != USER_CS_64
}

/// System calls that the kernel itself ends with EINTR when a tracer stops the thread, although no signal
/// arrived (signal(7)): to be issued again.
const EINTR_BY_STOP: [i64; 21] = [
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_semop,
    libc::SYS_semtimedop,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_io_getevents,
    // On sockets with a timeout (SO_RCVTIMEO, SO_SNDTIMEO).
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg,
    // Their offsets move only with bytes.
    libc::SYS_sendfile,
    libc::SYS_splice,
];

/// Whether the thread's call was ended with EINTR by our stop alone (if no signal is due).
pub fn ended_by_stop(regs: &Regs) -> bool {
    signed(regs.rax) == -(Errno::EINTR as i64)
        && interrupted_call(regs).is_some_and(|nr| EINTR_BY_STOP.contains(&nr))
}

/// Sets the thread back to before its system call, so that it is issued again with the same arguments.
pub fn rewind_call(regs: &mut Regs) {
    regs.rax = regs.orig_rax;
    regs.rip = regs.rip.wrapping_sub(SYSCALL_BYTES);
    regs.orig_rax = u64::MAX;
}

/// The registers with which a thread goes on by itself, without the kernel's restart logic: what the
/// injected code returns to when its tracer is gone.
pub fn self_restarting(regs: &Regs) -> Regs {
    let mut r = *regs;
    if interrupted_call(regs).is_some() {
        match signed(regs.rax) {
            ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND => rewind_call(&mut r),
            ERESTART_RESTARTBLOCK => {
                rewind_call(&mut r);
                r.rax = unsigned(libc::SYS_restart_syscall);
            }
            _ => {}
        }
    }
    r
}

/// Calls that take their timeout by value, as milliseconds in the fourth argument, and that a stop ends.
pub const EPOLL_WAITS: [i64; 2] = [libc::SYS_epoll_wait, libc::SYS_epoll_pwait];

/// Lets a call that was set back by [`rewind_call`] wait for this many milliseconds only. The register keeps the
/// new value after the call: nobody but the compiler of the very instruction could know the old one, and C
/// libraries and runtimes make these calls from functions of their own.
pub fn shorten_wait(regs: &mut Regs, milliseconds: u64) {
    if regs.orig_rax == u64::MAX && EPOLL_WAITS.contains(&signed(regs.rax)) {
        regs.r10 = milliseconds.min(u64::from(i32::MAX.unsigned_abs()));
    }
}

const WORDS: usize = 27;
/// Bytes of the general registers on the wire.
pub const REGS_BYTES: usize = WORDS * 8;

/// The registers in the order of `struct user_regs_struct`, little-endian.
pub fn to_bytes(r: &Regs) -> Vec<u8> {
    let words: [u64; WORDS] = [
        r.r15, r.r14, r.r13, r.r12, r.rbp, r.rbx, r.r11, r.r10, r.r9, r.r8, r.rax, r.rcx, r.rdx, r.rsi,
        r.rdi, r.orig_rax, r.rip, r.cs, r.eflags, r.rsp, r.ss, r.fs_base, r.gs_base, r.ds, r.es, r.fs, r.gs,
    ];
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// Reads what [`to_bytes`] wrote into a copy of `template`; `None` for a wrong length or segments that no
/// 64-bit user thread has.
pub fn from_bytes(bytes: &[u8], template: &Regs) -> Option<Regs> {
    if bytes.len() != REGS_BYTES {
        return None;
    }
    let mut words = [0u64; WORDS];
    for (word, chunk) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = u64::from_le_bytes(chunk.try_into().ok()?);
    }
    let mut r = *template;
    [
        r.r15, r.r14, r.r13, r.r12, r.rbp, r.rbx, r.r11, r.r10, r.r9, r.r8, r.rax, r.rcx, r.rdx, r.rsi,
        r.rdi, r.orig_rax, r.rip, r.cs, r.eflags, r.rsp, r.ss, r.fs_base, r.gs_base, r.ds, r.es, r.fs, r.gs,
    ] = words;
    (!is_32_bit(&r)).then_some(r)
}
