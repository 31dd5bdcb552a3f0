//! The incoming side.

pub mod machine;
pub mod protocol;
pub mod assemble;
