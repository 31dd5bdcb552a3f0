//! Descriptions into the process, at their numbers.
//!
//! The process starts with one descriptor, its end of a socketpair with us. Everything else arrives over
//! it (`SCM_RIGHTS`): the kernel puts what arrives at the lowest free numbers, so it is sent in ascending
//! order with placeholders in small gaps. What lies beyond a large gap arrives at the next numbers and is
//! moved, the highest first, so that no move covers what is still to be moved.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;

use super::build::{Built, finish};
use super::{RestoreFilesError, epoll, errno_of, tcp, unix};
use crate::engine::remote::{Arg, Batch, InjectError, RemoteCalls};
use crate::engine::sys::pidfd;
use crate::engine::sys::socket::{MAX_FDS_PER_MESSAGE, send_fds};
use crate::proto::files::description::Kind;
use crate::proto::files::{Fd, UnixPair, Watch};

/// Placeholders that one message's worth of gaps may cost before what follows is moved instead.
const GAP: usize = 1024;
/// Calls in one batch.
const CALLS: usize = 512;
/// Messages received in one batch: their buffers must fit into its data.
const MESSAGES: usize = 96;

/// Gives the process its descriptors. It must have exactly one, `channel_fd_in_process`, the other end of
/// `channel` (a unix SOCK_SEQPACKET or SOCK_STREAM socket); that one is closed at the end. The process may
/// open descriptors two above the highest that it gets.
///
/// # Errors
/// If a call fails; the process is then of no use.
pub fn install(
    process: &mut dyn RemoteCalls,
    channel_fd_in_process: i32,
    channel: BorrowedFd<'_>,
    built: Built,
) -> Result<(), RestoreFilesError> {
    let mut built = built;
    let files = std::mem::take(&mut built.files);
    let watched = files.descriptions.iter().filter_map(|d| match &d.kind {
        Some(Kind::Epoll(image)) => image.watches.iter().map(|w| w.number).max(),
        _ => None,
    });
    let highest = files.fds.iter().map(|f| f.number).chain(watched).max().unwrap_or(0);
    let parked = highest.max(channel_fd_in_process.unsigned_abs()) + 1;
    let mut calls = Calls { process, batch: Batch::new() };
    calls.add(libc::SYS_dup3, &[channel_fd_in_process.into(), parked.into(), libc::O_CLOEXEC.into()])?;
    calls.add(libc::SYS_close, &[channel_fd_in_process.into()])?;
    let own_pid = calls.flush_with(libc::SYS_getpid)?;
    built.files = files;
    make_pairs(&mut calls, &mut built)?;
    for (index, description) in built.files.descriptions.iter().enumerate() {
        if let (Some(Kind::Tcp(image)), Some(Some(fd))) = (&description.kind, built.made.get(index)) {
            tcp::start_listening(fd.as_fd(), image).map_err(|t| t.for_fd(built.number_of(index)))?;
        }
    }
    place(&mut calls, parked, channel, &built)?;
    for (index, description) in built.files.descriptions.iter().enumerate() {
        if let Some(Kind::UnixSingle(image)) = &description.kind
            && image.listening
        {
            let number = built.number_of(index);
            as_user(&mut calls.batch, image.uid, image.gid, |batch| {
                batch.call(libc::SYS_listen, &[number.into(), image.backlog.into()]);
            });
            if calls.batch.len() >= CALLS {
                calls.flush()?;
            }
        }
    }
    for (index, description) in built.files.descriptions.iter().enumerate() {
        let is_async = description.flags.cast_signed() & libc::O_ASYNC != 0;
        if !is_async && !description.owned && !matches!(description.kind, Some(Kind::Epoll(_))) {
            continue;
        }
        let number = built.number_of(index);
        if let Some(Kind::Epoll(image)) = &description.kind {
            // First those that fire at once, while no other can.
            let spent = |watch: &&Watch| epoll::is_spent(watch.events);
            for watch in image.watches.iter().filter(spent) {
                add_watch(&mut calls, &built, number, watch, parked + 1)?;
                calls.flush()?;
            }
            for watch in image.watches.iter().filter(|watch| !spent(watch)) {
                add_watch(&mut calls, &built, number, watch, parked + 1)?;
            }
        }
        if description.owned {
            calls.add(libc::SYS_fcntl, &[number.into(), libc::F_SETOWN.into(), own_pid.into()])?;
        }
        if is_async {
            calls.add(libc::SYS_fcntl, &[number.into(), libc::F_SETFL.into(), description.flags.into()])?;
        }
    }
    for fd in built.files.fds.iter().filter(|f| f.cloexec) {
        calls.add(libc::SYS_fcntl, &[fd.number.into(), libc::F_SETFD.into(), libc::FD_CLOEXEC.into()])?;
    }
    calls.add(libc::SYS_close, &[parked.into()])?;
    calls.flush()
}

/// Calls that must all succeed, run when enough have come together.
struct Calls<'a> {
    process: &'a mut dyn RemoteCalls,
    batch: Batch,
}

impl Calls<'_> {
    fn add(&mut self, number: i64, args: &[Arg]) -> Result<(), RestoreFilesError> {
        self.batch.call(number, args);
        if self.batch.len() >= CALLS { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), RestoreFilesError> {
        let batch = std::mem::take(&mut self.batch);
        if !batch.is_empty() {
            self.process.run_all_ok("placing descriptors", &batch)?;
        }
        Ok(())
    }

    /// Runs what is there and one more call without arguments, and returns what that one returned.
    fn flush_with(&mut self, number: i64) -> Result<u64, RestoreFilesError> {
        let mut batch = std::mem::take(&mut self.batch);
        let last = batch.call(number, &[]);
        let outcome = self.process.run_all_ok("preparing for descriptors", &batch)?;
        let tid = self.process.pid();
        let what = "preparing for descriptors".to_owned();
        outcome.ret(last).map_err(|errno| InjectError::Call { what, tid, errno }.into())
    }

    /// Takes the one event that an epoll has, of a one-shot registration.
    fn fire(&mut self, epoll: u32) -> Result<(), RestoreFilesError> {
        let mut batch = std::mem::take(&mut self.batch);
        let event = batch.output(12);
        let now = [epoll.into(), event, 1u64.into(), 0u64.into()];
        let last = batch.call(libc::SYS_epoll_wait, &now);
        let outcome = self.process.run_all_ok("placing descriptors", &batch)?;
        match outcome.ret(last) {
            Ok(1) => Ok(()),
            _ => Err(self.failed("letting a one-shot registration of an epoll fire")(Errno::EAGAIN)),
        }
    }

    fn failed(&self, step: &'static str) -> impl FnOnce(Errno) -> RestoreFilesError + use<> {
        let pid = self.process.pid();
        move |errno| RestoreFilesError::Pass { step, pid, errno }
    }
}

/// Lets the process make its socket pairs, takes them over and fills them.
fn make_pairs(calls: &mut Calls<'_>, built: &mut Built) -> Result<(), RestoreFilesError> {
    if built.files.pairs.is_empty() {
        return Ok(());
    }
    let pidfd =
        pidfd::PidFd::open(calls.process.pid().unsigned_abs()).map_err(calls.failed("opening a pidfd"))?;
    let pid = calls.process.pid();
    let mut filled: Vec<[Option<OwnedFd>; 2]> = Vec::new();
    for chunk in built.files.pairs.chunks(CALLS / 8) {
        let mut batch = Batch::new();
        let numbers: Vec<Arg> = chunk.iter().map(|pair| add_pair(&mut batch, pair)).collect();
        let outcome = calls.process.run_all_ok("making socket pairs", &batch)?;
        for (pair, at) in chunk.iter().zip(numbers) {
            let bytes = outcome.data(at, 8);
            let word =
                |i: usize| bytes.get(4 * i..).and_then(|b| b.first_chunk()).map(|b| i32::from_ne_bytes(*b));
            let (Some(a), Some(b)) = (word(0), word(1)) else {
                return Err(RestoreFilesError::Invalid("a socket pair's numbers"));
            };
            let take =
                |n| pidfd::take_fd(pidfd.as_fd(), n).map_err(calls.failed("taking a socket pair over"));
            let made = [take(a)?, take(b)?];
            let index = filled.len();
            filled.push(
                unix::fill(pid, pair, made)
                    .map_err(|t| t.for_fd(built.number_of(first_end(built, index))))?,
            );
            calls.add(libc::SYS_close, &[a.into()])?;
            calls.add(libc::SYS_close, &[b.into()])?;
        }
    }
    calls.flush()?;
    let descriptions = built.files.descriptions.iter().zip(built.made.iter_mut()).enumerate();
    for (index, (description, made)) in descriptions {
        let Some(Kind::UnixEnd(end)) = &description.kind else { continue };
        let slot = filled.get_mut(end.pair as usize).and_then(|p| p.get_mut(end.end as usize));
        let fd = slot.and_then(Option::take).ok_or(RestoreFilesError::Invalid("an end of a socket pair"))?;
        let number = built.files.fds.iter().find(|f| f.description as usize == index).map_or(0, |f| f.number);
        finish(&fd, description).map_err(|t| t.for_fd(number))?;
        *made = Some(Arc::new(fd));
    }
    Ok(())
}

fn first_end(built: &Built, pair: usize) -> usize {
    let is_end = |k: &Option<Kind>| matches!(k, Some(Kind::UnixEnd(e)) if e.pair as usize == pair);
    built.files.descriptions.iter().position(|d| is_end(&d.kind)).unwrap_or(usize::MAX)
}

/// A socketpair by the user and group that made it.
fn add_pair(batch: &mut Batch, pair: &UnixPair) -> Arg {
    let numbers = batch.output(8);
    as_user(batch, pair.uid, pair.gid, |batch| {
        batch.call(libc::SYS_socketpair, &[libc::AF_UNIX.into(), pair.r#type.into(), 0u32.into(), numbers]);
    });
    numbers
}

/// Calls by a user and group: the kernel keeps the effective ones for SO_PEERCRED. The process comes as root
/// and goes back to root.
fn as_user(batch: &mut Batch, uid: u32, gid: u32, add: impl FnOnce(&mut Batch)) {
    let keep = Arg::from(-1i64);
    if gid != 0 {
        batch.call(libc::SYS_setresgid, &[keep, gid.into(), keep]);
    }
    if uid != 0 {
        batch.call(libc::SYS_setresuid, &[keep, uid.into(), keep]);
    }
    add(batch);
    if uid != 0 {
        batch.call(libc::SYS_setresuid, &[keep, 0u32.into(), keep]);
    }
    if gid != 0 {
        batch.call(libc::SYS_setresgid, &[keep, 0u32.into(), keep]);
    }
}

/// Sends everything, and moves and closes until each description is at its numbers.
fn place(
    calls: &mut Calls<'_>,
    parked: u32,
    channel: BorrowedFd<'_>,
    built: &Built,
) -> Result<(), RestoreFilesError> {
    let wanted = &built.files.fds;
    let dense = dense_len(wanted);
    let filler = File::options()
        .read(true)
        .open("/dev/null")
        .map_err(|e| calls.failed("opening a placeholder")(errno_of(&e)))?;
    let mut sent: Vec<BorrowedFd<'_>> = Vec::with_capacity(wanted.len());
    let mut gaps = Vec::new();
    for (i, fd) in wanted.iter().enumerate() {
        while i < dense && sent.len() < fd.number as usize {
            gaps.push(sent.len());
            sent.push(filler.as_fd());
        }
        let made = built.made.get(fd.description as usize).and_then(Option::as_deref);
        sent.push(made.ok_or(RestoreFilesError::Invalid("a description that nothing makes"))?.as_fd());
    }
    send_all(calls, parked, channel, &sent)?;
    let landed_from = sent.len() - (wanted.len() - dense);
    for (i, fd) in wanted.iter().skip(dense).enumerate().rev() {
        calls.add(libc::SYS_dup3, &[(landed_from + i).into(), fd.number.into(), 0u32.into()])?;
        calls.add(libc::SYS_close, &[(landed_from + i).into()])?;
    }
    for gap in gaps {
        calls.add(libc::SYS_close, &[gap.into()])?;
    }
    Ok(())
}

/// How many of the descriptors, from the lowest on, are close enough together for placeholders.
fn dense_len(wanted: &[Fd]) -> usize {
    wanted.iter().enumerate().take_while(|(i, fd)| fd.number as usize - i <= GAP + i).count()
}

/// Sends descriptors and lets the process receive them, at the numbers from 0 on.
fn send_all(
    calls: &mut Calls<'_>,
    parked: u32,
    channel: BorrowedFd<'_>,
    sent: &[BorrowedFd<'_>],
) -> Result<(), RestoreFilesError> {
    let mut waiting: Vec<usize> = Vec::new();
    let mut next = 0;
    for chunk in sent.chunks(MAX_FDS_PER_MESSAGE) {
        if waiting.len() == MESSAGES {
            receive(calls, parked, &mut waiting, &mut next)?;
        }
        let mut result = send_fds(channel, chunk);
        if result == Err(Errno::EAGAIN) && !waiting.is_empty() {
            receive(calls, parked, &mut waiting, &mut next)?;
            result = send_fds(channel, chunk);
        }
        result.map_err(calls.failed("sending descriptors"))?;
        waiting.push(chunk.len());
    }
    receive(calls, parked, &mut waiting, &mut next)
}

/// One recvmsg per message, and a look at the numbers they were put at.
fn receive(
    calls: &mut Calls<'_>,
    parked: u32,
    waiting: &mut Vec<usize>,
    next: &mut usize,
) -> Result<(), RestoreFilesError> {
    let mut batch = Batch::new();
    let mut controls = Vec::new();
    for &count in waiting.iter() {
        let control_len = 16 + 4 * count.next_multiple_of(2);
        let control = batch.output(control_len);
        let byte = batch.output(1);
        let mut iov_bytes = [0u8; 16];
        iov_bytes[8] = 1;
        let iov = batch.input(&iov_bytes);
        batch.pointer_to(iov, 0, byte);
        // msghdr: name 0, its length 8, iov 16, count 24, control 32, its length 40, flags 48.
        let mut header_bytes = [0u8; 56];
        header_bytes[24] = 1;
        header_bytes[40..48].copy_from_slice(&(control_len as u64).to_ne_bytes());
        let header = batch.input(&header_bytes);
        batch.pointer_to(header, 16, iov);
        batch.pointer_to(header, 32, control);
        batch.call(libc::SYS_recvmsg, &[parked.into(), header, libc::MSG_DONTWAIT.into()]);
        controls.push((control, control_len));
    }
    if batch.is_empty() {
        return Ok(());
    }
    let outcome = calls.process.run_all_ok("receiving descriptors", &batch)?;
    for ((control, len), count) in controls.into_iter().zip(waiting.drain(..)) {
        let numbers = outcome.data(control, len).get(16..).unwrap_or_default();
        for number in numbers.chunks_exact(4).take(count) {
            let number = number.first_chunk().map_or(u32::MAX, |b| u32::from_ne_bytes(*b));
            if number as usize != *next {
                return Err(calls.failed("finding only one descriptor open")(Errno::EEXIST));
            }
            *next += 1;
        }
    }
    Ok(())
}

/// Registers one descriptor with an epoll of the process, by the number it was registered with. `spare` is
/// free.
fn add_watch(
    calls: &mut Calls<'_>,
    built: &Built,
    into: u32,
    watch: &Watch,
    spare: u32,
) -> Result<(), RestoreFilesError> {
    let at = |number: u32| built.files.fds.binary_search_by_key(&number, |f| f.number).ok();
    let there = at(watch.number).and_then(|i| built.files.fds.get(i));
    let moved = there.is_none_or(|f| f.description != watch.description);
    let dup = |calls: &mut Calls<'_>, from: u32, to: u32| {
        calls.add(libc::SYS_dup3, &[from.into(), to.into(), 0u32.into()])
    };
    if moved {
        // The number was closed since, or leads elsewhere: it leads to the old place for the registration.
        if there.is_some() {
            dup(calls, watch.number, spare)?;
        }
        dup(calls, built.number_of(watch.description as usize), watch.number)?;
    }
    let spent = epoll::is_spent(watch.events);
    let events = if spent { watch.events | epoll::ANYTHING } else { watch.events };
    let mut event = [0u8; 12];
    event[..4].copy_from_slice(&events.to_ne_bytes());
    event[4..].copy_from_slice(&watch.data.to_ne_bytes());
    let event = calls.batch.input(&event);
    calls.add(libc::SYS_epoll_ctl, &[into.into(), libc::EPOLL_CTL_ADD.into(), watch.number.into(), event])?;
    if spent {
        calls.fire(into)?;
    }
    if moved && there.is_some() {
        dup(calls, spare, watch.number)?;
        calls.add(libc::SYS_close, &[spare.into()])?;
    } else if moved {
        calls.add(libc::SYS_close, &[watch.number.into()])?;
    }
    Ok(())
}
