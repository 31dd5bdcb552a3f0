//! shim
use super::reason::Reason;
use crate::proto::control::{Cpu, KernelNeeds};
#[derive(Debug, thiserror::Error)]
#[error("host")]
pub struct HostError;
#[derive(Debug)]
pub struct Host;
impl Host {
    pub fn probe() -> Result<Self, HostError> {
        Ok(Self)
    }
    pub fn cpu(&self) -> Cpu {
        Cpu::default()
    }
    pub fn kernel_needs(&self) -> KernelNeeds {
        KernelNeeds::default()
    }
}
pub fn missing_here(_c: &Cpu, _n: &KernelNeeds, _h: &Host) -> Vec<Reason> {
    vec![]
}
