//! A received frame to what it asks for.

use bytes::Bytes;
use lz4_flex::block::decompress_into;

use super::frame::{BLOCK_BYTES, Codec, Frame, FrameError, Kind, PAGE_BYTES, checksum};

/// What a frame asks for. Addresses are bytes.
#[derive(Debug)]
pub enum Content<'a> {
    /// Page contents to be placed.
    Data(Pages<'a>),
    /// A run of pages that hold zeros.
    Zero {
        /// Address of the first page.
        addr: u64,
        /// Number of pages.
        pages: u32,
        /// Whether they are to be present, not merely read as zeros.
        present: bool,
    },
    /// A run of pages whose earlier contents are void.
    Drop {
        /// Address of the first page.
        addr: u64,
        /// Number of pages.
        pages: u32,
    },
    /// An encoded `Layout` message.
    Layout(Bytes),
    /// The round is complete.
    RoundEnd,
    /// The encoded final state.
    State(Bytes),
    /// An encoded `PageRuns` message: pages that are void and will come late.
    Missing(Bytes),
    /// An encoded `Ahead` message.
    Ahead(Bytes),
}

/// The pages of a Data frame.
#[derive(Debug, Clone, Copy)]
pub struct Pages<'a> {
    first_page: u64,
    table: &'a [[u8; 2]],
    raw: &'a [u8],
}

impl<'a> Pages<'a> {
    /// Number of pages.
    pub fn len(&self) -> usize {
        self.raw.len() / PAGE_BYTES
    }

    /// Never true for a frame that was unpacked.
    pub fn is_empty(&self) -> bool {
        self.raw.is_empty()
    }

    /// The contents of all pages, one after another.
    pub fn bytes(&self) -> &'a [u8] {
        self.raw
    }

    /// Runs of adjacent pages: address and contents, ascending.
    pub fn runs(&self) -> Runs<'a> {
        Runs { pages: *self, next: 0 }
    }

    fn number(&self, index: usize) -> u64 {
        let offset = self.table.get(index).map_or(index as u64, |o| u64::from(u16::from_le_bytes(*o)));
        self.first_page + offset
    }
}

/// Iterator of [`Pages::runs`].
#[derive(Debug, Clone)]
pub struct Runs<'a> {
    pages: Pages<'a>,
    next: usize,
}

impl<'a> Iterator for Runs<'a> {
    type Item = (u64, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let first = self.next;
        if first >= self.pages.len() {
            return None;
        }
        let number = self.pages.number(first);
        let mut end = first + 1;
        while end < self.pages.len() && self.pages.number(end) == number + (end - first) as u64 {
            end += 1;
        }
        self.next = end;
        let bytes = self.pages.raw.get(first * PAGE_BYTES..end * PAGE_BYTES)?;
        Some((number * PAGE_BYTES as u64, bytes))
    }
}

/// Unpacks frames; keeps the buffer that compressed blocks are unpacked into.
#[derive(Debug)]
pub struct Unpacker {
    block: Vec<u8>,
}

impl Default for Unpacker {
    fn default() -> Self {
        Self { block: vec![0; BLOCK_BYTES] }
    }
}

impl Unpacker {
    /// What `frame` asks for. Raw pages are used where they lie, compressed ones from our buffer, so the
    /// result must be dealt with before the next frame.
    ///
    /// # Errors
    /// [`FrameError`] if the payload does not hold what the header says.
    pub fn unpack<'a>(&'a mut self, frame: &'a Frame) -> Result<Content<'a>, FrameError> {
        let header = frame.header();
        let addr = header.first_page * PAGE_BYTES as u64;
        let payload = frame.payload();
        let whole = || {
            verify(header.checksum, 0, &[], payload)?;
            Ok(payload.clone())
        };
        match header.kind() {
            Kind::Data => self.data(frame).map(Content::Data),
            Kind::Zero => {
                verify(header.checksum, header.first_page, &[], &[])?;
                Ok(Content::Zero { addr, pages: header.pages, present: header.present() })
            }
            Kind::Drop => {
                verify(header.checksum, header.first_page, &[], &[])?;
                Ok(Content::Drop { addr, pages: header.pages })
            }
            Kind::Layout => whole().map(Content::Layout),
            Kind::State => whole().map(Content::State),
            Kind::Missing => whole().map(Content::Missing),
            Kind::Ahead => whole().map(Content::Ahead),
            Kind::RoundEnd => whole().map(|_| Content::RoundEnd),
        }
    }

    fn data<'a>(&'a mut self, frame: &'a Frame) -> Result<Pages<'a>, FrameError> {
        let header = frame.header();
        let pages = header.pages as usize;
        let bytes = pages * PAGE_BYTES;
        let short = FrameError::Length { have: frame.payload().len(), want: header.table_bytes() };
        let (table, block) = frame.payload().split_at_checked(header.table_bytes()).ok_or(short)?;
        let (table, _) = table.as_chunks::<2>();
        check_table(table)?;
        let raw: &[u8] = match header.codec {
            Codec::Raw => block,
            Codec::Lz4 => {
                let out = self.block.get_mut(..bytes).ok_or(FrameError::Block(pages))?;
                let len = decompress_into(block, out).map_err(|_| FrameError::Block(pages))?;
                out.get(..len).unwrap_or_default()
            }
        };
        if raw.len() != bytes {
            return Err(FrameError::Block(pages));
        }
        verify(header.checksum, header.first_page, table.as_flattened(), raw)?;
        Ok(Pages { first_page: header.first_page, table, raw })
    }
}

/// A table starts at 0 and ascends.
fn check_table(table: &[[u8; 2]]) -> Result<(), FrameError> {
    let mut least = 0;
    for (index, entry) in table.iter().enumerate() {
        let offset = u32::from(u16::from_le_bytes(*entry));
        if offset < least || (index == 0 && offset != 0) {
            return Err(FrameError::Table(index));
        }
        least = offset + 1;
    }
    Ok(())
}

fn verify(sent: u64, first_page: u64, table: &[u8], raw: &[u8]) -> Result<(), FrameError> {
    let is = checksum(first_page, table, raw);
    if is == sent { Ok(()) } else { Err(FrameError::Checksum { first_page, sent, is }) }
}
