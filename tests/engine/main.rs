//! The engine on real processes of this machine: stop, inject, let go, and what a killed tracer leaves.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests may panic")]

mod stops;
mod tracker;

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use migrate::engine::freeze::{Frozen, thread_ids};
use migrate::engine::procfs::parse_stat;
use migrate::engine::remote::{Batch, RemoteCalls};
use migrate::engine::sys::ptrace;
use migrate::engine::undertaker::Undertaker;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A Python program with threads that sleep, wait and compute, and check themselves.
const BUSY: &str = r#"
import threading, time, sys, hashlib, os
bad = []
ticks = [0] * 6
def sleeper(i):
    while True:
        t = time.monotonic(); time.sleep(0.01); d = time.monotonic() - t
        if d < 0.0099: bad.append(('short sleep', d))
        ticks[i] += 1
def hasher(i):
    want = hashlib.sha256(b'x' * 4096).hexdigest()
    while True:
        if hashlib.sha256(b'x' * 4096).hexdigest() != want: bad.append('hash')
        ticks[i] += 1
for i in range(3): threading.Thread(target=sleeper, args=(i,), daemon=True).start()
for i in range(3, 6): threading.Thread(target=hasher, args=(i,), daemon=True).start()
print('ready', flush=True)
for line in sys.stdin:
    before = list(ticks)
    end = time.monotonic() + 20
    while any(b == a for a, b in zip(before, ticks)) and time.monotonic() < end: time.sleep(0.01)
    stuck = [i for i in range(6) if ticks[i] == before[i]]
    print('ok' if not bad and not stuck else f'bad {bad} stuck {stuck}', flush=True)
"#;

struct Busy {
    child: Child,
    out: BufReader<std::process::ChildStdout>,
}

impl Busy {
    fn start() -> Self {
        let mut child = Command::new("python3")
            .args(["-c", BUSY])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        out.read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        Self { child, out }
    }
    fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }
    /// All its threads go on, and none has seen anything odd.
    fn verify(&mut self) {
        self.child.stdin.as_mut().unwrap().write_all(b"check\n").unwrap();
        let mut line = String::new();
        self.out.read_line(&mut line).unwrap();
        assert_eq!(line, "ok\n");
    }
    fn maps(&self) -> String {
        std::fs::read_to_string(format!("/proc/{}/maps", self.pid())).unwrap()
    }
    fn fds(&self) -> Vec<std::ffi::OsString> {
        let mut all: Vec<_> = std::fs::read_dir(format!("/proc/{}/fd", self.pid()))
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        all.sort();
        all
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// Kills a child and reaps it, also if this process still traces threads of it: each of them is left as a zombie until
/// somebody waits for it, and the leader's end is told after the last.
fn end(child: &mut Child) {
    let _ = child.kill();
    let pid = i32::try_from(child.id()).unwrap();
    let latest = Instant::now() + Duration::from_secs(20);
    while matches!(child.try_wait(), Ok(None)) && Instant::now() < latest {
        for tid in thread_ids(pid).unwrap_or_default() {
            let stat = std::fs::read(format!("/proc/{pid}/task/{tid}/stat")).unwrap_or_default();
            if tid != pid && parse_stat(&stat).is_ok_and(|stat| stat.state == b'Z') {
                let _ = ptrace::poll(tid);
            }
        }
        std::thread::yield_now();
    }
}

/// A leader's end is told to us only after that of its threads, which we must ask for.
#[test]
fn a_process_that_is_killed_under_our_hands_keeps_nobody_waiting() {
    let busy = Busy::start();
    let pid = busy.pid();
    let (done, is_done) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut frozen = Frozen::freeze(pid, Duration::from_secs(5)).unwrap();
        let _undertaker = Undertaker::start(pid).unwrap();
        let mut batch = Batch::new();
        batch.call(libc::SYS_pause, &[]);
        done.send(frozen.run(&batch).map(drop)).unwrap();
    });
    let pauses = || {
        let call = std::fs::read_to_string(format!("/proc/{pid}/syscall")).unwrap();
        call.starts_with(&format!("{} ", libc::SYS_pause))
    };
    let end = Instant::now() + Duration::from_secs(20);
    while !pauses() {
        assert!(Instant::now() < end, "it does not run our call");
        std::thread::yield_now();
    }
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    let outcome = is_done.recv_timeout(Duration::from_secs(20)).expect("it waits for ever");
    assert!(outcome.is_err());
}

#[test]
fn batches_run_and_leave_no_trace() {
    let mut busy = Busy::start();
    let (before, fds_before) = (busy.maps(), busy.fds());
    for _ in 0..50 {
        let mut frozen = Frozen::freeze(busy.pid(), Duration::from_secs(5)).unwrap();
        let mut batch = Batch::new();
        for _ in 0..2500 {
            batch.call(libc::SYS_getpid, &[]);
        }
        let path = batch.input_c_string(b"/proc/self/comm");
        let text = batch.output(16);
        let open = batch.call(libc::SYS_openat, &[libc::AT_FDCWD.into(), path, libc::O_RDONLY.into()]);
        let outcome = frozen.run(&batch).unwrap();
        for i in 0..2500 {
            assert_eq!(outcome.ret(i), Ok(u64::from(busy.child.id())));
        }
        let fd = outcome.ret(open).unwrap();
        let mut second = Batch::new();
        let text_at = second.output(16);
        second.call(libc::SYS_read, &[fd.into(), text_at, 16u64.into()]);
        second.call(libc::SYS_close, &[fd.into()]);
        let outcome = frozen.run_all_ok("reading", &second).unwrap();
        assert!(outcome.data(text_at, 16).starts_with(b"python3"));
        let _ = text;
        // One batch in each thread at the same time: each knows its own id.
        let tids: Vec<i32> = frozen.threads().iter().map(|t| t.tid).collect();
        assert_eq!(tids.len(), 7);
        let work: Vec<(i32, Batch)> = tids
            .iter()
            .map(|tid| {
                let mut b = Batch::new();
                b.call(libc::SYS_gettid, &[]);
                (*tid, b)
            })
            .collect();
        let outcomes = frozen.run_in_threads(&work).unwrap();
        for (tid, outcome) in tids.iter().zip(outcomes) {
            assert_eq!(outcome.ret(0), Ok(u64::try_from(*tid).unwrap()));
        }
        frozen.thaw().unwrap();
    }
    busy.verify();
    assert_eq!(busy.maps(), before);
    assert_eq!(busy.fds(), fds_before);
}

/// Not a test: what `a_killed_tracer_leaves_the_process_as_it_was` runs and kills.
#[test]
#[ignore = "the tracer of another test"]
fn tracer() {
    let pid: i32 = std::env::var("MIGRATE_TEST_PID").unwrap().parse().unwrap();
    println!("tracing");
    loop {
        let mut frozen = Frozen::freeze(pid, Duration::from_secs(5)).unwrap();
        let mut batch = Batch::new();
        for _ in 0..300 {
            batch.call(libc::SYS_getppid, &[]);
        }
        frozen.run_all_ok("calls", &batch).unwrap();
        if std::env::var("MIGRATE_TEST_THREADS").is_ok() {
            let work: Vec<(i32, Batch)> = frozen.threads().iter().map(|t| (t.tid, batch.clone())).collect();
            frozen.run_in_threads(&work).unwrap();
        }
        frozen.thaw().unwrap();
    }
}

#[test]
fn a_killed_tracer_leaves_the_process_as_it_was() {
    let (maps, fds) = torture(None);
    assert_eq!(maps, 0, "mappings left behind");
    assert_eq!(fds, 0, "descriptors left behind");
}

/// With calls in all threads at once there are instants (a microsecond a thread) at which the area is
/// left behind, which the process never notices; nothing else may be.
#[test]
fn a_killed_tracer_of_many_threads_leaves_them_running() {
    let (maps, fds) = torture(Some("1"));
    assert!(maps <= 20, "{maps} mappings left behind by 150 kills");
    assert_eq!(fds, 0, "descriptors left behind");
}

/// Kills a tracer 150 times; how many mappings and descriptors more there are at the end.
fn torture(threads: Option<&str>) -> (usize, usize) {
    let mut busy = Busy::start();
    // Its own heap settles with the first check.
    busy.verify();
    let (before, fds_before) = (busy.maps(), busy.fds());
    // A fixed seed: instants spread over several rounds of stop, calls and release.
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..150 {
        let mut tracer = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "tracer", "--nocapture"])
            .env("MIGRATE_TEST_PID", busy.pid().to_string())
            .envs(threads.map(|t| ("MIGRATE_TEST_THREADS", t)))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut out = BufReader::new(tracer.stdout.take().unwrap());
        let mut line = String::new();
        while !line.contains("tracing") {
            line.clear();
            assert_ne!(out.read_line(&mut line).unwrap(), 0, "the tracer has ended by itself");
        }
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let wait = Duration::from_micros(random % 3000);
        let start = std::time::Instant::now();
        while start.elapsed() < wait {
            std::hint::spin_loop();
        }
        tracer.kill().unwrap();
        tracer.wait().unwrap();
        busy.verify();
    }
    let bytes = |maps: &str| -> u64 {
        let entries = migrate::engine::procfs::parse_maps(maps.as_bytes()).unwrap();
        entries.iter().filter(|m| m.inode == 0).map(|m| m.end - m.start).sum()
    };
    let more = bytes(&busy.maps()).saturating_sub(bytes(&before));
    // 0x41000: the injected area.
    (usize::try_from(more / 0x41000).unwrap(), busy.fds().len() - fds_before.len())
}
