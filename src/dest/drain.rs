//! The missing pages of one migration here: who asks for them, and who places them.
//!
//! Frames that answer requests come on a connection of their own and are placed on its thread; those of the
//! push come by the driver. Both go into the same [`Lazy`], which places each page once.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::engine::extents::Extents;
use crate::engine::skeleton::Skeleton;
use crate::engine::state::mm::canonical;
use crate::identity::Fingerprint;
use crate::lazy::{Lazy, LazyError};
use crate::migration::MigrationId;
use crate::pageserver::frame::{Frame, FrameError};
use crate::pageserver::runs;
use crate::pageserver::unpack::{Content, Unpacker};
use crate::proto::control::{DrainStats, PageRuns};
use crate::transport::urgent::{Urgent, UrgentHandle, UrgentServer};

/// Why a page could not be placed.
#[derive(Debug, thiserror::Error)]
pub(super) enum DrainError {
    /// A frame is not valid, or not one about pages.
    #[error("unpacking a late frame")]
    Frame(#[from] FrameError),
    /// Another frame than one with pages.
    #[error("a frame that has no place after the resume")]
    Kind,
    /// It could not be placed.
    #[error("placing missing pages")]
    Lazy(#[from] LazyError),
}

/// One migration's missing pages.
pub(super) struct Drain {
    server: Arc<UrgentServer>,
    id: MigrationId,
    peer: Fingerprint,
    lazy: Arc<OnceLock<Arc<Lazy>>>,
    urgent: Arc<Mutex<Option<UrgentHandle>>>,
    unpacker: Unpacker,
}

impl Drain {
    /// The source may attach from now on.
    pub(super) fn expect(server: Arc<UrgentServer>, id: MigrationId, peer: Fingerprint) -> Self {
        let mut drain = Self {
            server,
            id,
            peer,
            lazy: Arc::default(),
            urgent: Arc::default(),
            unpacker: Unpacker::default(),
        };
        drain.detach();
        drain
    }

    fn handle(&self) -> MutexGuard<'_, Option<UrgentHandle>> {
        self.urgent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the source finds the connection for single pages.
    pub(super) fn port(&self) -> u16 {
        self.server.port()
    }

    /// Lets go of the source's connection, and waits for a new one. What is under way on the old one is void.
    pub(super) fn detach(&mut self) {
        *self.handle() = None;
        let (lazy, mut unpacker) = (self.lazy.clone(), Unpacker::default());
        let on = move |what: Urgent| {
            let Some(lazy) = lazy.get() else { return };
            match what {
                Urgent::Attached => lazy.ask_again(),
                Urgent::Frame(frame) => {
                    if let Err(error) = place(lazy, &frame, &mut unpacker) {
                        // It is missing still, and will be asked for again when the source comes again.
                        tracing::error!(
                            error = &error as &dyn std::error::Error,
                            "a page that was asked for"
                        );
                    }
                }
                Urgent::Lost(error) => tracing::info!(%error, "the connection for single pages ended"),
            }
        };
        let handle = self.server.expect(self.id, self.peer, Box::new(on));
        *self.handle() = Some(handle);
    }

    /// From here on pages of the stopped skeleton are missing, and faults on them are reported.
    ///
    /// # Errors
    /// See [`LazyError`].
    pub(super) fn start(&mut self, skeleton: &mut Skeleton, missing: Extents) -> Result<(), LazyError> {
        let layout = skeleton.layout().clone();
        let missing = canonical(missing, &layout);
        let urgent = self.urgent.clone();
        let ask = move |pages: &[u64]| {
            if let Some(handle) = urgent.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
                handle.ask(pages);
            }
        };
        let lazy = Lazy::start(skeleton, &layout, &missing, Box::new(ask))?;
        // Only one is ever started.
        let _ = self.lazy.set(Arc::new(lazy));
        Ok(())
    }

    /// Whether pages were missing at the resume.
    pub(super) fn is_active(&self) -> bool {
        self.lazy.get().is_some()
    }

    /// Whether none is missing any more.
    pub(super) fn is_done(&self) -> bool {
        self.lazy.get().is_none_or(|lazy| lazy.is_done())
    }

    /// Places what the push brought.
    ///
    /// # Errors
    /// See [`DrainError`]; the page is missing still.
    pub(super) fn place(&mut self, frame: &Frame) -> Result<(), DrainError> {
        match self.lazy.get() {
            Some(lazy) => place(lazy, frame, &mut self.unpacker),
            None => Ok(()),
        }
    }

    /// How many pages are missing.
    pub(super) fn pages_left(&self) -> u64 {
        let stats = self.lazy.get().map(|lazy| lazy.stats()).unwrap_or_default();
        (stats.initial + stats.inherited).saturating_sub(stats.installed + stats.dropped)
    }

    /// What is missing.
    pub(super) fn missing(&self) -> PageRuns {
        self.lazy.get().map(|lazy| runs::encode(&lazy.missing())).unwrap_or_default()
    }

    /// What was counted.
    pub(super) fn stats(&self) -> DrainStats {
        let Some(stats) = self.lazy.get().map(|lazy| lazy.stats()) else { return DrainStats::default() };
        let us = |time: std::time::Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        DrainStats {
            faults: stats.faults,
            pages_announced: stats.initial,
            pages_installed: stats.installed,
            pages_dropped: stats.dropped,
            pages_twice: stats.present,
            pages_faulted: stats.asked,
            fault_p50_us: us(stats.percentile(50)),
            fault_p99_us: us(stats.percentile(99)),
            fault_max_us: us(stats.longest),
        }
    }

    /// Ends it: mappings become ordinary ones again. If pages are missing, the process is killed: it would
    /// read zeros.
    pub(super) fn finish(&mut self) {
        *self.handle() = None;
        if let Some(lazy) = self.lazy.get() {
            lazy.finish();
        }
    }
}

fn place(lazy: &Lazy, frame: &Frame, unpacker: &mut Unpacker) -> Result<(), DrainError> {
    match unpacker.unpack(frame)? {
        Content::Data(pages) => {
            for (start, bytes) in pages.runs() {
                lazy.install(start, bytes)?;
            }
        }
        Content::Zero { addr, pages, present } => lazy.install_zero(addr, u64::from(pages), present)?,
        _ => return Err(DrainError::Kind),
    }
    Ok(())
}
