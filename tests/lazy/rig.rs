//! A worker, its freeze, and a source of its pages.

use std::collections::{BTreeMap, HashSet};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use migrate::engine::extents::Extents;
use migrate::engine::freeze::Frozen;
use migrate::engine::remote::{Batch, RemoteCalls};
use migrate::lazy::{Held, Keeper, Lazy, Left, Reader, Stats};
use migrate::proto::image::{Layout, Vma, VmaKind};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

pub(crate) const PAGE: u64 = 4096;
pub(crate) const HUGE: u64 = 2 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

/// A part of the worker's memory, as it printed it.
#[derive(Debug, Clone)]
pub(crate) struct Region {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) kind: String,
}

/// The program of `worker.c`.
pub(crate) struct Worker {
    child: Child,
    out: BufReader<ChildStdout>,
    pub(crate) regions: Vec<Region>,
}

fn program() -> std::path::PathBuf {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _building = ONE_AT_A_TIME.lock();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/lazy/worker.c");
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("lazy-worker");
    let time = |path: &Path| std::fs::metadata(path).and_then(|file| file.modified()).ok();
    if time(&program).is_none() || time(&program) < time(&source) {
        let output = Command::new("cc")
            .args(["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", "-o"])
            .arg(&program)
            .arg(&source)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    program
}

impl Worker {
    pub(crate) fn start(case: &str) -> Self {
        let _ = tracing_subscriber::fmt().with_test_writer().try_init();
        let mut child =
            Command::new(program()).arg(case).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let mut worker = Self { child, out, regions: Vec::new() };
        loop {
            let line = worker.line();
            if line == "ready" {
                break;
            }
            let words: Vec<&str> = line.split(' ').collect();
            let &["region", start, end, kind] = words.as_slice() else { panic!("{line:?}") };
            let hex = |word| u64::from_str_radix(word, 16).unwrap();
            worker.regions.push(Region { start: hex(start), end: hex(end), kind: kind.to_owned() });
        }
        worker.regions.sort_by_key(|r| r.start);
        worker
    }

    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap()
    }

    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.out.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    pub(crate) fn go(&mut self) {
        self.child.stdin.as_mut().unwrap().write_all(b"go\n").unwrap();
    }

    /// Its memory map where the regions are: what must be the same before and after.
    pub(crate) fn maps(&self) -> Vec<String> {
        let text = std::fs::read_to_string(format!("/proc/{}/maps", self.pid())).unwrap();
        let ours = |line: &&str| {
            let (start, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
            let hex = |word| u64::from_str_radix(word, 16).unwrap();
            self.regions.iter().any(|r| r.start < hex(end) && hex(start) < r.end)
        };
        text.lines().filter(ours).map(str::to_owned).collect()
    }

    pub(crate) fn fds(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }

    /// Whether any of its mappings is still watched.
    pub(crate) fn watched(&self) -> bool {
        let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", self.pid())).unwrap();
        smaps.lines().any(|l| l.starts_with("VmFlags:") && l.split(' ').any(|f| f == "um"))
    }

    pub(crate) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Its regions as a memory map, the whole of it.
    pub(crate) fn layout(&self) -> Layout {
        let vmas = self.regions.iter().map(|r| {
            let shared = r.kind.contains("shared");
            let kind = if shared { VmaKind::VmaAnonShared } else { VmaKind::VmaAnonPrivate };
            Vma {
                start: r.start,
                end: r.end,
                prot: 3,
                kind: kind.into(),
                // All shared regions of a case show the same object, from its beginning.
                shm_inode: u64::from(shared),
                page_bytes: if r.kind.contains("huge") { HUGE } else { 0 },
                advice: if r.kind == "wiped" {
                    vec![libc::MADV_WIPEONFORK.unsigned_abs()]
                } else {
                    Vec::new()
                },
                ..Vma::default()
            }
        });
        Layout { vmas: vmas.collect(), ..Layout::default() }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Which pages are missing: all, or two of three.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Take {
    All,
    Most,
}

/// Takes pages away from a stopped worker; names of what is missing now.
fn take_away(worker: &Worker, frozen: &mut Frozen, take: Take) -> Extents {
    let mut missing = Extents::new();
    let mut batch = Batch::new();
    let mut named = false;
    for r in &worker.regions {
        let shared = r.kind.contains("shared");
        // A second mapping of the same object.
        if shared && std::mem::replace(&mut named, true) {
            continue;
        }
        let unit = if r.kind.contains("huge") { HUGE } else { 16 * PAGE };
        let mut at = r.start;
        while at < r.end {
            let len = unit.min(r.end - at);
            if take == Take::All || (at / unit) % 3 != 0 {
                missing.insert(at, at + len);
                let advice = if shared { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
                batch.call(libc::SYS_madvise, &[at.into(), len.into(), advice.into()]);
            }
            at += len;
        }
    }
    frozen.run_all_ok("taking pages away", &batch).unwrap();
    missing
}

/// The contents of the page with this name.
pub(crate) fn contents(name: u64, into: &mut [u8]) {
    for (i, word) in into.chunks_exact_mut(8).enumerate() {
        let mut a = name + 8 * i as u64;
        a ^= a >> 17;
        a = a.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        a ^= a >> 29;
        word.copy_from_slice(&a.to_le_bytes());
    }
}

/// Where the pages come from: sends each once, asked for or pushed.
pub(crate) struct Source {
    unsent: Mutex<Extents>,
    huge: Vec<(u64, u64)>,
    /// Pages not to be sent for now.
    held: Mutex<HashSet<u64>>,
    pub(crate) asked: Mutex<Vec<u64>>,
}

impl Source {
    fn unit(&self, at: u64) -> u64 {
        if self.huge.iter().any(|(s, e)| (*s..*e).contains(&at)) { HUGE } else { PAGE }
    }

    /// Sends what of the range has not been sent.
    fn send(&self, lazy: &Lazy, start: u64, end: u64) {
        let parts: Vec<(u64, u64)> = {
            let mut unsent = self.unsent.lock().unwrap();
            let parts = unsent.overlap(start, end).collect();
            unsent.remove(start, end);
            parts
        };
        for (s, e) in parts {
            let mut bytes = vec![0; usize::try_from(e - s).unwrap()];
            contents(s, &mut bytes);
            lazy.install(s, &bytes).unwrap();
        }
    }

    fn answer(&self, lazy: &Lazy, page: u64) {
        if !self.held.lock().unwrap().contains(&page) {
            self.send(lazy, page, page + self.unit(page));
        }
    }

    /// No page is held back any more; those asked for are sent.
    pub(crate) fn release(&self, lazy: &Lazy) {
        self.held.lock().unwrap().clear();
        let asked = self.asked.lock().unwrap().clone();
        asked.into_iter().for_each(|page| self.answer(lazy, page));
    }

    /// Sends the first piece of what is left; false if nothing is.
    pub(crate) fn push_some(&self, lazy: &Lazy, piece: u64) -> bool {
        let next = self.unsent.lock().unwrap().iter().next();
        if let Some((s, e)) = next {
            self.send(lazy, s, e.min(s + piece));
        }
        next.is_some()
    }

    /// Sends everything that is left, in pieces, from both ends.
    pub(crate) fn push(&self, lazy: &Lazy, piece: u64) {
        let mut back = false;
        loop {
            let next = {
                let unsent = self.unsent.lock().unwrap();
                if back { unsent.iter().last() } else { unsent.iter().next() }
            };
            let Some((s, e)) = next else { return };
            if back {
                self.send(lazy, s.max(e.saturating_sub(piece)), e);
            } else {
                self.send(lazy, s, e.min(s + piece));
            }
            back = !back;
        }
    }
}

/// Holds duplicates, as a guardian does.
#[derive(Debug, Clone, Default)]
pub(crate) struct Kept(Arc<Mutex<BTreeMap<Held, OwnedFd>>>);

impl Keeper for Kept {
    fn keep(&mut self, what: &[(Held, BorrowedFd<'_>)]) -> std::io::Result<()> {
        let mut kept = self.0.lock().unwrap();
        for (held, fd) in what {
            kept.insert(*held, fd.try_clone_to_owned()?);
        }
        Ok(())
    }

    fn release(&mut self, what: Held) {
        self.0.lock().unwrap().remove(&what);
    }
}

/// A worker with missing pages, running.
pub(crate) struct Rig {
    pub(crate) worker: Worker,
    pub(crate) lazy: Arc<Lazy>,
    pub(crate) source: Arc<Source>,
    pub(crate) missing: Extents,
    maps: Vec<String>,
    fds: usize,
    answers: Option<Answers>,
    reader: Option<Reader>,
    kept: Kept,
}

type Answers = (Sender<Vec<u64>>, JoinHandle<()>);

impl Rig {
    pub(crate) fn start(case: &str, take: Take) -> Self {
        Self::start_holding(case, take, |_| HashSet::new())
    }

    pub(crate) fn start_holding(case: &str, take: Take, held: impl Fn(&Worker) -> HashSet<u64>) -> Self {
        let worker = Worker::start(case);
        let (maps, fds) = (worker.maps(), worker.fds());
        let mut frozen = Frozen::freeze(worker.pid(), PATIENCE).unwrap();
        let missing = take_away(&worker, &mut frozen, take);
        let huge = worker.regions.iter().filter(|r| r.kind.contains("huge")).map(|r| (r.start, r.end));
        let source = Arc::new(Source {
            unsent: Mutex::new(missing.clone()),
            huge: huge.collect(),
            held: Mutex::new(held(&worker)),
            asked: Mutex::new(Vec::new()),
        });
        let (asks, asked, ask) = line();
        let lazy = Arc::new(Lazy::start(&mut frozen, &worker.layout(), &missing, ask).unwrap());
        let kept = Kept::default();
        lazy.entrust(Box::new(kept.clone())).unwrap();
        let reader = Some(lazy.read_on_a_thread().unwrap());
        frozen.thaw().unwrap();
        let answers = Some((asks, answer(asked, &lazy, &source)));
        Self { worker, lazy, source, missing, maps, fds, answers, reader, kept }
    }

    /// What serves it ends without a word, and another goes on by what was kept.
    pub(crate) fn hand_over(&mut self) {
        let (asks, answering) = self.answers.take().unwrap();
        asks.send(Vec::new()).unwrap();
        answering.join().unwrap();
        self.reader = None;
        self.lazy.abandon();
        let (asks, asked, ask) = line();
        let kept: Vec<(Held, OwnedFd)> = {
            let kept = self.kept.0.lock().unwrap();
            kept.iter().map(|(held, fd)| (*held, fd.try_clone().unwrap())).collect()
        };
        let keeper = Box::new(self.kept.clone());
        self.lazy = Arc::new(Lazy::take_over(self.worker.pid(), &kept, keeper, ask).unwrap());
        self.reader = Some(self.lazy.read_on_a_thread().unwrap());
        self.answers = Some((asks, answer(asked, &self.lazy, &self.source)));
    }

    pub(crate) fn wait_asked(&self, count: usize) {
        let start = std::time::Instant::now();
        while self.source.asked.lock().unwrap().len() < count {
            assert!(start.elapsed() < PATIENCE, "nobody asks");
            std::thread::yield_now();
        }
    }

    pub(crate) fn wait_asked_for(&self, page: u64) {
        let start = std::time::Instant::now();
        while !self.source.asked.lock().unwrap().contains(&page) {
            assert!(start.elapsed() < PATIENCE, "nobody asks for {page:x}");
            std::thread::yield_now();
        }
    }

    /// Waits until nothing is missing and the worker is content; its memory is as before then.
    pub(crate) fn finish(mut self, same_maps: bool) -> Stats {
        assert_eq!(self.worker.line(), "ok");
        assert!(self.lazy.wait_done(PATIENCE), "{:?} missing", self.lazy.missing());
        let stats = self.stop();
        // A process that another test has just forked may hold a copy for a moment.
        while self.worker.watched() {
            std::thread::yield_now();
        }
        assert_eq!(self.worker.fds(), self.fds);
        if same_maps {
            assert_eq!(self.worker.maps(), self.maps);
        }
        stats
    }

    /// Nobody reads faults any more.
    pub(crate) fn leave_unread(&mut self) {
        self.reader = None;
    }

    /// Returns when there is one to be read.
    pub(crate) fn await_a_fault(&self) {
        let mut ready = [PollFd::new(self.lazy.events(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(PATIENCE).unwrap();
        assert_eq!(poll(&mut ready, timeout), Ok(1), "nobody faults");
    }

    /// Ends what serves it, and checks the numbers.
    pub(crate) fn stop(&mut self) -> Stats {
        if let Some((asks, answering)) = self.answers.take() {
            asks.send(Vec::new()).unwrap();
            answering.join().unwrap();
        }
        let stats = self.lazy.stats();
        println!("{stats:?}");
        let left: u64 = self.lazy.missing().total() / PAGE;
        assert_eq!(stats.initial, self.missing.total() / PAGE);
        if left == 0 {
            assert_eq!(stats.initial + stats.inherited, stats.installed + stats.dropped);
        }
        assert_eq!(stats.present, 0, "pages were there already");
        self.lazy.finish();
        self.reader = None;
        // The keeper has them still.
        assert_eq!(self.lazy.read(), Left::Nothing, "what was closed is reported");
        self.kept.0.lock().unwrap().clear();
        stats
    }
}

/// A channel of requests, and who puts them in.
fn line() -> (Sender<Vec<u64>>, Receiver<Vec<u64>>, migrate::lazy::Ask) {
    let (asks, asked) = channel::<Vec<u64>>();
    let ask = Mutex::new(asks.clone());
    let ask = Box::new(move |pages: &[u64]| {
        let _ = ask.lock().unwrap().send(pages.to_vec());
    });
    (asks, asked, ask)
}

fn answer(asked: Receiver<Vec<u64>>, lazy: &Arc<Lazy>, source: &Arc<Source>) -> JoinHandle<()> {
    let (lazy, source) = (Arc::clone(lazy), Arc::clone(source));
    std::thread::spawn(move || answer_all(&asked, &lazy, &source))
}

fn answer_all(asked: &Receiver<Vec<u64>>, lazy: &Lazy, source: &Source) {
    loop {
        match asked.recv_timeout(Duration::from_secs(3600)) {
            Ok(pages) if pages.is_empty() => return,
            Ok(pages) => {
                source.asked.lock().unwrap().extend(&pages);
                pages.into_iter().for_each(|page| source.answer(lazy, page));
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return,
        }
    }
}
