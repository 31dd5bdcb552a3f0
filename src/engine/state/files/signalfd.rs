//! signalfd: the set of signals it reads. The signals themselves are pending in the process.

use std::os::fd::OwnedFd;

use super::scan::Open;
use super::{Stop, Trouble};
use crate::engine::sys::fds;
use crate::proto::files::SignalFd;

pub(super) fn capture(open: &Open) -> Result<SignalFd, Stop> {
    let mask = open.field("sigmask").and_then(|s| u64::from_str_radix(s, 16).ok());
    mask.map(|mask| SignalFd { mask }).ok_or_else(|| Stop::refuse("is a signalfd without a readable mask"))
}

pub(super) fn make(image: &SignalFd) -> Result<OwnedFd, Trouble> {
    // A signalfd reads the signals of whoever calls read(), so it may be made by us.
    fds::signalfd(image.mask).map_err(Trouble::step("making a signalfd"))
}
