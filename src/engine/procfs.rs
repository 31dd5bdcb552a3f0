//! Files of /proc/PID: read, and text to types, which is pure and never panics on any input.

mod read;
mod status;
mod tables;

pub use read::{read, read_text, socket_behind};
pub use status::{Status, parse_status};
pub(crate) use tables::limit_name;
pub use tables::{ClockOffsets, ProcTimer, parse_cpu_list, parse_limits, parse_timens_offsets, parse_timers};

/// A line that does not have the form that proc(5) promises.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unexpected line: {line}")]
pub struct ProcfsError {
    /// The line, as far as it is text.
    pub line: String,
}

fn bad(line: &[u8]) -> ProcfsError {
    ProcfsError { line: String::from_utf8_lossy(&line[..line.len().min(200)]).into_owned() }
}

/// A line of /proc/PID/maps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MapsEntry {
    /// First address.
    pub start: u64,
    /// First address behind it.
    pub end: u64,
    /// Readable.
    pub read: bool,
    /// Writable.
    pub write: bool,
    /// Executable.
    pub exec: bool,
    /// MAP_SHARED.
    pub shared: bool,
    /// Offset in the file, bytes.
    pub offset: u64,
    /// Major and minor device number.
    pub dev: (u32, u32),
    /// Inode number; 0: no file.
    pub inode: u64,
    /// Path or label, unescaped (a newline is `\012` in the file).
    pub path: Vec<u8>,
}

fn hex(bytes: &[u8]) -> Option<u64> {
    u64::from_str_radix(std::str::from_utf8(bytes).ok()?, 16).ok()
}

/// Parses /proc/PID/maps.
///
/// # Errors
/// On the first line that is not one.
pub fn parse_maps(text: &[u8]) -> Result<Vec<MapsEntry>, ProcfsError> {
    text.split(|b| *b == b'\n')
        .filter(|l| !l.is_empty())
        .map(|line| parse_maps_line(line).ok_or_else(|| bad(line)))
        .collect()
}

fn parse_maps_line(line: &[u8]) -> Option<MapsEntry> {
    // address perms offset dev inode, then blanks and the path to the end of the line.
    let mut fields = line.splitn(6, |b| *b == b' ');
    let mut range = fields.next()?.splitn(2, |b| *b == b'-');
    let (start, end) = (hex(range.next()?)?, hex(range.next()?)?);
    let perms = fields.next()?;
    let offset = hex(fields.next()?)?;
    let mut dev = fields.next()?.splitn(2, |b| *b == b':');
    let dev = (hex(dev.next()?)?, hex(dev.next()?)?);
    let inode = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    let path = fields.next().unwrap_or_default().trim_ascii_start();
    let flag = |at: usize, c: u8| perms.get(at) == Some(&c);
    (start < end && perms.len() >= 4).then(|| MapsEntry {
        start,
        end,
        read: flag(0, b'r'),
        write: flag(1, b'w'),
        exec: flag(2, b'x'),
        shared: flag(3, b's'),
        offset,
        dev: (u32::try_from(dev.0).unwrap_or(0), u32::try_from(dev.1).unwrap_or(0)),
        inode,
        path: unescape(path),
    })
}

/// Undoes the kernel's `\012` for a newline.
fn unescape(path: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(path.len());
    let mut rest = path;
    while let Some((&first, tail)) = rest.split_first() {
        if rest.starts_with(b"\\012") {
            out.push(b'\n');
            rest = &rest[4..];
        } else {
            out.push(first);
            rest = tail;
        }
    }
    out
}

/// A mapping, and its two-letter VmFlags.
pub type MappingFlags = (MapsEntry, Vec<[u8; 2]>);

/// VmFlags of each mapping in /proc/PID/smaps (proc_pid_smaps(5)).
///
/// # Errors
/// On a header line that is not one.
pub fn parse_smaps_flags(text: &[u8]) -> Result<Vec<MappingFlags>, ProcfsError> {
    let mut all: Vec<MappingFlags> = Vec::new();
    for line in text.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
        if let Some(flags) = line.strip_prefix(b"VmFlags:") {
            if let Some((_, list)) = all.last_mut() {
                *list = flags.split(|b| *b == b' ').filter_map(|f| f.try_into().ok()).collect();
            }
        } else if line.first().is_some_and(u8::is_ascii_hexdigit)
            && !line.first().is_some_and(u8::is_ascii_uppercase)
        {
            let entry = parse_maps_line(line).ok_or_else(|| bad(line))?;
            all.push((entry, Vec::new()));
        }
    }
    Ok(all)
}

/// Times of a thread since it began (/proc/PID/task/TID/schedstat; Documentation/scheduler/sched-stats.rst).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SchedTimes {
    /// That it ran, nanoseconds.
    pub ran_ns: u64,
    /// That it was ready and waited for a processor, nanoseconds.
    pub waited_ns: u64,
}

/// Parses a line of `ran waited timeslices`; `None` if it is not one.
#[must_use]
pub fn parse_schedstat(line: &[u8]) -> Option<SchedTimes> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    Some(SchedTimes { ran_ns: words.next()?.parse().ok()?, waited_ns: words.next()?.parse().ok()? })
}

/// /proc/PID/stat, the fields that matter here (proc_pid_stat(5)).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stat {
    /// Name, without the parentheses.
    pub comm: Vec<u8>,
    /// One letter: R, S, D, T, t, Z, X, I.
    pub state: u8,
    /// Parent.
    pub ppid: i32,
    /// Process group.
    pub pgrp: i32,
    /// Session.
    pub session: i32,
    /// Controlling terminal, 0: none.
    pub tty_nr: i32,
    /// PF_* flags of the kernel.
    pub flags: u32,
    /// Start time in clock ticks since boot: with the PID, it names a process for good.
    pub starttime: u64,
    /// CPU it ran on last.
    pub processor: i32,
    /// Addresses of the mm.
    pub start_code: u64,
    /// End of the text.
    pub end_code: u64,
    /// Bottom of the stack.
    pub start_stack: u64,
    /// Start of initialised data.
    pub start_data: u64,
    /// End of all data.
    pub end_data: u64,
    /// Start of the heap.
    pub start_brk: u64,
    /// Start of the arguments.
    pub arg_start: u64,
    /// End of the arguments.
    pub arg_end: u64,
    /// Start of the environment.
    pub env_start: u64,
    /// End of the environment.
    pub env_end: u64,
}

/// Parses /proc/PID/stat.
///
/// # Errors
/// If it is not one line of at least 51 fields.
pub fn parse_stat(text: &[u8]) -> Result<Stat, ProcfsError> {
    parse_stat_line(text).ok_or_else(|| bad(text))
}

fn parse_stat_line(text: &[u8]) -> Option<Stat> {
    // The name may hold blanks and parentheses: it ends at the last one.
    let open = text.iter().position(|b| *b == b'(')?;
    let close = text.iter().rposition(|b| *b == b')')?;
    let comm = text.get(open + 1..close)?.to_vec();
    let rest = std::str::from_utf8(text.get(close + 1..)?).ok()?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    // Numbered as in the manual page: field 3 is the first behind the name.
    let field = |n: usize| fields.get(n.checked_sub(3)?).copied();
    let u = |n| field(n).and_then(|f| f.parse::<u64>().ok());
    let i = |n| field(n).and_then(|f| f.parse::<i32>().ok());
    Some(Stat {
        comm,
        state: *field(3)?.as_bytes().first()?,
        ppid: i(4)?,
        pgrp: i(5)?,
        session: i(6)?,
        tty_nr: i(7)?,
        flags: u32::try_from(u(9)?).ok()?,
        starttime: u(22)?,
        processor: i(39)?,
        start_code: u(26)?,
        end_code: u(27)?,
        start_stack: u(28)?,
        start_data: u(45)?,
        end_data: u(46)?,
        start_brk: u(47)?,
        arg_start: u(48)?,
        arg_end: u(49)?,
        env_start: u(50)?,
        env_end: u(51)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::trial::{Killed, until_asleep};
    use proptest::prelude::*;

    #[test]
    fn times_of_a_thread() {
        assert_eq!(parse_schedstat(b"900 100 7\n"), Some(SchedTimes { ran_ns: 900, waited_ns: 100 }));
        assert!([&b""[..], b"9", b"x y z", b"-1 2 3"].iter().all(|line| parse_schedstat(line).is_none()));
    }

    #[test]
    fn reads_our_own() {
        let maps = parse_maps(&std::fs::read("/proc/self/maps").unwrap()).unwrap();
        assert!(maps.iter().any(|m| m.path == b"[vdso]" && m.exec && !m.write));
        // Of a process that does not map and unmap something between two looks, as the tests beside this one do.
        let child = Killed::sleeper();
        until_asleep(child.id());
        let file = |name| std::fs::read(format!("/proc/{}/{name}", child.id())).unwrap();
        let (maps, flags) = (parse_maps(&file("maps")).unwrap(), parse_smaps_flags(&file("smaps")).unwrap());
        assert!(flags.len() >= maps.len() - 2);
        assert!(flags.iter().any(|(.., f)| f.contains(b"gd")), "the stack grows down");
        let stat = parse_stat(&std::fs::read("/proc/self/stat").unwrap()).unwrap();
        assert!(stat.arg_start < stat.arg_end && stat.start_brk > 0 && stat.starttime > 0);
    }

    #[test]
    fn names_with_parentheses_and_newlines() {
        let mut line = b"7 (a) (b) S 1 2 3 0 -1 4194304".to_vec();
        for n in 10..=52 {
            line.extend_from_slice(format!(" {n}").as_bytes());
        }
        let stat = parse_stat(&line).unwrap();
        assert_eq!(
            (stat.comm.as_slice(), stat.state, stat.starttime, stat.env_end),
            (&b"a) (b"[..], b'S', 22, 51)
        );
        let maps = parse_maps(b"1000-2000 rw-s 00003000 08:01 42    /a b\\012c\n").unwrap();
        assert_eq!(maps[0].path, b"/a b\nc");
        assert!(maps[0].shared && maps[0].inode == 42 && maps[0].offset == 0x3000);
    }

    proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse_maps(&bytes);
            let _ = parse_smaps_flags(&bytes);
            let _ = parse_stat(&bytes);
        }
    }
}
