//! The outgoing side.
