//! One host's mechanics: stop a process from outside, read it, build it again. Knows no network.
//!
//! Everything is done by the service, from outside, with two primitives: batches of system calls run by
//! a stopped thread of the process ([`remote`]), and its memory read and written from outside. Blocking;
//! each migration's calls come from the one OS thread that traces the process.

pub mod address;
pub mod alive;
mod bpf;
pub mod capture;
pub mod clocks;
pub mod cpu;
pub mod dirty;
pub mod extents;
pub mod features;
pub mod fence;
pub mod freeze;
pub mod handshake;
pub mod hook;
pub mod inject;
pub mod kernel;
pub mod late;
pub mod lock;
pub mod many;
pub mod memory;
pub mod own_files;
pub mod pids;
pub mod preflight;
pub mod priority;
pub mod procfs;
pub mod queued;
pub mod reason;
pub mod regs;
pub mod remap;
pub mod remote;
pub mod restore;
mod rseq;
pub mod skeleton;
pub mod sleep;
pub mod state;
pub mod strays;
pub mod sys;
mod tcp_diag;
#[cfg(test)]
pub mod trial;
pub mod undertaker;
mod vdso;
