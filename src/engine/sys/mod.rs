//! Raw system calls and kernel structures: the whole unsafe fence of the crate. Thin functions, owned
//! and borrowed descriptors in the signatures, no policy.

#![allow(unsafe_code, reason = "this module is the fence")]

pub(crate) mod inherit;
pub(crate) mod netlink;
pub(crate) mod packet;
pub mod pidfd;
pub(crate) mod seize;
