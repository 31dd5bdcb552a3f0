//! One kind of kernel state, one file: its preflight check, its capture at the source and its restore at
//! the destination, side by side.

pub mod calls;
pub mod creds;
pub mod files;
pub mod keys;
pub mod limits;
pub mod mm;
pub mod objects;
pub mod sched;
pub mod signals;
pub mod threads;
pub mod timers;
