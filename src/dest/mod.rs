//! The incoming side.
