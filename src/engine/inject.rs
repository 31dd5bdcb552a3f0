//! Runs a [`Batch`] in stopped threads: the code, where it lives, and how a thread finds back alone.
//!
//! The code (`sys::blob`) is a loop over a table of calls. It ends by ringing a *doorbell*: a signal to
//! itself whose default is to be ignored. A live tracer sees the thread stop there, reads the results and
//! puts the registers back. If the tracer was killed in between, nobody hears the bell, and the code goes
//! on to undo everything by itself: it unmaps the area, restores mask, flags and registers from the
//! thread's *lane*, and jumps back to where the thread was. So a `kill -9` of our process at any instant
//! leaves the target as it was.
//!
//! A process that has handlers for all signals that could ring (Go's runtime has) gets [`SILENT`], which is no
//! signal: ringing does nothing. Its threads stop at each system call instead, until it is the one that
//! would ring. That costs two stops for each call of a batch.
//!
//! Two rules follow:
//!
//! - foreign registers are only ever set in stops that are not a SIGTRAP (its signal would be delivered
//!   when the tracer dies): no single steps, no breakpoints at the source;
//! - set registers first and the mask second, and restore in the reverse order: a thread with its own
//!   registers and our mask would run on deaf.
//!
//! At the source the code and the lanes live in the unused tail of the vdso's last page, which is there
//! before any system call has run; table and data live in an anonymous mapping that the first injected
//! call makes and the last one removes. At the destination both have a place of their own in the
//! skeleton.

use std::fs::File;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;

use super::regs;
use super::remote::{Arg, Batch, InjectError, Outcome, SCRATCH_BYTES, Tid};
use super::sys::blob::{self, lane};
use super::sys::ptrace::{self, Regs, Stop};
use super::sys::vm::{self, RemoteRange};

const ENTRY_BYTES: usize = 64;
/// First page of the area: the number of threads that are under way, for the way back.
const HEADER_BYTES: usize = 4096;
const TABLE_BYTES: usize = 64 * 1024;
/// Size of the area: header, tables, data.
pub(super) const AREA_BYTES: usize = HEADER_BYTES + TABLE_BYTES + SCRATCH_BYTES;
const WORK_BYTES: usize = TABLE_BYTES + SCRATCH_BYTES;

/// Signals that a process without a handler for them ignores: one of them is the doorbell.
const DOORBELLS: [i32; 3] = [libc::SIGWINCH, libc::SIGURG, libc::SIGCHLD];

/// The doorbell that nobody hears: sending signal 0 only checks whether the receiver is there (kill(2)).
pub const SILENT: i32 = 0;

/// Bit of a signal in a kernel sigset; none for [`SILENT`].
pub(super) fn signal_bit(signal: i32) -> u64 {
    1u64.checked_shl(signal.unsigned_abs().wrapping_sub(1)).unwrap_or(0)
}

/// A thread that waits, stopped, with its registers and mask of before any injection.
#[derive(Debug, Clone)]
pub struct StoppedThread {
    pub tid: Tid,
    pub regs: Regs,
    pub mask: u64,
    /// Whether it has our registers now.
    foreign: bool,
}

impl StoppedThread {
    /// Takes down what a stopped thread must get back.
    pub fn take(tid: Tid) -> Result<Self, InjectError> {
        let step = |step| move |errno| sys(step, tid, errno);
        Ok(Self {
            tid,
            regs: ptrace::regs(tid).map_err(step("reading the registers"))?,
            mask: ptrace::sigmask(tid).map_err(step("reading the signal mask"))?,
            foreign: false,
        })
    }

    /// Gives the thread its own mask and registers back; it stays stopped.
    pub fn put_back(&mut self) -> Result<(), InjectError> {
        if self.foreign {
            ptrace::set_sigmask(self.tid, self.mask).map_err(|e| sys("restoring the mask", self.tid, e))?;
            ptrace::set_regs(self.tid, &self.regs).map_err(|e| sys("restoring registers", self.tid, e))?;
            self.foreign = false;
        }
        Ok(())
    }
}

pub(super) fn sys(step: &'static str, tid: Tid, errno: Errno) -> InjectError {
    if errno == Errno::ESRCH { InjectError::Gone(tid) } else { InjectError::Sys { step, tid, errno } }
}

/// The code and its places in one process.
#[derive(Debug)]
pub struct Injector {
    pid: Tid,
    mem: File,
    code: u64,
    lanes: u64,
    lane_count: usize,
    area: u64,
    signal: i32,
    /// SIGSTOP came while threads ran injected code: to be passed on when they are let go.
    pub stop_seen: bool,
}

/// Where the code and the lanes may be written.
#[derive(Debug, Clone, Copy)]
pub struct CodeRoom {
    pub start: u64,
    pub len: usize,
}

impl Injector {
    /// Writes code and lanes to `room`; the area is made by [`Injector::boot`].
    pub fn place(pid: Tid, mem: File, room: CodeRoom, signal: i32) -> Result<Self, InjectError> {
        let code = blob::blob().code;
        let lanes = (room.start + code.len() as u64).next_multiple_of(16);
        let left = (room.start + room.len as u64).saturating_sub(lanes);
        let lane_count = usize::try_from(left).unwrap_or(0) / lane::BYTES;
        // One for the thread that stays parked in the code, one at least for another.
        if lane_count < 2 {
            return Err(InjectError::NoRoom { tid: pid, why: "the tail of its vdso is too small" });
        }
        mem.write_all_at(code, room.start).map_err(|e| io("writing the injected code", pid, &e))?;
        Ok(Self { pid, mem, code: room.start, lanes, lane_count, area: 0, signal, stop_seen: false })
    }

    /// How many threads can run batches at the same time.
    pub fn lane_count(&self) -> usize {
        self.lane_count
    }

    /// The process.
    pub(super) fn pid(&self) -> Tid {
        self.pid
    }

    /// Address of the area, 0 while there is none.
    pub fn area(&self) -> u64 {
        self.area
    }

    /// Uses an area that exists already.
    pub fn use_area(&mut self, area: u64) {
        self.area = area;
    }

    /// The doorbell from now on: a signal that is neither pending nor handled.
    pub fn set_signal(&mut self, signal: i32) {
        self.signal = signal;
    }

    /// Maps the area by one call of `thread`, which stays parked in our code afterwards.
    pub fn boot(&mut self, thread: &mut StoppedThread) -> Result<(), InjectError> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let args =
            [0, AREA_BYTES as u64, u64::from(protection.unsigned_abs()), u64::from(flags.unsigned_abs())];
        let returned = self.one_call(thread, libc::SYS_mmap, args)?;
        if (-4095..0).contains(&returned) {
            thread.put_back()?;
            let errno = Errno::from_raw(i32::try_from(-returned).unwrap_or(0));
            return Err(InjectError::Call { what: "mapping room for calls".into(), tid: self.pid, errno });
        }
        self.area = regs::unsigned(returned);
        // From here the thread must leave by the counted way: an empty table parks it there.
        let mut nothing = Batch::new();
        nothing.call(libc::SYS_getpid, &[]);
        self.run(thread, &nothing)?;
        Ok(())
    }

    /// Unmaps the area by a call of `thread` and gives the thread its registers back.
    pub fn shut(&mut self, thread: &mut StoppedThread) -> Result<(), InjectError> {
        if self.area != 0 {
            let args = [self.area, AREA_BYTES as u64, 0, 0];
            let returned = self.one_call(thread, libc::SYS_munmap, args)?;
            if returned != 0 {
                tracing::warn!(pid = self.pid, returned, "could not unmap the room for injected calls");
            }
            self.area = 0;
        }
        thread.put_back()
    }

    /// One call with its arguments in registers: needs no memory but the code.
    pub fn one_call(
        &mut self,
        thread: &mut StoppedThread,
        number: i64,
        args: [u64; 4],
    ) -> Result<i64, InjectError> {
        let tid = thread.tid;
        let rang_at = self.start_one(thread, number, args)?;
        self.wait_for_bell(tid, rang_at)?;
        let after = ptrace::regs(tid).map_err(|e| sys("reading the registers", tid, e))?;
        Ok(regs::signed(after.rbx))
    }

    /// Starts what [`Injector::one_call`] runs and does not wait; where the thread will ring.
    pub(super) fn start_one(
        &self,
        thread: &mut StoppedThread,
        number: i64,
        args: [u64; 4],
    ) -> Result<u64, InjectError> {
        let lane = self.write_lane(0, thread)?;
        let mut r = thread.regs;
        r.rip = self.code;
        r.rax = regs::unsigned(number);
        [r.rdi, r.rsi, r.rdx, r.r10] = args;
        r.r8 = u64::MAX; // no descriptor
        r.r9 = 0;
        r.r15 = lane;
        self.launch(thread, &r)?;
        Ok(self.code + blob::blob().boot_rang)
    }

    /// Writes bytes where the next batch will have its table; their address.
    pub(super) fn write_scratch(&self, bytes: &[u8]) -> Result<u64, InjectError> {
        let at = self.area + HEADER_BYTES as u64;
        self.write_area(at, bytes)?;
        Ok(at)
    }

    /// Runs `batch` in one thread, in as few stops as its size allows.
    pub fn run(&mut self, thread: &mut StoppedThread, batch: &Batch) -> Result<Outcome, InjectError> {
        self.run_in_lane(0, thread, batch, 1)
    }

    fn run_in_lane(
        &mut self,
        lane: usize,
        thread: &mut StoppedThread,
        batch: &Batch,
        under_way: usize,
    ) -> Result<Outcome, InjectError> {
        let room = WORK_BYTES.checked_sub(batch.data.len()).map_or(0, |left| left / ENTRY_BYTES);
        if room == 0 {
            return Err(InjectError::NoRoom { tid: self.pid, why: "too much data for one batch" });
        }
        let mut outcome = Outcome { returned: Vec::with_capacity(batch.len()), data: batch.data.clone() };
        for calls in batch.calls.chunks(room) {
            let data = std::mem::take(&mut outcome.data);
            let part = Batch { calls: calls.to_vec(), data, pointers: batch.pointers.clone() };
            self.write_under_way(under_way)?;
            let slice = self.start(lane, 0, thread, &part)?;
            self.wait_for_bell(thread.tid, self.code + blob::blob().loop_rang)?;
            let done = self.collect(slice, &part)?;
            outcome.returned.extend(done.returned);
            outcome.data = done.data;
        }
        Ok(outcome)
    }

    /// Runs one batch in each of these threads, as many at the same time as there are lanes. `parked` is
    /// how many other threads already wait in our code.
    pub fn run_many(
        &mut self,
        work: &mut [(&mut StoppedThread, &Batch)],
        parked: usize,
    ) -> Result<Vec<Outcome>, InjectError> {
        let first_lane = usize::from(parked > 0);
        let wave = self.lane_count - first_lane;
        let mut outcomes = Vec::with_capacity(work.len());
        for group in work.chunks_mut(wave) {
            let slice_bytes = (WORK_BYTES / group.len()) & !63;
            let fits = |b: &Batch| b.data.len() + b.calls.len() * ENTRY_BYTES <= slice_bytes;
            if !group.iter().all(|(_, b)| fits(b)) {
                for (thread, batch) in group.iter_mut() {
                    outcomes.push(self.run_in_lane(first_lane, thread, batch, parked + 1)?);
                    thread.put_back()?;
                    self.write_under_way(parked)?;
                }
                continue;
            }
            // The count follows each thread closely, so that if we die in between, the last of those that
            // are really under way unmaps the area; too high leaves it behind, too low is never safe.
            let mut slices = Vec::with_capacity(group.len());
            for (i, (thread, batch)) in group.iter_mut().enumerate() {
                self.write_under_way(parked + i + 1)?;
                slices.push(self.start(first_lane + i, i * slice_bytes, thread, batch)?);
            }
            for ((thread, batch), slice) in group.iter_mut().zip(slices) {
                self.wait_for_bell(thread.tid, self.code + blob::blob().loop_rang)?;
                outcomes.push(self.collect(slice, batch)?);
            }
            for (i, (thread, _)) in group.iter_mut().enumerate().rev() {
                thread.put_back()?;
                self.write_under_way(parked + i)?;
            }
        }
        Ok(outcomes)
    }

    /// Writes table and data of `batch` and lets the thread run it; returns where they are.
    fn start(
        &mut self,
        lane: usize,
        slice_at: usize,
        thread: &mut StoppedThread,
        batch: &Batch,
    ) -> Result<u64, InjectError> {
        let table = self.area + (HEADER_BYTES + slice_at) as u64;
        let data = table + (batch.len() * ENTRY_BYTES) as u64;
        let mut bytes = Vec::with_capacity(batch.len() * ENTRY_BYTES + batch.data.len());
        for call in &batch.calls {
            bytes.extend_from_slice(&call.number.to_ne_bytes());
            for arg in call.args {
                let value = match arg {
                    Arg::Value(v) => v,
                    Arg::Data(offset) => data + offset as u64,
                };
                bytes.extend_from_slice(&value.to_ne_bytes());
            }
            bytes.extend_from_slice(&[0; 8]);
        }
        bytes.extend_from_slice(&batch.data_at(data));
        self.write_area(table, &bytes)?;
        let lane = self.write_lane(lane, thread)?;
        let mut r = thread.regs;
        r.rip = self.code + blob::blob().table_loop;
        r.rbx = table;
        r.r12 = batch.len() as u64;
        r.r14 = self.area;
        r.r15 = lane;
        self.launch(thread, &r)?;
        Ok(table)
    }

    fn collect(&self, table: u64, batch: &Batch) -> Result<Outcome, InjectError> {
        let table_bytes = batch.len() * ENTRY_BYTES;
        let mut bytes = vec![0u8; table_bytes + batch.data.len()];
        let range = RemoteRange { start: table, len: bytes.len() };
        match vm::read(self.pid, &mut bytes, &[range]) {
            Ok(n) if n == bytes.len() => {}
            Ok(_) => return Err(sys("reading results", self.pid, Errno::EFAULT)),
            Err(errno) => return Err(sys("reading results", self.pid, errno)),
        }
        let returned = bytes[..table_bytes]
            .chunks_exact(ENTRY_BYTES)
            .map(|entry| i64::from_ne_bytes(entry[56..].try_into().unwrap_or_default()))
            .collect();
        bytes.drain(..table_bytes);
        Ok(Outcome { returned, data: bytes })
    }

    fn launch(&self, thread: &mut StoppedThread, r: &Regs) -> Result<(), InjectError> {
        let tid = thread.tid;
        let mut r = *r;
        r.orig_rax = u64::MAX; // not in a system call: nothing to restart
        // TF would stop it at each instruction.
        r.eflags &= !0x100;
        thread.foreign = true;
        ptrace::set_regs(tid, &r).map_err(|e| sys("setting registers", tid, e))?;
        ptrace::set_sigmask(tid, !signal_bit(self.signal)).map_err(|e| sys("blocking signals", tid, e))?;
        self.go_on(tid).map_err(|e| sys("starting injected calls", tid, e))
    }

    fn go_on(&self, tid: Tid) -> Result<(), Errno> {
        if self.signal == SILENT { ptrace::cont_to_call(tid) } else { ptrace::cont(tid, 0) }
    }

    /// Waits until the thread has rung; other stops on the way are taken note of and passed over.
    fn wait_for_bell(&mut self, tid: Tid, at: u64) -> Result<(), InjectError> {
        let mut ringing = false;
        loop {
            let (stop, status) = ptrace::wait(tid).map_err(|e| sys("waiting", tid, e))?;
            match stop {
                Stop::Gone => return Err(InjectError::Gone(tid)),
                Stop::Signal(signal) => {
                    let r = ptrace::regs(tid).map_err(|e| sys("reading the registers", tid, e))?;
                    if r.rip == at {
                        return Ok(());
                    }
                    match signal {
                        libc::SIGSTOP => self.stop_seen = true,
                        s if s == self.signal => {}
                        _ => return Err(InjectError::UnexpectedStop { tid, status }),
                    }
                }
                Stop::Event(_) if ringing => return Ok(()),
                Stop::Event(_) => {}
                Stop::Call => {
                    let r = ptrace::regs(tid).map_err(|e| sys("reading the registers", tid, e))?;
                    if r.rip == at {
                        // In the entry of the call that rings. Registers may not be set here, where they
                        // would be those of a call to make; the next stop is after it.
                        ringing = true;
                        ptrace::interrupt(tid).map_err(|e| sys("interrupting", tid, e))?;
                        ptrace::cont(tid, 0).map_err(|e| sys("going on", tid, e))?;
                        continue;
                    }
                }
                Stop::Other(_) => return Err(InjectError::UnexpectedStop { tid, status }),
            }
            self.go_on(tid).map_err(|e| sys("going on", tid, e))?;
        }
    }

    /// What the thread needs to find back by itself.
    fn write_lane(&self, index: usize, thread: &StoppedThread) -> Result<u64, InjectError> {
        let address = self.lanes + (index * lane::BYTES) as u64;
        let r = regs::self_restarting(&thread.regs);
        let mut bytes = [0u8; lane::BYTES];
        let mut put = |at: usize, value: u64| bytes[at..at + 8].copy_from_slice(&value.to_ne_bytes());
        put(lane::MASK, thread.mask);
        put(lane::FLAGS, r.eflags);
        for (i, v) in [r.rax, r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9, r.rcx, r.r11, r.rbx, r.r12]
            .into_iter()
            .enumerate()
        {
            put(lane::REGS + i * 8, v);
        }
        put(lane::RSP, r.rsp);
        put(lane::RIP, r.rip);
        put(lane::R14, r.r14);
        put(lane::R15, r.r15);
        put(lane::TGID, u64::from(self.pid.unsigned_abs()));
        put(lane::TID, u64::from(thread.tid.unsigned_abs()));
        put(lane::AREA_BYTES, AREA_BYTES as u64);
        put(lane::STUB_ADDRESS, address + lane::STUB as u64);
        put(lane::SIGNAL, u64::from(self.signal.unsigned_abs()));
        bytes[lane::STUB..lane::STUB + lane::STUB_CODE.len()].copy_from_slice(&lane::STUB_CODE);
        self.mem.write_all_at(&bytes, address).map_err(|e| io("writing a lane", self.pid, &e))?;
        Ok(address)
    }

    fn write_under_way(&self, threads: usize) -> Result<(), InjectError> {
        self.write_area(self.area, &u32::try_from(threads).unwrap_or(u32::MAX).to_ne_bytes())
    }

    fn write_area(&self, at: u64, bytes: &[u8]) -> Result<(), InjectError> {
        match vm::write(self.pid, bytes, &[RemoteRange { start: at, len: bytes.len() }]) {
            Ok(n) if n == bytes.len() => Ok(()),
            Ok(_) => Err(sys("writing calls", self.pid, Errno::EFAULT)),
            Err(errno) => Err(sys("writing calls", self.pid, errno)),
        }
    }

    /// Puts zeroes where code and lanes were.
    pub fn erase(&self, room: CodeRoom) -> Result<(), InjectError> {
        let zeroes = vec![0u8; room.len];
        self.mem.write_all_at(&zeroes, room.start).map_err(|e| io("erasing injected code", self.pid, &e))
    }
}

pub(super) fn io(step: &'static str, tid: Tid, error: &std::io::Error) -> InjectError {
    let errno = error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
    // A dead process's memory file answers with nothing at all.
    if error.kind() == std::io::ErrorKind::WriteZero { InjectError::Gone(tid) } else { sys(step, tid, errno) }
}

/// A doorbell for a process with these caught and pending signals (kernel sigsets); [`SILENT`] if there is
/// none.
///
/// Whatever it is, the process must survive it if we die: it is ignored by default, or by the process
/// (`ignored`). Of the latter none that a fault of the CPU raises, and none whose sending has effects of
/// its own (SIGCONT and the stop signals take each other out of the queues).
pub fn choose_doorbell(caught: u64, ignored: u64, pending: u64) -> i32 {
    const PLAIN: [i32; 8] = [
        libc::SIGPIPE,
        libc::SIGHUP,
        libc::SIGUSR1,
        libc::SIGUSR2,
        libc::SIGIO,
        libc::SIGTERM,
        libc::SIGINT,
        libc::SIGQUIT,
    ];
    let by_itself = PLAIN.into_iter().filter(|s| ignored & signal_bit(*s) != 0);
    let mut all = DOORBELLS.into_iter().chain(by_itself);
    all.find(|s| (caught | pending) & signal_bit(*s) == 0).unwrap_or(SILENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_doorbell_is_neither_caught_nor_pending_and_harmless() {
        let all = DOORBELLS.iter().fold(0, |set, s| set | signal_bit(*s));
        assert_eq!(choose_doorbell(0, 0, 0), libc::SIGWINCH);
        assert_eq!(choose_doorbell(signal_bit(libc::SIGWINCH), 0, 0), libc::SIGURG);
        assert_eq!(choose_doorbell(0, 0, all), SILENT);
        let stops = signal_bit(libc::SIGTSTP) | signal_bit(libc::SIGCONT) | signal_bit(libc::SIGSEGV);
        assert_eq!(choose_doorbell(0, stops, all), SILENT);
        assert_eq!(choose_doorbell(all, signal_bit(libc::SIGPIPE) | stops, 0), libc::SIGPIPE);
    }
}
