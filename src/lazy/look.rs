//! What /proc tells about a process whose pages are missing, where its userfaultfd does not tell enough.

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::engine::freeze::thread_ids;
use crate::engine::procfs::{self, MapsEntry};
use crate::engine::remote::Tid;

/// A thread inside of madvise(2) (or process_madvise(2) on itself).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Advising {
    start: u64,
    end: u64,
    advice: i32,
}

/// What is known about a range whose contents are given up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Advice {
    /// The contents of shared memory stay (MADV_DONTNEED), but for these ranges (MADV_REMOVE).
    Known(Vec<(u64, u64)>),
    /// No thread was seen that does it.
    Unknown,
}

impl Advising {
    /// What these threads mean for the shared memory in `start..end`.
    pub(super) fn judge(seen: &[Self], start: u64, end: u64) -> Advice {
        let holes: Vec<(u64, u64)> = seen
            .iter()
            .filter(|a| a.advice == libc::MADV_REMOVE)
            .map(|a| (a.start.max(start), a.end.min(end)))
            .filter(|(s, e)| s < e)
            .collect();
        let covered = seen.iter().any(|a| a.start <= start && end <= a.end);
        if covered || !holes.is_empty() { Advice::Known(holes) } else { Advice::Unknown }
    }
}

/// How often threads that run are looked at again, and after which time: on a busy machine one that is woken
/// does not run for tens of milliseconds.
const LOOKS: usize = 20_000;
const LOOK_AGAIN: Duration = Duration::from_micros(20);
/// More CPU time than a thread takes to find out that it was woken for another's event.
const BRIEF_NS: u64 = 50_000;

/// All threads of `pid` that give memory up and wait for us; of all processes if it is not known.
///
/// A thread that runs cannot be looked into; and one that waits with an event runs for a moment whenever
/// another's event is read. So those that run are looked at until they wait, or have run too long for that.
pub(super) fn advising(pid: Option<Tid>) -> Vec<Advising> {
    let mut seen = Vec::new();
    let mut left: Vec<(Tid, Tid, Option<u64>)> = tasks(pid).map(|(pid, tid)| (pid, tid, None)).collect();
    for look in 0..LOOKS {
        if look > 0 {
            std::thread::sleep(LOOK_AGAIN);
        }
        left.retain_mut(|(pid, tid, ran)| {
            let task = format!("/proc/{pid}/task/{tid}");
            let text = match std::fs::read(format!("{task}/syscall")) {
                Ok(text) => text,
                // It has ended, or has changed its mind while it was looked at.
                Err(error) => return error.raw_os_error() == Some(libc::EAGAIN),
            };
            seen.extend(parse_advising(&text));
            if !text.starts_with(b"running") {
                return false;
            }
            let now = cpu_time(&task);
            let since = *ran.get_or_insert(now);
            now.saturating_sub(since) < BRIEF_NS
        });
        if left.is_empty() {
            break;
        }
    }
    seen
}

/// How long a thread has run, in nanoseconds.
fn cpu_time(task: &str) -> u64 {
    let text = std::fs::read(format!("{task}/schedstat")).unwrap_or_default();
    procfs::parse_schedstat(&text).unwrap_or_default().ran_ns
}

/// Whether a thread of `pid` (of any process, if it is not known) has told of an event and waits.
pub(super) fn waits_with_event(pid: Option<Tid>) -> bool {
    tasks(pid).any(|(pid, tid)| {
        let at = std::fs::read(format!("/proc/{pid}/task/{tid}/wchan")).unwrap_or_default();
        at.starts_with(b"userfaultfd_event_wait_completion")
    })
}

/// The threads of a process, or of all: both numbers.
fn tasks(pid: Option<Tid>) -> impl Iterator<Item = (Tid, Tid)> {
    let pids: Vec<Tid> = match pid {
        Some(pid) => vec![pid],
        None => std::fs::read_dir("/proc")
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect(),
    };
    pids.into_iter()
        .flat_map(|pid| thread_ids(pid).unwrap_or_default().into_iter().map(move |tid| (pid, tid)))
}

/// Reads /proc/PID/task/TID/syscall: the number and six arguments, or `running`.
fn parse_advising(text: &[u8]) -> Option<Advising> {
    let text = std::str::from_utf8(text).ok()?;
    let mut words = text.split_ascii_whitespace();
    let number: i64 = words.next()?.parse().ok()?;
    let args: Vec<u64> = words
        .take(6)
        .map(|word| u64::from_str_radix(word.trim_start_matches("0x"), 16))
        .collect::<Result<_, _>>()
        .ok()?;
    match (number, args.as_slice()) {
        (libc::SYS_madvise, &[start, len, advice, ..]) => Some(Advising {
            start,
            end: start.saturating_add(len).checked_next_multiple_of(4096).unwrap_or(u64::MAX),
            advice: i32::try_from(advice & 0xffff_ffff).ok()?,
        }),
        // Its ranges are in memory: it may mean any.
        (libc::SYS_process_madvise, &[_, _, _, advice, ..]) => {
            Some(Advising { start: 0, end: u64::MAX, advice: i32::try_from(advice & 0xffff_ffff).ok()? })
        }
        _ => None,
    }
}

/// The mapping of a process that holds `address`. `Err`: nothing can be learnt about the process.
pub(super) fn mapping(tid: Tid, address: u64) -> Result<Option<MapsEntry>, ()> {
    let maps = maps(tid)?;
    Ok(maps.into_iter().find(|m| m.start <= address && address < m.end))
}

/// All mappings of the process of a thread.
pub(super) fn maps(tid: Tid) -> Result<Vec<MapsEntry>, ()> {
    let text = std::fs::read(format!("/proc/{tid}/maps")).map_err(drop)?;
    let maps = procfs::parse_maps(&text).map_err(drop)?;
    // A leader that has ended before its threads shows nothing.
    if maps.is_empty() { Err(()) } else { Ok(maps) }
}

/// The object behind a mapping, to write to it.
pub(super) fn object(tid: Tid, mapping: &MapsEntry) -> std::io::Result<File> {
    let path = format!("/proc/{tid}/map_files/{:x}-{:x}", mapping.start, mapping.end);
    File::options().read(true).write(true).open(path)
}

/// Whether there is something to read.
pub(super) fn has_message(uffd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(uffd, PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO) == Ok(1)
}

/// Whether a thread waits for a page and its message has not been read. (One that finds its page after
/// all is counted for a moment.)
pub(super) fn has_fault(uffd: BorrowedFd<'_>) -> bool {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", uffd.as_raw_fd()));
    let text = text.unwrap_or_default();
    let faults = text.lines().find_map(|l| l.strip_prefix("pending:")).map(str::trim);
    faults.is_some_and(|count| count != "0")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_thread_that_punches_a_hole() {
        let text = b"28 0x7f0000001000 0x1800 0x9 0x0 0x0 0x0 0x7ffc00000000 0x7f1111111111\n";
        let seen = parse_advising(text).unwrap();
        assert_eq!(seen, Advising { start: 0x7f00_0000_1000, end: 0x7f00_0000_3000, advice: 9 });
        let judge = |start, end| Advising::judge(&[seen], start, end);
        assert_eq!(judge(0x7f00_0000_1000, 0x7f00_0000_3000), Advice::Known(vec![(seen.start, seen.end)]));
        assert_eq!(judge(0x7f00_0000_8000, 0x7f00_0000_9000), Advice::Unknown);
        let keeps = Advising { advice: libc::MADV_DONTNEED, ..seen };
        assert_eq!(Advising::judge(&[keeps], seen.start, seen.end), Advice::Known(Vec::new()));
        assert_eq!(parse_advising(b"running\n"), None);
        assert_eq!(parse_advising(b"0 0x0 0x7f 0x400 0x0 0x0 0x0 0x7ffc 0x7f\n"), None);
    }

    proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = parse_advising(&bytes);
        }
    }
}
