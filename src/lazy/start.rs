//! The beginning: a userfaultfd in the stopped process, its mappings registered.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Condvar, Mutex};

use super::book::Book;
use super::state::{ObjectFile, Space, State};
use super::table::{Registered, Table};
use super::{Ask, Lazy, LazyError, Shared, look};
use crate::engine::extents::Extents;
use crate::engine::memory::PAGE_BYTES;
use crate::engine::remote::{Batch, RemoteCalls, Tid};
use crate::engine::sys::{pidfd, uffd};
use crate::proto::image::Layout;

const FEATURES: u64 = uffd::FEATURE_EVENT_FORK
    | uffd::FEATURE_EVENT_REMAP
    | uffd::FEATURE_EVENT_REMOVE
    | uffd::FEATURE_EVENT_UNMAP
    | uffd::FEATURE_MISSING_SHMEM
    | uffd::FEATURE_MISSING_HUGETLBFS
    | uffd::FEATURE_THREAD_ID;

impl Lazy {
    /// Watches the stopped process for the pages in `missing` (source addresses of `layout`, the map that
    /// it has now), which must not be there. `ask` is called with what its faults need; each page once.
    ///
    /// # Errors
    /// See [`LazyError`]; the process is then as before.
    pub fn start(
        process: &mut dyn RemoteCalls,
        layout: &Layout,
        missing: &Extents,
        ask: Ask,
    ) -> Result<Self, LazyError> {
        let pid = process.pid();
        let sys = |step| move |errno| LazyError::Sys { step, pid, errno };
        let (table, registered) = Table::new(layout, missing)?;
        let uffd = make(process)?;
        uffd::api(uffd.as_fd(), FEATURES).map_err(sys("setting up a userfaultfd"))?;
        for Registered { start, end, .. } in &registered {
            uffd::register_missing(uffd.as_fd(), *start, end - start)
                .map_err(|errno| LazyError::Register { start: *start, end: *end, errno })?;
        }
        let objects = objects(pid, &registered)?;
        let book = Book::new(layout, missing)?;
        let mut spaces = BTreeMap::new();
        spaces.insert(0, Space { uffd, pid: Some(pid) });
        Ok(Self::over(State::new(table, spaces, objects, pid, book)?, ask))
    }

    /// [`Lazy::read`] does the rest.
    pub(super) fn over(state: State, ask: Ask) -> Self {
        let epoll = state.epoll.clone();
        Self { shared: Shared { state: Mutex::new(state), changed: Condvar::new(), epoll, ask } }
    }
}

/// A userfaultfd of the process, in our hands only.
fn make(process: &mut dyn RemoteCalls) -> Result<OwnedFd, LazyError> {
    let pid = process.pid();
    let mut batch = Batch::new();
    batch.call(libc::SYS_userfaultfd, &[(libc::O_CLOEXEC | libc::O_NONBLOCK).into()]);
    let theirs = process.run_all_ok("making a userfaultfd", &batch)?.ret(0).unwrap_or(u64::MAX);
    let ours = pidfd::PidFd::open(pid.unsigned_abs())
        .and_then(|p| pidfd::take_fd(p.as_fd(), i32::try_from(theirs).unwrap_or(-1)));
    let mut close = Batch::new();
    close.call(libc::SYS_close, &[theirs.into()]);
    process.run_all_ok("closing the userfaultfd", &close)?;
    ours.map_err(|errno| LazyError::Sys { step: "taking over a userfaultfd", pid, errno })
}

/// The shared objects behind the registered mappings, as they are here.
fn objects(pid: Tid, registered: &[Registered]) -> Result<BTreeMap<usize, ObjectFile>, LazyError> {
    let mut objects = BTreeMap::new();
    let mut maps = Vec::new();
    for r in registered {
        let Some(index) = r.object else { continue };
        if objects.contains_key(&index) {
            continue;
        }
        let gone = |source| LazyError::Object { start: r.start, source };
        if maps.is_empty() {
            maps = look::maps(pid).map_err(|()| gone(std::io::ErrorKind::NotFound.into()))?;
        }
        let mapping = maps.iter().find(|m| m.start <= r.start && r.start + PAGE_BYTES <= m.end);
        let mapping = mapping.ok_or_else(|| gone(std::io::ErrorKind::NotFound.into()))?;
        let file = look::object(pid, mapping).map_err(gone)?;
        objects.insert(index, ObjectFile { file, dev: mapping.dev, inode: mapping.inode });
    }
    Ok(objects)
}
