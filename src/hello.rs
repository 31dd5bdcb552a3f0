//! The first message of either side: which program, which boot of which kernel, what its clocks say.

use nix::time::{ClockId, clock_gettime};

use crate::journal;
use crate::proto::control::Hello;

/// Our Hello; the transport fills in the protocol version.
pub fn hello() -> Hello {
    let ns = |clock| {
        clock_gettime(clock).map_or(0, |t| {
            u64::try_from(t.tv_sec()).unwrap_or(0) * 1_000_000_000 + u64::try_from(t.tv_nsec()).unwrap_or(0)
        })
    };
    Hello {
        software: concat!("migrate ", env!("CARGO_PKG_VERSION")).into(),
        boot_id: journal::boot_id().unwrap_or_default().into_bytes(),
        monotonic_ns: ns(ClockId::CLOCK_MONOTONIC),
        boottime_ns: ns(ClockId::CLOCK_BOOTTIME),
        ..Hello::default()
    }
}
