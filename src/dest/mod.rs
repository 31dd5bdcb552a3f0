//! The incoming side.

pub mod assemble;
pub mod machine;
pub mod protocol;
