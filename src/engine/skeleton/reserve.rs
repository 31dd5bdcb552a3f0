//! A PID that is taken, and the little program that makes its process a skeleton.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};

use super::{Skeleton, SkeletonError, kill_and_reap};
use crate::engine::inject::{AREA_BYTES, CodeRoom, Injector, StoppedThread, io, sys};
use crate::engine::memory::{Memory, PAGE_BYTES};
use crate::engine::remote::{InjectError, Tid};
use crate::engine::sys::ptrace::{self, Stop};
use crate::engine::sys::{blob, clone};
use crate::engine::undertaker::Undertaker;
use crate::proto::image::Layout;

/// A PID that is ours: a child that waits for its program.
#[derive(Debug)]
pub struct ReservedPid {
    pid: Tid,
    go: Option<OwnedFd>,
    exe: File,
    /// Our end of the channel over which descriptors go in.
    channel: OwnedFd,
    channel_in_process: i32,
    highest_fd: u32,
    done: bool,
}

/// How long a child may take to close what it has of ours, in ms: microseconds on a processor, which it may wait for.
const START: u16 = 20_000;
/// Lanes for this many threads at the same time.
const LANES: u64 = 64;
/// Lowest address that the stub may have: above any mmap_min_addr.
const LOWEST: u64 = 0x11_0000;
const HIGHEST: u64 = 0x7000_0000_0000;
/// End of user space with four-level page tables.
pub(super) const TASK_END: u64 = 0x7fff_ffff_f000;

const CODE_BYTES: u64 = {
    let wanted = 512 + LANES * blob::lane::BYTES as u64;
    wanted.next_multiple_of(PAGE_BYTES)
};
pub(super) const STUB_BYTES: u64 = CODE_BYTES + AREA_BYTES as u64;

impl ReservedPid {
    /// Takes the PID: a child of ours that waits. Must be called on the thread that will drive the skeleton.
    ///
    /// # Errors
    /// See [`SkeletonError`].
    pub fn take(pid: Tid) -> Result<Self, SkeletonError> {
        let own = |what| move |errno| SkeletonError::Own { what, errno };
        let (wait, go) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(own("a pipe"))?;
        let (ours, theirs) = nix::sys::socket::socketpair(
            nix::sys::socket::AddressFamily::Unix,
            nix::sys::socket::SockType::SeqPacket,
            None,
            nix::sys::socket::SockFlag::SOCK_CLOEXEC,
        )
        .map_err(own("a socket pair"))?;
        let exe = nix::sys::memfd::memfd_create(c"migrate-skeleton", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)
            .map_err(own("a memory file"))?;
        // The skeleton opens files at descriptor 0: its channel must be above.
        let theirs = if theirs.as_raw_fd() < 3 {
            let low = theirs;
            nix::fcntl::fcntl(&low, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(3))
                .map(crate::engine::sys::owned_fd)
                .map_err(own("a descriptor"))?
        } else {
            theirs
        };
        clone::spawn_with_pid(pid, exe.as_fd(), wait.as_fd(), theirs.as_fd()).map_err(
            |errno| match errno {
                Errno::EEXIST => SkeletonError::PidInUse(pid),
                errno => SkeletonError::Clone { pid, errno },
            },
        )?;
        let channel_in_process = theirs.as_raw_fd();
        drop(theirs);
        let reserved = Self {
            pid,
            go: Some(go),
            exe: File::from(exe),
            channel: ours,
            channel_in_process,
            highest_fd: 0,
            done: false,
        };
        // What it has of ours would stay open as long as it is held: not before it has closed that.
        reserved.wait_until_told()?;
        // Held and bound to our life from then on: whoever looks at it sees that it does not run.
        let options = libc::PTRACE_O_EXITKILL | libc::PTRACE_O_TRACEEXEC;
        ptrace::seize(pid, options).map_err(|e| sys("seizing the skeleton", pid, e))?;
        ptrace::interrupt(pid).map_err(|e| sys("stopping the skeleton", pid, e))?;
        reserved.wait_for(|stop| matches!(stop, Stop::Event(_)))?;
        Ok(reserved)
    }

    /// The process will have descriptors up to about this number.
    #[must_use]
    pub fn expect_descriptors(mut self, highest_fd: u32) -> Self {
        self.highest_fd = highest_fd;
        self
    }

    /// Makes it a skeleton with nothing mapped but our code, at a place that `layout` leaves free. Must be
    /// called on the thread that will drive the skeleton.
    ///
    /// # Errors
    /// See [`SkeletonError`]; the child is then killed.
    pub fn execute(mut self, layout: &Layout) -> Result<Skeleton, SkeletonError> {
        let pid = self.pid;
        let base = hole(layout).ok_or(SkeletonError::NoHole(pid))?;
        let elf = stub_elf(base);
        self.exe.write_all_at(&elf, 0).map_err(|e| io("writing the stub", pid, &e))?;
        if let Some(go) = self.go.take() {
            File::from(go).write_all(&[1]).map_err(|e| io("starting the skeleton", pid, &e))?;
        }
        ptrace::cont(pid, 0).map_err(|e| sys("starting the skeleton", pid, e))?;
        self.wait_for(|stop| matches!(stop, Stop::Other(libc::PTRACE_EVENT_EXEC)))?;
        let mem = File::options()
            .read(true)
            .write(true)
            .open(format!("/proc/{pid}/mem"))
            .map_err(|e| io("opening its memory", pid, &e))?;
        // The first instruction is a breakpoint: by then what execve returns has been written to its
        // register.
        mem.write_all_at(&[0xcc], base).map_err(|e| io("writing the stub's entry", pid, &e))?;
        ptrace::cont(pid, 0).map_err(|e| sys("starting the stub", pid, e))?;
        self.wait_for(|stop| stop == Stop::Signal(libc::SIGTRAP))?;
        ptrace::set_options(pid, libc::PTRACE_O_EXITKILL).map_err(|e| sys("binding the skeleton", pid, e))?;
        let memory = Memory::open(pid)?;
        let room = CodeRoom { start: base, len: usize::try_from(CODE_BYTES).unwrap_or(0) };
        let mut injector = Injector::place(pid, mem, room, libc::SIGWINCH)?;
        injector.use_area(base + CODE_BYTES);
        let leader = StoppedThread::take(pid)?;
        self.done = true;
        let channel = self
            .channel
            .try_clone()
            .map_err(|_| SkeletonError::Own { what: "a descriptor", errno: Errno::EMFILE })?;
        let undertaker = Undertaker::start(pid).map_err(|e| io("starting a thread for", pid, &e))?;
        let mut skeleton = Skeleton {
            pid,
            base,
            injector,
            threads: vec![leader],
            memory,
            layout: Layout::default(),
            objects: Default::default(),
            channel,
            channel_in_process: self.channel_in_process,
            fence: None,
            over: false,
            _undertaker: undertaker,
        };
        skeleton.clear()?;
        skeleton.make_room(self.highest_fd)?;
        Ok(skeleton)
    }

    fn wait_until_told(&self) -> Result<(), SkeletonError> {
        let mut told = [PollFd::new(self.channel.as_fd(), PollFlags::POLLIN)];
        let ready = poll(&mut told, PollTimeout::from(START))
            .map_err(|e| sys("waiting for the skeleton", self.pid, e))?;
        let mut byte = [0];
        match recv(self.channel.as_raw_fd(), &mut byte, MsgFlags::MSG_DONTWAIT) {
            Ok(1) if ready == 1 => Ok(()),
            _ => Err(InjectError::Gone(self.pid).into()),
        }
    }

    fn wait_for(&self, wanted: impl Fn(Stop) -> bool) -> Result<(), SkeletonError> {
        let (stop, status) =
            ptrace::wait(self.pid).map_err(|e| sys("waiting for the skeleton", self.pid, e))?;
        match stop {
            Stop::Gone => Err(InjectError::Gone(self.pid).into()),
            stop if wanted(stop) => Ok(()),
            _ => Err(InjectError::UnexpectedStop { tid: self.pid, status }.into()),
        }
    }
}

impl Drop for ReservedPid {
    fn drop(&mut self) {
        if !self.done {
            kill_and_reap(self.pid, &[]);
        }
    }
}

/// A place for the stub that no mapping of the source touches, as low as possible: new mappings of the
/// source, which come while it runs, are put elsewhere by the kernel.
fn hole(layout: &Layout) -> Option<u64> {
    let mut at = LOWEST;
    for vma in &layout.vmas {
        if vma.start >= at + STUB_BYTES + PAGE_BYTES {
            break;
        }
        at = at.max(vma.end + PAGE_BYTES);
    }
    (at + STUB_BYTES < HIGHEST).then_some(at)
}

/// An ELF file with one segment and nothing in it, room for code and area. Anonymous memory: a mapping of
/// the file itself would hinder the change of the exe link (EBUSY).
fn stub_elf(base: u64) -> Vec<u8> {
    let page = PAGE_BYTES;
    let mut f = Vec::new();
    let (u16s, u32s, u64s) = (u16::to_le_bytes, u32::to_le_bytes, u64::to_le_bytes);
    f.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    f.extend_from_slice(&u16s(2)); // ET_EXEC
    f.extend_from_slice(&u16s(62)); // EM_X86_64
    f.extend_from_slice(&u32s(1));
    f.extend_from_slice(&u64s(base));
    f.extend_from_slice(&u64s(64)); // program headers
    f.extend_from_slice(&u64s(0));
    f.extend_from_slice(&u32s(0));
    for half in [64u16, 56, 1, 64, 0, 0] {
        f.extend_from_slice(&u16s(half));
    }
    f.extend_from_slice(&u32s(1)); // PT_LOAD
    f.extend_from_slice(&u32s(7)); // R+W+X
    for v in [0, base, base, 0, STUB_BYTES, page] {
        f.extend_from_slice(&u64s(v));
    }
    f
}
