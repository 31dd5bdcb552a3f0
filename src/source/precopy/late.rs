//! What travels after the resume: announced before the freeze where it is known by then, and at the freeze.

use std::collections::HashSet;

use prost::Message as _;

use super::ranges::page_chunks;
use super::{Go, Precopy, PrecopyError, Sink};
use crate::engine::extents::Extents;
use crate::engine::memory::PAGE_BYTES;
use crate::engine::state::mm::canonical;
use crate::engine::state::objects::{WINDOWS_END, WINDOWS_START};
use crate::pageserver::frame;
use crate::pageserver::runs as page_runs;
use crate::proto::image::{Layout, Range, Vma};
use crate::source::owed;

/// What may follow after the resume.
#[allow(missing_debug_implementations, reason = "holds a closure")]
pub struct Following<'a> {
    /// All goes before, if it is no more than this.
    pub eager_pages: u64,
    /// Addresses in pages that go before in any case.
    pub hot: &'a [u64],
    /// Told all that is owed, each page by one name, and the mappings of huge pages (start, end, bytes of a
    /// page), before the destination hears of it.
    pub owe: &'a mut (dyn FnMut(Extents, Vec<(u64, u64, u64)>) + Send),
}

impl Precopy {
    /// In place of a last round before post-copy: what the last scan found is not sent but announced, while
    /// the process still runs, so that the freeze has to deal only with what is written from now on. What
    /// may not follow late is sent. Returns how many pages are owed then.
    ///
    /// # Errors
    /// See [`PrecopyError`].
    pub fn announce<E: std::error::Error>(
        &mut self,
        round: u32,
        sink: &mut impl Sink<E>,
        go: &dyn Fn(u64) -> Go,
    ) -> Result<u64, PrecopyError<E>> {
        if self.pending.is_none() {
            self.scan()?;
        }
        let Some((layout, selected)) = self.pending.take() else { return Ok(0) };
        let runs = selected.mapped;
        self.send_layout(round, layout, sink)?;
        let untouched = self.send_untouched(round, &runs, sink)?;
        let touched = self.touched(&runs, &untouched);
        let (mut late, early) = owed::split(&touched, &self.placed);
        let mut windows = selected.windows;
        selected.suspects.iter().for_each(|(start, end)| windows.insert(start, end));
        self.put_late_windows(&mut windows, &mut late);
        self.send_pages(round, &early, sink, &without_stop(go))?;
        self.send_windows(round, &windows, sink, &without_stop(go))?;
        self.packer.flush(sink)?;
        self.put_missing(round, &late, sink)?;
        self.put(frame::round_end(round), sink)?;
        Ok(self.owed.total() / PAGE_BYTES)
    }

    /// Takes out of `windows` what may follow.
    fn put_late_windows(&self, windows: &mut Extents, late: &mut Extents) {
        let by_mappings = owed::split_windows(windows, &self.placed, |id| self.objects.is_open(id));
        by_mappings.iter().for_each(|(start, end)| late.insert(start, end));
    }

    fn put_missing<E: std::error::Error>(
        &mut self,
        round: u32,
        late: &Extents,
        sink: &mut impl Sink<E>,
    ) -> Result<(), PrecopyError<E>> {
        if late.is_empty() {
            return Ok(());
        }
        self.note_owed(late);
        self.put(frame::missing(round, &page_runs::encode(late).encode_to_vec())?, sink)
    }

    fn note_owed(&mut self, late: &Extents) {
        for (start, end) in late.iter() {
            self.owed.insert(start, end);
            self.sent.insert(start, end);
        }
    }

    /// Sends the rest of the memory, or announces what may follow; true if anything is owed then. It is not
    /// ended early, but can be given up.
    ///
    /// # Errors
    /// See [`PrecopyError`].
    pub fn send_rest<E: std::error::Error>(
        &mut self,
        round: u32,
        mut rest: Remainder,
        follow: Following<'_>,
        sink: &mut impl Sink<E>,
        go: &dyn Fn(u64) -> Go,
    ) -> Result<bool, PrecopyError<E>> {
        let Following { eager_pages, hot, owe } = follow;
        self.send_layout(round, rest.layout, sink)?;
        for &(start, end) in &rest.gone {
            for (at, pages) in page_chunks(start, end) {
                self.packer.drop_run(round, at, pages, sink)?;
            }
            self.sent.remove(start, end);
            self.owed.remove(start, end);
        }
        let mut windows = rest.suspects;
        let exact = rest.dirty.overlap(WINDOWS_START, WINDOWS_END);
        exact.for_each(|(start, end)| windows.insert(start, end));
        rest.dirty.remove(WINDOWS_START, WINDOWS_END);
        let total = (rest.dirty.total() + windows.total()) / PAGE_BYTES;
        let (mut late, mut early) = if self.owed.is_empty() && total <= eager_pages {
            (Extents::new(), rest.dirty)
        } else {
            let (mut late, early) = owed::split(&rest.dirty, &self.placed);
            self.put_late_windows(&mut windows, &mut late);
            (late, early)
        };
        for page in hot.iter().map(|address| address & !(PAGE_BYTES - 1)) {
            // Of huge pages the destination takes whole ones only.
            let small = |v: &&Vma| v.start <= page && page < v.end && v.page_bytes == 0;
            let late_or_owed =
                late.overlap(page, page + PAGE_BYTES).chain(self.owed.overlap(page, page + PAGE_BYTES));
            if late_or_owed.count() > 0 && self.placed.vmas.iter().any(|v| small(&v)) {
                late.remove(page, page + PAGE_BYTES);
                self.owed.remove(page, page + PAGE_BYTES);
                early.insert(page, page + PAGE_BYTES);
            }
        }
        self.send_pages(round, &early, sink, &without_stop(go))?;
        self.send_windows(round, &windows, sink, &without_stop(go))?;
        self.packer.flush(sink)?;
        let announced = self.owed.is_empty() && late.is_empty();
        // The destination may ask as soon as it has read this.
        self.note_owed(&late);
        let owed = canonical(std::mem::take(&mut self.owed), &self.placed);
        let huge = self.placed.vmas.iter().filter(|v| v.page_bytes > 0);
        owe(owed, huge.map(|v| (v.start, v.end, v.page_bytes)).collect());
        if !late.is_empty() {
            self.put(frame::missing(round, &page_runs::encode(&late).encode_to_vec())?, sink)?;
        }
        Ok(!announced)
    }
}

/// The memory map of the stopped process.
#[derive(Debug)]
pub struct FinalMap(pub(super) Layout);

/// What the last scan left to send.
#[derive(Debug)]
pub struct Remainder {
    pub(super) layout: Layout,
    pub(super) dirty: Extents,
    /// Pages of objects that calls may have changed: to be read and compared.
    pub(super) suspects: Extents,
    pub(super) gone: Vec<(u64, u64)>,
    /// Guard pages, for the image.
    pub guards: Vec<Range>,
}

impl Remainder {
    /// Pages to send.
    pub fn pages(&self) -> u64 {
        self.dirty.total() / PAGE_BYTES
    }

    /// Paths of the files that are mapped.
    pub fn mapped_paths(&self) -> HashSet<&[u8]> {
        self.layout.files.iter().map(|f| f.path.as_slice()).collect()
    }
}

/// What must go goes: only giving up ends it.
fn without_stop(go: &dyn Fn(u64) -> Go) -> impl Fn(u64) -> Go + '_ {
    move |left| match go(left) {
        Go::Stop => Go::On,
        answer => answer,
    }
}
