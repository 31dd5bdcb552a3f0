//! POSIX timers whose signals wait or were missed: afterwards they count on, in phase.

use migrate::engine::remote::{Batch, Outcome, RemoteCalls};
use migrate::engine::skeleton::Skeleton;
use migrate::engine::state::signals;
use migrate::engine::sys::fds::clock_ns;
use migrate::proto::image::{PosixTimer, Process};

use super::{Moved, moved_after, start};

/// Programs make timers by these.
const TOOLS: &str = r"
def timer(clock, notify, signo, value, tid=0):
    ev = ctypes.create_string_buffer(struct.pack('Qiii', value, signo, notify, tid), 64)
    i = ctypes.c_int(-1)
    ok(libc.syscall(222, clock, ev, ctypes.byref(i)))
    return i.value
def arm(i, first, interval=0, absolute=1):
    both = struct.pack('qqqq', *divmod(interval, 10**9), *divmod(first, 10**9))
    ok(libc.syscall(223, i, absolute, ctypes.create_string_buffer(both, 32), 0))
def missed(clock, interval, times):
    return time.clock_gettime_ns(clock) - times * interval - interval // 2
signal.pthread_sigmask(signal.SIG_BLOCK, range(34, 60))
S = 10**9
";

fn moved(program: &str) -> Moved {
    let moved = moved_after(start(&format!("{TOOLS}{program}")), |_| ());
    moved.assert_same();
    moved
}

fn timer(image: &Process, id: i32) -> PosixTimer {
    *image.timers.iter().find(|t| t.id == id).unwrap()
}

/// When the timer is due next, by CLOCK_MONOTONIC.
fn next(image: &Process, id: i32) -> i64 {
    image.clocks.as_ref().unwrap().monotonic_ns + i64::try_from(timer(image, id).value_ns).unwrap()
}

/// Between the reading of the clock and that of a timer, in one batch.
const APART_NS: i64 = 2_000_000;

/// Takes a signal and tells its overruns, those of `timer_getoverrun`, and the time before and after.
fn take(skeleton: &mut Skeleton, signal: i32, id: i32) -> (i32, u64, i64, i64) {
    let mut batch = Batch::new();
    let mask = batch.input(&(1u64 << (signal - 1)).to_ne_bytes());
    let zero = batch.input(&[0; 16]);
    let (before, info, after) = (batch.output(16), batch.output(128), batch.output(16));
    batch.call(libc::SYS_clock_gettime, &[libc::CLOCK_MONOTONIC.into(), before]);
    let taken = batch.call(libc::SYS_rt_sigtimedwait, &[mask, info, zero, 8u64.into()]);
    batch.call(libc::SYS_clock_gettime, &[libc::CLOCK_MONOTONIC.into(), after]);
    let count = batch.call(libc::SYS_timer_getoverrun, &[id.into()]);
    let outcome = skeleton.run(&batch).unwrap();
    assert_eq!(outcome.ret(taken), Ok(u64::from(signal.unsigned_abs())));
    let overrun = i32::from_ne_bytes(outcome.data(info, 128)[20..24].try_into().unwrap());
    (overrun, outcome.ret(count).unwrap(), time(&outcome, before), time(&outcome, after))
}

fn time(outcome: &Outcome, at: migrate::engine::remote::Arg) -> i64 {
    let word = |from: usize| i64::from_ne_bytes(outcome.data(at, 16)[from..from + 8].try_into().unwrap());
    word(0) * 1_000_000_000 + word(8)
}

#[test]
fn overruns_are_there_again() {
    let moved = moved(
        r"
up = int(time.clock_gettime(time.CLOCK_BOOTTIME)) * S
a = timer(1, 0, 40, 1); arm(a, missed(1, up // 20, 7), up // 20)
b = timer(0, 0, 41, 2); arm(b, missed(0, 3600 * S, 1), 3600 * S)
c = timer(1, 0, 42, 3); arm(c, missed(1, up // 20, 0), up // 20)
signal.sigtimedwait({40}, 5); signal.sigtimedwait({41}, 5); signal.sigtimedwait({42}, 5)
e = threading.Event(); tids = []
def other():
    tids.append(threading.get_native_id())
    d = timer(7, 4, 43, 4, tids[0]); arm(d, missed(7, up // 20, 2), up // 20)
    signal.sigtimedwait({43}, 5); e.set(); signal.pause()
threading.Thread(target=other, daemon=True).start(); e.wait()
",
    );
    let counts: Vec<u32> = moved.after.timers.iter().map(|t| t.overrun).collect();
    assert_eq!(counts, [2, 0, 1, 7]);
    for id in [0, 2] {
        let (a, b) = (next(&moved.before, id), next(&moved.after, id));
        assert!((a - b).abs() < APART_NS, "timer {id} was due at {a}, now at {b}");
    }
}

#[test]
fn a_waiting_signal_is_the_timers_own() {
    // Others of the same number before and behind it, in this order.
    let mut moved = moved(
        r"
os.sched_setaffinity(0, {0})   # One processor fires timers in their order.
class Value(ctypes.Union): _fields_ = [('p', ctypes.c_void_p)]
libc.sigqueue.argtypes = [ctypes.c_int, ctypes.c_int, Value]
a = timer(1, 0, 40, 5)
ok(libc.sigqueue(os.getpid(), 40, Value(1)))
arm(a, missed(1, S // 50, 3), S // 50)
b = timer(1, 0, 44, 0); arm(b, 2); signal.sigtimedwait({44}, 5)
ok(libc.sigqueue(os.getpid(), 40, Value(2)))
once = timer(1, 0, 41, 6); arm(once, 1)
",
    );
    let (before, after) = (&moved.before, &moved.after);
    let value = |info: &Vec<u8>| (info[8], info[24]);
    let order: Vec<_> = before.pending.iter().map(value).collect();
    assert_eq!(order, [(0xff, 1), (0xfe, 5), (0xff, 2), (0xfe, 6)]);
    // It is due in phase, and counts from there.
    let interval = 20_000_000;
    let due = next(before, 0) - interval;
    assert!(((next(after, 0) - due + interval / 2).rem_euclid(interval) - interval / 2).abs() < APART_NS);
    let until = clock_ns(libc::CLOCK_MONOTONIC).unwrap() + 5 * interval;
    while clock_ns(libc::CLOCK_MONOTONIC).unwrap() < until {
        std::thread::yield_now();
    }
    let queued = signals::capture_pending(moved.skeleton.pid(), true, u64::MAX >> 63 << 39).unwrap();
    assert_eq!(queued.iter().map(value).collect::<Vec<_>>(), order, "another one has come");
    assert_eq!(take(&mut moved.skeleton, 40, 0).0, 0, "the first is not the timer's");
    let (overrun, count, early, late) = take(&mut moved.skeleton, 40, 0);
    let missed = |at: i64| i32::try_from((at - due) / interval).unwrap();
    assert_eq!(overrun, i32::try_from(count).unwrap());
    let (least, most) = (missed(early - APART_NS), missed(late + APART_NS));
    assert!((least..=most).contains(&overrun), "{overrun} overruns, should be {least} to {most}");
    assert!(overrun >= 5);
    // Taken: the timer goes on; and what fires once does not fire again.
    take(&mut moved.skeleton, 41, 2);
    let mut batch = Batch::new();
    let times = batch.output(32);
    batch.call(libc::SYS_timer_gettime, &[2u64.into(), times]);
    assert_eq!(moved.skeleton.run(&batch).unwrap().data(times, 32), [0; 32]);
}

#[test]
fn a_timer_that_runs_out_meanwhile_counts_on() {
    let mut moved = moved_after(
        start(&format!(
            "{TOOLS}a = timer(1, 0, 40, 5); arm(a, missed(1, S // 4, 0), S // 4)\nsignal.sigtimedwait({{40}}, 5)"
        )),
        |image| {
            let until = next(image, 0) + 600_000_000;
            while clock_ns(libc::CLOCK_MONOTONIC).unwrap() < until {
                std::thread::yield_now();
            }
        },
    );
    let due = next(&moved.before, 0);
    let (overrun, _, early, late) = take(&mut moved.skeleton, 40, 0);
    let missed = |at: i64| i32::try_from((at - due) / 250_000_000).unwrap();
    assert!((missed(early - APART_NS)..=missed(late + APART_NS)).contains(&overrun), "{overrun}");
    assert!(overrun >= 2);
}

#[test]
fn a_timer_of_the_cpu_clock_is_not_lost() {
    let mut moved = moved(
        r"
a = timer(2, 0, 40, 5); arm(a, 1, 3600 * S)
b = timer(2, 0, 41, 6); arm(b, 1)
",
    );
    take(&mut moved.skeleton, 40, 0);
    take(&mut moved.skeleton, 41, 1);
    let mut batch = Batch::new();
    let times = batch.output(32);
    batch.call(libc::SYS_timer_gettime, &[0u64.into(), times]);
    let outcome = moved.skeleton.run(&batch).unwrap();
    let word = |at: usize| u64::from_ne_bytes(outcome.data(times, 32)[at..at + 8].try_into().unwrap());
    assert_eq!((word(0), word(8)), (3600, 0));
    assert!(word(16) >= 3590, "{} s", word(16));
}
