//! Page frames of a migration.
