//! One sleeping thread, seen from outside: its call, its timeout, since when.

use super::{Place, Sleep};
use crate::engine::procfs;
use crate::engine::remote::Tid;
use crate::engine::sys::vm::{self, RemoteRange};

const NS: u64 = 1_000_000_000;
const NS_PER_MS: u64 = 1_000_000;
/// Operation of a futex call without its flags (FUTEX_PRIVATE_FLAG, FUTEX_CLOCK_REALTIME).
const FUTEX_COMMAND: u64 = 0x7f;
const FUTEX_WAIT: u64 = 0;
/// Clocks above are CPU clocks or of devices: below zero, as an unsigned number.
const LAST_CLOCK: u64 = 11;
const CPU_CLOCKS: [u64; 2] = [2, 3];

/// One thread.
#[derive(Debug, Clone, Copy)]
pub(super) struct Target {
    pub(super) pid: Tid,
    pub(super) tid: Tid,
}

/// The call that a thread is blocked in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Blocked {
    pub(super) number: i64,
    pub(super) place: Place,
}

/// A look at a thread that did not move meanwhile.
#[derive(Debug)]
pub(super) struct Asleep {
    pub(super) blocked: Blocked,
    pub(super) sched: Sched,
    /// The CPU that it slept in on: the one whose clock `exec_start` is of.
    pub(super) cpu: usize,
}

/// Fields of /proc/PID/task/TID/sched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sched {
    /// When the thread last began or ended to run, on the clock of its CPU.
    pub(super) exec_start: u64,
    /// Voluntary context switches.
    pub(super) switches: u64,
}

impl Target {
    fn read(self, file: &str) -> Option<String> {
        procfs::read_text(format!("/proc/{}/task/{}/{file}", self.pid, self.tid)).ok()
    }

    /// The thread, if it is blocked in one of the calls that matter here.
    pub(super) fn asleep(self) -> Option<Asleep> {
        const TRIES: usize = 3;
        let relevant = |blocked: &Blocked| {
            let number = blocked.number;
            timeout_kind(number).is_some() || number == libc::SYS_restart_syscall
        };
        // Most threads are out after this one file.
        self.blocked().filter(relevant)?;
        (0..TRIES).find_map(|_| {
            let before = parse_sched(&self.read("sched")?)?;
            let blocked = self.blocked().filter(relevant)?;
            let cpu = procfs::parse_stat(self.read("stat")?.as_bytes()).ok()?.processor;
            let after = parse_sched(&self.read("sched")?)?;
            (before == after).then_some(Asleep { blocked, sched: after, cpu: usize::try_from(cpu).ok()? })
        })
    }

    pub(super) fn blocked(self) -> Option<Blocked> {
        parse_syscall(&self.read("syscall")?)
    }

    /// The call behind a restart_syscall: by where in the kernel the thread sleeps.
    pub(super) fn restarted_call(self, place: &Place) -> Option<i64> {
        let place_in_kernel = self.read("wchan")?;
        let [first, second, ..] = place.args;
        match place_in_kernel.as_str() {
            // Not asleep any more, or stopped by a signal or a tracer.
            "" | "0" => None,
            w if w.contains("stop") || w.contains("trap") => None,
            w if w.contains("futex") => Some(libc::SYS_futex),
            w if w.contains("poll") => Some(libc::SYS_poll),
            // The other two leave no frame of their own, only that of whoever called restart_syscall. The
            // older takes a pointer first, the newer a clock and no flags.
            _ if first <= LAST_CLOCK && second == 0 => Some(libc::SYS_clock_nanosleep),
            _ => Some(libc::SYS_nanosleep),
        }
    }
}

/// Voluntary context switches of a thread.
pub(super) fn switches(pid: Tid, tid: Tid) -> Option<u64> {
    Some(parse_sched(&Target { pid, tid }.read("sched")?)?.switches)
}

/// Parses /proc/PID/syscall: number, six arguments, stack pointer and instruction pointer of a thread that
/// is blocked in a call.
pub(super) fn parse_syscall(text: &str) -> Option<Blocked> {
    let mut words = text.split_ascii_whitespace();
    let number = words.next()?.parse().ok().filter(|n| *n >= 0)?;
    let mut hex = || u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok();
    let mut args = [0; 6];
    for arg in &mut args {
        *arg = hex()?;
    }
    Some(Blocked { number, place: Place { args, sp: hex()?, pc: hex()? } })
}

/// Parses /proc/PID/sched.
pub(super) fn parse_sched(text: &str) -> Option<Sched> {
    let field = |name: &str| {
        let line =
            text.lines().find(|l| l.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', ':'])))?;
        line.rsplit_once(':').map(|(_, value)| value.trim())
    };
    // Milliseconds with six places.
    let (ms, fraction) = field("se.exec_start")?.split_once('.')?;
    let fraction = fraction.parse::<u64>().ok().filter(|_| fraction.len() == 6)?;
    let exec_start = ms.parse::<u64>().ok()?.checked_mul(NS_PER_MS)?.checked_add(fraction)?;
    Some(Sched { exec_start, switches: field("nr_voluntary_switches")?.parse().ok()? })
}

/// How a call takes its timeout.
pub(super) enum Timeout {
    /// A `timespec` at the address in this argument.
    At(usize),
    /// Milliseconds in this argument.
    Milliseconds(usize),
}

pub(super) fn timeout_kind(number: i64) -> Option<Timeout> {
    match number {
        libc::SYS_nanosleep => Some(Timeout::At(0)),
        libc::SYS_clock_nanosleep => Some(Timeout::At(2)),
        libc::SYS_futex => Some(Timeout::At(3)),
        libc::SYS_poll => Some(Timeout::Milliseconds(2)),
        libc::SYS_epoll_wait | libc::SYS_epoll_pwait => Some(Timeout::Milliseconds(3)),
        _ => None,
    }
}

/// Whether the call sleeps for a time, in real time: not until an instant, not for ever.
pub(super) fn is_relative(number: i64, args: &[u64; 6]) -> bool {
    match number {
        libc::SYS_nanosleep => true,
        libc::SYS_clock_nanosleep => args[1] == 0 && args[0] <= LAST_CLOCK && !CPU_CLOCKS.contains(&args[0]),
        libc::SYS_futex => args[1] & FUTEX_COMMAND == FUTEX_WAIT && args[3] != 0,
        // An int: the upper half means nothing.
        libc::SYS_poll => args[2] & 0x8000_0000 == 0,
        libc::SYS_epoll_wait | libc::SYS_epoll_pwait => args[3] & 0x8000_0000 == 0,
        _ => false,
    }
}

pub(super) fn needs_deadline(sleep: &Sleep) -> bool {
    is_relative(sleep.number, &sleep.place.args)
        && remainder_address(sleep.number, &sleep.place.args).is_none()
}

/// The relative timeout of a call that has not been restarted.
pub(super) fn relative_timeout(pid: Tid, number: i64, args: &[u64; 6]) -> Option<u64> {
    if !is_relative(number, args) {
        return None;
    }
    match timeout_kind(number)? {
        Timeout::At(arg) => timespec(pid, args[arg]),
        Timeout::Milliseconds(arg) => Some((args[arg] & 0x7fff_ffff) * NS_PER_MS),
    }
}

/// Where the kernel writes what is left of an interrupted sleep.
fn remainder_address(number: i64, args: &[u64; 6]) -> Option<u64> {
    let address = match number {
        libc::SYS_nanosleep => args[1],
        libc::SYS_clock_nanosleep => args[3],
        _ => 0,
    };
    (address != 0 && is_relative(number, args)).then_some(address)
}

/// What the kernel has written there at the stop.
pub(super) fn written_remainder(pid: Tid, number: i64, args: &[u64; 6]) -> Option<u64> {
    timespec(pid, remainder_address(number, args)?)
}

fn timespec(pid: Tid, address: u64) -> Option<u64> {
    let mut bytes = [0u8; 16];
    let range = RemoteRange { start: address, len: bytes.len() };
    let read = vm::read(pid, &mut bytes, &[range]).ok()?;
    let word = |at: usize| bytes.get(at..at + 8)?.try_into().ok().map(u64::from_ne_bytes);
    (read == bytes.len()).then_some(())?;
    Some(word(0)?.saturating_mul(NS).saturating_add(word(8)?.min(NS)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_the_files_of_this_kernel() {
        let sched = parse_sched(&std::fs::read_to_string("/proc/self/sched").unwrap_or_default());
        assert!(sched.is_some_and(|s| s.exec_start > 0));
        assert_eq!(parse_syscall("running\n"), None);
        assert_eq!(parse_syscall("-1 0x7ffc 0x7fd1\n"), None);
        let blocked = parse_syscall("202 0x1 0x0 0x2 0xa 0x4 0x6 0x7ffc 0x7fd1\n");
        let place = Place { args: [1, 0, 2, 10, 4, 6], sp: 0x7ffc, pc: 0x7fd1 };
        assert_eq!(blocked, Some(Blocked { number: 202, place }));
    }

    #[test]
    fn knows_relative_from_absolute() {
        let futex = |op| is_relative(libc::SYS_futex, &[1, op, 0, 1, 0, 0]);
        assert!(futex(0) && futex(128) && !futex(9) && !futex(0x189));
        assert!(!is_relative(libc::SYS_futex, &[1, 0, 0, 0, 0, 0]));
        assert!(is_relative(libc::SYS_clock_nanosleep, &[1, 0, 1, 0, 0, 0]));
        assert!(!is_relative(libc::SYS_clock_nanosleep, &[1, 1, 1, 0, 0, 0]));
        assert!(!is_relative(libc::SYS_clock_nanosleep, &[2, 0, 1, 0, 0, 0]));
        assert!(is_relative(libc::SYS_poll, &[0, 0, 5, 0, 0, 0]));
        assert!(!is_relative(libc::SYS_poll, &[0, 0, 0xffff_ffff, 0, 0, 0]));
    }

    proptest! {
        #[test]
        fn parsing_never_panics(text in "(se.exec_start|nr_voluntary_switches|[0-9]{1,20})? *:? *(0x[0-9a-f]{0,18} ?|[0-9.]{0,24}){0,9}\n?") {
            let _ = parse_sched(&text);
            let _ = parse_syscall(&text);
        }
    }
}
