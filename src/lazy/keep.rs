//! Giving all that is needed to somebody who outlives us, and going on with it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use nix::sys::stat::{major, minor};

use super::book::{Book, BookError, Entry};
use super::state::{ObjectFile, Space, State};
use super::table::{MmId, Table, TableError};
use super::{Ask, Lazy, LazyError};
use crate::engine::remote::Tid;

/// What a descriptor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Held {
    /// The book.
    Book,
    /// The userfaultfd of an address space.
    Space(MmId),
    /// A shared object.
    Object(u32),
}

/// Who holds duplicates for us.
pub trait Keeper: Send + std::fmt::Debug {
    /// Takes duplicates of these. They are safe when this returns, even if we die right then.
    ///
    /// # Errors
    /// If they are not: the keeper is of no use any more.
    fn keep(&mut self, what: &[(Held, BorrowedFd<'_>)]) -> io::Result<()>;
    /// This one is needed no more.
    fn release(&mut self, what: Held);
}

/// What a keeper holds.
pub type Kept = Vec<(Held, OwnedFd)>;

/// From here on in the address space of a process a wake may be about anything.
const LOWEST: u64 = 1 << 16;
const HIGHEST: u64 = (1 << 47) - 4096;

impl Lazy {
    /// Gives duplicates of all that is held to a keeper, and from here on of whatever comes, too. An
    /// earlier one is given up.
    ///
    /// # Errors
    /// If the keeper does not take them; there is none then.
    pub fn entrust(&self, mut keeper: Box<dyn Keeper>) -> io::Result<()> {
        let mut state = self.shared.lock();
        state.keeper = None;
        let spaces = state.spaces.iter().map(|(&mm, s)| (Held::Space(mm), s.uffd.as_fd()));
        let objects = state
            .objects
            .iter()
            .filter_map(|(&index, o)| Some((Held::Object(u32::try_from(index).ok()?), o.file.as_fd())));
        let book = (Held::Book, state.book.file().as_fd());
        let all: Vec<_> = std::iter::once(book).chain(spaces).chain(objects).collect();
        keeper.keep(&all)?;
        state.keeper = Some(keeper);
        Ok(())
    }

    /// Whether somebody holds all this as well, as far as is known.
    pub fn is_entrusted(&self) -> bool {
        self.shared.lock().keeper.is_some()
    }

    /// Goes on with what `keeper` held, and still holds, when another [`Lazy`] for this process died. What
    /// that one was asked for is asked for again.
    ///
    /// # Errors
    /// If something is lacking: the process and its children cannot be kept right then, and must be killed
    /// before the descriptors are closed.
    pub fn take_over(
        pid: Tid,
        kept: &[(Held, OwnedFd)],
        keeper: Box<dyn Keeper>,
        ask: Ask,
    ) -> Result<Self, LazyError> {
        let sys = |step| move |errno| LazyError::Sys { step, pid, errno };
        let io = |step| move |source| LazyError::from(BookError::Io { step, source });
        let find = |what| kept.iter().find(|(held, _)| *held == what).map(|(_, fd)| fd);
        let copy = |what| {
            let fd = find(what).ok_or(LazyError::NotKept)?;
            fd.try_clone().map_err(io("taking over what was kept with"))
        };
        let mut begun: Result<Option<Table>, TableError> = Ok(None);
        let book = Book::read(File::from(copy(Held::Book)?), |entry| match (entry, &mut begun) {
            (Entry::Begin(layout, missing), _) => {
                begun = Table::new(&layout, &missing).map(|(table, _)| Some(table));
            }
            (Entry::Op(op), Ok(Some(table))) => table.apply(&op),
            (Entry::Op(_), _) => {}
        })?;
        let table = begun?.ok_or(LazyError::NotKept)?;
        let mut spaces = BTreeMap::new();
        for mm in table.mms() {
            let of = (mm == 0).then_some(pid);
            spaces.insert(mm, Space { uffd: copy(Held::Space(mm))?, pid: of });
        }
        let mut objects = BTreeMap::new();
        for (held, _) in kept {
            let Held::Object(index) = *held else { continue };
            let file = File::from(copy(*held)?);
            let is = file.metadata().map_err(io("examining an object kept with"))?;
            let number = |n: u64| u32::try_from(n).unwrap_or(0);
            let dev = (number(major(is.dev())), number(minor(is.dev())));
            objects.insert(index as usize, ObjectFile { file, dev, inode: is.ino() });
        }
        let mut state = State::new(table, spaces, objects, pid, book)?;
        state.again = true;
        // Before a child may be born.
        state.keeper = Some(keeper);
        state.sweep();
        state.settle();
        // Threads whose faults were read by the dead one fault again.
        for space in state.spaces.values() {
            crate::engine::sys::uffd::wake(space.uffd.as_fd(), LOWEST, HIGHEST - LOWEST)
                .map_err(sys("waking whoever waits for pages"))?;
        }
        Ok(Self::over(state, ask))
    }

    /// Closes all that is held here, and ends nobody: to be called where another one holds it as well.
    pub fn abandon(&self) {
        self.shared.lock().let_go();
    }
}
