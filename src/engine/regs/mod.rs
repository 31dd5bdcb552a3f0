//! Registers, by architecture: what the rest of the engine asks of them.

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64::*;

#[cfg(not(target_arch = "x86_64"))]
compile_error!("migrate knows the registers of x86-64 only, for now");
