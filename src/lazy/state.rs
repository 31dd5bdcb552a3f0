//! What is known and held under the lock: the table, the userfaultfds, and what a message does to them.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::LazyError;
use super::book::Book;
use super::huge::Assembler;
use super::keep::{Held, Keeper};
use super::look::{self, Advice, Advising};
use super::stats::Stats;
use super::table::{Fault, MmId, Place, Table, Wake};
use crate::engine::memory::PAGE_BYTES;
use crate::engine::remote::Tid;
use crate::engine::sys::uffd::{self, Message};
use crate::report::Histogram;

/// An address space that is served.
#[derive(Debug)]
pub(super) struct Space {
    pub(super) uffd: OwnedFd,
    /// A process or thread that has it, once it is known.
    pub(super) pid: Option<Tid>,
}

/// A shared object, as it is here.
#[derive(Debug)]
pub(super) struct ObjectFile {
    pub(super) file: File,
    pub(super) dev: (u32, u32),
    pub(super) inode: u64,
}

/// See the module.
#[derive(Debug)]
pub(super) struct State {
    /// Has all userfaultfds.
    pub(super) epoll: Arc<Epoll>,
    pub(super) table: Table,
    pub(super) spaces: BTreeMap<MmId, Space>,
    pub(super) objects: BTreeMap<usize, ObjectFile>,
    pub(super) huge: Assembler,
    pub(super) stats: Stats,
    /// From a fault's message to its page.
    pub(super) waits: Arc<Histogram>,
    /// Faults that wait for an answer: since when, by source address.
    pub(super) waiting: BTreeMap<u64, Instant>,
    /// Who cannot be answered before an event is read. Woken earlier, they would fault again, and faults
    /// are read before events.
    pub(super) later: Vec<Wake>,
    pub(super) book: Book,
    /// Who holds all this as well, in case we die.
    pub(super) keeper: Option<Box<dyn Keeper>>,
    /// It was taken over: pages may be there that nobody wrote down.
    pub(super) again: bool,
    pub(super) pid: Tid,
    /// Why the last message could not be read: told once.
    unreadable: Option<Errno>,
    /// At so many mms those that are gone are looked for.
    sweep_at: usize,
}

/// What is left after reading.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pumped {
    /// Whatever comes is announced.
    Settled,
    /// There is something that cannot be read yet: a thread is about to tell of a change.
    Unsettled,
}

/// Messages that are acted upon before others get their turn.
const MOST_MESSAGES: usize = 16;
/// An address to ask the kernel about when what matters is whether it answers.
const ANYWHERE: u64 = 1 << 20;
/// Below this many mms nobody looks for those that are gone.
const FIRST_SWEEP: usize = 64;

impl State {
    pub(super) fn new(
        table: Table,
        spaces: BTreeMap<MmId, Space>,
        objects: BTreeMap<usize, ObjectFile>,
        pid: Tid,
        book: Book,
    ) -> Result<Self, LazyError> {
        let sys = |step| move |errno| LazyError::Sys { step, pid, errno };
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(sys("making an epoll"))?;
        for (mm, space) in &spaces {
            epoll
                .add(&space.uffd, EpollEvent::new(EpollFlags::EPOLLIN, (*mm).into()))
                .map_err(sys("watching a userfaultfd"))?;
        }
        Ok(Self {
            epoll: Arc::new(epoll),
            unreadable: None,
            table,
            spaces,
            objects,
            huge: Assembler::default(),
            stats: Stats::default(),
            waits: Arc::default(),
            waiting: BTreeMap::new(),
            later: Vec::new(),
            book,
            keeper: None,
            again: false,
            pid,
            sweep_at: FIRST_SWEEP,
        })
    }

    /// Reads what an mm has to say and acts upon it. `asks` grows by the pages that are needed.
    pub(super) fn pump(&mut self, mm: MmId, asks: &mut Vec<u64>) -> Pumped {
        for _ in 0..MOST_MESSAGES {
            let Some(space) = self.spaces.get(&mm) else { return Pumped::Settled };
            // Which thread gives shared memory up, and how, can only be seen while it waits for us.
            let advising = if !self.objects.is_empty() && self.table.shares(mm, 0, u64::MAX) {
                if !look::has_message(space.uffd.as_fd()) {
                    return self.settled();
                }
                if self.is_quiet(mm) {
                    // A fault that is there for more than a moment is read before any event that comes now.
                    if !(look::has_fault(space.uffd.as_fd()) && look::has_fault(space.uffd.as_fd())) {
                        return Pumped::Unsettled;
                    }
                    Vec::new()
                } else if look::waits_with_event(space.pid) {
                    // Whoever has told of an event before that thread waits now, too.
                    look::advising(space.pid)
                } else {
                    return Pumped::Unsettled;
                }
            } else {
                Vec::new()
            };
            if let Err(error) = self.book.reading(true) {
                tracing::error!(pid = self.pid, error = &error as &dyn std::error::Error, "a book is lost");
            }
            let message = uffd::read_message(space.uffd.as_fd());
            if matches!(message, Ok(Message::Fault { .. }) | Err(_)) {
                self.settle();
            }
            match message {
                Ok(message) => {
                    self.act(mm, message, &advising, asks);
                    self.settle();
                }
                Err(Errno::EAGAIN) => return self.settled(),
                Err(Errno::EINTR) => {}
                Err(errno) => {
                    if self.unreadable.replace(errno) != Some(errno) {
                        tracing::error!(pid = self.pid, %errno, "reading a userfaultfd");
                    }
                    // The thread behind the message goes on waiting.
                    return Pumped::Unsettled;
                }
            }
        }
        Pumped::Settled
    }

    /// There is nothing more to read: who had to wait for that looks again.
    pub(super) fn settled(&mut self) -> Pumped {
        std::mem::take(&mut self.later).into_iter().for_each(|wake| self.wake(wake));
        Pumped::Settled
    }

    /// Writes down what has changed. Before the lock is released.
    pub(super) fn write_down(&mut self) {
        let ops = self.table.take_ops();
        if let Err(error) = self.book.append(&ops) {
            // The mark stays, and nobody will go on by this book.
            tracing::error!(pid = self.pid, error = &error as &dyn std::error::Error, "a book is lost");
        }
    }

    /// What was read is acted upon and written down.
    pub(super) fn settle(&mut self) {
        self.write_down();
        if let Err(error) = self.book.reading(false) {
            tracing::error!(pid = self.pid, error = &error as &dyn std::error::Error, "a book is lost");
        }
    }

    fn act(&mut self, mm: MmId, message: Message, advising: &[Advising], asks: &mut Vec<u64>) {
        match message {
            Message::Fault { address, tid } => self.fault(mm, address, tid, asks),
            Message::Fork(uffd) => self.fork(mm, uffd),
            Message::Remap { from, to, len: 0 } => self.duplicate(mm, from, to),
            Message::Remap { from, to, len } => {
                for child in self.table.recent_children(mm) {
                    // It was born after the move: it has the mapping there, and no event of its own.
                    if !self.is_registered(child, from) && self.is_registered(child, to) {
                        self.table.remap(child, from, to, len, false);
                    }
                }
                self.table.remap(mm, from, to, len, true);
                self.wake(Wake { mm, address: from, len });
            }
            Message::Remove { start, end } => self.removed(mm, start, end, advising),
            Message::Unmap { start, end } => {
                self.table.unmap(mm, start, end);
                self.wake(Wake { mm, address: start, len: end - start });
            }
            Message::Other(event) => tracing::error!(pid = self.pid, event, "unknown userfaultfd event"),
        }
    }

    fn fault(&mut self, mm: MmId, address: u64, tid: u32, asks: &mut Vec<u64>) {
        self.stats.faults += 1;
        let tid = Tid::try_from(tid).ok().filter(|t| *t > 0);
        if let Some(space) = self.spaces.get_mut(&mm)
            && space.pid.is_none()
        {
            space.pid = tid;
        }
        match self.table.fault(mm, address) {
            Fault::Ask(source) => {
                self.stats.asked += 1;
                self.waiting.insert(source, Instant::now());
                asks.push(source);
            }
            // Another thread, or the same: a signal that is due makes a fault inside of a system call
            // come again and again.
            Fault::AlreadyAsked(_) => {}
            Fault::NotMissing { mm: by, address: at, page } => {
                self.fill_zero(by, at, page);
                if (by, at) != (mm, address & !(page - 1)) {
                    self.later.push(Wake { mm, address: address & !(page - 1), len: page });
                }
            }
            Fault::Unknown => self.unknown(mm, address & !(PAGE_BYTES - 1)),
        }
    }

    /// A fault where the table knows nothing: the mapping has grown, or shows an object anew. No event is
    /// ever lost, so private memory here has never been missing.
    fn unknown(&mut self, mm: MmId, address: u64) {
        let again = Wake { mm, address, len: PAGE_BYTES };
        if self.objects.is_empty() {
            return self.fill_zero(mm, address, PAGE_BYTES);
        }
        let Some(pid) = self.spaces.get(&mm).and_then(|s| s.pid) else {
            // Somebody else reads the memory of a child of which nobody knows the number: it has to wait
            // until the shared pages are in.
            if self.table.is_empty() {
                return self.fill_zero(mm, address, PAGE_BYTES);
            }
            return self.later.push(again);
        };
        match look::mapping(pid, address) {
            // It is gone, or the process is: whoever waits finds out.
            Err(()) | Ok(None) => self.later.push(again),
            Ok(Some(m)) if m.inode == 0 => self.fill_zero(mm, address, PAGE_BYTES),
            Ok(Some(m)) => {
                let object = self.objects.iter().find(|(_, o)| (o.dev, o.inode) == (m.dev, m.inode));
                match object.map(|(index, _)| *index) {
                    Some(object) => {
                        self.table.learn(mm, m.start, m.end, object, m.offset, m.shared);
                        self.wake(again);
                    }
                    // A private mapping of huge pages has an inode, too, of its own.
                    None if !m.shared => self.fill_zero(mm, address, PAGE_BYTES),
                    None => self.give_up(mm, "a fault in shared memory that was never registered"),
                }
            }
        }
    }

    /// mremap with an old length of 0: the object behind `from` is mapped at `to` as well.
    fn duplicate(&mut self, mm: MmId, from: u64, to: u64) {
        let pid = self.spaces.get(&mm).and_then(|s| s.pid);
        let here = pid.and_then(|pid| look::mapping(pid, to).ok()).flatten();
        if let (Some((object, offset, places)), Some(m)) = (self.table.shown(mm, from), here) {
            self.table.learn(mm, to, m.end, object, offset, places);
        }
        // Else a fault there finds it out.
    }

    fn fork(&mut self, parent: MmId, uffd: OwnedFd) {
        let Some(child) = self.table.fork(parent) else { return };
        if let Err(errno) = self.epoll.add(&uffd, EpollEvent::new(EpollFlags::EPOLLIN, child.into())) {
            tracing::error!(pid = self.pid, %errno, "watching the memory of a child");
            self.give_up(parent, "its child's memory cannot be watched");
        }
        self.keep(Held::Space(child), uffd.as_fd());
        self.spaces.insert(child, Space { uffd, pid: None });
        if self.spaces.len() >= self.sweep_at {
            self.sweep();
            self.sweep_at = (self.spaces.len() * 2).max(FIRST_SWEEP);
        }
    }

    fn keep(&mut self, what: Held, fd: std::os::fd::BorrowedFd<'_>) {
        if let Some(keeper) = &mut self.keeper
            && let Err(error) = keeper.keep(&[(what, fd)])
        {
            tracing::warn!(pid = self.pid, %error, "whoever held the missing pages for us is gone");
            self.keeper = None;
        }
    }

    /// Forgets children that have ended, of which no event tells.
    pub(super) fn sweep(&mut self) {
        let gone: Vec<MmId> = self
            .spaces
            .iter()
            .filter(|(_, s)| uffd::is_registered(s.uffd.as_fd(), ANYWHERE) == Err(Errno::ESRCH))
            .map(|(&mm, _)| mm)
            .collect();
        gone.into_iter().for_each(|mm| self.gone(mm));
    }

    /// MADV_DONTNEED, MADV_FREE and MADV_REMOVE look the same in the message, and only the last empties
    /// shared memory. The thread was waiting in its call when `advising` was looked up.
    fn removed(&mut self, mm: MmId, start: u64, end: u64, advising: &[Advising]) {
        let mut wakes = self.table.remove(mm, start, end, false);
        if self.table.shares(mm, start, end) {
            let mut advice = Advising::judge(advising, start, end);
            if advice == Advice::Unknown {
                let pid = self.spaces.get(&mm).and_then(|s| s.pid);
                advice = Advising::judge(&look::advising(pid), start, end);
            }
            if advice == Advice::Unknown {
                advice = Advising::judge(&look::advising(None), start, end);
            }
            match advice {
                Advice::Known(holes) => {
                    for (start, end) in holes {
                        wakes.extend(self.table.remove(mm, start, end, true));
                    }
                }
                Advice::Unknown => self.give_up(mm, "shared memory was given up in an unknown way"),
            }
        }
        self.wake(Wake { mm, address: start, len: end - start });
        wakes.into_iter().for_each(|wake| self.wake(wake));
    }

    fn is_registered(&self, mm: MmId, address: u64) -> bool {
        self.spaces.get(&mm).is_some_and(|s| uffd::is_registered(s.uffd.as_fd(), address) == Ok(true))
    }

    /// Whether no event of the mm is due.
    pub(super) fn is_quiet(&self, mm: MmId) -> bool {
        let asked = |s: &Space| uffd::is_registered(s.uffd.as_fd(), ANYWHERE);
        self.spaces.get(&mm).is_none_or(|s| asked(s) != Err(Errno::EAGAIN))
    }

    pub(super) fn wake(&self, wake: Wake) {
        if let Some(space) = self.spaces.get(&wake.mm)
            && wake.len > 0
            && let Err(errno) = uffd::wake(space.uffd.as_fd(), wake.address, wake.len)
        {
            tracing::error!(pid = self.pid, %errno, address = wake.address, "waking threads");
        }
    }

    /// The mm has ended.
    pub(super) fn gone(&mut self, mm: MmId) {
        self.table.gone(mm);
        if let Some(space) = self.spaces.remove(&mm) {
            self.forget(&space);
        }
        if let Some(keeper) = &mut self.keeper {
            keeper.release(Held::Space(mm));
        }
    }

    /// What would go on with wrong contents is ended: nothing may read zeros instead of what it wrote.
    fn give_up(&mut self, mm: MmId, why: &'static str) {
        let pid = self.spaces.get(&mm).and_then(|s| s.pid).unwrap_or(self.pid);
        tracing::error!(pid, why, "killed: its memory could not be kept right");
        if let Err(errno) = kill(Pid::from_raw(pid), Signal::SIGKILL) {
            tracing::error!(pid, %errno, "killing");
        }
    }

    /// Names of the pages to be asked for again.
    pub(super) fn asked(&self) -> Vec<u64> {
        let mut pages = Vec::new();
        for (start, end) in self.table.asked().iter() {
            let mut at = start;
            while at < end {
                pages.push(at);
                at += self.table.unit(at, end).0;
            }
        }
        pages
    }

    pub(super) fn stats(&self) -> Stats {
        let counts = self.table.counts();
        Stats {
            initial: counts.initial,
            inherited: counts.inherited,
            installed: counts.installed,
            dropped: counts.dropped,
            ..self.stats
        }
    }

    /// Closes all userfaultfds. If pages are missing, the process is killed before, and its children find
    /// an error (SIGBUS) where they would read zeros.
    pub(super) fn close(&mut self) {
        if !self.table.is_empty() {
            self.sweep();
            for step in self.table.plan(0, u64::MAX) {
                if let Place::Mapped { mm, address } = step.place {
                    self.poison(mm, address, step.len);
                }
                for wake in self.table.installed(&step, 0, step.len) {
                    self.poison(wake.mm, wake.address, wake.len);
                }
            }
            if self.spaces.contains_key(&0) {
                self.give_up(0, "its pages are given up");
            }
        }
        self.let_go();
    }

    /// What is closed here may be open elsewhere, and would be reported as ready for ever.
    fn forget(&self, space: &Space) {
        if let Err(errno) = self.epoll.delete(&space.uffd) {
            tracing::error!(pid = self.pid, %errno, "forgetting a userfaultfd");
        }
    }

    /// Closes what we have of all this, whatever is missing.
    pub(super) fn let_go(&mut self) {
        for space in std::mem::take(&mut self.spaces).into_values() {
            self.forget(&space);
        }
        self.objects.clear();
        self.keeper = None;
    }

    fn poison(&self, mm: MmId, address: u64, len: u64) {
        if let Some(space) = self.spaces.get(&mm)
            && let Err(errno) = uffd::poison(space.uffd.as_fd(), address, len)
        {
            tracing::error!(pid = self.pid, %errno, address, "giving up missing pages");
        }
    }
}
