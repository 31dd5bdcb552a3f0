//! Frames to a skeleton: the map reconciled, pages written where they belong, in the order they came.

use prost::Message as _;

use crate::engine::extents::Extents;
use crate::engine::memory::{MemoryError, PAGE_BYTES};
use crate::engine::remote::{Batch, InjectError, RemoteCalls};
use crate::engine::skeleton::{ReservedPid, Skeleton, SkeletonError};
use crate::engine::state::objects::{self, ObjectError, WINDOWS_START};
use crate::engine::sys::vm::RemoteRange;
use crate::pageserver::frame::{Frame, FrameError};
use crate::pageserver::runs;
use crate::pageserver::unpack::{Content, Unpacker};
use crate::proto::control::PageRuns;
use crate::proto::files::Ahead;
use crate::proto::image::{Layout, Process, VmaKind};

/// Why the skeleton could not be built up.
#[derive(Debug, thiserror::Error)]
pub enum AssembleError {
    /// A frame is not valid.
    #[error("unpacking a frame")]
    Frame(#[from] FrameError),
    /// A message in a frame is not valid.
    #[error("decoding the {what}")]
    Decode {
        /// Which.
        what: &'static str,
        /// Why.
        #[source]
        source: prost::DecodeError,
    },
    /// The map breaks a rule: see the text.
    #[error("the memory map is not valid: {0}")]
    Layout(&'static str),
    /// Pages came before a map.
    #[error("pages came before the memory map")]
    NoLayout,
    /// The skeleton could not be driven.
    #[error("building the skeleton")]
    Skeleton(#[from] SkeletonError),
    /// Pages could not be written.
    #[error("placing pages")]
    Memory(#[from] MemoryError),
    /// Pages of shared memory could not be placed or dropped.
    #[error("placing pages of shared memory")]
    Objects(#[from] ObjectError),
    /// Pages could not be dropped.
    #[error("dropping pages")]
    Drop(#[from] InjectError),
}

/// What a frame brought, for the caller to act upon.
#[derive(Debug)]
pub enum Applied {
    /// Pages or a map: done.
    Placed,
    /// The end of this round.
    RoundEnd(u32),
    /// The final state: everything is here.
    State(Box<Process>),
    /// Connections whose sockets can be made.
    Ahead(Ahead),
}

/// Mappings in a map, at most: twice the default of vm.max_map_count.
const MAX_VMAS: usize = 131_072;
/// Threads of a process, at most.
const MAX_THREADS: usize = 65_536;
static ZEROES: [u8; 64 * 1024] = [0; 64 * 1024];

/// A skeleton and what is needed to go on with it.
#[derive(Debug)]
pub struct Assembly {
    reserved: Option<ReservedPid>,
    skeleton: Option<Skeleton>,
    unpacker: Unpacker,
    /// Ranges to drop before the next page is placed.
    drops: Vec<(u64, u64)>,
    /// Pages that were announced, and have not come yet.
    missing: Extents,
}

impl Assembly {
    /// Starts from a reserved PID; the skeleton follows with the first map.
    pub fn new(reserved: ReservedPid) -> Self {
        Self {
            reserved: Some(reserved),
            skeleton: None,
            unpacker: Unpacker::default(),
            drops: Vec::new(),
            missing: Extents::new(),
        }
    }

    /// Whether pages are missing, as far as the source has told.
    pub(super) fn is_missing_any(&self) -> bool {
        !self.missing.is_empty()
    }

    /// The finished skeleton, and the pages that will come after the resume.
    ///
    /// # Errors
    /// If no map ever came.
    pub fn into_skeleton(self) -> Result<(Skeleton, Extents), AssembleError> {
        Ok((self.skeleton.ok_or(AssembleError::NoLayout)?, self.missing))
    }

    /// Does what a frame asks for.
    ///
    /// # Errors
    /// See [`AssembleError`]; the assembly is then of no use.
    pub fn apply(&mut self, frame: &Frame) -> Result<Applied, AssembleError> {
        let round = frame.round();
        match self.unpacker.unpack(frame)? {
            Content::Layout(bytes) => {
                let layout = Layout::decode(bytes)
                    .map_err(|source| AssembleError::Decode { what: "memory map", source })?;
                check(&layout)?;
                self.drop_pending()?;
                if let Some(reserved) = self.reserved.take() {
                    self.skeleton = Some(reserved.execute(&layout)?);
                }
                forget_unmapped(&mut self.missing, &layout);
                self.skeleton.as_mut().ok_or(AssembleError::NoLayout)?.reconcile(layout)?;
                Ok(Applied::Placed)
            }
            Content::Data(pages) => {
                if !self.drops.is_empty() {
                    let drops = std::mem::take(&mut self.drops);
                    drop_ranges(self.skeleton.as_mut().ok_or(AssembleError::NoLayout)?, &drops)?;
                }
                let skeleton = self.skeleton.as_ref().ok_or(AssembleError::NoLayout)?;
                let runs: Vec<RemoteRange> =
                    pages.runs().map(|(start, bytes)| RemoteRange { start, len: bytes.len() }).collect();
                // Ascending: what is of windows comes last.
                let mapped = runs.partition_point(|r| r.start < WINDOWS_START);
                if mapped > 0 {
                    skeleton.memory().write_runs(pages.bytes(), &runs[..mapped])?;
                }
                for (start, bytes) in pages.runs().skip(mapped) {
                    skeleton.objects().write(start, bytes)?;
                }
                if !self.missing.is_empty() {
                    runs.iter().for_each(|r| self.missing.remove(r.start, r.start + r.len as u64));
                }
                Ok(Applied::Placed)
            }
            Content::Zero { addr, pages, present } => {
                self.drop_pending()?;
                let skeleton = self.skeleton.as_mut().ok_or(AssembleError::NoLayout)?;
                let end = addr + u64::from(pages) * PAGE_BYTES;
                self.missing.remove(addr, end);
                if present {
                    let mut at = addr;
                    while at < end {
                        let len = usize::try_from(end - at).unwrap_or(ZEROES.len()).min(ZEROES.len());
                        if at >= WINDOWS_START {
                            skeleton.objects().write(at, &ZEROES[..len])?;
                        } else {
                            skeleton
                                .memory()
                                .write_runs(&ZEROES[..len], &[RemoteRange { start: at, len }])?;
                        }
                        at += len as u64;
                    }
                } else {
                    // Only read, never written: absent reads as zero just so.
                    drop_ranges(skeleton, &[(addr, end)])?;
                }
                Ok(Applied::Placed)
            }
            Content::Drop { addr, pages } => {
                let end = addr + u64::from(pages) * PAGE_BYTES;
                self.missing.remove(addr, end);
                self.drops.push((addr, end));
                Ok(Applied::Placed)
            }
            Content::Missing(bytes) => {
                let message = PageRuns::decode(bytes)
                    .map_err(|source| AssembleError::Decode { what: "list of missing pages", source })?;
                let first = self.missing.is_empty();
                for (start, end) in runs::decode(&message)?.iter() {
                    // What is here of them is stale, and must be gone before the process can see it.
                    self.drops.push((start, end));
                    self.missing.insert(start, end);
                }
                let skeleton = self.skeleton.as_mut().ok_or(AssembleError::NoLayout)?;
                // One more call would cost as much as the drops, in the freeze.
                if first {
                    forbid_huge_pages(skeleton)?;
                }
                self.drop_pending()?;
                Ok(Applied::Placed)
            }
            Content::Ahead(bytes) => Ahead::decode(bytes)
                .map(Applied::Ahead)
                .map_err(|source| AssembleError::Decode { what: "list of connections", source }),
            Content::RoundEnd => {
                self.drop_pending()?;
                Ok(Applied::RoundEnd(round))
            }
            Content::State(bytes) => {
                let process = Process::decode(bytes)
                    .map_err(|source| AssembleError::Decode { what: "process state", source })?;
                self.drop_pending()?;
                Ok(Applied::State(Box::new(process)))
            }
        }
    }

    fn drop_pending(&mut self) -> Result<(), AssembleError> {
        if self.drops.is_empty() {
            return Ok(());
        }
        let drops = std::mem::take(&mut self.drops);
        drop_ranges(self.skeleton.as_mut().ok_or(AssembleError::NoLayout)?, &drops)
    }
}

/// Pages of mappings that are gone, or start over, are nobody's.
fn forget_unmapped(missing: &mut Extents, layout: &Layout) {
    if missing.is_empty() {
        return;
    }
    let mut at = 0;
    for vma in &layout.vmas {
        missing.remove(at, vma.start);
        if vma.fresh {
            missing.remove(vma.start, vma.end);
        }
        at = vma.end;
    }
    missing.remove(at, u64::MAX);
}

/// No page is filled with zeros because one beside it is placed, as happens with large folios, or because the
/// kernel collects them to a huge one (khugepaged): what is missing must stay absent until a userfaultfd
/// watches it, where neither is done any more. The restore sets what the process itself wants.
fn forbid_huge_pages(skeleton: &mut Skeleton) -> Result<(), AssembleError> {
    let mut batch = Batch::new();
    batch.call(libc::SYS_prctl, &[libc::PR_SET_THP_DISABLE.into(), 1u64.into()]);
    skeleton.run_all_ok("switching transparent huge pages off", &batch)?;
    Ok(())
}

/// Makes ranges read as if they had never been written: zero, or the file again.
fn drop_ranges(skeleton: &mut Skeleton, ranges: &[(u64, u64)]) -> Result<(), AssembleError> {
    let mut batch = Batch::new();
    let vmas = &skeleton.layout().vmas;
    for &(start, end) in ranges {
        if start >= WINDOWS_START {
            skeleton.objects().punch(start, end)?;
            continue;
        }
        let first = vmas.partition_point(|v| v.end <= start);
        for vma in vmas.iter().skip(first).take_while(|v| v.start < end) {
            let (from, to) = (start.max(vma.start), end.min(vma.end));
            // In a shared object the page must go for everybody.
            let advice = match vma.kind() {
                VmaKind::VmaAnonShared | VmaKind::VmaMemfdShared | VmaKind::VmaSysv => libc::MADV_REMOVE,
                _ => libc::MADV_DONTNEED,
            };
            batch.call(libc::SYS_madvise, &[from.into(), (to - from).into(), advice.into()]);
        }
    }
    if !batch.is_empty() {
        skeleton.run_all_ok("dropping pages", &batch)?;
    }
    Ok(())
}

/// The rules that everything later relies on: sorted, disjoint, page-aligned, below the end of user space.
fn check(layout: &Layout) -> Result<(), AssembleError> {
    const TASK_END: u64 = 0x7fff_ffff_f000;
    if layout.vmas.len() > MAX_VMAS {
        return Err(AssembleError::Layout("too many mappings"));
    }
    if layout.tids.is_empty() || layout.tids.len() > MAX_THREADS {
        return Err(AssembleError::Layout("no threads, or too many"));
    }
    let mut at = 0;
    for vma in &layout.vmas {
        if vma.start < at || vma.end <= vma.start || vma.end > TASK_END {
            return Err(AssembleError::Layout("mappings overlap or leave user space"));
        }
        if vma.start % PAGE_BYTES != 0 || vma.end % PAGE_BYTES != 0 || vma.offset % PAGE_BYTES != 0 {
            return Err(AssembleError::Layout("a mapping is not page-aligned"));
        }
        if VmaKind::try_from(vma.kind).is_err() || vma.kind() == VmaKind::Invalid {
            return Err(AssembleError::Layout("a mapping of unknown kind"));
        }
        let file = vma.file.map(|i| (i as usize) < layout.files.len());
        let backed = matches!(vma.kind(), VmaKind::VmaFilePrivate | VmaKind::VmaFileShared);
        if file == Some(false) || backed != file.is_some() {
            return Err(AssembleError::Layout("a mapping without its file"));
        }
        if vma.offset.checked_add(vma.end - vma.start).is_none() {
            return Err(AssembleError::Layout("an offset without end"));
        }
        at = vma.end;
    }
    objects::check(layout).map_err(AssembleError::Layout)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::fs::File;
    use std::os::fd::AsFd;

    use bytes::Bytes;

    use super::*;
    use crate::engine::sys::pagemap;
    use crate::pageserver::frame;
    use crate::pageserver::pack::Compression;
    use crate::pageserver::pack::Packer;
    use crate::proto::image::Vma;

    const HUGE: u64 = 2 << 20;
    const START: u64 = 0x10_0000_0000;

    fn reserved() -> (u32, ReservedPid) {
        let reserve = |pid: u32| Some((pid, ReservedPid::take(pid.try_into().ok()?).ok()?));
        (20_000..30_000).find_map(reserve).unwrap()
    }

    #[test]
    fn there_is_room_for_descriptors_before_there_are_threads() {
        crate::engine::own_files::make_room();
        for (highest, least) in [(0, 64), (999, 1000), (u32::MAX, 64)] {
            let (pid, reserved) = reserved();
            let skeleton = reserved.expect_descriptors(highest).execute(&Layout::default()).unwrap();
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
            let size = status.lines().find_map(|line| line.strip_prefix("FDSize:")).unwrap();
            assert!(size.trim().parse::<u32>().unwrap() >= least, "{size}");
            // Only the channel is open.
            assert_eq!(std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count(), 1);
            drop(skeleton);
        }
    }

    /// Where the process has asked for huge pages, and where the kernel may give them to anybody.
    #[test]
    fn a_page_that_is_placed_brings_no_missing_one_with_it() {
        let (pid, reserved) = reserved();
        let mut vma = Vma {
            start: START,
            end: START + HUGE,
            prot: (libc::PROT_READ | libc::PROT_WRITE).unsigned_abs(),
            advice: vec![libc::MADV_HUGEPAGE.unsigned_abs()],
            ..Vma::default()
        };
        vma.set_kind(VmaKind::VmaAnonPrivate);
        let layout = Layout { vmas: vec![vma], tids: vec![pid], ..Layout::default() };
        let last = START + HUGE - PAGE_BYTES;
        let mut missing = Extents::new();
        missing.insert(START, last);
        let mut frames = vec![
            frame::layout(1, &layout.encode_to_vec()).unwrap(),
            frame::missing(1, &runs::encode(&missing).encode_to_vec()).unwrap(),
        ];
        let mut sink = |bytes: Bytes| {
            frames.push(bytes);
            Ok::<_, Infallible>(())
        };
        let mut packer = Packer::new(Compression::Off, true);
        packer.pack(1, &[last], &[7; 4096], &mut sink).unwrap();
        packer.flush(&mut sink).unwrap();

        let mut assembly = Assembly::new(reserved);
        for mut bytes in frames {
            while !bytes.is_empty() {
                assembly.apply(&Frame::decode(&mut bytes).unwrap()).unwrap();
            }
        }
        let (skeleton, missing) = assembly.into_skeleton().unwrap();
        assert_eq!(missing.total(), HUGE - PAGE_BYTES);
        let file = File::open(format!("/proc/{}/pagemap", skeleton.pid())).unwrap();
        let query = pagemap::Query { all: pagemap::PRESENT, report: pagemap::PRESENT, ..Default::default() };
        let mut found = [pagemap::PageRegion::default(); 8];
        let count = pagemap::scan(file.as_fd(), START, START + HUGE, query, &mut found).unwrap().0;
        let present: Vec<_> = found[..count].iter().map(|r| (r.start, r.end)).collect();
        assert_eq!(present, [(last, START + HUGE)]);
    }
}
