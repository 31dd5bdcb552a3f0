//! What happens to shared memory that no scan reports: where the process gives some up (MADV_REMOVE), a page
//! that it reads again is a new one, full of zeros; and where it maps some a second time (mremap with an old
//! size of 0, or MREMAP_DONTUNMAP), it can store through that mapping, and unmap it before it was ever looked at.
//!
//! Shared mappings are registered with a userfaultfd of their own, which tells of both (UFFD_EVENT_REMOVE,
//! before it happens, and UFFD_EVENT_REMAP; userfaultfd(2)) and lets the thread wait until the message is read.
//! That is done by a thread of ours at once; if we die, the kernel lets all go on. Private mappings are not part
//! of this: there MADV_DONTNEED is frequent, and the page tables show what is gone.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::TrackError;
use crate::engine::extents::Extents;
use crate::engine::memory::PAGE_BYTES;
use crate::engine::state::objects::by_window;
use crate::engine::sys::uffd::{self, Message};
use crate::proto::image::{Layout, Vma, VmaKind};

/// Reads what the process tells. Dropping it ends that.
#[derive(Debug)]
pub(super) struct Removals {
    uffd: Arc<OwnedFd>,
    /// What was told since the last look. Held while a message is read: whoever has told of something and goes
    /// on, has it in here.
    told: Arc<Mutex<Told>>,
    stop: Arc<EventFd>,
    reader: Option<JoinHandle<()>>,
    /// Told by the look before the last one: the page may have been read before it was given up, or stored to
    /// since, through a mapping that no map has shown.
    before: Extents,
    /// What was given up since the beginning.
    pub(super) ever: Extents,
    /// Where objects were mapped at the last look.
    views: Vec<View>,
}

/// What the process has told.
#[derive(Debug, Default)]
struct Told {
    gone: Extents,
    /// Pages of mappings that were mapped a second time; or moved, and if they are still where they were
    /// (MREMAP_DONTUNMAP), that is the same.
    doubled: Extents,
    moved: Extents,
    /// Where they are now. The kernel keeps such a mapping registered, and its marks; but nobody has seen what it
    /// holds there.
    arrived: Extents,
}

/// What is to be sent again although no scan may report it.
#[derive(Debug)]
pub(super) struct Again {
    /// As addresses in all places where its object is mapped.
    pub(super) removed: Extents,
    /// Mappings that came to where they are, as far as is known of their addresses: to be taken for new.
    pub(super) arrived: Extents,
}

/// A place where a shared object is mapped.
#[derive(Debug, Clone, Copy)]
struct View {
    start: u64,
    end: u64,
    inode: u64,
    offset: u64,
}

impl View {
    fn of(vma: &Vma) -> Option<Self> {
        let Vma { start, end, shm_inode: inode, offset, .. } = *vma;
        is_shared(vma).then_some(Self { start, end, inode, offset })
    }
}

/// Whether what is given up in this mapping is given up for all: it belongs to this userfaultfd.
pub(super) fn is_shared(vma: &Vma) -> bool {
    by_window(vma) || vma.kind() == VmaKind::VmaAnonShared
}

impl Removals {
    pub(super) fn start(uffd: OwnedFd) -> Result<Self, TrackError> {
        let own = |errno: Errno| TrackError::Unsupported { what: "eventfd(2)", errno };
        let uffd = Arc::new(uffd);
        let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC).map_err(own)?);
        let told = Arc::new(Mutex::new(Told::default()));
        let work = {
            let (uffd, stop, told) = (uffd.clone(), stop.clone(), told.clone());
            move || read_all(&uffd, &stop, &told)
        };
        let reader = std::thread::Builder::new().name("removals".into()).spawn(work);
        let reader = reader.map_err(|source| TrackError::Open { path: "a thread".to_owned(), source })?;
        let (before, ever) = (Extents::new(), Extents::new());
        Ok(Self { uffd, told, stop, reader: Some(reader), before, ever, views: Vec::new() })
    }

    pub(super) fn uffd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }

    /// To be called before a scan.
    pub(super) fn look(&mut self, layout: &Layout) -> Again {
        let Told { gone, mut doubled, moved, arrived } =
            std::mem::take(&mut *self.told.lock().unwrap_or_else(PoisonError::into_inner));
        let views: Vec<View> = layout.vmas.iter().filter_map(View::of).collect();
        let mut everywhere = Extents::new();
        for (start, end) in gone.iter() {
            // Where it was told may be mapped no more, or be another object by now.
            for from in self.views.iter().chain(&views) {
                let (start, end) = (start.max(from.start), end.min(from.end));
                if start < end {
                    let (first, last) =
                        (from.offset + (start - from.start), from.offset + (end - from.start));
                    insert_views(&views, from.inode, first, last, &mut everywhere);
                }
            }
        }
        everywhere.iter().for_each(|(start, end)| self.ever.insert(start, end));
        for (start, end) in moved.iter() {
            let at = |v: &&View| start < v.end && v.start < end;
            let was = self.views.iter().find(at).map(|v| v.inode);
            if views.iter().find(at).is_some_and(|v| Some(v.inode) == was) {
                doubled.insert(start, end);
            }
        }
        for (start, end) in doubled.iter() {
            for from in self.views.iter().chain(&views).filter(|v| start < v.end && v.start < end) {
                insert_views(&views, from.inode, 0, u64::MAX, &mut everywhere);
            }
        }
        self.views = views;
        let mut removed = std::mem::replace(&mut self.before, everywhere.clone());
        everywhere.iter().for_each(|(start, end)| removed.insert(start, end));
        Again { removed, arrived }
    }
}

fn insert_views(views: &[View], inode: u64, first: u64, last: u64, into: &mut Extents) {
    for view in views.iter().filter(|v| v.inode == inode) {
        let (from, to) = (first.max(view.offset), last.min(view.offset + (view.end - view.start)));
        if from < to {
            into.insert(view.start + (from - view.offset), view.start + (to - view.offset));
        }
    }
}

impl Drop for Removals {
    fn drop(&mut self) {
        if let Some(reader) = self.reader.take() {
            if let Err(errno) = self.stop.write(1) {
                tracing::error!(%errno, "stopping the reader of removals");
            } else if reader.join().is_err() {
                tracing::error!("the reader of removals has panicked");
            }
        }
    }
}

fn read_all(uffd: &OwnedFd, stop: &EventFd, told: &Mutex<Told>) {
    loop {
        let mut ready =
            [PollFd::new(uffd.as_fd(), PollFlags::POLLIN), PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
        match poll(&mut ready, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return tracing::error!(%errno, "waiting for removals"),
        }
        if ready[1].any() == Some(true) {
            return;
        }
        let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match uffd::read_message(uffd.as_fd()) {
                Ok(Message::Remove { start, end }) => {
                    told.gone.insert(start & !(PAGE_BYTES - 1), end.next_multiple_of(PAGE_BYTES));
                }
                Ok(Message::Remap { from, to, len }) => {
                    told.arrived.insert(to, to.saturating_add(len.max(PAGE_BYTES)));
                    let list = if len == 0 { &mut told.doubled } else { &mut told.moved };
                    list.insert(from, from + PAGE_BYTES);
                }
                Ok(other) => tracing::debug!(?other, "not a removal"),
                Err(Errno::EAGAIN) => break,
                Err(errno) => return tracing::error!(%errno, "reading removals"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(start: u64, pages: u64, inode: u64, page: u64) -> View {
        View { start, end: start + pages * 4096, inode, offset: page * 4096 }
    }

    #[test]
    fn a_page_is_gone_wherever_its_object_is_mapped() {
        let views = [view(0x10000, 4, 7, 0), view(0x20000, 4, 7, 2), view(0x30000, 4, 8, 0)];
        let mut into = Extents::new();
        insert_views(&views, 7, 3 * 4096, 5 * 4096, &mut into);
        let found: Vec<_> = into.iter().collect();
        assert_eq!(found, [(0x13000, 0x14000), (0x21000, 0x23000)]);
    }
}
