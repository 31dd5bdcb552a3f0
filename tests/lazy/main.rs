//! Missing pages of real processes: programs whose pages are taken away while they stand still, and come
//! back upon their faults and by a push. No network: the pages are a pattern of their addresses.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests may panic")]

mod cases;
mod rig;
