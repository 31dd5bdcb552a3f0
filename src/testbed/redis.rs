//! A small client of redis: enough to fill it, to write under way, and to check what was acknowledged.
