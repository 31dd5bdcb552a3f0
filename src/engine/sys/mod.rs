//! Raw system calls and kernel structures: the whole unsafe fence of the crate. Thin functions, owned
//! and borrowed descriptors in the signatures, no policy.

#![allow(unsafe_code, reason = "this module is the fence")]

pub mod attrs;
pub mod blob;
pub mod bpf;
pub mod clone;
pub mod datagram;
pub mod fds;
pub mod pagemap;
pub mod perf;
pub mod pidfd;
pub mod priority;
pub mod probe;
pub mod ptrace;
pub mod queue;
pub mod sem;
pub mod shm;
pub mod socket;
pub mod tcp;
pub mod timens;
pub mod uffd;
pub mod vm;

use std::os::fd::{FromRawFd, OwnedFd};

/// Takes over a descriptor number that the kernel has just returned to us.
pub fn owned_fd(fd: i32) -> OwnedFd {
    // SAFETY: callers pass what a system call has just made for them and nobody else holds.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
pub(crate) mod heap;
pub(crate) mod inherit;
pub(crate) mod netlink;
pub(crate) mod packet;
pub(crate) mod seize;
