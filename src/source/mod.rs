//! The outgoing side.

pub mod machine;
pub mod policy;
pub mod protocol;
pub mod precopy;
pub mod resolve;
pub mod sentinel;
