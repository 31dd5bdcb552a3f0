//! Programs that the kernel runs for us (BPF): how they are put together, and what the kernel says of itself that they
//! need to know.

pub(super) mod btf;
pub(super) mod program;

/// Where the kernel describes itself.
pub(super) const KERNEL: &str = "/sys/kernel/btf/vmlinux";
/// Some of the kernel's functions may only be called by programs that say so.
pub(super) const LICENCE: &std::ffi::CStr = c"Dual MIT/GPL";
