//! What is counted while the missing pages come in.

/// Numbers for the report and the tests. Pages are of 4 KiB unless said otherwise.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Missing at the beginning. `initial + inherited = installed + dropped` when all is done.
    pub initial: u64,
    /// Missing in children by fork when they were born.
    pub inherited: u64,
    /// Placed with their contents or as zeros that the source told of.
    pub installed: u64,
    /// Wanted no more: unmapped, dropped, or of a process that is gone.
    pub dropped: u64,
    /// Messages about a thread that waits for a page.
    pub faults: u64,
    /// Pages that were asked for (of any size).
    pub asked: u64,
    /// Pages that arrived and were not missing: sent twice, or dropped meanwhile.
    pub unwanted: u64,
    /// Pages that should have been missing and were there: a defect, here or at the source.
    pub present: u64,
    /// Places that were never missing and were filled with zeros upon a fault (of any size).
    pub zero_filled: u64,
    /// Huge pages whose parts were given up for want of room, and asked for again.
    pub evicted: u64,
}
