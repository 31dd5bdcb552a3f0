//! Something else that the thread for faults waits for: what says that pages are needed.

use std::os::fd::OwnedFd;
use std::time::Duration;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use super::super::TransportError;

/// What is to be done after something was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// There is nothing more.
    Wait,
    /// Read again, after all else that there is to do.
    Again,
    /// Read again in this time, because it was not possible yet.
    Soon(Duration),
}

/// So often in a row something that was not possible yet is tried soon; then everybody else's pages are worth more.
const SOON: u32 = 16;
const LATER: Duration = Duration::from_millis(1);

/// As long as it lives the thread for faults watches a descriptor. What is being read when it is dropped ends.
#[derive(Debug)]
pub struct Watch(JoinHandle<()>);

impl Watch {
    /// Calls `read` on the thread of `runtime` whenever `fd`, which is to be one that epoll can watch, has become
    /// readable, and again as it says. All else on that thread waits while it runs.
    pub(super) fn start(
        runtime: &Handle,
        fd: OwnedFd,
        mut read: impl FnMut() -> Next + Send + 'static,
    ) -> Result<Self, TransportError> {
        let _context = runtime.enter();
        #[allow(deprecated, reason = "sound for a descriptor that is owned; what replaces it is unsafe")]
        let fd = AsyncFd::with_interest(fd, Interest::READABLE)
            .map_err(TransportError::local("watch for faults"))?;
        let task = runtime.spawn(async move {
            while let Ok(mut ready) = fd.readable().await {
                // Before it is read: what comes afterwards is told of anew.
                ready.clear_ready();
                let mut tries = 0;
                loop {
                    match read() {
                        Next::Wait => break,
                        Next::Again => {}
                        Next::Soon(_) if tries >= SOON => tokio::time::sleep(LATER).await,
                        // Shorter than the runtime can wait.
                        Next::Soon(time) => {
                            tries += 1;
                            std::thread::sleep(time);
                        }
                    }
                    tokio::task::yield_now().await;
                }
            }
            tracing::error!("nobody watches for faults any more");
        });
        Ok(Self(task))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.abort();
    }
}
