//! The book of a migration: all that is needed to go on with its missing pages when whoever served them
//! has died.
//!
//! A file in memory that others hold as well. First what was at the beginning (the layout, the missing
//! pages), then the changes of the table, in order. An event is written down right after it was read, under
//! the lock of the table; around the read a mark is set, because the thread behind an event goes on as soon
//! as it is read: a book with the mark may lack an event, and is of no use.
//!
//! Pages are written down after they were placed. So a book may say that pages are missing which are
//! there; that is harmless, since the kernel places no page twice.

use std::fs::File;
use std::os::unix::fs::FileExt;

use nix::sys::memfd::{MFdFlags, memfd_create};
use prost::Message;

use super::table::MmId;
use crate::engine::extents::Extents;
use crate::proto::image::Layout;

const MAGIC: u64 = 0x6b6f_6f62_0000_0001;
/// The head has a page of its own. An entry fits into one, so that none is ever written by half.
const HEAD_BYTES: u64 = 4096;
const ENTRY_BYTES: usize = 64;
const READING_AT: u64 = 8;
/// Entries that are read at once.
const PIECE_BYTES: usize = 1024 * ENTRY_BYTES;
/// Longest layout, and most runs of missing pages, that are read back.
const MAX_LAYOUT_BYTES: u64 = 256 << 20;
const MAX_RUNS: u64 = 1 << 26;

/// A change of the table, see its methods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the fields are the arguments of the table's methods")]
pub enum Op {
    /// Pages are in place: by source address of an mm, or by offset of an object.
    Installed { object: Option<usize>, mm: MmId, at: u64, len: u64 },
    /// A child was born.
    Fork { parent: MmId },
    /// A mapping has moved.
    Remap { mm: MmId, from: u64, to: u64, len: u64, echo: bool },
    /// All that was to be told has been.
    Quiet { mm: MmId },
    /// A new mapping of an object.
    Learn { mm: MmId, start: u64, end: u64, object: usize, offset: u64, places: bool },
    /// Contents were given up.
    Remove { mm: MmId, start: u64, end: u64, hole: bool },
    /// A mapping is gone, as an event says.
    Unmap { mm: MmId, start: u64, end: u64 },
    /// A mapping is gone, as the kernel says.
    Vanished { mm: MmId, start: u64, end: u64 },
    /// An mm is gone.
    Gone { mm: MmId },
}

/// Why a book cannot be written or used.
#[derive(Debug, thiserror::Error)]
pub enum BookError {
    /// A file operation failed.
    #[error("{step} the book of missing pages")]
    Io {
        /// What was being done.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// It is no book of ours, or damaged.
    #[error("the book of missing pages is not valid: {0}")]
    Malformed(&'static str),
    /// Whoever wrote it died while it read an event, which may be lost.
    #[error("the book of missing pages may lack an event")]
    Torn,
}

impl Op {
    fn encode(&self) -> [u8; ENTRY_BYTES] {
        let wide = |n: usize| n as u64;
        let words: [u64; 7] = match *self {
            Op::Installed { object, mm, at, len } => {
                [1, mm.into(), at, len, object.map_or(0, |o| wide(o) + 1), 0, 0]
            }
            Op::Fork { parent } => [2, parent.into(), 0, 0, 0, 0, 0],
            Op::Remap { mm, from, to, len, echo } => [3, mm.into(), from, to, len, echo.into(), 0],
            Op::Quiet { mm } => [4, mm.into(), 0, 0, 0, 0, 0],
            Op::Learn { mm, start, end, object, offset, places } => {
                [5, mm.into(), start, end, wide(object), offset, places.into()]
            }
            Op::Remove { mm, start, end, hole } => [6, mm.into(), start, end, hole.into(), 0, 0],
            Op::Unmap { mm, start, end } => [7, mm.into(), start, end, 0, 0, 0],
            Op::Vanished { mm, start, end } => [8, mm.into(), start, end, 0, 0, 0],
            Op::Gone { mm } => [9, mm.into(), 0, 0, 0, 0, 0],
        };
        let mut entry = [0; ENTRY_BYTES];
        for (into, word) in entry.chunks_exact_mut(8).zip(words) {
            into.copy_from_slice(&word.to_le_bytes());
        }
        entry
    }

    fn decode(entry: &[u8]) -> Option<Self> {
        let mut words = [0u64; 7];
        for (into, word) in words.iter_mut().zip(entry.chunks_exact(8)) {
            *into = u64::from_le_bytes(word.try_into().ok()?);
        }
        let [code, mm, a, b, c, d, e] = words;
        let mm = MmId::try_from(mm).ok()?;
        let index = |n: u64| usize::try_from(n).ok();
        // Ranges are added up when they are used.
        let range = a.checked_add(b).is_some();
        Some(match code {
            1 if range => {
                Op::Installed { object: c.checked_sub(1).map(index).unwrap_or_default(), mm, at: a, len: b }
            }
            2 => Op::Fork { parent: mm },
            3 => Op::Remap { mm, from: a, to: b, len: c, echo: d != 0 },
            4 => Op::Quiet { mm },
            5 if a < b => Op::Learn { mm, start: a, end: b, object: index(c)?, offset: d, places: e != 0 },
            6 => Op::Remove { mm, start: a, end: b, hole: c != 0 },
            7 => Op::Unmap { mm, start: a, end: b },
            8 => Op::Vanished { mm, start: a, end: b },
            9 => Op::Gone { mm },
            _ => return None,
        })
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Book {
    file: File,
    /// Where the next entry goes.
    end: u64,
    /// Something could not be written: the mark stays for ever.
    lost: bool,
}

impl Book {
    /// A new one.
    pub(super) fn new(layout: &Layout, missing: &Extents) -> Result<Self, BookError> {
        let io = |source| BookError::Io { step: "writing", source };
        let fd = memfd_create(c"migrate-book", MFdFlags::MFD_CLOEXEC)
            .map_err(|e| BookError::Io { step: "making", source: e.into() })?;
        let file = File::from(fd);
        let mut image = layout.encode_to_vec();
        let layout_bytes = image.len() as u64;
        let mut runs = 0u64;
        for (start, end) in missing.iter() {
            image.extend_from_slice(&start.to_le_bytes());
            image.extend_from_slice(&end.to_le_bytes());
            runs += 1;
        }
        let end = (HEAD_BYTES + image.len() as u64).next_multiple_of(HEAD_BYTES);
        file.set_len(end).map_err(io)?;
        file.write_all_at(&image, HEAD_BYTES).map_err(io)?;
        let mut head = [0u8; 32];
        for (into, word) in head.chunks_exact_mut(8).zip([MAGIC, 0, layout_bytes, runs]) {
            into.copy_from_slice(&word.to_le_bytes());
        }
        file.write_all_at(&head, 0).map_err(io)?;
        Ok(Self { file, end, lost: false })
    }

    /// Reads one: what was at the beginning, and each change since. It can be written on.
    pub(super) fn read(file: File, mut each: impl FnMut(Entry)) -> Result<Self, BookError> {
        let io = |source| BookError::Io { step: "reading", source };
        let size = file.metadata().map_err(io)?.len();
        let mut head = [0u8; 32];
        file.read_exact_at(&mut head, 0).map_err(io)?;
        let mut words = [0u64; 4];
        for (into, word) in words.iter_mut().zip(head.chunks_exact(8)) {
            *into = u64::from_le_bytes(word.try_into().unwrap_or_default());
        }
        let [magic, reading, layout_bytes, runs] = words;
        if magic != MAGIC || layout_bytes > MAX_LAYOUT_BYTES || runs > MAX_RUNS {
            return Err(BookError::Malformed("its head"));
        }
        if reading != 0 {
            return Err(BookError::Torn);
        }
        let begin = (HEAD_BYTES + layout_bytes + runs * 16).next_multiple_of(HEAD_BYTES);
        if size < begin {
            return Err(BookError::Malformed("its length"));
        }
        let mut image = vec![0; usize::try_from(layout_bytes + runs * 16).unwrap_or(0)];
        file.read_exact_at(&mut image, HEAD_BYTES).map_err(io)?;
        let (layout, runs) = image.split_at(usize::try_from(layout_bytes).unwrap_or(0));
        let layout = Layout::decode(layout).map_err(|_| BookError::Malformed("its layout"))?;
        let mut missing = Extents::new();
        for run in runs.chunks_exact(16) {
            let (start, end) = run.split_at(8);
            let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap_or_default());
            missing.insert(word(start), word(end));
        }
        each(Entry::Begin(layout, missing));
        let mut end = begin;
        let mut piece = vec![0; PIECE_BYTES];
        while size - end >= ENTRY_BYTES as u64 {
            let len = usize::try_from(size - end).unwrap_or(PIECE_BYTES).min(PIECE_BYTES);
            let whole = len - len % ENTRY_BYTES;
            let part = piece.get_mut(..whole).unwrap_or_default();
            file.read_exact_at(part, end).map_err(io)?;
            for entry in part.chunks_exact(ENTRY_BYTES) {
                each(Entry::Op(Op::decode(entry).ok_or(BookError::Malformed("an entry"))?));
            }
            end += whole as u64;
        }
        Ok(Self { file, end, lost: false })
    }

    /// A message is about to be read, or (`false`) all that followed from it is written down.
    pub(super) fn reading(&mut self, reading: bool) -> Result<(), BookError> {
        let mark = u64::from(reading || self.lost);
        self.file.write_all_at(&mark.to_le_bytes(), READING_AT).map_err(|source| {
            self.lost = true;
            BookError::Io { step: "marking", source }
        })
    }

    /// Writes changes down.
    pub(super) fn append(&mut self, ops: &[Op]) -> Result<(), BookError> {
        if ops.is_empty() || self.lost {
            return Ok(());
        }
        let bytes: Vec<u8> = ops.iter().flat_map(Op::encode).collect();
        if let Err(source) = self.file.write_all_at(&bytes, self.end) {
            self.lost = true;
            self.reading(true)?;
            return Err(BookError::Io { step: "writing", source });
        }
        self.end += bytes.len() as u64;
        Ok(())
    }

    /// The file, for others to hold.
    pub(super) fn file(&self) -> &File {
        &self.file
    }
}

/// What a book tells.
#[derive(Debug)]
pub(super) enum Entry {
    /// How it began: the layout and the missing pages.
    Begin(Layout, Extents),
    /// A change.
    Op(Op),
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(file: File) -> Result<(Extents, Vec<Op>), BookError> {
        let (mut begin, mut ops) = (None, Vec::new());
        Book::read(file, |entry| match entry {
            Entry::Begin(_, missing) => begin = Some(missing),
            Entry::Op(op) => ops.push(op),
        })?;
        Ok((begin.unwrap(), ops))
    }

    fn all() -> Vec<Op> {
        vec![
            Op::Installed { object: None, mm: 3, at: 0x1000, len: 0x2000 },
            Op::Installed { object: Some(0), mm: 0, at: 0x1000, len: 0x2000 },
            Op::Fork { parent: 1 },
            Op::Remap { mm: 1, from: 1, to: 2, len: 3, echo: true },
            Op::Quiet { mm: 7 },
            Op::Learn { mm: 1, start: 2, end: 3, object: 4, offset: 5, places: true },
            Op::Remove { mm: 1, start: 2, end: 3, hole: true },
            Op::Unmap { mm: 1, start: 2, end: 3 },
            Op::Vanished { mm: 1, start: 2, end: 3 },
            Op::Gone { mm: 1 },
        ]
    }

    #[test]
    fn what_is_written_is_read() {
        let mut missing = Extents::new();
        missing.insert(0x1000, 0x9000);
        let mut book = Book::new(&Layout::default(), &missing).unwrap();
        let mut ops = Vec::new();
        for _ in 0..200 {
            book.append(&all()).unwrap();
            ops.extend(all());
        }
        let (begin, got) = read(book.file().try_clone().unwrap()).unwrap();
        assert_eq!(begin.iter().collect::<Vec<_>>(), [(0x1000, 0x9000)]);
        assert_eq!(got, ops);
        // Half of an entry is none.
        book.file().write_all_at(&[1; 30], book.end).unwrap();
        assert_eq!(read(book.file().try_clone().unwrap()).unwrap().1, ops);
        book.reading(true).unwrap();
        assert!(matches!(read(book.file().try_clone().unwrap()), Err(BookError::Torn)));
    }

    proptest! {
        #[test]
        fn never_panics(at in 0u64..8192, bytes in proptest::collection::vec(any::<u8>(), 1..200)) {
            let mut missing = Extents::new();
            missing.insert(0x1000, 0x9000);
            let mut book = Book::new(&Layout::default(), &missing).unwrap();
            book.append(&all()).unwrap();
            book.file().write_all_at(&bytes, at).unwrap();
            let _ = read(book.file().try_clone().unwrap());
        }
    }
}
