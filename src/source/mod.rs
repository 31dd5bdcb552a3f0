//! The outgoing side.

pub mod machine;
pub mod policy;
pub mod precopy;
pub mod protocol;
pub mod resolve;
pub mod sentinel;
