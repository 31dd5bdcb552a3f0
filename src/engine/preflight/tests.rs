//! Preflight against real processes, each with one thing in the way.

use std::io::{BufRead, BufReader};
use std::process::{ChildStdout, Command, Stdio};

use super::*;
use crate::engine::trial::{Killed, KilledPid, state_of, until};

/// A child that is killed and reaped at the end. What it prints after its first line has a reader until then: it would
/// end by a broken pipe.
struct Victim(Killed, #[expect(dead_code, reason = "held open")] BufReader<ChildStdout>);

impl Victim {
    fn pid(&self) -> Tid {
        self.0.pid()
    }

    /// Runs Python code that prints a line when it is ready, and then waits.
    fn python(code: &str) -> (Self, String) {
        let code = format!(
            "import ctypes,os,signal,sys,threading\nlibc=ctypes.CDLL(None)\n{code}\nprint('ready',flush=True)\nsignal.pause()"
        );
        let mut child = Killed::spawn(Command::new("python3").args(["-c", &code]).stdout(Stdio::piped()));
        let mut line = String::new();
        let mut printed = BufReader::new(child.stdout.take().unwrap());
        printed.read_line(&mut line).unwrap();
        (Self(child, printed), line)
    }

    /// Its only child, which ends with the test too.
    fn child(&self) -> KilledPid {
        let text = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", self.pid())).unwrap();
        KilledPid(text.trim().parse().unwrap())
    }
}

/// All reasons but for semaphores: the test of those runs beside the others.
fn whys(pid: Tid) -> Vec<String> {
    let of_semaphores = |why: &String| why.starts_with("System V semaphore set");
    let all = check(pid, true).reasons.into_iter().map(|r| r.to_string());
    all.filter(|why| !of_semaphores(why)).collect()
}

#[test]
fn an_ordinary_process_has_nothing_in_the_way() {
    let (victim, _) = Victim::python("threading.Thread(target=signal.pause, daemon=True).start()");
    assert_eq!(whys(victim.pid()), [""; 0]);
    // It was started by us, in our session.
    let notes = check(victim.pid(), true).notes;
    assert_eq!(notes.len(), 2, "{notes:?}");
}

#[test]
fn what_is_no_process_to_move() {
    assert!(whys(Tid::MAX)[0].contains("no such process"));
    let us = Tid::try_from(std::process::id()).unwrap();
    assert!(whys(us)[0].contains("this very process"));
    let parent = nix::unistd::getppid().as_raw();
    assert!(parent == 0 || whys(parent)[0].contains("ancestor"));
    if look(2, 2).is_some_and(|(stat, _)| stat.comm == b"kthreadd") {
        assert!(whys(2)[0].contains("kernel"));
    }
    let zombie = Killed::spawn(&mut Command::new("true"));
    until("its end", || state_of(zombie.pid(), zombie.pid()) == Some(b'Z'));
    assert!(whys(zombie.pid())[0].contains("zombie"));
}

#[test]
fn a_main_thread_that_has_exited() {
    let (victim, _) = Victim::python(
        "threading.Thread(target=signal.pause).start()\nprint('ready',flush=True)\nlibc.syscall(60,0)",
    );
    let pid = victim.pid();
    until("the end of its main thread", || state_of(pid, pid) == Some(b'Z'));
    assert!(whys(pid)[0].contains("main thread has exited"));
}

#[test]
fn children_and_tracers_are_named() {
    let (victim, _) = Victim::python("import subprocess\nsubprocess.Popen(['sleep','100'])");
    let pid = victim.pid();
    let guard = victim.child();
    let child = guard.0;
    let found = whys(pid);
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].contains("child processes"));
    assert!(found[0].contains(&child.to_string()));
    crate::engine::sys::ptrace::seize(child, 0).unwrap();
    let traced = whys(child);
    assert!(traced.iter().any(|w| w.contains("is traced by process")), "{traced:?}");
    drop(guard);
    crate::engine::sys::ptrace::wait(child).unwrap();
}

#[test]
fn a_time_namespace_for_children() {
    // CLONE_NEWTIME: the children's, for now.
    let (victim, _) = Victim::python("assert libc.unshare(0x80)==0");
    let found = whys(victim.pid());
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].contains("time namespace for its children"), "{found:?}");
}

#[test]
fn other_namespaces_each_by_name() {
    // CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWNET; chroot.
    let (victim, _) = Victim::python(
        "assert libc.unshare(0x04000000|0x08000000|0x40000000)==0\nos.chroot('/proc')\nos.chdir('/')",
    );
    let found = whys(victim.pid());
    for name in ["uts", "ipc", "net"] {
        assert!(found.iter().any(|w| w.contains(&format!("another {name} namespace"))), "{found:?}");
    }
    assert!(found.iter().any(|w| w.contains("root directory")), "{found:?}");
    assert!(!found.iter().any(|w| w.contains("mnt")), "{found:?}");
}

#[test]
fn threads_that_share_too_little_and_processes_that_share_too_much() {
    // CLONE_FILES | CLONE_FS, in a thread.
    let (victim, _) = Victim::python(
        "e=threading.Event()\ndef f():\n  assert libc.unshare(0x600)==0\n  e.set()\n  signal.pause()\n\
         threading.Thread(target=f,daemon=True).start()\ne.wait()",
    );
    let found = whys(victim.pid());
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(found.iter().all(|w| w.starts_with("thread ")), "{found:?}");
    // clone(CLONE_FILES | SIGCHLD): a child with the same table of descriptors.
    let (victim, _) = Victim::python("pid=libc.syscall(56,0x400|17,0,0,0,0)\nif pid==0: signal.pause()");
    let _child = victim.child();
    let found = whys(victim.pid());
    assert!(found.iter().any(|w| w.contains("shares its table of descriptors")), "{found:?}");
}

#[test]
fn a_parent_that_waits_for_vfork() {
    // clone(CLONE_VFORK): the child says ready, the parent waits in the kernel.
    let (victim, _) =
        Victim::python("pid=libc.syscall(56,0x4000|17,0,0,0,0)\nif pid==0: libc.prctl(1,9,0,0,0)");
    // The child may be faster.
    until("the wait of the parent", || state_of(victim.pid(), victim.pid()) == Some(b'D'));
    let found = whys(victim.pid());
    assert!(found.iter().any(|w| w.contains("uninterruptible")), "{found:?}");
    assert!(found.iter().any(|w| w.contains("child processes")), "{found:?}");
}

#[test]
fn filters_and_threads_with_other_ids() {
    let (victim, _) = Victim::python(
        "import struct\ne=threading.Event()\ndef f():\n  assert libc.syscall(117,65534,65534,65534)==0\n  e.set()\n  \
         signal.pause()\nthreading.Thread(target=f,daemon=True).start()\ne.wait()\n\
         rule=ctypes.create_string_buffer(struct.pack('HBBI',6,0,0,0x7fff0000))\n\
         prog=ctypes.create_string_buffer(struct.pack('HxxxxxxQ',1,ctypes.addressof(rule)))\n\
         assert libc.prctl(22,2,prog,0,0)==0",
    );
    let found = whys(victim.pid());
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(found[0].contains("seccomp"), "{found:?}");
    assert!(found[1].contains("other credentials"), "{found:?}");
}

#[test]
fn a_thread_in_a_namespace_of_its_own() {
    let code = "
def lone():
    assert libc.unshare(0x40000000) == 0
    done.set(); signal.pause()
done = threading.Event()
threading.Thread(target=lone, daemon=True).start()
done.wait()";
    let (victim, _) = Victim::python(code);
    let found = whys(victim.pid());
    assert!(found.len() == 1 && found[0].contains("another net namespace than its process"), "{found:?}");
}

#[test]
fn semaphore_adjustments() {
    let code = "
import struct, threading, time
sem = libc.semget(os.getpid(), 2, 0o600 | 0o1000)
assert sem >= 0
SEM_UNDO = 0x1000
def op(flags, index=0): assert libc.semop(sem, struct.pack('Hhh', index, 1, flags), 1) == 0
def elsewhere():
    child = os.fork()
    if child == 0: op(0); os._exit(0)
    os.waitpid(child, 0)
def threads(): threading.Thread(target=time.sleep, args=(1e9,), daemon=True).start()
def give_up(): os.setgroups([]); os.setresgid(7, 7, 7); os.setresuid(7, 7, 7)
";
    let found = |does: &str| {
        let (victim, id) = Victim::python(&format!("{code}{does}\nprint(sem, flush=True)"));
        let mut found: Vec<String> =
            check(victim.pid(), true).reasons.iter().map(ToString::to_string).collect();
        found.retain(|why| why.starts_with(&format!("System V semaphore set {}:", id.trim())));
        // That it was the last to use it is another reason.
        let others = found.iter().filter(|why| why.contains("was last used by")).count();
        assert_eq!(others, usize::from(does.contains("op(")), "{does}: {found:?}");
        found.retain(|why| !why.contains("was last used by"));
        let remove = format!(
            "import ctypes; l = ctypes.CDLL(None); assert l.semctl(l.semget({}, 0, 0), 0, 0) == 0",
            victim.pid()
        );
        assert!(Command::new("python3").args(["-c", &remove]).status().unwrap().success());
        found
    };
    for harmless in ["op(0)", "elsewhere()", "threads()", "elsewhere(); give_up(); threads()"] {
        assert_eq!(found(harmless), [""; 0], "{harmless}");
    }
    for adjusted in [
        "op(SEM_UNDO)",
        "threads(); op(SEM_UNDO)",
        "threads(); op(SEM_UNDO, 1); elsewhere()",
        "op(SEM_UNDO); give_up(); threads()",
    ] {
        let with = found(adjusted);
        assert!(with.len() == 1 && with[0].contains("SEM_UNDO"), "{adjusted}: {with:?}");
    }
}
