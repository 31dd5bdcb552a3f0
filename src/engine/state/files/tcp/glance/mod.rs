//! One glance at all TCP connections of a process.
//!
//! To read a connection through `TCP_REPAIR` takes some twenty calls, and a server has connections by the thousand, most
//! of which have nothing in their queues. Of these the kernel's own structures say all that the calls would say: a
//! program (a BPF iterator) goes through the files of the process and copies the few members that count. Where they are
//! in the structures of this very kernel, its description of itself tells (BTF).
//!
//! What is said of a connection here is what `TCP_REPAIR` would say, to the byte. Of whatever is not plain and quiet
//! nothing is said, nor where the kernel has no such programs, or we may not load them: that is read as ever.
//!
//! Nothing is locked while members are copied. So those of a socket are copied twice: if both copies are the same, all
//! of them were so at one moment between the two, as sequence numbers do not come back.

mod layout;
mod program;
mod record;

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

use nix::errno::Errno;

use self::layout::{Layout, Layouts};
use self::record::{Named, Record};
use crate::engine::bpf::{KERNEL, LICENCE};
use crate::engine::lock::Own;
use crate::engine::remote::Tid;
use crate::engine::sys::bpf::{self, Array};
use crate::engine::sys::pidfd;
use crate::proto::files::TcpConnection;

/// The kernel gives no more at a time.
const PIECE_BYTES: usize = 32 << 10;
/// Of a million sockets.
const MOST_BYTES: usize = 1 << 30;

/// Why nothing can be seen at a glance.
#[derive(Debug, thiserror::Error)]
pub(in super::super) enum GlanceError {
    /// The kernel refused.
    #[error("{step}")]
    Sys {
        /// What was being done.
        step: &'static str,
        /// The kernel's answer.
        #[source]
        errno: Errno,
    },
    /// The kernel's description of itself cannot be read.
    #[error("reading {KERNEL}")]
    Kernel(#[source] std::io::Error),
    /// The kernel is too old, or too new.
    #[error("the kernel is not one that we know")]
    Unknown,
    /// The pass over the files broke off.
    #[error("looking at the files of the process")]
    Read(#[source] std::io::Error),
}

fn step(step: &'static str) -> impl Fn(Errno) -> GlanceError {
    move |errno| GlanceError::Sys { step, errno }
}

/// The layouts stay the same as long as the kernel runs.
fn layouts() -> Result<&'static Layouts, GlanceError> {
    static LAYOUT: OnceLock<Option<Layouts>> = OnceLock::new();
    if let Some(layouts) = LAYOUT.get() {
        return layouts.as_ref().ok_or(GlanceError::Unknown);
    }
    let btf = std::fs::read(KERNEL).map_err(GlanceError::Kernel)?;
    LAYOUT.get_or_init(|| Layouts::of(&btf)).as_ref().ok_or(GlanceError::Unknown)
}

/// Ready to look at a process.
#[derive(Debug)]
pub(in super::super) struct Glance {
    layouts: &'static Layouts,
    connections: OwnedFd,
    names: OwnedFd,
}

impl Glance {
    /// Makes ready, which takes milliseconds, and longer the first time.
    ///
    /// # Errors
    /// If the kernel cannot do it, or we may not.
    pub(in super::super) fn prepare(pid: Tid) -> Result<Self, GlanceError> {
        let layouts = layouts()?;
        let process = pidfd::PidFd::open(pid.unsigned_abs()).map_err(step("opening a pidfd"))?;
        let ready = |layout: &Layout, instructions: &dyn Fn(&Layout, i32) -> Option<Vec<u8>>| {
            let bytes = u32::try_from(layout.bytes).map_err(|_| GlanceError::Unknown)?;
            let record = Array::create(bytes, 1).map_err(step("making an array for a BPF program"))?;
            let instructions = instructions(layout, record.number()).ok_or(GlanceError::Unknown)?;
            let program = bpf::load_iterator(&instructions, LICENCE, layout.function)
                .map_err(step("loading a BPF program"))?;
            bpf::iterate_over(program.as_fd(), process.as_fd())
                .map_err(step("pointing a BPF program at a process"))
        };
        Ok(Self {
            layouts,
            connections: ready(&layouts.connections, &program::instructions)?,
            names: ready(&layouts.names, &program::instructions_for_names)?,
        })
    }

    /// Looks at its TCP sockets. The process may run, or stand still.
    ///
    /// # Errors
    /// If the kernel breaks off.
    pub(in super::super) fn look(&self) -> Result<Seen, GlanceError> {
        let bytes = pass(self.connections.as_fd())?;
        Seen::of(bytes, &self.layouts.connections).ok_or(GlanceError::Unknown)
    }

    /// Names all its sockets, and where those of TCP end. What it says is exact once the process stands still.
    ///
    /// # Errors
    /// If the kernel breaks off.
    pub(in super::super) fn own(&self) -> Result<Own, GlanceError> {
        let (bytes, layout) = (pass(self.names.as_fd())?, &self.layouts.names);
        let mut own = Own { is_all: bytes.len().is_multiple_of(layout.bytes), ..Own::default() };
        for bytes in bytes.chunks_exact(layout.bytes) {
            let record = Record { layout, bytes };
            own.inodes.insert(record.inode());
            match record.named() {
                Named::Nothing => {}
                Named::Connection(connection) => own.connections.push(connection),
                Named::More => own.is_all = false,
            }
        }
        // Several descriptors may lead to one.
        own.connections.sort_unstable();
        own.connections.dedup();
        Ok(own)
    }
}

/// All that a program says, one call after the other.
fn pass(link: BorrowedFd<'_>) -> Result<Vec<u8>, GlanceError> {
    let mut pass = File::from(bpf::iterator(link).map_err(step("beginning a pass of a BPF program"))?);
    let mut bytes = Vec::with_capacity(PIECE_BYTES);
    let mut piece = vec![0; PIECE_BYTES];
    while bytes.len() < MOST_BYTES {
        let len = pass.read(&mut piece).map_err(GlanceError::Read)?;
        if len == 0 {
            return Ok(bytes);
        }
        bytes.extend_from_slice(piece.get(..len).unwrap_or_default());
    }
    Err(GlanceError::Unknown)
}

/// What was seen of the TCP sockets of a process.
///
/// One is meant by the number of a descriptor and its inode: what only stands for the path of a socket (`O_PATH`) has
/// the inode, too.
#[derive(Debug)]
pub(in super::super) struct Seen {
    layout: &'static Layout,
    bytes: Vec<u8>,
    /// Ascending: the numbers of descriptors, and where their records begin.
    places: Vec<(u64, usize)>,
}

impl Seen {
    fn of(bytes: Vec<u8>, layout: &'static Layout) -> Option<Self> {
        if !bytes.len().is_multiple_of(layout.bytes) {
            return None;
        }
        let places = bytes.chunks_exact(layout.bytes).enumerate();
        let mut places: Vec<_> =
            places.map(|(place, bytes)| (Record { layout, bytes }.number(), place * layout.bytes)).collect();
        places.sort_unstable();
        Some(Self { layout, bytes, places })
    }

    fn record(&self, number: i32, inode: u64) -> Option<Record<'_>> {
        let number = u64::try_from(number).ok()?;
        let at = self.places.binary_search_by_key(&number, |(number, _)| *number).ok()?;
        let place = self.places.get(at)?.1;
        let bytes = self.bytes.get(place..place.checked_add(self.layout.bytes)?)?;
        Some(Record { layout: self.layout, bytes }).filter(|record| record.inode() == inode)
    }

    /// Whether this socket is a connection that is quiet.
    pub(in super::super) fn is_quiet(&self, number: i32, inode: u64) -> bool {
        self.record(number, inode).is_some_and(|record| record.is_quiet())
    }

    /// The flags of its description (`F_GETFL`), where it is a TCP socket.
    pub(in super::super) fn flags(&self, number: i32, inode: u64) -> Option<i32> {
        Some(self.record(number, inode)?.flags())
    }

    /// The signal that it sends instead of `SIGIO`, where it is a TCP socket that sends it to nobody.
    pub(in super::super) fn signal_for_nobody(&self, number: i32, inode: u64) -> Option<u32> {
        self.record(number, inode)?.signal_for_nobody()
    }

    /// A connection that is quiet, without its options; `None` for any other socket.
    pub(in super::super) fn quiet(&self, number: i32, inode: u64) -> Option<TcpConnection> {
        self.record(number, inode)?.quiet()
    }

    /// All connections that are quiet, without their options, and their inodes.
    pub(in super::super) fn all_quiet(&self) -> impl Iterator<Item = (u64, TcpConnection)> {
        let records = self.bytes.chunks_exact(self.layout.bytes);
        let records = records.map(|bytes| Record { layout: self.layout, bytes });
        records.filter_map(|record| Some((record.inode(), record.quiet()?)))
    }
}
