//! Frames of the bulk stream: a fixed 40-byte little-endian header, then the payload.
//!
//! | offset | field | meaning |
//! | --- | --- | --- |
//! | 0 | kind u8 | see [`Kind`] |
//! | 1 | codec u8 | how the payload is stored, see [`Codec`] |
//! | 2 | count u16 | Data: entries of the page table, 0 if the pages are contiguous |
//! | 4 | round u32 | the round this frame belongs to |
//! | 8 | pages u32 | number of pages (Data, Zero, Drop) |
//! | 12 | payload u32 | bytes that follow the header |
//! | 16 | first page u64 | page number (address / 4096) of the first page |
//! | 24 | flags u64 | Zero: bit 0, the pages are to be present; all other bits are zero |
//! | 32 | checksum u64 | xxh3 of what the payload holds once decompressed |
//!
//! A Data payload is the page table (for scattered pages: `count` offsets of u16 from the first page,
//! ascending, the first one 0), then one block with the contents of all its pages. The checksum finds our
//! own mistakes; against others the connection is encrypted and authenticated.
//!
//! Nothing here trusts the peer: a [`Header`] can only be had by checks of every field against the limits
//! below, so whoever allocates by its lengths allocates a bounded amount.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Bytes of a page.
pub const PAGE_BYTES: usize = 4096;
/// Bytes of a frame's header.
pub const HEADER_BYTES: usize = 40;
/// Most pages of one Data frame.
pub const MAX_BATCH_PAGES: usize = 16;
/// Bytes of the largest block of page contents.
pub const BLOCK_BYTES: usize = MAX_BATCH_PAGES * PAGE_BYTES;
/// Largest memory layout that a frame may carry.
pub const MAX_LAYOUT_BYTES: usize = 16 << 20;
/// Largest process state that a frame may carry: with the queues of its connections.
pub const MAX_STATE_BYTES: usize = 256 << 20;
/// Longest list of missing pages that a frame may carry.
pub const MAX_RUNS_BYTES: usize = 16 << 20;
/// Longest list of connections whose sockets can be made: of some 16,000.
pub const MAX_AHEAD_BYTES: usize = 4 << 20;
/// Page numbers end here: user space reaches to 2^56 bytes where page tables have five levels.
pub const MAX_PAGE_NUMBER: u64 = 1 << 44;

/// Bytes of a Data frame's page table, at most.
const MAX_TABLE_BYTES: usize = MAX_BATCH_PAGES * 2;
/// Flag of a Zero frame: the pages are to be present, not merely unmapped.
const FLAG_PRESENT: u64 = 1;

/// What a frame carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Contents of up to 16 pages.
    Data = 1,
    /// A run of pages that hold zeros.
    Zero = 2,
    /// A run of pages whose earlier contents are void.
    Drop = 3,
    /// The memory layout of the round, a `Layout` message.
    Layout = 4,
    /// Everything of the round has been sent.
    RoundEnd = 5,
    /// The final state of the process.
    State = 6,
    /// Pages whose earlier contents are void and whose contents will come after the process has resumed,
    /// unless they are sent before: a `PageRuns` message.
    Missing = 7,
    /// Connections whose sockets can be made already: an `Ahead` message.
    Ahead = 8,
}

/// How a block is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Codec {
    /// As it is.
    Raw = 1,
    /// One LZ4 block without a length prefix.
    Lz4 = 2,
}

/// A frame that breaks the rules of this module, or does not hold what its header says.
#[derive(Debug, Clone, thiserror::Error, PartialEq, Eq)]
pub enum FrameError {
    /// The first byte is no kind.
    #[error("frame of unknown kind {0}")]
    Kind(u8),
    /// The second byte is no codec, or not one for this kind.
    #[error("{kind:?} frame with codec {codec}")]
    Codec {
        /// The frame's kind.
        kind: Kind,
        /// The codec byte.
        codec: u8,
    },
    /// A number in the header is not possible for this kind.
    #[error("{kind:?} frame with {field} {value}")]
    Field {
        /// The frame's kind.
        kind: Kind,
        /// Which field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// A length goes beyond its limit.
    #[error("{kind:?} frame of {len} bytes, the limit is {limit}")]
    TooLong {
        /// The frame's kind.
        kind: Kind,
        /// Bytes of payload that the header announces.
        len: usize,
        /// The limit for this kind.
        limit: usize,
    },
    /// Fewer or more bytes than the header announces.
    #[error("frame of {have} bytes where {want} belong")]
    Length {
        /// Bytes that are there.
        have: usize,
        /// Bytes that the header announces.
        want: usize,
    },
    /// A list of page runs is not sorted, or goes beyond user space.
    #[error("list of page runs out of order at entry {0}")]
    Runs(usize),
    /// The page table is not ascending from 0.
    #[error("page table out of order at entry {0}")]
    Table(usize),
    /// The block does not decompress to its pages.
    #[error("block does not decompress to {0} pages")]
    Block(usize),
    /// The contents are not those that were sent.
    #[error("checksum of page {first_page:#x} is {is:#x}, sent was {sent:#x}")]
    Checksum {
        /// First page of the frame.
        first_page: u64,
        /// Checksum in the header.
        sent: u64,
        /// Checksum of what arrived.
        is: u64,
    },
}

/// A header whose fields are possible together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub(super) kind: Kind,
    pub(super) codec: Codec,
    pub(super) count: u16,
    pub(super) round: u32,
    pub(super) pages: u32,
    pub(super) payload: u32,
    pub(super) first_page: u64,
    pub(super) flags: u64,
    pub(super) checksum: u64,
}

/// A frame as received: a checked header and a payload of the length it announces.
#[derive(Debug, Clone)]
pub struct Frame {
    header: Header,
    payload: Bytes,
}

impl Header {
    /// What the frame carries.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The round that the frame belongs to.
    pub fn round(&self) -> u32 {
        self.round
    }

    /// Bytes that follow the header; bounded by the limit of its kind.
    pub fn payload_bytes(&self) -> usize {
        self.payload as usize
    }

    /// Bytes of the page table at the start of a Data payload.
    pub(super) fn table_bytes(&self) -> usize {
        usize::from(self.count) * 2
    }

    /// Whether the pages of a Zero frame are to be present.
    pub(super) fn present(&self) -> bool {
        self.flags & FLAG_PRESENT != 0
    }

    /// Reads and checks a header.
    ///
    /// # Errors
    /// Any [`FrameError`] that the header alone can show.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, FrameError> {
        let mut rest = &bytes[..];
        let (kind, codec) = (rest.get_u8(), rest.get_u8());
        let kind = match kind {
            1 => Kind::Data,
            2 => Kind::Zero,
            3 => Kind::Drop,
            4 => Kind::Layout,
            5 => Kind::RoundEnd,
            6 => Kind::State,
            7 => Kind::Missing,
            8 => Kind::Ahead,
            other => return Err(FrameError::Kind(other)),
        };
        let codec = match codec {
            1 => Codec::Raw,
            2 if kind == Kind::Data => Codec::Lz4,
            codec => return Err(FrameError::Codec { kind, codec }),
        };
        let header = Self {
            kind,
            codec,
            count: rest.get_u16_le(),
            round: rest.get_u32_le(),
            pages: rest.get_u32_le(),
            payload: rest.get_u32_le(),
            first_page: rest.get_u64_le(),
            flags: rest.get_u64_le(),
            checksum: rest.get_u64_le(),
        };
        header.check()?;
        Ok(header)
    }

    fn check(&self) -> Result<(), FrameError> {
        let kind = self.kind;
        let field = |field, value| Err(FrameError::Field { kind, field, value });
        let pages = u64::from(self.pages);
        let about_pages = matches!(kind, Kind::Data | Kind::Zero | Kind::Drop);
        if about_pages != (pages > 0) {
            return field("page count", pages);
        }
        let end = self.first_page.checked_add(pages);
        if end.is_none_or(|end| end > MAX_PAGE_NUMBER) || (!about_pages && self.first_page != 0) {
            return field("first page", self.first_page);
        }
        let known_flags = if kind == Kind::Zero { FLAG_PRESENT } else { 0 };
        if self.flags & !known_flags != 0 {
            return field("flags", self.flags);
        }
        if self.count != 0 && (kind != Kind::Data || u32::from(self.count) != self.pages) {
            return field("table length", u64::from(self.count));
        }
        let len = self.payload_bytes();
        let limit = match kind {
            Kind::Data if pages > MAX_BATCH_PAGES as u64 => return field("page count", pages),
            Kind::Data => self.table_bytes() + self.pages as usize * PAGE_BYTES,
            Kind::Layout => MAX_LAYOUT_BYTES,
            Kind::State => MAX_STATE_BYTES,
            Kind::Missing => MAX_RUNS_BYTES,
            Kind::Ahead => MAX_AHEAD_BYTES,
            Kind::Zero | Kind::Drop | Kind::RoundEnd => 0,
        };
        if len > limit {
            return Err(FrameError::TooLong { kind, len, limit });
        }
        // A compressed block is smaller than the pages, or it would have been sent raw; a raw one is the pages.
        let short = match (kind, self.codec) {
            (Kind::Data, Codec::Raw) => len < limit,
            (Kind::Data, Codec::Lz4) => len <= self.table_bytes(),
            _ => false,
        };
        if short {
            return Err(FrameError::Length { have: len, want: limit });
        }
        Ok(())
    }

    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        let mut rest = &mut out[..];
        rest.put_u8(self.kind as u8);
        rest.put_u8(self.codec as u8);
        rest.put_u16_le(self.count);
        rest.put_u32_le(self.round);
        rest.put_u32_le(self.pages);
        rest.put_u32_le(self.payload);
        rest.put_u64_le(self.first_page);
        rest.put_u64_le(self.flags);
        rest.put_u64_le(self.checksum);
        out
    }
}

impl Frame {
    /// Joins a header and the bytes that followed it.
    ///
    /// # Errors
    /// [`FrameError::Length`] if they are not as many as the header says.
    pub fn new(header: Header, payload: Bytes) -> Result<Self, FrameError> {
        if payload.len() != header.payload_bytes() {
            return Err(FrameError::Length { have: payload.len(), want: header.payload_bytes() });
        }
        Ok(Self { header, payload })
    }

    /// Reads one frame from the front of `bytes`.
    ///
    /// # Errors
    /// Any [`FrameError`]; [`FrameError::Length`] for a truncated frame.
    pub fn decode(bytes: &mut Bytes) -> Result<Self, FrameError> {
        let head = bytes.first_chunk().ok_or(FrameError::Length { have: bytes.len(), want: HEADER_BYTES })?;
        let header = Header::decode(head)?;
        let want = HEADER_BYTES + header.payload_bytes();
        if bytes.len() < want {
            return Err(FrameError::Length { have: bytes.len(), want });
        }
        let payload = bytes.split_to(want).slice(HEADER_BYTES..);
        Self::new(header, payload)
    }

    /// The checked header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// What the frame carries.
    pub fn kind(&self) -> Kind {
        self.header.kind
    }

    /// The round that the frame belongs to.
    pub fn round(&self) -> u32 {
        self.header.round
    }

    /// The bytes after the header, as they were sent.
    pub fn payload(&self) -> &Bytes {
        &self.payload
    }
}

/// Checksum of a payload: seeded with its place, so that pages which land elsewhere are noticed too.
pub(super) fn checksum(first_page: u64, table: &[u8], raw: &[u8]) -> u64 {
    let seed = if table.is_empty() { first_page } else { xxh3_64_with_seed(table, first_page) };
    xxh3_64_with_seed(raw, seed)
}

/// Header of a frame about a run of pages without contents.
pub(super) fn run_header(kind: Kind, round: u32, first_page: u64, pages: u32, present: bool) -> Header {
    Header {
        kind,
        codec: Codec::Raw,
        count: 0,
        round,
        pages,
        payload: 0,
        first_page,
        flags: if present { FLAG_PRESENT } else { 0 },
        checksum: checksum(first_page, &[], &[]),
    }
}

/// The frame that carries the encoded `Layout` message of a round, ready to be sent.
///
/// # Errors
/// [`FrameError::TooLong`] beyond [`MAX_LAYOUT_BYTES`].
pub fn layout(round: u32, message: &[u8]) -> Result<Bytes, FrameError> {
    whole(Kind::Layout, round, message, MAX_LAYOUT_BYTES)
}

/// The frame that carries the encoded final state, ready to be sent.
///
/// # Errors
/// [`FrameError::TooLong`] beyond [`MAX_STATE_BYTES`].
pub fn state(round: u32, message: &[u8]) -> Result<Bytes, FrameError> {
    whole(Kind::State, round, message, MAX_STATE_BYTES)
}

/// The frame that announces missing pages (an encoded `PageRuns` message), ready to be sent.
///
/// # Errors
/// [`FrameError::TooLong`] beyond [`MAX_RUNS_BYTES`].
pub fn missing(round: u32, message: &[u8]) -> Result<Bytes, FrameError> {
    whole(Kind::Missing, round, message, MAX_RUNS_BYTES)
}

/// The frame that carries an encoded `Ahead` message, ready to be sent.
///
/// # Errors
/// [`FrameError::TooLong`] beyond [`MAX_AHEAD_BYTES`].
pub fn ahead(round: u32, message: &[u8]) -> Result<Bytes, FrameError> {
    whole(Kind::Ahead, round, message, MAX_AHEAD_BYTES)
}

fn whole(kind: Kind, round: u32, message: &[u8], limit: usize) -> Result<Bytes, FrameError> {
    let too_long = FrameError::TooLong { kind, len: message.len(), limit };
    let payload = u32::try_from(message.len()).map_err(|_| too_long)?;
    let header =
        Header { kind, payload, checksum: checksum(0, &[], message), ..run_header(kind, round, 0, 0, false) };
    header.check()?;
    let mut out = BytesMut::with_capacity(HEADER_BYTES + message.len());
    out.put_slice(&header.encode());
    out.put_slice(message);
    Ok(out.freeze())
}

/// The frame that ends a round, ready to be sent.
pub fn round_end(round: u32) -> Bytes {
    Bytes::copy_from_slice(&run_header(Kind::RoundEnd, round, 0, 0, false).encode())
}

const _: () = assert!(MAX_TABLE_BYTES + BLOCK_BYTES < u32::MAX as usize);
