//! Single pages for which a process waits: a connection of their own that never queues behind the bulk.
//!
//! After the switch-over the destination asks for the pages that the process touches while the rest is still
//! being pushed. A page that shares a connection, a socket or only a thread with the push waits for it; so
//! both sides give the requests an OS thread of their own (named `faults`, with real-time priority where it is
//! permitted, because a thread that slept competes with all others for a processor), with its own runtime and
//! socket. What is to be done with a page is done right there, in a callback: handing it to another thread
//! would cost as much as the network does.
//!
//! The destination has one [`UrgentServer`] for all migrations; each [`UrgentServer::expect`]s its source. The
//! source [`connect`]s, says for which migration ([`Attach`](crate::proto::control::Attach)), and answers. On
//! one bidirectional stream, requests go one way, each 16 bytes, little-endian:
//!
//! | offset | field | meaning |
//! | --- | --- | --- |
//! | 0 | address u64 | of the first page |
//! | 8 | pages u32 | how many from there on, 1 to 16 |
//! | 12 | reserved u32 | 0 |
//!
//! and frames about pages (`pageserver::frame`: Data, Zero, Drop) the other way, in any order. There is no
//! other acknowledgement. When the connection ends, what was asked and not answered is void: the destination
//! asks again once the source has attached again. A newer connection of a source replaces its older one.

mod link;
mod request;
mod server;
mod watch;

use std::thread;
use std::time::Duration;

pub use link::{Lost, Serve, UrgentLink, connect};
pub use request::{MAX_REQUEST_PAGES, RequestError};
pub(super) use server::Attachments;
pub use server::{On, Urgent, UrgentHandle, UrgentServer};
pub use watch::{Next, Watch};

use super::{Settings, TransportError};

/// A process may stand still while nothing is heard, so a connection that is gone is given up soon. In
/// tests that is not the point, and the host is busy.
const IDLE_TIMEOUT: Duration = Duration::from_millis(if cfg!(test) { 20_000 } else { 1500 });
/// The same holds for a peer that does not answer.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(if cfg!(test) { 20 } else { 3 });

/// Settings with which a connection for single pages notices soon that it is lost.
pub fn settings() -> Settings {
    Settings { idle_timeout: IDLE_TIMEOUT, handshake_timeout: HANDSHAKE_TIMEOUT, bandwidth: None }
}

/// Starts a thread that takes the processor as soon as it has something to do, with a runtime of its own.
fn start_thread(
    run: impl FnOnce(Result<tokio::runtime::Runtime, TransportError>) + Send + 'static,
) -> Result<thread::JoinHandle<()>, TransportError> {
    thread::Builder::new()
        .name("faults".to_owned())
        .spawn(move || {
            crate::engine::priority::at_once();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            run(runtime.map_err(TransportError::local("start the runtime for faults")));
        })
        .map_err(TransportError::local("start the thread for faults"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
mod tests;
