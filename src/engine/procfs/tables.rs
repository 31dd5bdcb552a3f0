//! The small tables of /proc/PID: limits, timers, clock offsets; and lists of CPUs.

use super::{ProcfsError, bad};

/// Names in /proc/PID/limits, in the order of RLIMIT_* numbers.
const LIMIT_NAMES: [&str; 16] = [
    "Max cpu time",
    "Max file size",
    "Max data size",
    "Max stack size",
    "Max core file size",
    "Max resident set",
    "Max processes",
    "Max open files",
    "Max locked memory",
    "Max address space",
    "Max file locks",
    "Max pending signals",
    "Max msgqueue size",
    "Max nice priority",
    "Max realtime priority",
    "Max realtime timeout",
];

/// Parses /proc/PID/limits: soft and hard limit by RLIMIT_* number, `u64::MAX` for unlimited.
///
/// # Errors
/// On a limit that has no known name, and if one is missing.
pub fn parse_limits(text: &[u8]) -> Result<[(u64, u64); 16], ProcfsError> {
    let mut limits = [None; 16];
    for line in text.split(|b| *b == b'\n').skip(1).filter(|l| !l.is_empty()) {
        let (resource, pair) = parse_limit(line).ok_or_else(|| bad(line))?;
        limits[resource] = Some(pair);
    }
    let mut all = [(0, 0); 16];
    for (slot, limit) in all.iter_mut().zip(limits) {
        *slot = limit.ok_or_else(|| bad(b"(a limit is missing)"))?;
    }
    Ok(all)
}

fn parse_limit(line: &[u8]) -> Option<(usize, (u64, u64))> {
    let line = std::str::from_utf8(line).ok()?;
    let (resource, values) =
        LIMIT_NAMES.iter().enumerate().find_map(|(i, name)| Some((i, line.strip_prefix(name)?)))?;
    let mut fields = values.split_ascii_whitespace().map(|v| match v {
        "unlimited" => Some(u64::MAX),
        v => v.parse().ok(),
    });
    Some((resource, (fields.next()??, fields.next()??)))
}

/// The name of an RLIMIT_* as /proc/PID/limits words it.
pub(crate) fn limit_name(resource: u32) -> &'static str {
    LIMIT_NAMES.get(resource as usize).copied().unwrap_or("unknown limit")
}

/// A POSIX timer as /proc/PID/timers tells of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcTimer {
    /// Its id, as timer_create gave it.
    pub id: i32,
    /// Signal it sends.
    pub signal: i32,
    /// The value that goes with the signal.
    pub sigval: u64,
    /// SIGEV_*: SIGEV_SIGNAL 0, SIGEV_NONE 1, SIGEV_THREAD 2, with SIGEV_THREAD_ID 4 for one thread.
    pub notify: i32,
    /// The thread or process that is told.
    pub target: i32,
    /// Clock id; negative ones are CPU-time clocks.
    pub clock: i32,
}

/// Parses /proc/PID/timers.
///
/// # Errors
/// On a line that it must not have, and on an incomplete timer.
pub fn parse_timers(text: &[u8]) -> Result<Vec<ProcTimer>, ProcfsError> {
    let mut timers = Vec::new();
    let mut lines = text.split(|b| *b == b'\n').filter(|l| !l.is_empty());
    while let Some(first) = lines.next() {
        let four = [Some(first), lines.next(), lines.next(), lines.next()];
        timers.push(parse_timer(four).ok_or_else(|| bad(first))?);
    }
    Ok(timers)
}

fn parse_timer(lines: [Option<&[u8]>; 4]) -> Option<ProcTimer> {
    let [id, signal, notify, clock] = lines.map(|l| l.and_then(|l| std::str::from_utf8(l).ok()));
    let (signal, sigval) = signal?.strip_prefix("signal: ")?.split_once('/')?;
    let sigval = sigval.strip_prefix("0x").unwrap_or(sigval);
    let (notify, target) = notify?.strip_prefix("notify: ")?.split_once('/')?;
    let (kind, target) = target.split_once('.')?;
    let how = match notify {
        "signal" => libc::SIGEV_SIGNAL,
        "none" => libc::SIGEV_NONE,
        "thread" => libc::SIGEV_THREAD,
        _ => return None,
    };
    let to_thread = match kind {
        "tid" => libc::SIGEV_THREAD_ID,
        "pid" => 0,
        _ => return None,
    };
    Some(ProcTimer {
        id: id?.strip_prefix("ID: ")?.parse().ok()?,
        signal: signal.parse().ok()?,
        // The kernel prints a pointer; a null one is `(null)` on some versions.
        sigval: if sigval == "(null)" { 0 } else { u64::from_str_radix(sigval, 16).ok()? },
        notify: how | to_thread,
        target: target.parse().ok()?,
        clock: clock?.strip_prefix("ClockID: ")?.parse().ok()?,
    })
}

/// How the clocks of a time namespace differ from the machine's, nanoseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ClockOffsets {
    /// CLOCK_MONOTONIC.
    pub monotonic_ns: i64,
    /// CLOCK_BOOTTIME.
    pub boottime_ns: i64,
}

/// Parses /proc/PID/timens_offsets.
///
/// # Errors
/// On a line that is not `CLOCK SECONDS NANOSECONDS`.
pub fn parse_timens_offsets(text: &[u8]) -> Result<ClockOffsets, ProcfsError> {
    let mut offsets = ClockOffsets::default();
    for line in text.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
        take_offset(&mut offsets, line).ok_or_else(|| bad(line))?;
    }
    Ok(offsets)
}

fn take_offset(offsets: &mut ClockOffsets, line: &[u8]) -> Option<()> {
    let mut fields = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let clock = fields.next()?;
    let (seconds, ns): (i64, i64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    let total = seconds.checked_mul(1_000_000_000)?.checked_add(ns)?;
    match clock {
        "monotonic" => offsets.monotonic_ns = total,
        "boottime" => offsets.boottime_ns = total,
        _ => {}
    }
    Some(())
}

/// Most CPUs that a list may name: more than any kernel is built for.
const MAX_CPUS: usize = 8192;

/// Parses a list of CPUs (`0-3,8`), as in /sys/devices/system/cpu/online.
///
/// # Errors
/// If it is none, or names a CPU beyond what kernels support.
pub fn parse_cpu_list(text: &[u8]) -> Result<Vec<usize>, ProcfsError> {
    let mut cpus = Vec::new();
    let list = std::str::from_utf8(text).map_err(|_| bad(text))?;
    for part in list.trim().split(',').filter(|p| !p.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) =
            first.parse().ok().zip(last.parse().ok()).ok_or_else(|| bad(text))?;
        if last >= MAX_CPUS || first > last {
            return Err(bad(text));
        }
        cpus.extend(first..=last);
    }
    Ok(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn our_own_limits() {
        let limits = parse_limits(&std::fs::read("/proc/self/limits").unwrap()).unwrap();
        let (soft, hard) =
            nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap();
        assert_eq!(limits[7], (soft, hard));
        assert!(parse_limits(b"Limit\nMax cpu time 1 2 seconds\n").is_err());
        assert!(parse_limits(b"Limit\nMax fun 1 2\n").is_err());
    }

    #[test]
    fn timers() {
        let text = b"ID: 1\nsignal: 60/00007fff86e452a8\nnotify: signal/pid.2634\nClockID: 0\n\
            ID: 7\nsignal: 32/0000000000000000\nnotify: signal/tid.12\nClockID: -6\n";
        let timers = parse_timers(text).unwrap();
        assert_eq!(
            timers[0],
            ProcTimer { id: 1, signal: 60, sigval: 0x7fff_86e4_52a8, notify: 0, target: 2634, clock: 0 }
        );
        assert_eq!((timers[1].id, timers[1].notify, timers[1].target, timers[1].clock), (7, 4, 12, -6));
        assert!(parse_timers(b"ID: 1\nsignal: 60/0\n").is_err());
        assert_eq!(parse_timers(b"").unwrap(), []);
    }

    #[test]
    fn offsets_and_cpu_lists() {
        let offsets = parse_timens_offsets(b"monotonic           1         5\nboottime -2 0\n").unwrap();
        assert_eq!(offsets, ClockOffsets { monotonic_ns: 1_000_000_005, boottime_ns: -2_000_000_000 });
        assert!(parse_timens_offsets(b"monotonic 9223372036854775807 0\n").is_err());
        parse_timens_offsets(&std::fs::read("/proc/self/timens_offsets").unwrap()).unwrap();
        assert_eq!(parse_cpu_list(b"0-2,5\n").unwrap(), [0, 1, 2, 5]);
        assert!(parse_cpu_list(b"\n").unwrap().is_empty());
        assert!(parse_cpu_list(b"0-99999999999").is_err() && parse_cpu_list(b"3-1").is_err());
        assert!(
            !parse_cpu_list(&std::fs::read("/sys/devices/system/cpu/online").unwrap()).unwrap().is_empty()
        );
    }

    proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300), timer in "ID: .{0,6}\nsignal: .{0,9}\nnotify: .{0,20}\nClockID: .{0,5}") {
            let _ = parse_limits(&bytes);
            let _ = parse_timers(&bytes);
            let _ = parse_timers(timer.as_bytes());
            let _ = parse_timens_offsets(&bytes);
            let _ = parse_cpu_list(&bytes);
        }
    }
}
