//! Something else that the thread for faults waits for: what says that pages are needed.

use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use super::super::TransportError;

/// As long as it lives the thread for faults watches a descriptor.
#[derive(Debug)]
pub struct Watch(JoinHandle<()>);

impl Watch {
    /// Calls `act` on the thread of `runtime` whenever `fd`, which is to be one that epoll can watch, has become
    /// readable. `act` reads until there is nothing more, and says `true`; or it is called again after all else that
    /// there is to do.
    pub(super) fn start(
        runtime: &Handle,
        fd: OwnedFd,
        mut act: impl FnMut() -> bool + Send + 'static,
    ) -> Result<Self, TransportError> {
        let _context = runtime.enter();
        #[allow(deprecated, reason = "sound for a descriptor that is owned; what replaces it is unsafe")]
        let fd = AsyncFd::with_interest(fd, Interest::READABLE)
            .map_err(TransportError::local("watch for faults"))?;
        let task = runtime.spawn(async move {
            while let Ok(mut ready) = fd.readable().await {
                // Before it is read: what comes afterwards is told of anew.
                ready.clear_ready();
                while !act() {
                    tokio::task::yield_now().await;
                }
            }
        });
        Ok(Self(task))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.abort();
    }
}
