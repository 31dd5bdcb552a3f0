//! Page contents to frames.
//!
//! The caller reads pages into one buffer (256 KiB at a time is fastest, and the zero check then finds them
//! in the cache) and hands them over with their addresses. Pages of zeros become runs; the others are
//! gathered 16 at a time, contiguous or scattered, and compressed where that pays. Frames are written one
//! after another into pooled buffers of 256 KiB, the size that the transport carries fastest.

use bytes::{BufMut, Bytes, BytesMut};
use lz4_flex::block::{CompressTable, compress_into_with_table, get_maximum_output_size};

pub use super::compress::Compression;
use super::compress::Policy;
use super::frame::{
    BLOCK_BYTES, Codec, HEADER_BYTES, Header, Kind, MAX_BATCH_PAGES, MAX_PAGE_NUMBER, PAGE_BYTES, checksum,
    run_header,
};
use super::pool::Pool;

/// Bytes of an output buffer.
const OUT_BYTES: usize = 256 * 1024;
/// Buffers that are remembered: what the transport holds in flight, at most.
const OUT_BUFFERS: usize = 40;
/// The longest frame: header, table, block.
const MAX_FRAME_BYTES: usize = HEADER_BYTES + MAX_BATCH_PAGES * 2 + BLOCK_BYTES;

/// Why pages were not packed. `E` is the error of the sink.
#[derive(Debug, thiserror::Error)]
pub enum PackError<E: std::error::Error + 'static> {
    /// The contents are not as many pages as there are addresses.
    #[error("{pages} page addresses with {bytes} bytes of contents")]
    Shape {
        /// Addresses given.
        pages: usize,
        /// Bytes given.
        bytes: usize,
    },
    /// An address is not that of a page, or a run of pages is empty or too long.
    #[error("pages at {addr:#x} cannot be sent")]
    Address {
        /// The address.
        addr: u64,
    },
    /// The sink did not take the bytes.
    #[error("send pages")]
    Sink(#[source] E),
}

/// What went through a [`Packer`] so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PackStats {
    /// Pages sent with contents.
    pub pages_data: u64,
    /// Pages sent as zeros.
    pub pages_zero: u64,
    /// Bytes of the pages sent with contents, before compression.
    pub bytes_raw: u64,
    /// Bytes of all frames.
    pub bytes_wire: u64,
}

/// Turns pages into frames; one per sending thread.
pub struct Packer {
    policy: Policy,
    zeros_present: bool,
    pool: Pool,
    out: BytesMut,
    batch: Vec<(u64, usize)>,
    gathered: Vec<u8>,
    compressed: Vec<u8>,
    table: CompressTable,
    stats: PackStats,
}

impl std::fmt::Debug for Packer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Packer").field("stats", &self.stats).finish_non_exhaustive()
    }
}

impl Packer {
    /// A packer. With `zeros_present`, pages found to be zero are present at the destination too (they count
    /// in its resident size); otherwise they only read as zeros.
    pub fn new(compression: Compression, zeros_present: bool) -> Self {
        let mut pool = Pool::new(OUT_BYTES + MAX_FRAME_BYTES, OUT_BUFFERS);
        Self {
            policy: Policy::new(compression),
            zeros_present,
            out: pool.take(),
            pool,
            batch: Vec::with_capacity(MAX_BATCH_PAGES),
            gathered: Vec::with_capacity(BLOCK_BYTES),
            compressed: vec![0; get_maximum_output_size(BLOCK_BYTES)],
            table: CompressTable::default(),
            stats: PackStats::default(),
        }
    }

    /// What was packed so far.
    pub fn stats(&self) -> PackStats {
        self.stats
    }

    /// Packs pages: `addrs` are their addresses, ascending and each once, `contents` what they hold, one after
    /// another. Full buffers go to `sink`; the last one waits for [`Packer::flush`].
    ///
    /// # Errors
    /// [`PackError`]: the sink's, or addresses and contents that do not fit together.
    pub fn pack<E: std::error::Error + 'static>(
        &mut self,
        round: u32,
        addrs: &[u64],
        contents: &[u8],
        sink: &mut impl FnMut(Bytes) -> Result<(), E>,
    ) -> Result<(), PackError<E>> {
        let (pages, rest) = contents.as_chunks::<PAGE_BYTES>();
        if pages.len() != addrs.len() || !rest.is_empty() {
            return Err(PackError::Shape { pages: addrs.len(), bytes: contents.len() });
        }
        let mut zeros: Option<(u64, u32)> = None;
        self.batch.clear();
        for (index, (&addr, page)) in addrs.iter().zip(pages).enumerate() {
            let number = page_number(addr, 1).ok_or(PackError::Address { addr })?;
            if is_zero(page) {
                zeros = match zeros {
                    Some((first, n)) if first + u64::from(n) == number && n < u32::MAX => {
                        Some((first, n + 1))
                    }
                    Some((first, n)) => {
                        self.put_zeros(round, first, n, self.zeros_present, sink)?;
                        Some((number, 1))
                    }
                    None => Some((number, 1)),
                };
                continue;
            }
            let fits = self.batch.len() < MAX_BATCH_PAGES
                && match (self.batch.first(), self.batch.last()) {
                    (Some(&(first, _)), Some(&(last, _))) => {
                        number > last && number - first <= u64::from(u16::MAX)
                    }
                    _ => true,
                };
            if !fits {
                self.put_batch(round, contents, sink)?;
            }
            self.batch.push((number, index * PAGE_BYTES));
        }
        self.put_batch(round, contents, sink)?;
        if let Some((first, n)) = zeros {
            self.put_zeros(round, first, n, self.zeros_present, sink)?;
        }
        Ok(())
    }

    /// Says that the pages of a run hold zeros, without reading them; `present` as in [`Packer::new`].
    ///
    /// # Errors
    /// [`PackError`].
    pub fn zero_run<E: std::error::Error + 'static>(
        &mut self,
        round: u32,
        addr: u64,
        pages: u32,
        present: bool,
        sink: &mut impl FnMut(Bytes) -> Result<(), E>,
    ) -> Result<(), PackError<E>> {
        let first = page_number(addr, pages).ok_or(PackError::Address { addr })?;
        self.put_zeros(round, first, pages, present, sink)
    }

    /// Says that what was sent of the pages of a run is void.
    ///
    /// # Errors
    /// [`PackError`].
    pub fn drop_run<E: std::error::Error + 'static>(
        &mut self,
        round: u32,
        addr: u64,
        pages: u32,
        sink: &mut impl FnMut(Bytes) -> Result<(), E>,
    ) -> Result<(), PackError<E>> {
        let first = page_number(addr, pages).ok_or(PackError::Address { addr })?;
        self.put(&run_header(Kind::Drop, round, first, pages, false), &[], &[], sink)
    }

    /// Gives what is packed so far to `sink`.
    ///
    /// # Errors
    /// [`PackError::Sink`].
    pub fn flush<E: std::error::Error + 'static>(
        &mut self,
        sink: &mut impl FnMut(Bytes) -> Result<(), E>,
    ) -> Result<(), PackError<E>> {
        if self.out.is_empty() {
            return Ok(());
        }
        let next = self.pool.take();
        let full = std::mem::replace(&mut self.out, next);
        sink(self.pool.send(full)).map_err(PackError::Sink)
    }

    fn put_zeros<E: std::error::Error + 'static>(
        &mut self,
        round: u32,
        first: u64,
        pages: u32,
        present: bool,
        sink: &mut impl FnMut(Bytes) -> Result<(), E>,
    ) -> Result<(), PackError<E>> {
        self.stats.pages_zero += u64::from(pages);
        self.put(&run_header(Kind::Zero, round, first, pages, present), &[], &[], sink)
    }

    /// Writes the gathered batch as one Data frame.
    fn put_batch<E: std::error::Error + 'static>(
        &mut self,
        round: u32,
        contents: &[u8],
        sink: &mut impl FnMut(Bytes) -> Result<(), E>,
    ) -> Result<(), PackError<E>> {
        let (Some(&(first_page, first_at)), Some(&(last_page, last_at))) =
            (self.batch.first(), self.batch.last())
        else {
            return Ok(());
        };
        let pages = self.batch.len();
        let bytes = pages * PAGE_BYTES;
        let mut gathered = std::mem::take(&mut self.gathered);
        let raw = if last_at - first_at + PAGE_BYTES == bytes {
            contents.get(first_at..first_at + bytes).unwrap_or_default()
        } else {
            gathered.clear();
            for &(_, at) in &self.batch {
                gathered.extend_from_slice(contents.get(at..at + PAGE_BYTES).unwrap_or_default());
            }
            &gathered[..]
        };

        let mut table = [0; MAX_BATCH_PAGES * 2];
        let scattered = last_page - first_page + 1 != pages as u64;
        if scattered {
            for (slot, &(page, _)) in table.chunks_exact_mut(2).zip(&self.batch) {
                slot.copy_from_slice(&u16::try_from(page - first_page).unwrap_or(u16::MAX).to_le_bytes());
            }
        }
        let table = if scattered { table.get(..pages * 2).unwrap_or_default() } else { &[] };

        let mut compressed = std::mem::take(&mut self.compressed);
        let smaller = self.compress(first_page, raw, &mut compressed);
        let (codec, block) = match smaller.and_then(|len| compressed.get(..len)) {
            Some(block) => (Codec::Lz4, block),
            None => (Codec::Raw, raw),
        };
        let header = Header {
            kind: Kind::Data,
            codec,
            count: u16::try_from(table.len() / 2).unwrap_or(u16::MAX),
            round,
            pages: u32::try_from(pages).unwrap_or(u32::MAX),
            payload: u32::try_from(table.len() + block.len()).unwrap_or(u32::MAX),
            first_page,
            flags: 0,
            checksum: checksum(first_page, table, raw),
        };
        let put = self.put(&header, table, block, sink);
        self.stats.pages_data += pages as u64;
        self.stats.bytes_raw += bytes as u64;
        self.batch.clear();
        self.gathered = gathered;
        self.compressed = compressed;
        put
    }

    /// Compresses `raw` where it is worth trying; the length if it got smaller.
    fn compress(&mut self, first_page: u64, raw: &[u8], out: &mut [u8]) -> Option<usize> {
        if !self.policy.wants(first_page) {
            return None;
        }
        let smaller = compress_into_with_table(raw, out, &mut self.table)
            .ok()
            .filter(|&len| len + len / 16 < raw.len());
        self.policy.tried(first_page, raw.len(), smaller.unwrap_or(raw.len()));
        smaller
    }

    fn put<E: std::error::Error + 'static>(
        &mut self,
        header: &Header,
        table: &[u8],
        block: &[u8],
        sink: &mut impl FnMut(Bytes) -> Result<(), E>,
    ) -> Result<(), PackError<E>> {
        self.out.put_slice(&header.encode());
        self.out.put_slice(table);
        self.out.put_slice(block);
        self.stats.bytes_wire += (HEADER_BYTES + table.len() + block.len()) as u64;
        if self.out.len() >= OUT_BYTES { self.flush(sink) } else { Ok(()) }
    }
}

/// The page number of an address, if a run of `pages` there can be sent.
fn page_number(addr: u64, pages: u32) -> Option<u64> {
    let first = addr / PAGE_BYTES as u64;
    let ok =
        addr.is_multiple_of(PAGE_BYTES as u64) && pages > 0 && first + u64::from(pages) <= MAX_PAGE_NUMBER;
    ok.then_some(first)
}

/// Whether a page holds zeros only. Most pages that do not show it in their first word.
fn is_zero(page: &[u8; PAGE_BYTES]) -> bool {
    let (words, _) = page.as_chunks::<8>();
    if words.first().is_some_and(|w| u64::from_ne_bytes(*w) != 0) {
        return false;
    }
    words.chunks_exact(32).all(|part| part.iter().fold(0, |acc, w| acc | u64::from_ne_bytes(*w)) == 0)
}
