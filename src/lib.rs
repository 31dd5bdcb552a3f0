//! Live migration of running Linux processes.
//!
//! The map of the crate, top to bottom; `tests/layers.rs` holds the arrows between the rooms:
//!
//! - [`source`]: the outgoing side, behind `migrate --to HOST:PORT PID`.
//! - [`dest`]: the incoming side, behind `migrate serve`.
//! - [`lazy`]: the missing pages of a process that runs at the destination already.
//! - [`pageserver`]: the page frames of a migration, packed and unpacked in memory.
//! - [`transport`], [`identity`], [`wire`]: QUIC with mutual TLS, who is trusted, what the messages mean.
//! - [`engine`]: one host's mechanics (tracees, memory, kernel state); knows no network.
//! - [`cli`], [`config`], [`report`], [`telemetry`]: what the operator types and reads.
//! - [`operator`]: `migrate status`, `cancel` and `postcopy`, and the socket they speak over.
//! - [`proto`]: the plain description of a process and the messages, generated from `proto/`.
//! - [`testbed`], [`demo`]: two hosts on one machine, for the tests and for `migrate demo`.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used, reason = "tests may panic"))]

pub mod cli;
pub mod config;
pub mod demo;
pub mod dest;
pub mod engine;
pub mod hello;
pub mod identity;
pub mod journal;
pub mod lazy;
pub mod migration;
pub mod operator;
pub mod pageserver;
pub mod proto;
pub mod report;
#[cfg(test)]
mod sim;
pub mod source;
pub mod telemetry;
pub mod testbed;
pub mod transport;
pub mod wire;
