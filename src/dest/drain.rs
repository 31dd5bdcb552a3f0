//! The missing pages of one migration here: who asks for them, and who places them.
//!
//! Frames that answer requests come on a connection of their own and are placed on its thread; those of the
//! push come by the driver. Both go into the same [`Lazy`], which places each page once.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::guardian::{Guard, GuardianError};
use crate::engine::extents::Extents;
use crate::engine::priority::Hurry;
use crate::engine::remote::Tid;
use crate::engine::skeleton::Skeleton;
use crate::engine::state::mm::canonical;
use crate::identity::Fingerprint;
use crate::lazy::book::BookError;
use crate::lazy::{Ask, Held, Lazy, LazyError, Left, Reader, UNSETTLED};
use crate::migration::MigrationId;
use crate::pageserver::frame::{Frame, FrameError};
use crate::pageserver::runs;
use crate::pageserver::unpack::{Content, Unpacker};
use crate::proto::control::{DrainStats, PageRuns};
use crate::transport::TransportError;
use crate::transport::urgent::{Next, Urgent, UrgentHandle, UrgentServer, Watch};

/// Why a page could not be placed.
#[derive(Debug, thiserror::Error)]
pub(super) enum DrainError {
    /// A frame is not valid, or not one about pages.
    #[error("unpacking a late frame")]
    Frame(#[from] FrameError),
    /// Nobody would answer a fault.
    #[error("the source's connection for single pages is lost")]
    Unattached,
    /// Faults cannot be noticed.
    #[error("watching for missing pages")]
    Watch(#[source] LazyError),
    /// Nor can whoever tells of them be watched.
    #[error("watching for faults")]
    Descriptor(#[source] std::io::Error),
    /// Likewise.
    #[error("reading faults")]
    Reader(#[source] TransportError),
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
    /// Who reads its faults and events.
    reading: Option<Reading>,
    line: Arc<Mutex<Line>>,
    urgent: Arc<Mutex<Option<UrgentHandle>>>,
    unpacker: Unpacker,
    state_dir: PathBuf,
    /// Who keeps the process waiting if we die.
    guard: Option<Guard>,
    /// When another guardian could not be had.
    failed_at: Option<Instant>,
}

/// Who reads faults and events, as long as this lives.
#[allow(dead_code, reason = "held")]
enum Reading {
    /// The thread that asks and places.
    Together(Watch),
    /// A thread of its own.
    Alone(Reader),
}

/// The connection for single pages, as the restore sees it.
#[derive(Default)]
struct Line {
    lost: bool,
    /// The restore is under way. If it waits for a page, it waits for nothing else, so it would not notice
    /// that the source is gone.
    needed: bool,
}

/// How long to wait before another guardian is tried.
const GUARD_AGAIN: Duration = Duration::from_secs(1);

impl Drain {
    /// The source may attach from now on.
    pub(super) fn expect(
        server: Arc<UrgentServer>,
        id: MigrationId,
        peer: Fingerprint,
        state_dir: &Path,
    ) -> Self {
        let mut drain = Self {
            server,
            id,
            peer,
            lazy: Arc::default(),
            reading: None,
            line: Arc::default(),
            urgent: Arc::default(),
            unpacker: Unpacker::default(),
            state_dir: state_dir.to_owned(),
            guard: None,
            failed_at: None,
        };
        drain.detach();
        drain
    }

    fn handle(&self) -> MutexGuard<'_, Option<UrgentHandle>> {
        locked(&self.urgent)
    }

    /// Where the source finds the connection for single pages.
    pub(super) fn port(&self) -> u16 {
        self.server.port()
    }

    /// Lets go of the source's connection, and waits for a new one. What is under way on the old one is void.
    pub(super) fn detach(&mut self) {
        *self.handle() = None;
        let (lazy, mut unpacker) = (self.lazy.clone(), Unpacker::default());
        let line = self.line.clone();
        let on = move |what: Urgent| {
            note(&line, &what, lazy.get());
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
    /// [`DrainError::Watch`]; [`DrainError::Unattached`] if the source has attached and is gone again.
    pub(super) fn start(&mut self, skeleton: &mut Skeleton, missing: Extents) -> Result<(), DrainError> {
        let layout = skeleton.layout().clone();
        let missing = canonical(missing, &layout);
        let lazy = Lazy::start(skeleton, &layout, &missing, self.ask()).map_err(DrainError::Watch)?;
        self.begin(lazy)?;
        let mut line = locked(&self.line);
        line.needed = true;
        if line.lost { Err(DrainError::Unattached) } else { Ok(()) }
    }

    /// Its faults and events are read from here on: by the thread that asks the source and places the answers, or by
    /// one of its own if that may take long.
    fn begin(&mut self, lazy: Lazy) -> Result<(), DrainError> {
        let lazy = Arc::new(lazy);
        // Only one is ever started. Whoever brings pages has to find it.
        let _ = self.lazy.set(lazy.clone());
        self.reading = Some(if lazy.reads_slowly() {
            Reading::Alone(lazy.read_on_a_thread()?)
        } else {
            let events = lazy.events().try_clone_to_owned().map_err(DrainError::Descriptor)?;
            let read = move || match lazy.read() {
                Left::Nothing => Next::Wait,
                Left::Some => Next::Again,
                Left::Unsettled => Next::Soon(UNSETTLED),
            };
            Reading::Together(self.server.watch(events, read).map_err(DrainError::Reader)?)
        });
        Ok(())
    }

    /// The restore waits for no page any more: from here on a lost connection is only a pause.
    pub(super) fn restored(&mut self) {
        locked(&self.line).needed = false;
    }

    /// Goes on where an earlier service ended, with what its guardian held.
    ///
    /// # Errors
    /// See [`Lazy::take_over`].
    pub(super) fn take_over(
        &mut self,
        pid: Tid,
        guard: Guard,
        kept: &[(Held, OwnedFd)],
    ) -> Result<(), (Box<DrainError>, Guard)> {
        let keeper = match guard.keeper() {
            Ok(keeper) => keeper,
            Err(source) => {
                let source = BookError::Io { step: "finding a way to", source };
                return Err((Box::new(DrainError::Lazy(source.into())), guard));
            }
        };
        let taken = Lazy::take_over(pid, kept, keeper, self.ask()).map_err(DrainError::Lazy);
        if let Err(error) = taken.and_then(|lazy| self.begin(lazy)) {
            // The guardian keeps them all waiting, until they are ended together.
            *self.handle() = None;
            if let Some(lazy) = self.lazy.get() {
                lazy.abandon();
            }
            return Err((Box::new(error), guard));
        }
        self.guard = Some(guard);
        Ok(())
    }

    fn ask(&self) -> Ask {
        let urgent = self.urgent.clone();
        Box::new(move |pages: &[u64]| {
            if let Some(handle) = locked(&urgent).as_ref() {
                handle.ask(pages);
            }
        })
    }

    /// Starts the guardian, so that it is there when it is needed.
    ///
    /// # Errors
    /// If it cannot be started.
    pub(super) fn prepare_guard(&mut self) -> Result<(), GuardianError> {
        if self.guard.is_none() {
            self.guard = Some(Guard::spawn(&self.state_dir, self.id)?);
        }
        Ok(())
    }

    /// Gives the guardian all that it has to hold. From here on the process waits for its pages even if we
    /// die.
    ///
    /// # Errors
    /// If the guardian does not take it.
    pub(super) fn entrust(&mut self) -> Result<(), GuardianError> {
        self.prepare_guard()?;
        let (Some(guard), Some(lazy)) = (&self.guard, self.lazy.get()) else { return Ok(()) };
        if guard.is_new() {
            guard.await_ready()?;
        }
        let taken = guard.keeper().and_then(|keeper| lazy.entrust(keeper));
        taken.map_err(|source| GuardianError { step: "giving it what it has to hold", source })
    }

    /// If the guardian has died, starts another one.
    pub(super) fn keep_guarded(&mut self) {
        let Some(lazy) = self.lazy.get() else { return };
        let guarded = self.guard.as_ref().is_some_and(Guard::is_alive) && lazy.is_entrusted();
        let recently = self.failed_at.is_some_and(|at| at.elapsed() < GUARD_AGAIN);
        if guarded || recently || lazy.is_done() {
            return;
        }
        tracing::warn!(id = %self.id, "the guardian of the missing pages is gone: starting another one");
        if let Some(guard) = self.guard.take() {
            guard.dismiss();
        }
        let again = self.entrust();
        self.failed_at = again.is_err().then(Instant::now);
        if let Err(error) = again {
            tracing::error!(error = &error as &dyn std::error::Error, "nobody guards the missing pages");
        }
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
        let Some(lazy) = self.lazy.get() else { return DrainStats::default() };
        let (stats, waits) = (lazy.stats(), lazy.waits());
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "rounded; the cast saturates"
        )]
        let us = |micros: f64| micros.round() as u64;
        DrainStats {
            faults: stats.faults,
            pages_announced: stats.initial,
            pages_installed: stats.installed,
            pages_dropped: stats.dropped,
            pages_twice: stats.present,
            pages_faulted: stats.asked,
            fault_p50_us: us(waits.p50),
            fault_p99_us: us(waits.p99),
            fault_max_us: us(waits.max),
        }
    }

    /// Ends it: mappings become ordinary ones again. If pages are missing, the process is killed: it would
    /// read zeros.
    pub(super) fn finish(&mut self) {
        *self.handle() = None;
        if let Some(lazy) = self.lazy.get() {
            lazy.finish();
        }
        self.reading = None;
        if let Some(guard) = self.guard.take() {
            guard.dismiss();
        }
    }
}

/// Ends a restore that may wait for pages which do not come.
fn note(line: &Mutex<Line>, what: &Urgent, lazy: Option<&Arc<Lazy>>) {
    let mut line = locked(line);
    match what {
        Urgent::Attached => line.lost = false,
        Urgent::Frame(_) => {}
        Urgent::Lost(_) => {
            line.lost = true;
            if let (true, Some(lazy)) = (line.needed, lazy) {
                tracing::warn!("the source is gone while the process is being restored: given up");
                lazy.finish();
            }
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn place(lazy: &Lazy, frame: &Frame, unpacker: &mut Unpacker) -> Result<(), DrainError> {
    let content = unpacker.unpack(frame)?;
    // The thread that reads faults is first in line and needs the same lock.
    let _hurry = Hurry::up();
    match content {
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
