//! Stops and continues that others send while we hold a process, with and without our fence around it.

use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use migrate::engine::fence::{another_stop_waits, restore_masks};
use migrate::engine::freeze::Frozen;
use migrate::engine::late::Seen;
use migrate::engine::procfs::{parse_stat, parse_status};
use migrate::engine::remote::{Batch, RemoteCalls};
use migrate::engine::skeleton::{ReservedPid, Skeleton};
use migrate::engine::sys::ptrace;
use migrate::proto::control::LateSignal;
use migrate::proto::image::Layout;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const PATIENCE: Duration = Duration::from_secs(5);

/// Threads that compute, and a line for each SIGCONT and SIGUSR1 that its handlers see.
const PROGRAM: &str = r"
import os, signal, threading, time
signal.signal(signal.SIGCONT, lambda *_: os.write(1, b'continued\n'))
signal.signal(signal.SIGUSR1, lambda *_: os.write(1, b'asked\n'))
def work():
    while True: sum(range(1000))
for _ in range(3): threading.Thread(target=work, daemon=True).start()
os.write(1, b'ready\n')
while True: time.sleep(0.01)
";

struct Program {
    child: Child,
    out: BufReader<ChildStdout>,
}

impl Program {
    fn start() -> Self {
        let mut child = Command::new("python3").args(["-c", PROGRAM]).stdout(Stdio::piped()).spawn().unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let mut program = Self { child, out };
        program.says("ready");
        program
    }

    fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    fn send(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).unwrap();
    }

    fn freeze(&self) -> Frozen {
        Frozen::freeze(self.pid(), PATIENCE).unwrap()
    }

    fn next_line(&mut self) -> String {
        if self.out.buffer().is_empty() {
            let mut fds = [PollFd::new(self.out.get_ref().as_fd(), PollFlags::POLLIN)];
            let there = poll(&mut fds, PollTimeout::try_from(PATIENCE).unwrap()).unwrap();
            assert_eq!(there, 1, "it says nothing");
        }
        let mut line = String::new();
        self.out.read_line(&mut line).unwrap();
        line
    }

    fn says(&mut self, word: &str) {
        assert_eq!(self.next_line().trim_end(), word);
    }

    /// It runs, and has seen nothing but what was read before: the answer is the next line.
    fn runs(&mut self) {
        self.send(Signal::SIGUSR1);
        self.says("asked");
    }

    /// All its threads are stopped, and by nobody's trace.
    fn is_stopped(&self) {
        await_state(self.pid(), |state| state == b'T');
    }

    /// It is stopped, and runs on with SIGCONT.
    fn is_stopped_and_goes_on(&mut self) {
        self.is_stopped();
        self.send(Signal::SIGCONT);
        self.says("continued");
        self.runs();
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        super::end(&mut self.child);
    }
}

/// Waits until all threads of a process are in a state.
fn await_state(pid: i32, wanted: impl Fn(u8) -> bool) {
    let end = Instant::now() + PATIENCE;
    loop {
        let tids = migrate::engine::freeze::thread_ids(pid).unwrap();
        let states: Vec<u8> = tids
            .iter()
            .map(|tid| {
                parse_stat(&std::fs::read(format!("/proc/{pid}/task/{tid}/stat")).unwrap()).unwrap().state
            })
            .collect();
        if states.iter().all(|state| wanted(*state)) {
            return;
        }
        assert!(Instant::now() < end, "states {:?}", String::from_utf8_lossy(&states));
        std::thread::yield_now();
    }
}

/// A call in each thread, which would run into a stop that waits.
fn inject(frozen: &mut Frozen) {
    let mut batch = Batch::new();
    batch.call(libc::SYS_getpid, &[]);
    let work: Vec<(i32, Batch)> = frozen.threads().iter().map(|t| (t.tid, batch.clone())).collect();
    frozen.run_in_threads(&work).unwrap();
}

#[test]
fn a_fence_leaves_no_trace() {
    let mut program = Program::start();
    for _ in 0..20 {
        let mut frozen = program.freeze();
        inject(&mut frozen);
        frozen.fence().unwrap();
        assert!(!another_stop_waits(program.child.id()));
        frozen.lift_fence().unwrap();
        frozen.thaw().unwrap();
        program.runs();
    }
}

#[test]
fn a_continue_that_takes_the_fence_away_hangs_nobody() {
    let mut program = Program::start();
    for lifted in [true, false] {
        let mut frozen = program.freeze();
        frozen.fence().unwrap();
        program.send(Signal::SIGCONT);
        if lifted {
            frozen.lift_fence().unwrap();
        }
        frozen.thaw().unwrap();
        program.says("continued");
        program.runs();
    }
}

#[test]
fn a_stop_that_comes_while_the_fence_is_up_is_kept() {
    let mut program = Program::start();
    let mut frozen = program.freeze();
    frozen.fence().unwrap();
    program.send(Signal::SIGSTOP);
    frozen.lift_fence().unwrap();
    assert!(frozen.stop_is_due().unwrap());
    frozen.thaw().unwrap();
    program.is_stopped_and_goes_on();
}

#[test]
fn a_stop_that_injected_calls_ran_into_is_kept_unless_continued() {
    let mut program = Program::start();
    for continued in [false, true] {
        let mut frozen = program.freeze();
        inject(&mut frozen);
        program.send(Signal::SIGSTOP);
        inject(&mut frozen);
        if continued {
            program.send(Signal::SIGCONT);
        }
        assert_eq!(frozen.stop_is_due().unwrap(), !continued);
        frozen.fence().unwrap();
        frozen.lift_fence().unwrap();
        frozen.thaw().unwrap();
        if continued {
            program.says("continued");
            program.runs();
        } else {
            program.is_stopped_and_goes_on();
        }
    }
}

#[test]
fn a_continue_that_came_before_the_fence_is_not_lost() {
    let mut program = Program::start();
    let mut frozen = program.freeze();
    program.send(Signal::SIGCONT);
    frozen.fence().unwrap();
    frozen.lift_fence().unwrap();
    frozen.thaw().unwrap();
    program.says("continued");
    program.runs();
}

#[test]
fn a_process_that_was_stopped_stays_so_unless_continued() {
    let mut program = Program::start();
    program.send(Signal::SIGSTOP);
    program.is_stopped();
    for fenced in [true, false] {
        let mut frozen = program.freeze();
        assert!(frozen.stop_is_due().unwrap());
        inject(&mut frozen);
        if fenced {
            frozen.fence().unwrap();
        } else {
            program.send(Signal::SIGCONT);
            assert!(!frozen.stop_is_due().unwrap());
        }
        frozen.thaw().unwrap();
        if fenced {
            program.is_stopped();
        }
    }
    program.says("continued");
    program.runs();
}

/// A stop that comes while the threads are being stopped, sooner or later.
#[test]
fn a_stop_on_its_way_is_noticed() {
    let mut program = Program::start();
    for _ in 0..100 {
        let start = std::sync::Barrier::new(2);
        let frozen = std::thread::scope(|scope| {
            scope.spawn(|| {
                start.wait();
                program.send(Signal::SIGSTOP);
            });
            start.wait();
            program.freeze()
        });
        assert!(frozen.stop_is_due().unwrap());
        frozen.thaw().unwrap();
        program.is_stopped_and_goes_on();
    }
}

#[test]
fn a_fence_holds_when_its_tracer_is_gone() {
    let mut program = Program::start();
    for (left_held, other_stop) in [(false, false), (true, false), (true, true), (false, true)] {
        // The kernel lets go of the tracees of a thread that ends.
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut frozen = program.freeze();
                inject(&mut frozen);
                frozen.fence().unwrap();
                if other_stop {
                    program.send(Signal::SIGSTOP);
                }
                if left_held { frozen.leave_held() } else { std::mem::forget(frozen) }
            });
        });
        program.is_stopped();
        assert_eq!(another_stop_waits(program.child.id()), other_stop);
        program.is_stopped_and_goes_on();
        let status = std::fs::read(format!("/proc/{}/status", program.pid())).unwrap();
        let status = parse_status(&status).unwrap();
        assert_eq!(status.pending | status.shared_pending, 0);
    }
}

/// Who lifted the fence died while threads blocked all signals for it.
#[test]
fn masks_that_a_lifted_fence_has_left_are_restored() {
    let program = Program::start();
    let pid = program.pid();
    let blocked = || {
        let status = std::fs::read(format!("/proc/{pid}/status")).unwrap();
        parse_status(&status).unwrap().blocked
    };
    let mut frozen = program.freeze();
    let masks = frozen.masks();
    inject(&mut frozen);
    frozen.thaw().unwrap();
    assert_eq!(blocked(), masks[0].1);
    restore_masks(&[(pid, 1 << 20)]).unwrap();
    assert_eq!(blocked(), masks[0].1, "it did not block everything");
    ptrace::seize(pid, 0).unwrap();
    ptrace::interrupt(pid).unwrap();
    ptrace::wait(pid).unwrap();
    ptrace::set_sigmask(pid, u64::MAX).unwrap();
    ptrace::detach(pid, 0).unwrap();
    let mut program = program;
    program.send(Signal::SIGUSR1);
    assert_ne!(blocked(), masks[0].1);
    restore_masks(&masks).unwrap();
    program.says("asked");
    assert_eq!(blocked(), masks[0].1);
}

#[test]
fn signals_after_the_capture_are_found() {
    let mut program = Program::start();
    let mut frozen = program.freeze();
    program.send(Signal::SIGCONT);
    program.send(Signal::SIGUSR1);
    frozen.fence().unwrap();
    let numbers = |late: &[LateSignal]| -> Vec<u8> { late.iter().map(|l| l.info[0]).collect() };
    let late = frozen.late_signals(&Seen::default()).unwrap();
    let signal = |s: Signal| u8::try_from(s as i32).unwrap();
    // The first one the fence has removed; the fence itself is none.
    assert_eq!(numbers(&late), [signal(Signal::SIGCONT), signal(Signal::SIGUSR1)]);
    assert!(late.iter().all(|l| l.tid == 0));
    frozen.thaw().unwrap();
    let mut lines = [program.next_line(), program.next_line()];
    lines.sort();
    assert_eq!(lines, ["asked\n", "continued\n"]);
}

/// A destination's process that has been accepted. It is killed at the end of the test.
struct Accepted(i32);

impl Accepted {
    fn make() -> (Self, Skeleton) {
        let reserved = (20_000..30_000).find_map(|pid| ReservedPid::take(pid).ok()).unwrap();
        let mut skeleton = reserved.execute(&Layout::default()).unwrap();
        let accepted = Self(skeleton.pid());
        skeleton.accept().unwrap();
        (accepted, skeleton)
    }

    fn send(&self, signal: Signal) {
        kill(Pid::from_raw(self.0), signal).unwrap();
    }

    fn is_stopped(&self) {
        await_state(self.0, |state| state == b'T');
    }

    fn is_not_stopped(&self) {
        await_state(self.0, |state| state != b'T' && state != b't');
    }
}

impl Drop for Accepted {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.0), Signal::SIGKILL);
        let _ = nix::sys::wait::waitpid(Pid::from_raw(self.0), None);
    }
}

fn late(signal: Signal) -> [LateSignal; 1] {
    let mut info = vec![0; 128];
    info[..4].copy_from_slice(&(signal as i32).to_ne_bytes());
    [LateSignal { tid: 0, info }]
}

#[test]
fn an_accepted_process_takes_stops_and_continues_for_what_they_are() {
    // What it came as, what is sent to it between acceptance and resume, what came late at the source.
    let none = || [];
    let cases: [(bool, Option<Signal>, Vec<LateSignal>, bool); 7] = [
        (false, None, none().into(), false),
        (true, None, none().into(), true),
        (false, Some(Signal::SIGSTOP), none().into(), true),
        (false, Some(Signal::SIGCONT), none().into(), false),
        (false, None, late(Signal::SIGSTOP).into(), true),
        (true, None, late(Signal::SIGCONT).into(), false),
        (true, Some(Signal::SIGCONT), late(Signal::SIGSTOP).into(), true),
    ];
    for (came_stopped, sent, late, stopped) in cases {
        let what = format!("{came_stopped} {sent:?} {late:?}");
        let (accepted, skeleton) = Accepted::make();
        if let Some(signal) = sent {
            accepted.send(signal);
        }
        skeleton.resume(came_stopped, &late).unwrap_or_else(|error| panic!("{what}: {error:?}"));
        if stopped { accepted.is_stopped() } else { accepted.is_not_stopped() }
    }
}

#[test]
fn an_accepted_process_stays_stopped_when_the_service_dies() {
    let made = std::thread::spawn(|| {
        let (accepted, skeleton) = Accepted::make();
        std::mem::forget(skeleton);
        accepted
    });
    let accepted = made.join().unwrap();
    accepted.is_stopped();
}

#[test]
fn nonsense_from_the_source_is_not_sent() {
    let (accepted, skeleton) = Accepted::make();
    let mut wrong: Vec<LateSignal> = vec![
        LateSignal { tid: 0, info: vec![] },
        LateSignal { tid: 0, info: vec![9; 128] },
        LateSignal { tid: u32::MAX, info: late(Signal::SIGSTOP)[0].info.clone() },
        LateSignal { tid: std::process::id(), info: late(Signal::SIGKILL)[0].info.clone() },
    ];
    wrong.extend(late(Signal::SIGKILL));
    wrong.extend(late(Signal::SIGSTOP));
    skeleton.resume(false, &wrong).unwrap();
    accepted.is_stopped();
}
