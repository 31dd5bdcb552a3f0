//! Room on the way between the hosts: what one of them sends another waits in a queue of the processor that takes it
//! there. All cases share it, and what does not fit is dropped.

use std::fs;

const PATH: &str = "/proc/sys/net/core/netdev_max_backlog";
/// Packets: those of many hosts under load, of which each has several thousand under way.
const ROOM: u32 = 100_000;

/// As long as it lives there is room; then as much as before.
pub(crate) struct Room {
    before: Option<u32>,
}

impl Room {
    /// Makes room, where that is allowed.
    pub(crate) fn make() -> Self {
        let before: Option<u32> = fs::read_to_string(PATH).ok().and_then(|text| text.trim().parse().ok());
        let before = before.filter(|before| *before < ROOM && fs::write(PATH, ROOM.to_string()).is_ok());
        Self { before }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        if let Some(before) = self.before {
            let _ = fs::write(PATH, before.to_string());
        }
    }
}
