//! Threads that are stopped inside restartable sequences, with and without calls of ours in them.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests may panic")]

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use migrate::engine::freeze::Frozen;
use migrate::engine::memory::Memory;
use migrate::engine::procfs::parse_maps;
use migrate::engine::remote::{Batch, RemoteCalls, Tid};
use migrate::engine::sys::attrs;
use migrate::engine::sys::vm::RemoteRange;

/// Two threads, each in an endless loop that only its abort handler leaves, returning 42. In a page: at 0 the
/// loop, at 16 the signature and the handler; the second thread's are 512 bytes on.
const PROGRAM: &str = "
import ctypes, mmap, signal, threading
signal.alarm(20)
code = mmap.mmap(-1, 4096, prot=7)
for at in (0, 512):
    code[at:at + 2] = bytes.fromhex('ebfe')
    code[at + 16:at + 26] = bytes.fromhex('53300553b82a000000c3')
at = ctypes.addressof(ctypes.c_char.from_buffer(code))
run = lambda place: ctypes.CFUNCTYPE(ctypes.c_int)(place)()
results = []
other = threading.Thread(target=lambda: results.append(run(at + 512)))
print('ready', flush=True)
other.start()
results.append(run(at))
other.join()
print(*results, flush=True)";

struct Loops {
    child: Child,
    out: BufReader<std::process::ChildStdout>,
    code: u64,
}

impl Loops {
    fn start() -> Self {
        let mut child = Command::new("python3").args(["-c", PROGRAM]).stdout(Stdio::piped()).spawn().unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        out.read_line(&mut line).unwrap();
        let maps = parse_maps(&std::fs::read(format!("/proc/{}/maps", child.id())).unwrap()).unwrap();
        let code = maps.iter().find(|m| m.write && m.exec).unwrap().start;
        Self { child, out, code }
    }

    fn pid(&self) -> Tid {
        Tid::try_from(self.child.id()).unwrap()
    }

    /// Stops it when both threads are in their loops, and makes the loops restartable sequences.
    fn freeze_in_sections(&self) -> Frozen {
        let frozen = loop {
            let frozen = Frozen::freeze(self.pid(), Duration::from_secs(5)).unwrap();
            let inside: Vec<u64> = frozen.threads().iter().map(|t| t.regs.rip).collect();
            if inside == [self.code, self.code + 512] {
                break frozen;
            }
            frozen.thaw().unwrap();
        };
        let memory = Memory::open(self.pid()).unwrap();
        for thread in frozen.threads() {
            let start = thread.regs.rip;
            let section = [0, start, 2, start + 20];
            let bytes: Vec<u8> = section.iter().flat_map(|w| w.to_ne_bytes()).collect();
            let at = RemoteRange { start: start + 64, len: bytes.len() };
            memory.write_runs(&bytes, &[at]).unwrap();
            let pointer = attrs::traced_rseq(thread.tid).unwrap().area + 8;
            let at = RemoteRange { start: pointer, len: 8 };
            memory.write_runs(&(start + 64).to_ne_bytes(), &[at]).unwrap();
        }
        frozen
    }

    /// What both threads return, once they do; nothing if one is in its loop still, when the alarm comes.
    fn results(mut self) -> String {
        let mut line = String::new();
        self.out.read_line(&mut line).unwrap();
        line
    }
}

impl Drop for Loops {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn one_call() -> Batch {
    let mut batch = Batch::new();
    batch.call(libc::SYS_getpid, &[]);
    batch
}

/// As in the brief stop at the beginning of a migration: only the first thread runs a call.
#[test]
fn a_call_in_one_thread_aborts_the_sequences_of_both() {
    let loops = Loops::start();
    let mut frozen = loops.freeze_in_sections();
    frozen.run_all_ok("a call", &one_call()).unwrap();
    frozen.thaw().unwrap();
    assert_eq!(loops.results(), "42 42\n");
}

/// As in a migration that fails after registers were read.
#[test]
fn threads_let_go_without_calls_are_at_their_handlers() {
    let loops = Loops::start();
    let mut frozen = loops.freeze_in_sections();
    frozen.leave_rseq_sections().unwrap();
    let at: Vec<u64> = frozen.threads().iter().map(|t| t.regs.rip).collect();
    assert_eq!(at, [loops.code + 20, loops.code + 532]);
    frozen.thaw().unwrap();
    assert_eq!(loops.results(), "42 42\n");
}
