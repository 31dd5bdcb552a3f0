//! shim
use super::inject::StoppedThread;
use super::remote::{InjectError, Tid};
use super::skeleton::Skeleton;
use super::sys::ptrace::Regs;
use crate::proto::image::Thread;
#[derive(Debug, Default)]
pub struct SleepBook;
#[derive(Debug)]
pub struct Call {
    pub number: i64,
    pub remaining_ns: i64,
}
impl SleepBook {
    pub fn look(&mut self, _pid: Tid) {}
    pub fn note(&mut self, _t: &[StoppedThread]) {}
    pub fn remaining(&self, _t: &StoppedThread) -> Option<Call> {
        None
    }
}
pub fn arm(_s: &mut Skeleton, _t: &Thread, r: &mut Regs) -> Result<(), InjectError> {
    if super::regs::signed(r.rax) == super::regs::ERESTART_RESTARTBLOCK {
        super::regs::rewind_call(r);
    }
    Ok(())
}
