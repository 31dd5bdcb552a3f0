//! Threads that sleep in every way that leaves a restart block, stopped in the middle.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests may panic")]

use std::io::{BufRead, BufReader, Write};
use std::process::{ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use super::arm::arm_thread;
use super::*;
use crate::engine::freeze::Frozen;
use crate::engine::remote::{Batch, RemoteCalls};
use crate::engine::skeleton::ReservedPid;
use crate::engine::sys::ptrace::{self, Regs};
use crate::engine::trial::{Killed, PATIENCE as TRIAL, until};
use crate::proto::image::{Layout, Thread, Vma, VmaKind};

/// How long each of the sleeps lasts, by its own clock.
const WHOLE: Duration = Duration::from_secs(9);
/// The moment of the first stop: what a sleep that began anew would last longer. Far more than a busy host costs.
const FIRST_STOP_MS: u64 = 4000;
/// How much later than it should a busy host may end a sleep, or compare two clocks.
const SLACK: Duration = Duration::from_secs(3);

/// Each thread says what its call returned and how long it took.
const PROGRAM: &str = r#"
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
static int word; static int fds[2]; static pthread_mutex_t out = PTHREAD_MUTEX_INITIALIZER;
static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec + t.tv_nsec / 1e9; }
static void *sleeper(void *which) {
    struct timespec t = { 9, 0 }, rem = { 77, 77 }, until; long r = 0, got; double start = now();
    struct pollfd p = { fds[0], POLLIN, 0 };
    clock_gettime(CLOCK_MONOTONIC, &until); until.tv_sec += 9;
    errno = 0;
    switch ((long)which) {
    case 0: r = syscall(SYS_nanosleep, &t, NULL); break;
    case 1: r = syscall(SYS_nanosleep, &t, &rem); break;
    case 2: r = syscall(SYS_nanosleep, &t, &t); break;
    case 3: r = syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, 0, &t, NULL); break;
    case 4: r = syscall(SYS_poll, NULL, 0, 9000); break;
    case 5: r = syscall(SYS_futex, &word, 128, 0, &t, NULL, 0); break;
    case 6: r = syscall(SYS_futex, &word, 128 | 9, 0, &until, NULL, -1); break;
    case 7: r = syscall(SYS_poll, &p, 1, -1); break;
    }
    got = now() * 1000 - start * 1000;
    pthread_mutex_lock(&out); printf("%ld %ld %d %ld\n", (long)which, r, errno, got); fflush(stdout);
    pthread_mutex_unlock(&out); return 0;
}
int main(void) {
    pthread_t t[8]; if (pipe(fds)) return 1;
    for (long i = 0; i < 8; i++) pthread_create(t + i, 0, sleeper, (void *)i);
    char c; if (read(0, &c, 1) == 1 && write(fds[1], &c, 1) != 1) return 1;
    for (int i = 0; i < 8; i++) pthread_join(t[i], 0);
    return 0;
}
"#;

struct Program {
    child: Killed,
    out: BufReader<ChildStdout>,
    /// Before the first sleep began, and when all had.
    spawned: Instant,
    started: Instant,
    /// Before and after the last stop.
    stop: (Instant, Instant),
    /// For how long the moves have held the sleeps up.
    held: Duration,
}

impl Program {
    fn start(dir: &std::path::Path) -> Self {
        let (exe, source) = (dir.join("sleeps"), dir.join("sleeps.c"));
        std::fs::write(&source, PROGRAM).unwrap();
        let mut cc = Command::new("cc");
        cc.args(["-o".as_ref(), exe.as_os_str(), source.as_ref(), "-pthread".as_ref()]);
        assert!(cc.status().unwrap().success());
        let now = Instant::now();
        let mut child = Killed::spawn(Command::new(exe).stdin(Stdio::piped()).stdout(Stdio::piped()));
        let out = BufReader::new(child.stdout.take().unwrap());
        let mut program =
            Self { child, out, spawned: now, started: now, stop: (now, now), held: Duration::ZERO };
        until("the sleep of all threads", || program.asleep() == 8);
        program.started = Instant::now();
        program
    }
    fn pid(&self) -> Tid {
        self.child.pid()
    }
    fn asleep(&self) -> usize {
        let pid = self.pid();
        thread_ids(pid)
            .unwrap()
            .into_iter()
            .filter(|tid| Target { pid, tid: *tid }.asleep().is_some())
            .count()
    }
    /// The test is about time: here it passes.
    fn at(&self, ms: u64) {
        std::thread::sleep(Duration::from_millis(ms).saturating_sub(self.started.elapsed()));
    }
    fn freeze(&mut self, book: &mut SleepBook) -> Frozen {
        self.stop.0 = Instant::now();
        let frozen = book.freeze(self.pid(), Duration::from_secs(5)).unwrap();
        self.stop.1 = Instant::now();
        frozen
    }
    /// The calls of the sleepers are known, with what is left of their time.
    fn check(&self, book: &SleepBook, frozen: &Frozen) {
        let numbers = [35, 35, 35, 230, 7, 202, 202, 7];
        assert_eq!(frozen.threads().len(), 9);
        for (i, thread) in frozen.threads()[1..].iter().enumerate() {
            let call =
                book.remaining(thread).unwrap_or_else(|| panic!("thread {i} in no call: {:?}", thread.regs));
            assert_eq!(call.number, numbers[i], "thread {i}");
            if i >= 6 {
                assert_eq!(call.remaining_ns, -1, "thread {i}");
                continue;
            }
            let left = Duration::from_nanos(call.remaining_ns.try_into().unwrap());
            let least = WHOLE.saturating_sub(self.stop.1 - self.spawned + SLACK);
            // What the kernel wrote at the stop may be as old as the stop took.
            let took = self.stop.1 - self.stop.0;
            let most = (WHOLE + self.held + took + SLACK).saturating_sub(self.stop.0 - self.started);
            assert!(left >= least && left <= most, "thread {i}: {least:?} <= {left:?} <= {most:?}");
        }
        assert_eq!(book.remaining(&frozen.threads()[0]), None);
    }
    fn finish(mut self) {
        assert_eq!(self.child.stdin.as_mut().map(|i| i.write(b"x").unwrap()), Some(1));
        let mut line = String::new();
        let mut count = 0;
        while self.out.read_line(&mut line).unwrap() > 0 {
            let words: Vec<i64> = line.split_whitespace().map(|w| w.parse().unwrap()).collect();
            let [which, returned, errno, ms] = words[..] else { panic!("{line}") };
            match which {
                5 | 6 => assert_eq!((returned, errno), (-1, i64::from(libc::ETIMEDOUT)), "{line}"),
                7 => assert_eq!((returned, errno), (1, 0), "{line}"),
                _ => assert_eq!((returned, errno), (0, 0), "{line}"),
            }
            let ms = u128::try_from(ms).unwrap();
            let latest = (WHOLE + SLACK + self.held).as_millis();
            assert!(which == 7 || (WHOLE.as_millis()..latest).contains(&ms), "{line}");
            line.clear();
            count += 1;
        }
        assert_eq!(count, 8);
    }
}

/// What the destination does, in the threads of the frozen process: their restart blocks are first replaced
/// by another, long one, as a new thread's would be none.
fn arm_all(frozen: &mut Frozen, book: &SleepBook) {
    let (injector, threads) = frozen.parts().unwrap();
    for thread in &mut threads[1..] {
        let mut other = thread.regs;
        other.orig_rax = regs::unsigned(libc::SYS_poll);
        [other.rdi, other.rsi, other.rdx] = [0, 0, 1000];
        arm_thread(injector, thread, &mut other, 1_000_000_000_000).unwrap();
        assert_eq!(regs::signed(other.rax), regs::ERESTART_RESTARTBLOCK);
        let call = book.remaining(thread).unwrap();
        let mut r = thread.regs;
        r.orig_rax = regs::unsigned(call.number);
        arm_thread(injector, thread, &mut r, call.remaining_ns).unwrap();
        thread.regs = r;
    }
}

#[test]
fn sleeps_go_on_through_stops_and_moves() {
    let dir = tempfile::tempdir().unwrap();
    let mut program = Program::start(dir.path());
    let mut book = SleepBook::new();

    program.at(FIRST_STOP_MS);
    let frozen = program.freeze(&mut book);
    program.check(&book, &frozen);
    frozen.thaw().unwrap();

    // Stopped again, in restart_syscall; then what a move does to it.
    program.at(FIRST_STOP_MS + 500);
    let mut frozen = program.freeze(&mut book);
    program.check(&book, &frozen);
    arm_all(&mut frozen, &book);
    program.held += program.stop.0.elapsed();
    frozen.thaw().unwrap();

    // After a move nobody there has seen the sleeps begin.
    program.at(FIRST_STOP_MS + 1000);
    let mut book = SleepBook::new();
    let mut frozen = program.freeze(&mut book);
    program.check(&book, &frozen);
    arm_all(&mut frozen, &book);
    program.held += program.stop.0.elapsed();
    frozen.thaw().unwrap();
    program.at(FIRST_STOP_MS + 1500);
    program.finish();
}

/// Stopped from a terminal twice: while it is stopped, nothing tells which call goes on.
#[test]
fn a_call_that_was_interrupted_before_is_known_when_it_sleeps() {
    let child = Killed::sleeper();
    let pid = child.pid();
    let target = Target { pid, tid: pid };
    let signal = |which| nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), which).unwrap();
    let stat = || crate::engine::procfs::parse_stat(&std::fs::read(format!("/proc/{pid}/stat")).unwrap());
    let sleeps_in = |number| target.asleep().is_some_and(|a| a.blocked.number == number);
    until("its sleep", || sleeps_in(libc::SYS_clock_nanosleep));
    let mut unknown = Vec::new();
    for _ in 0..2 {
        signal(nix::sys::signal::SIGSTOP);
        until("its stop", || stat().unwrap().state == b'T');
        let mut book = SleepBook::new();
        let frozen = book.freeze(pid, Duration::from_secs(5)).unwrap();
        let number = regs::interrupted_call(&frozen.threads()[0].regs);
        unknown.push((number == Some(libc::SYS_restart_syscall), book.is_unknown(&frozen.threads()[0])));
        frozen.thaw().unwrap();
        signal(nix::sys::signal::SIGCONT);
        until("its sleep after the stop", || sleeps_in(libc::SYS_restart_syscall));
    }
    assert_eq!(unknown, [(false, false), (true, true)]);
    let mut book = SleepBook::new();
    let frozen = book.freeze(pid, Duration::from_secs(5)).unwrap();
    let call = book.remaining(&frozen.threads()[0]).unwrap();
    assert_eq!(call.number, libc::SYS_clock_nanosleep);
    frozen.thaw().unwrap();
}

/// A skeleton with one page of code: the call that the registers were interrupted in, then an exit with
/// what it returned. The call finds a time of `seconds` in its memory.
fn exit_of_skeleton(
    number: i64,
    seconds: u64,
    change: impl FnOnce(&mut Regs, u64),
    remaining_ns: i64,
) -> (i32, Duration) {
    let ms = Duration::from_millis;
    const CODE: [u8; 11] = [0x0f, 0x05, 0x89, 0xc7, 0xb8, 0xe7, 0, 0, 0, 0x0f, 0x05];
    let reserved = (20_000..30_000).find_map(|pid| ReservedPid::take(pid).ok()).unwrap();
    let mut skeleton = reserved.execute(&Layout::default()).unwrap();
    let pid = skeleton.pid();
    // Our own group of vdso mappings, somewhere: the stub is removed by a call from there.
    let maps = crate::engine::procfs::parse_maps(&std::fs::read("/proc/self/maps").unwrap()).unwrap();
    let group = maps.iter().filter(|m| m.path == b"[vdso]" || m.path.starts_with(b"[vvar"));
    let vdso = |m: &crate::engine::procfs::MapsEntry| {
        let mut vma = Vma { start: m.start, end: m.end, ..Vma::default() };
        vma.set_kind(VmaKind::VmaVdso);
        vma
    };
    let layout =
        Layout { vmas: group.map(vdso).collect(), tids: vec![pid.unsigned_abs()], ..Layout::default() };
    skeleton.reconcile(layout).unwrap();
    let mut batch = Batch::new();
    let (protection, flags) =
        (libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let page = batch.call(
        libc::SYS_mmap,
        &[0u64.into(), 4096u64.into(), protection.into(), flags.into(), (-1).into(), 0u64.into()],
    );
    let page = skeleton.run_all_ok("a page", &batch).unwrap().ret(page).unwrap();
    let mut bytes = vec![0u8; 4096];
    bytes[..CODE.len()].copy_from_slice(&CODE);
    // The seconds of a timespec.
    bytes[1024..1032].copy_from_slice(&seconds.to_ne_bytes());
    let range = crate::engine::sys::vm::RemoteRange { start: page, len: bytes.len() };
    assert_eq!(crate::engine::sys::vm::write(pid, &bytes, &[range]), Ok(4096));
    let mut r = ptrace::regs(pid).unwrap();
    [r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9] = [0; 6];
    r.rip = page + 2;
    r.rsp = page + 4096;
    r.orig_rax = regs::unsigned(number);
    r.rax = regs::unsigned(regs::ERESTART_RESTARTBLOCK);
    change(&mut r, page + 1024);
    let image = Thread { tid: pid.unsigned_abs(), restart_remaining_ns: remaining_ns, ..Thread::default() };
    let start = Instant::now();
    arm(&mut skeleton, &image, ms(100), &mut r).unwrap();
    skeleton.remove_stub().unwrap();
    ptrace::set_regs(pid, &r).unwrap();
    ptrace::set_sigmask(pid, 0).unwrap();
    skeleton.accept().unwrap();
    skeleton.resume(false, &[]).unwrap();
    let (stop, status) = ptrace::wait(pid).unwrap();
    assert!(stop == ptrace::Stop::Gone && libc::WIFEXITED(status), "{status:#x}");
    (libc::WEXITSTATUS(status), start.elapsed())
}

#[test]
fn a_skeleton_goes_on_with_the_call() {
    /// The call's own time, unless that is what it waits for.
    const LONG: u64 = 2 * TRIAL.as_secs();
    let near = |(code, took): (i32, Duration), wanted: (i32, u64)| {
        assert_eq!(code, wanted.0, "{took:?}");
        let least = Duration::from_millis(wanted.1);
        assert!(took >= least && took < least + TRIAL, "{took:?}");
    };
    let sleep = |r: &mut Regs, at| r.rdi = at;
    // The futex is the nanoseconds: 0.
    let futex = |value| move |r: &mut Regs, at| [r.rdi, r.rsi, r.rdx, r.r10] = [at + 8, 128, value, at];
    let poll = |r: &mut Regs, _| r.rdx = LONG * 1000;
    let timed_out = 256 - libc::ETIMEDOUT;
    near(exit_of_skeleton(libc::SYS_nanosleep, LONG, sleep, 350_000_000), (0, 250));
    near(exit_of_skeleton(libc::SYS_futex, LONG, futex(0), 350_000_000), (timed_out, 250));
    // Over before it was interrupted, or nothing to wait for.
    near(exit_of_skeleton(libc::SYS_nanosleep, LONG, sleep, 0), (0, 0));
    near(exit_of_skeleton(libc::SYS_futex, LONG, futex(5), 350_000_000), (256 - libc::EAGAIN, 0));
    near(exit_of_skeleton(libc::SYS_poll, LONG, poll, 0), (0, 0));
    // Not known how long: the call's own time.
    near(exit_of_skeleton(libc::SYS_nanosleep, 1, sleep, -1), (0, 1000));
    // Not even the call is known: what the kernel itself says then.
    near(exit_of_skeleton(libc::SYS_restart_syscall, 1, sleep, -1), (256 - libc::EINTR, 0));
}
