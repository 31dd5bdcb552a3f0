//! Attributes of processes and threads: taken from a stopped process, given to a skeleton with the same
//! PID and thread ids, taken again from that: nothing may differ.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests may panic")]

mod rig;
mod timers;

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use migrate::engine::freeze::Frozen;
use migrate::engine::procfs::{Status, parse_status};
use migrate::engine::remote::{Batch, RemoteCalls};
use migrate::engine::skeleton::{ReservedPid, Skeleton};
use migrate::engine::state::calls::AttrError;
use migrate::engine::state::mm::{self, FlagCache};
use migrate::proto::image::Process;

/// What every program below begins with.
const PRELUDE: &str = r"
import ctypes, mmap, os, resource, signal, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def ok(rc):
    if rc < 0: raise OSError(ctypes.get_errno(), 'call failed')
    return rc
def ready():
    # print() may read the clock, which is fatal to a program that has forbidden itself the time stamp counter.
    os.write(1, b'ready\n')
    while True: signal.pause()
";

fn start(code: &str) -> Child {
    let mut child = Command::new("python3")
        .args(["-c", &format!("{PRELUDE}{code}\nready()")])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    child
}

fn status(pid: i32, tid: i32) -> Status {
    parse_status(&std::fs::read(format!("/proc/{pid}/task/{tid}/status")).unwrap()).unwrap()
}

struct Moved {
    before: Process,
    after: Process,
    statuses: Vec<(Status, Status)>,
    /// Kept alive for further looks.
    skeleton: Skeleton,
}

/// Stops the process, takes its attributes, ends it, and gives them to a skeleton a tenth of a second later, as it
/// says.
fn moved(child: Child) -> Moved {
    moved_after(child, |image| image.clocks.as_mut().unwrap().monotonic_ns -= 100_000_000)
}

/// With a look at what was captured in between.
fn moved_after(child: Child, meanwhile: impl Fn(&mut Process)) -> Moved {
    let pid = i32::try_from(child.id()).unwrap();
    let mut layout = mm::capture(pid, &FlagCache::look(pid).unwrap()).unwrap().layout;
    let mut frozen = Frozen::freeze(pid, Duration::from_secs(5)).unwrap();
    let tids: Vec<i32> = frozen.threads().iter().map(|t| t.tid).collect();
    let before = rig::capture(&mut frozen, &tids).unwrap();
    let there: Vec<Status> = tids.iter().map(|t| status(pid, *t)).collect();
    frozen.close_injection().unwrap();
    frozen.kill();
    layout.tids = tids.iter().map(|t| t.unsigned_abs()).collect();
    assert_eq!(rig::check_here(&before), []);
    let mut skeleton = ReservedPid::take(pid).unwrap().execute(&layout).unwrap();
    skeleton.reconcile(layout).unwrap();
    let mut image = before.clone();
    meanwhile(&mut image);
    rig::restore(&mut skeleton, &image);
    let after = rig::capture(&mut skeleton, &tids).unwrap();
    let statuses = there.into_iter().zip(tids.iter().map(|t| status(pid, *t))).collect();
    Moved { before, after, statuses, skeleton }
}

impl Moved {
    /// Both images are the same but for what may differ: times that go on, and that a skeleton's thread is
    /// not on its alternate stack before it has its registers.
    fn assert_same(&self) {
        let (mut a, mut b) = (self.before.clone(), self.after.clone());
        for image in [&mut a, &mut b] {
            for timer in &mut image.timers {
                timer.value_ns = u64::from(timer.value_ns != 0);
            }
            for timer in &mut image.itimers {
                timer.value_us = u64::from(timer.value_us != 0);
            }
            for thread in &mut image.threads {
                thread.altstack_flags &= !1;
            }
            // The skeleton leads a session of its own.
            let attrs = image.attrs.as_mut().unwrap();
            (attrs.sid, attrs.pgid) = (0, 0);
            image.clocks = None;
        }
        for (x, y) in a.threads.iter().zip(&b.threads) {
            assert_eq!(x, y);
        }
        assert_eq!(a.actions, b.actions);
        assert_eq!(a.creds, b.creds);
        assert_eq!(a.attrs, b.attrs);
        assert_eq!(a, b);
        for (x, y) in &self.statuses {
            assert_eq!((x.uids, x.gids, &x.groups, x.caps), (y.uids, y.gids, &y.groups, y.caps));
            assert_eq!((x.no_new_privs, x.umask), (y.no_new_privs, y.umask));
            assert_eq!((x.ignored, x.caught), (y.ignored, y.caught));
            assert_eq!((x.pending, x.shared_pending), (y.pending, y.shared_pending));
        }
    }
}

#[test]
fn an_ordinary_program() {
    let moved = moved(start("threading.Thread(target=signal.pause, daemon=True).start()"));
    moved.assert_same();
    assert_eq!(moved.before.threads.len(), 2);
    assert!(moved.before.threads.iter().all(|t| t.rseq_area != 0 && t.robust_list != 0));
    assert!(moved.before.threads[1].clear_child_tid != 0);
    drop(moved.skeleton);
}

#[test]
fn signals_of_all_kinds() {
    let moved = moved(start(
        r"
signal.signal(signal.SIGUSR1, lambda *a: None)
signal.signal(signal.SIGUSR2, signal.SIG_IGN)
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
signal.siginterrupt(signal.SIGUSR1, False)
blocked = {40, 41, 42, signal.SIGCHLD, signal.SIGUSR1}
signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
t = threading.Thread(target=signal.pause, daemon=True); t.start()
class Value(ctypes.Union): _fields_ = [('p', ctypes.c_void_p)]
libc.sigqueue.argtypes = [ctypes.c_int, ctypes.c_int, Value]
for n in range(700): ok(libc.sigqueue(os.getpid(), 40, Value(0x1234500000000000 + n)))
os.kill(os.getpid(), signal.SIGCHLD)
signal.pthread_kill(t.ident, 41); signal.pthread_kill(t.ident, 41); signal.pthread_kill(t.ident, signal.SIGUSR1)
signal.pthread_kill(threading.main_thread().ident, 42)
",
    ));
    moved.assert_same();
    let image = &moved.before;
    assert_eq!(image.pending.len(), 701);
    assert_eq!((image.threads[0].pending.len(), image.threads[1].pending.len()), (1, 3));
    let value = |info: &[u8]| u64::from_ne_bytes(info[24..32].try_into().unwrap());
    assert_eq!(value(&image.pending[699]), 0x1234_5000_0000_0000 + 699);
    let usr2 = image.actions.iter().find(|a| a.signo == 12).unwrap();
    assert_eq!(usr2.handler, 1);
    assert!(!image.actions.iter().any(|a| a.signo == 13 && a.handler != 0), "SIGPIPE is the default again");
}

#[test]
fn dispositions_that_the_service_ignores_do_not_leak() {
    // A skeleton inherits what its service ignores; this process ignores SIGPIPE, as all of Rust's do,
    // and a shell leaves it alone.
    let mut child = Command::new("sh")
        .args(["-c", "echo ready; read x"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let moved = moved(child);
    moved.assert_same();
    assert!(!moved.before.actions.iter().any(|a| a.signo == 13));
    assert_eq!(moved.statuses[0].1.ignored & (1 << 12), 0);
    let ours = parse_status(&std::fs::read("/proc/self/status").unwrap()).unwrap();
    assert_ne!(ours.ignored & (1 << 12), 0, "or this test tests nothing");
}

#[test]
fn timers_keep_their_ids_and_the_time_that_remains() {
    let moved = moved(start(
        r"
def timer(clock, notify, signo, value, tid=0):
    ev = ctypes.create_string_buffer(struct.pack('Qiii', value, signo, notify, tid), 64)
    i = ctypes.c_int(-1)
    ok(libc.syscall(222, clock, ev, ctypes.byref(i)))
    return i.value
def arm(i, value, interval=0):
    ok(libc.syscall(223, i, 0, ctypes.create_string_buffer(struct.pack('qqqq', interval, 5, value, 7), 32), 0))
e = threading.Event(); tids = []
def other(): tids.append(threading.get_native_id()); e.set(); signal.pause()
threading.Thread(target=other, daemon=True).start(); e.wait()
first = timer(1, 0, 40, 0xdeadbeef00000001)
for k in range(3): ok(libc.syscall(226, timer(0, 0, 40, 0)))
arm(timer(0, 4, 41, 0xffff000000000002, tids[0]), 500)
arm(first, 400, 20)
arm(timer(2, 0, 42, 3), 300)
timer(7, 1, 0, 0)
signal.setitimer(signal.ITIMER_REAL, 1000, 3)
signal.setitimer(signal.ITIMER_PROF, 2000)
",
    ));
    moved.assert_same();
    let (a, b) = (&moved.before, &moved.after);
    // The newest first.
    let ids: Vec<i32> = a.timers.iter().map(|t| t.id).collect();
    assert_eq!(ids, [6, 5, 4, 0]);
    assert_eq!(a.timers[2].thread, a.threads[1].tid);
    assert_eq!((a.timers[3].sigval, a.timers[3].interval_ns), (0xdead_beef_0000_0001, 20_000_000_005));
    for (x, y) in a.timers.iter().zip(&b.timers).filter(|(x, _)| x.value_ns != 0) {
        assert!(y.value_ns <= x.value_ns, "timer {} gained time: {} {}", x.id, x.value_ns, y.value_ns);
        assert!(x.value_ns - y.value_ns < 5_000_000_000);
        // A tenth of a second has passed in between, we said: on the clocks of the machine.
        let cpu_clock = x.clock == 2;
        assert_eq!(x.value_ns - y.value_ns >= 100_000_000, !cpu_clock, "timer {}", x.id);
    }
    assert!(a.itimers[0].value_us - b.itimers[0].value_us >= 100_000);
    assert!(b.itimers[2].value_us > 1_990_000_000 && b.itimers[1].value_us == 0);
}

#[test]
fn credentials_of_a_service_that_gave_up_root() {
    let code = r"
os.setgroups([5, 6, 70000])
os.setresgid(10, 11, 12)
ok(libc.prctl(28, 1 << 4))                       # keep capabilities
for cap in (24, 25): libc.prctl(24, cap)         # bounding set
os.setresuid(20, 21, 22)
want = 1 << 10 | 1 << 13
head = ctypes.create_string_buffer(struct.pack('Ii', 0x20080522, 0), 8)
ok(libc.capset(head, ctypes.create_string_buffer(struct.pack('IIIIII', want, want | 1 << 12 | 1 << 8, want, 0, 0, 0), 24)))
ok(libc.prctl(47, 2, 10, 0, 0))                  # ambient
head_set = 1 << 10
libc.prctl(28, 1 << 4 | 1 << 6 | 1 << 7)         # securebits: needs SETPCAP, not effective: refused
ok(libc.prctl(38, 1, 0, 0, 0))                   # no_new_privs
threading.Thread(target=signal.pause, daemon=True).start()
";
    let moved = moved(start(code));
    moved.assert_same();
    let creds = moved.before.creds.as_ref().unwrap();
    assert_eq!(
        (creds.uids.as_slice(), creds.gids.as_slice()),
        (&[20, 21, 22, 21][..], &[10, 11, 12, 11][..])
    );
    assert_eq!(creds.groups, [5, 6, 70000]);
    assert_eq!((creds.cap_ambient, creds.cap_effective), (1 << 10, 1 << 10 | 1 << 13));
    assert_eq!(creds.cap_permitted, 1 << 8 | 1 << 10 | 1 << 12 | 1 << 13);
    assert_eq!(creds.cap_bounding & (1 << 25), 0);
    assert_eq!((creds.securebits, creds.no_new_privs, creds.dumpable), (1 << 4, true, 0));
}

#[test]
fn securebits_file_ids_and_dumpable() {
    let code = r"
ok(libc.prctl(28, 1 | 2 | 1 << 6))
libc.setfsgid(77); libc.setfsuid(78)
ok(libc.prctl(4, 1, 0, 0, 0))
";
    let moved = moved(start(code));
    moved.assert_same();
    let creds = moved.before.creds.as_ref().unwrap();
    assert_eq!((creds.uids[3], creds.gids[3], creds.securebits), (78, 77, 1 | 2 | 1 << 6));
    assert_eq!(creds.dumpable, 1);
}

#[test]
fn numbers_of_a_process_and_its_threads() {
    let code = r"
os.umask(0o27)
os.chdir('/usr/share')
ok(libc.prctl(36, 1, 0, 0, 0))                   # subreaper
ok(libc.prctl(41, 1, 0, 0, 0))                   # THP
ok(libc.prctl(65, 1, 0, 0, 0))                   # no new executable memory
ok(libc.personality(0x0040000))
open('/proc/self/oom_score_adj', 'w').write('321')
open('/proc/self/coredump_filter', 'w').write('0x3f')
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 200))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_NPROC, (1000, 2000))
resource.setrlimit(resource.RLIMIT_STACK, (1 << 20, 1 << 30))
e = threading.Event()
def other():
    ok(libc.prctl(15, b'one\nname', 0, 0, 0))
    ok(libc.prctl(29, 123456, 0, 0, 0))
    os.sched_setaffinity(0, {0})
    ok(libc.setpriority(0, 0, 7))
    ok(libc.syscall(251, 1, 0, 2 << 13 | 6))
    e.set(); signal.pause()
threading.Thread(target=other, daemon=True).start(); e.wait()
os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(9))
";
    let moved = moved(start(code));
    moved.assert_same();
    let wanted = moved.before.attrs.as_ref().unwrap();
    assert_eq!((wanted.umask, wanted.cwd.as_ref().unwrap().path.as_slice()), (0o27, &b"/usr/share"[..]));
    assert!(wanted.child_subreaper && wanted.thp_disable && wanted.mdwe == 1);
    assert_eq!((wanted.personality, wanted.oom_score_adj, wanted.coredump_filter), (0x40000, 321, 0x3f));
    assert_eq!((wanted.limits[7].soft, wanted.limits[7].hard), (100, 200));
    let thread = &moved.before.threads[1];
    assert_eq!((thread.comm.as_slice(), thread.timer_slack_ns), (&b"one\nname"[..], 123_456));
    let sched = thread.sched.as_ref().unwrap();
    assert_eq!((sched.nice, sched.affinity.as_slice(), sched.ioprio), (7, &[1u8][..], 2 << 13 | 6));
    let leader = moved.before.threads[0].sched.as_ref().unwrap();
    assert_eq!((leader.policy, leader.rt_priority), (2, 9));
}

#[test]
fn a_thread_on_its_alternate_stack() {
    let code = r"
class Stack(ctypes.Structure): _fields_ = [('sp', ctypes.c_void_p), ('flags', ctypes.c_int), ('size', ctypes.c_size_t)]
class Action(ctypes.Structure): _fields_ = [('handler', ctypes.c_void_p), ('mask', ctypes.c_ulong * 16), ('flags', ctypes.c_int), ('restorer', ctypes.c_void_p)]
CB = ctypes.CFUNCTYPE(None, ctypes.c_int)
@CB
def handler(n): ready()
def on(flags, size):
    m = mmap.mmap(-1, size)
    sp = ctypes.addressof(ctypes.c_char.from_buffer(m))
    ok(libc.sigaltstack(ctypes.byref(Stack(sp, flags, size)), None))
    return m
e = threading.Event(); keep = []
def other():
    keep.append(on(-0x80000000, 1 << 18))         # SS_AUTODISARM
    e.set(); signal.pause()
threading.Thread(target=other, daemon=True).start(); e.wait()
keep.append(on(0, 4 << 20))
a = Action(); a.handler = ctypes.cast(handler, ctypes.c_void_p).value; a.flags = 0x08000000
ok(libc.sigaction(10, ctypes.byref(a), None))
libc.raise_(10) if hasattr(libc, 'raise_') else getattr(libc, 'raise')(10)
";
    let moved = moved(start(code));
    moved.assert_same();
    let [leader, other] = &moved.before.threads[..] else { panic!("two threads") };
    assert_eq!((leader.altstack_flags, leader.altstack_size), (1, 4 << 20));
    assert_eq!((other.altstack_flags, other.altstack_size), (1 << 31, 1 << 18));
    assert_eq!(moved.after.threads[0].altstack_flags, 0);
}

#[test]
fn what_cannot_be_carried_is_refused_by_name() {
    for (code, words) in [
        ("ok(libc.prctl(1, 15, 0, 0, 0))", "parent"),
        ("ok(libc.prctl(26, 2, 0, 0, 0))", "time stamp counter"),
        (
            "sel = ctypes.create_string_buffer(1); ok(libc.prctl(59, 1, 0, 1 << 47, sel))",
            "its own system calls",
        ),
        (
            "ev = ctypes.create_string_buffer(struct.pack('Qiii', 0, 10, 0, 0), 64); i = ctypes.c_int()\n\
             ok(libc.syscall(222, 3, ev, ctypes.byref(i)))",
            "CPU clock of a thread",
        ),
        (
            "libc.prctl(38, 1, 0, 0, 0); rule = ctypes.create_string_buffer(struct.pack('HBBI', 6, 0, 0, 0x7fff0000))\n\
             prog = ctypes.create_string_buffer(struct.pack('HxxxxxxQ', 1, ctypes.addressof(rule)))\n\
             ok(libc.prctl(22, 2, prog, 0, 0))",
            "seccomp",
        ),
        (
            "def other():\n    ok(libc.syscall(248, b'user', b'secret', b'x', 1, -1)); ready()\n\
             threading.Thread(target=other, daemon=True).start(); time.sleep(1e9)",
            "keyring of thread",
        ),
        ("ok(libc.syscall(248, b'user', b'secret', b'x', 1, -2))", "keyring of the process"),
        (
            "ok(libc.syscall(250, 1, 0)); ok(libc.syscall(248, b'user', b'secret', b'x', 1, -3))",
            "keyring of the session",
        ),
        (
            "ok(libc.syscall(250, 1, b'mine')); ok(libc.syscall(248, b'user', b'secret', b'x', 1, -3))",
            "keyring of the session",
        ),
    ] {
        let mut child = start(code);
        let pid = i32::try_from(child.id()).unwrap();
        let mut frozen = Frozen::freeze(pid, Duration::from_secs(5)).unwrap();
        let tids: Vec<i32> = frozen.threads().iter().map(|t| t.tid).collect();
        let refused = rig::capture(&mut frozen, &tids);
        frozen.thaw().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        let Err(AttrError::Refused(reasons)) = refused else { panic!("{words}: {refused:?}") };
        assert!(reasons.len() == 1 && reasons[0].to_string().contains(words), "{words}: {reasons:?}");
    }
}

/// The session keyring of a skeleton: its number and its description.
fn session_keyring(skeleton: &mut Skeleton) -> (u64, String) {
    let mut batch = Batch::new();
    let id = batch.call(libc::SYS_keyctl, &[0u64.into(), (-3i32).into(), 0u64.into()]);
    let text = batch.output(256);
    batch.call(libc::SYS_keyctl, &[6u64.into(), (-3i32).into(), text, 256u64.into()]);
    let outcome = skeleton.run(&batch).unwrap();
    let text = String::from_utf8(outcome.data(text, 256).to_vec()).unwrap();
    (outcome.ret(id).unwrap(), text.trim_end_matches('\0').to_owned())
}

#[test]
fn a_session_keyring_from_outside_is_replaced_by_a_new_one() {
    // Once more in a session with a key, as a service may be.
    const NAME: &str = "a_session_keyring_from_outside_is_replaced_by_a_new_one";
    const INSIDE: &str = "IN_A_SESSION_WITH_A_KEY";
    if std::env::var_os(INSIDE).is_none() {
        let join = "ok(libc.syscall(250, 1, 0)); ok(libc.syscall(248, b'user', b'ours', b'x', 1, -3))";
        let code = format!("{PRELUDE}{join}\nos.execv(sys.argv[1], [sys.argv[1], '--exact', '{NAME}'])");
        let us = std::env::current_exe().unwrap();
        let status = Command::new("python3").args(["-c", &code]).arg(us).env(INSIDE, "1").status().unwrap();
        assert!(status.success());
        return;
    }
    // As a login and a service manager make it.
    let mut moved = moved(start(
        r"
ok(libc.syscall(250, 1, 0))
ok(libc.syscall(250, 8, -4, -3))
ok(libc.syscall(248, b'user', b'invocation_id', b'x' * 16, 16, -3))
os.setresgid(7, 7, 7); os.setresuid(7, 7, 7)
threading.Thread(target=signal.pause, daemon=True).start()
",
    ));
    moved.assert_same();
    let (id, text) = session_keyring(&mut moved.skeleton);
    assert!(text.starts_with("keyring;7;7;") && text.ends_with(";_ses"), "{text}");
    let ours = Command::new("python3")
        .args(["-c", &format!("{PRELUDE}print(libc.syscall(250, 0, -3, 0))")])
        .output()
        .unwrap();
    assert_ne!(String::from_utf8(ours.stdout).unwrap().trim(), id.to_string());
}
