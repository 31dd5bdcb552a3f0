//! What a process looks like from outside, and how two looks differ.
//!
//! Left out because they rightly differ: addresses of kernel objects (socket and pipe inodes become an
//! index of first appearance), times, counts of faults, and counters that go on by themselves.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use migrate::testbed::Host;

use crate::case::{Result, ensure, fail};

/// The lines of `/proc/PID/status` that a move carries.
const STATUS: &[&str] = &[
    "Name",
    "Umask",
    "Tgid",
    "Pid",
    "TracerPid",
    "Uid",
    "Gid",
    "FDSize",
    "Groups",
    "NStgid",
    "NSpid",
    "NSpgid",
    "NSsid",
    "VmLck",
    "Threads",
    "SigQ",
    "SigPnd",
    "ShdPnd",
    "SigBlk",
    "SigIgn",
    "SigCgt",
    "CapInh",
    "CapPrm",
    "CapEff",
    "CapBnd",
    "CapAmb",
    "NoNewPrivs",
    "Seccomp",
    "Cpus_allowed",
];
/// Of each thread; signals are left to the leader, as a thread may be inside a handler now and then.
const THREAD_STATUS: &[&str] =
    &["Name", "Uid", "Gid", "SigIgn", "SigCgt", "CapEff", "NoNewPrivs", "Cpus_allowed"];

/// Which signals the leader blocks.
const BLOCKED: &str = "status SigBlk";
/// How long a process may take to look the same twice.
const PATIENCE: Duration = Duration::from_secs(20);

/// One look at a process.
pub(crate) struct Snapshot {
    /// Everything that must be the same, by what it is.
    facts: BTreeMap<String, String>,
    /// All resident memory; and what of it is nobody else's.
    resident_kib: u64,
    private_kib: u64,
    /// Whether its leader runs, and how long it has run, in ns.
    runs: bool,
    ran: u64,
}

impl Snapshot {
    /// Looks at a process of a host. A program that sends itself signals is inside the handler for a moment now and
    /// then: it is looked at until its leader has run between two looks, or sleeps, and both say the same of the signals
    /// it blocks.
    pub(crate) fn take(host: &Host, pid: i32) -> Result<Self> {
        let end = Instant::now() + PATIENCE;
        let mut last = Self::look(host, pid)?;
        while Instant::now() < end {
            let next = Self::look(host, pid)?;
            let same = last.facts.get(BLOCKED) == next.facts.get(BLOCKED);
            let later = !next.runs || next.ran > last.ran;
            if same && later {
                return Ok(next);
            }
            if later {
                last = next;
            }
        }
        fail("the signals it blocks are never the same twice")
    }

    fn look(host: &Host, pid: i32) -> Result<Self> {
        let directory = host.proc(pid);
        let mut facts = BTreeMap::new();
        for name in ["cmdline", "comm", "environ", "personality", "coredump_filter", "oom_score_adj"] {
            let bytes = std::fs::read(directory.join(name))?;
            facts.insert(name.to_owned(), String::from_utf8_lossy(&bytes).into_owned());
        }
        for name in ["exe", "cwd", "root"] {
            facts.insert(name.to_owned(), link(&directory.join(name))?);
        }
        let status = fields(&directory.join("status"))?;
        for name in STATUS {
            // `FDSize` is how far the table has grown, not what is in it.
            if *name != "FDSize" && *name != "SigQ" {
                facts.insert(format!("status {name}"), status.get(*name).cloned().unwrap_or_default());
            }
        }
        // A signal that is pending and not blocked is on its way: the next look finds it gone.
        let signals = |name: &str| -> Result<u64> {
            let text = status.get(name).ok_or_else(|| format!("no {name}"))?;
            Ok(u64::from_str_radix(text, 16)?)
        };
        for name in ["SigPnd", "ShdPnd"] {
            let lasting = signals(name)? & signals("SigBlk")?;
            facts.insert(format!("status {name}"), format!("{lasting:016x}"));
        }
        threads(&directory, &mut facts)?;
        facts.insert("maps".to_owned(), maps(&std::fs::read_to_string(directory.join("maps"))?));
        descriptors(&directory, &mut facts)?;
        let limits = std::fs::read_to_string(directory.join("limits"))?;
        facts.insert("limits".to_owned(), limits);
        let kib = |name: &str| -> Result<u64> {
            let number = status.get(name).and_then(|text| text.split_whitespace().next());
            Ok(number.ok_or_else(|| format!("no {name}"))?.parse()?)
        };
        let schedstat = std::fs::read_to_string(directory.join(format!("task/{pid}/schedstat")))?;
        let ran = schedstat.split(' ').next().unwrap_or_default().parse()?;
        let runs = status.get("State").is_some_and(|state| state.starts_with('R'));
        Ok(Self { facts, resident_kib: kib("VmRSS")?, private_kib: kib("RssAnon")?, runs, ran })
    }

    /// An error that lists what differs from an earlier look.
    pub(crate) fn compare(&self, before: &Self) -> Result {
        let mut text = String::new();
        let mut names: Vec<&String> = before.facts.keys().chain(self.facts.keys()).collect();
        names.sort_unstable();
        names.dedup();
        for name in names {
            let (was, is) = (before.facts.get(name), self.facts.get(name));
            if was != is {
                writeln!(text, "{name}:\n{}", difference(was, is))?;
            }
        }
        // Within 2 %. A small process may touch a few pages more or less between the two looks; and of a file, or
        // of shared memory, the kernel maps 64 KiB around each page that is touched, as far as it has them by then.
        for (name, was, is, few) in [
            ("private memory", before.private_kib, self.private_kib, 128),
            ("resident memory", before.resident_kib, self.resident_kib, 256),
        ] {
            if is.abs_diff(was) > (was / 50).max(few) {
                writeln!(text, "{name}: was {was} KiB, is {is} KiB")?;
            }
        }
        ensure(text.is_empty(), || format!("seen from outside, the process changed:\n{text}"))
    }
}

fn difference(was: Option<&String>, is: Option<&String>) -> String {
    let (was, is) = (was.map_or("", String::as_str), is.map_or("", String::as_str));
    let mut text = String::new();
    for line in was.lines().filter(|line| !is.lines().any(|other| other == *line)) {
        let _ = writeln!(text, "  was {line}");
    }
    for line in is.lines().filter(|line| !was.lines().any(|other| other == *line)) {
        let _ = writeln!(text, "  is  {line}");
    }
    text
}

fn threads(directory: &Path, facts: &mut BTreeMap<String, String>) -> Result {
    for entry in std::fs::read_dir(directory.join("task"))? {
        let entry = entry?;
        // A short-lived thread may end between the listing and the look.
        let Ok(status) = fields(&entry.path().join("status")) else { continue };
        let mut text = String::new();
        for name in THREAD_STATUS {
            writeln!(text, "{name} {}", status.get(*name).map_or("", String::as_str))?;
        }
        facts.insert(format!("thread {}", entry.file_name().to_string_lossy()), text);
    }
    Ok(())
}

fn descriptors(directory: &Path, facts: &mut BTreeMap<String, String>) -> Result {
    let mut numbers: Vec<u32> = std::fs::read_dir(directory.join("fd"))?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    numbers.sort_unstable();
    let mut objects: HashMap<String, usize> = HashMap::new();
    for number in numbers {
        let Ok(mut target) = link(&directory.join(format!("fd/{number}"))) else { continue };
        if target.starts_with("socket:[") || target.starts_with("pipe:[") {
            let count = objects.len();
            let index = *objects.entry(target.clone()).or_insert(count);
            let kind = target.split(':').next().unwrap_or_default();
            target = format!("{kind} object {index}");
        }
        let info = std::fs::read_to_string(directory.join(format!("fdinfo/{number}"))).unwrap_or_default();
        // A position moves while the process runs; the flags do not.
        let flags = info.lines().find(|line| line.starts_with("flags:")).unwrap_or_default();
        facts.insert(format!("descriptor {number:4}"), format!("{target} {flags}"));
    }
    Ok(())
}

/// The memory map with equal neighbours joined: whether the kernel merged two of them is not visible to
/// the process.
fn maps(text: &str) -> String {
    let mut lines: Vec<(u64, u64, String, u64, String)> = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let (Some(range), Some(prot), Some(offset)) = (words.next(), words.next(), words.next()) else {
            continue;
        };
        let name = words.skip(2).collect::<Vec<_>>().join(" ");
        let hex = |text: &str| u64::from_str_radix(text, 16).unwrap_or(0);
        let (start, end) = range.split_once('-').map_or((0, 0), |(start, end)| (hex(start), hex(end)));
        let offset = hex(offset);
        if let Some(last) = lines.last_mut()
            && last.1 == start
            && last.2 == prot
            && last.4 == name
            && (name.is_empty() || name.starts_with('[') || last.3 + (start - last.0) == offset)
        {
            last.1 = end;
            continue;
        }
        lines.push((start, end, prot.to_owned(), offset, name));
    }
    lines.iter().fold(String::new(), |mut text, (start, end, prot, offset, name)| {
        let _ = writeln!(text, "{start:x}-{end:x} {prot} {offset:x} {name}");
        text
    })
}

fn fields(path: &Path) -> Result<HashMap<String, String>> {
    let text = std::fs::read_to_string(path)?;
    let split = text.lines().filter_map(|line| line.split_once(':'));
    Ok(split.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect())
}

fn link(path: &Path) -> Result<String> {
    Ok(std::fs::read_link(path)?.to_string_lossy().into_owned())
}
