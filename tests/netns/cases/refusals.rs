//! Every refusal: exit status 1, all reasons in one go, the process unharmed, nothing at the destination.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use migrate::testbed::{Host, Lan, Outcome, PRIVATE, Spawn, wait_for};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use crate::case::{Case, Need, Result, ensure};
use crate::relay::{Relay, Way, Weather};
use crate::workload::Workload;

pub(crate) const REFUSAL: Duration = Duration::from_secs(30);

/// States of the counting program, what they are refused by, and words that the reasons must have.
pub(crate) const STATES: &[(&str, &[&str], &[&str])] = &[
    ("inotify", &["inotify"], &["inotify"]),
    ("half_udp", &["half_udp"], &["udp", "try again"]),
    ("child", &["child"], &["child"]),
    ("traced", &["traced"], &["traced"]),
    ("seccomp", &["seccomp"], &["seccomp"]),
    ("deleted_file", &["deleted"], &["deleted"]),
    ("file_lock", &["lock"], &["lock"]),
    ("file_missing_there", &["private_file"], &["only-here"]),
    ("sysv_attached_elsewhere", &["sysv"], &["system v segment", "attached 2 times", "detach"]),
    ("memfd_open_elsewhere", &["memfd_held"], &["memfd held", "has open"]),
    ("memfd_mapped_elsewhere", &["memfd_mapped"], &["memfd mapped", "maps"]),
    ("mapped_memfd_open_elsewhere", &["mapped_memfd_held"], &["memfd both", "has open"]),
    ("file_shared_with_another", &["file_held"], &["shares its open file /run/shared/held-", "(pid "]),
    ("eventfd_held_elsewhere", &["eventfd_held"], &["an eventfd that another process holds", "(pid "]),
    (
        "listener_held_elsewhere",
        &["listener_held"],
        &["a listening socket that another process holds", "(pid "],
    ),
    ("tcp_connection", &["connection"], &["tcp-close"]),
    ("key_of_its_own", &["key"], &["keyring of the process", "holds 1 key"]),
    ("semaphore_with_threads", &["semaphore"], &["semaphore set", "sem_undo", "ipcrm"]),
    ("message_queue", &["queue"], &["system v message queue", "last used", "ipcrm"]),
    ("segments_of_its_own", &["segment"], &["modify_ldt"]),
    ("watched_directory", &["watched"], &["f_notify", "/tmp"]),
    (
        "all_at_once",
        &["inotify", "half_udp", "child", "deleted", "private_file"],
        &["inotify", "udp", "child", "deleted", "only-here"],
    ),
];

pub(crate) fn cases() -> Vec<Case> {
    let states = STATES.iter().map(|(name, states, words)| {
        Case::new(format!("refusals/{name}"), move |lan| {
            let workload = Workload::start(&lan.a, "counter", states)?;
            refused(lan, workload, &[], words)
        })
    });
    let huge = |name: &str, state: &'static str, word: &'static str| {
        let run = move |lan: &Lan| refused(lan, Workload::start(&lan.a, "counter", &[state])?, &[], &[word]);
        Case::new(format!("refusals/{name}"), run).needs(Need::HugePages(2))
    };
    let own = vec![
        huge("huge_pages_missing_there", "huge", "huge pages of 2048 kib"),
        huge("huge_page_file", "hugetlbfs", "hugetlbfs"),
        Case::new("refusals/sysv_id_taken", sysv_id_taken),
        Case::new("refusals/no_such_process", |lan| no_process(lan, 31_000, &["31000"])),
        Case::new("refusals/own_ancestor", |lan| no_process(lan, 1, &["ancestor"])),
        Case::new("refusals/zombie", zombie),
        Case::new("refusals/pid_taken", pid_taken),
        Case::new("refusals/port_bound", port_bound),
        Case::new("refusals/tcp_address_stays", tcp_address_stays),
        Case::new("refusals/file_differs", file_differs),
        Case::new("refusals/not_for_what_has_passed", not_for_what_has_passed),
        Case::new("refusals/begun_since_preflight", begun_since_preflight),
        Case::new("refusals/unreachable", unreachable),
        Case::new("refusals/usage", usage),
    ];
    states.chain(own).collect()
}

/// A process that cannot be moved is refused, and goes on.
pub(crate) fn refused(lan: &Lan, mut workload: Workload, options: &[&str], words: &[&str]) -> Result {
    workload.check(&lan.a)?;
    lan.share_identity()?;
    let service = lan.serve(&lan.b)?;
    let before = lan.b.processes()?;
    let outcome = lan.move_to(&lan.a, &service, workload.pid(), options, REFUSAL)?;
    says(&outcome, words)?;
    workload.check_going_on(&lan.a)?;
    let after = lan.b.processes()?;
    ensure(after == before, || format!("left at the destination: {after:?}, before it was {before:?}"))
}

/// Exit status 1, `not_moved`, and every word in the reasons.
pub(crate) fn says(outcome: &Outcome, words: &[&str]) -> Result {
    let whole = || format!("{:?} {}\n{}", outcome.exit, outcome.report, outcome.stderr);
    ensure(outcome.exit.code == Some(1), || format!("the exit status is not 1: {}", whole()))?;
    ensure(outcome.report["outcome"] == "not_moved", || format!("the outcome: {}", whole()))?;
    let reasons = outcome.reasons().to_lowercase();
    for word in words {
        ensure(reasons.contains(word), || format!("no reason names {word:?}: {}", whole()))?;
    }
    Ok(())
}

/// A connection cannot move where its address does not.
fn tcp_address_stays(lan: &Lan) -> Result {
    let workload = Workload::start(&lan.a, "tcp_echo", &["7"])?;
    let dial = || TcpStream::connect((Lan::SERVICE, 7_u16));
    let mut client = lan.client("dial", dial)?.join().map_err(|_| "the client panicked")???;
    let mut answer = [0; 5];
    client.write_all(b"there")?;
    client.read_exact(&mut answer)?;
    refused(lan, workload, &["--tcp-established"], &[Lan::SERVICE, "move-ip"])?;
    client.write_all(b"still")?;
    client.read_exact(&mut answer)?;
    ensure(&answer == b"still", || format!("{answer:?}"))
}

/// Just before the freeze the process forks: nothing of its own shows that, and the child would stay behind.
fn begun_since_preflight(lan: &Lan) -> Result {
    let workload = Workload::start(&lan.a, "counter", &["child_when_told"])?;
    let hook = "[ $MIGRATE_STAGE != pre-freeze ] || { kill -USR2 $MIGRATE_PID; \
                while [ -z \"$(cat /proc/$MIGRATE_PID/task/*/children)\" ]; do sleep 0.01; done; }";
    refused(lan, workload, &["--hook", hook], &["child processes"])
}

fn no_process(lan: &Lan, pid: i32, words: &[&str]) -> Result {
    lan.share_identity()?;
    let service = lan.serve(&lan.b)?;
    says(&lan.move_to(&lan.a, &service, pid, &[], REFUSAL)?, words)
}

fn zombie(lan: &Lan) -> Result {
    // The first `sleep` ends at once; its parent has become a `sleep` that does not know of it.
    let job = lan.a.spawn(&Spawn::new(["/bin/sh", "-c", "sleep 0 & echo $!; exec sleep 1000"]))?;
    let (line, _) = lan.a.wait_line(&job, "", 0, REFUSAL)?;
    let pid: i32 = line.parse()?;
    wait_for("the zombie", REFUSAL, || {
        let status = std::fs::read_to_string(lan.a.proc(pid).join("status")).unwrap_or_default();
        Ok(status.contains("State:\tZ").then_some(()))
    })?;
    no_process(lan, pid, &["zombie"])
}

fn pid_taken(lan: &Lan) -> Result {
    let workload = Workload::start(&lan.a, "counter", &[])?;
    let pid = workload.pid();
    let last = lan.b.outside("/proc/sys/kernel/ns_last_pid");
    // Written from inside: the file sets the namespace of who writes it.
    ensure(last.exists(), || "no ns_last_pid".to_owned())?;
    let set = format!("echo {} > /proc/sys/kernel/ns_last_pid; echo set; exec sleep 1000", pid - 2);
    let shell = lan.b.spawn(&Spawn::new(["/bin/sh", "-c", &set]))?;
    lan.b.wait_line(&shell, "set", 0, REFUSAL)?;
    let taken = take_pid(&lan.b, pid)?;
    // What is at the destination is to be the same afterwards, names included.
    wait_for("all of them sleeping", REFUSAL, || {
        Ok(lan.b.processes()?.iter().all(|(_, name)| name == "sleep").then_some(()))
    })?;
    refused(lan, workload, &[], &[&taken.to_string()])
}

/// Starts programs until one has the PID.
fn take_pid(host: &Host, pid: i32) -> Result<i32> {
    for _ in 0..20 {
        if host.proc(pid).exists() {
            return Ok(pid);
        }
        host.spawn(&Spawn::new(["sleep", "1000"]))?;
    }
    Err(format!("PID {pid} could not be taken").into())
}

fn port_bound(lan: &Lan) -> Result {
    Workload::start(&lan.b, "counter", &["port"])?;
    let workload = Workload::start(&lan.a, "counter", &["port"])?;
    refused(lan, workload, &[], &["4243"])
}

/// The first segments of both hosts have the same ids.
fn sysv_id_taken(lan: &Lan) -> Result {
    Workload::start(&lan.b, "zoo_shared", &["sysv"])?;
    let workload = Workload::start(&lan.a, "zoo_shared", &["sysv"])?;
    refused(lan, workload, &[], &["system v segment 0", "system v segment 1", "ipcrm"])
}

/// The same path on both hosts' own disks, with different contents.
fn file_differs(lan: &Lan) -> Result {
    let workload = Workload::start(&lan.a, "counter", &["private_file"])?;
    let name = format!("{PRIVATE}/only-here-{}", workload.pid());
    std::fs::write(lan.b.outside(&name), "Contents")?;
    refused(lan, workload, &[], &["only-here"])
}

/// A file that the process had open when it was looked at, and not any more when the destination looks for it, is
/// no reason.
fn not_for_what_has_passed(lan: &Lan) -> Result {
    let mut workload = Workload::start(&lan.a, "fleeting", &[])?;
    let pid = workload.pid();
    lan.share_identity()?;
    lan.serve(&lan.b)?;
    let looks = Arc::new(Inotify::init(InitFlags::IN_CLOEXEC)?);
    let name = lan.a.outside(format!("{PRIVATE}/fleeting-{pid}"));
    looks.add_watch(&name, AddWatchFlags::IN_CLOSE_NOWRITE)?;
    // What the destination says of it waits until it is gone: the source looks twice, a moment apart.
    let looked_at = |looks: &Inotify, patience: u16| {
        let mut looked = [PollFd::new(looks.as_fd(), PollFlags::POLLIN)];
        poll(&mut looked, patience) == Ok(1)
    };
    let weather = Weather { lost: 0, repeated: 0, delay: Duration::ZERO, reorders: false };
    let seen = Arc::clone(&looks);
    let gate = Box::new(move |way| way == Way::Back && looked_at(&seen, 0));
    let relay = Relay::with_gate(lan, weather, gate)?;
    let job = lan.start_move(&lan.a, &relay.address, pid, &[])?;
    ensure(looked_at(&looks, 30_000), || "nobody looked at its file".to_owned())?;
    lan.a.signal(pid, libc::SIGUSR2)?;
    wait_for("the end of its file", REFUSAL, || Ok((!name.exists()).then_some(())))?;
    relay.release();
    let outcome = lan.finish_move(&lan.a, &job, REFUSAL)?;
    ensure(outcome.moved(), || format!("{:?} {}", outcome.exit, outcome.report))?;
    workload.check_going_on(&lan.b)
}

fn unreachable(lan: &Lan) -> Result {
    let mut workload = Workload::start(&lan.a, "counter", &[])?;
    lan.share_identity()?;
    let to = format!("{}:7077", Lan::B);
    let job = lan.start_move(&lan.a, &to, workload.pid(), &[])?;
    says(&lan.finish_move(&lan.a, &job, REFUSAL)?, &[Lan::B])?;
    workload.check_going_on(&lan.a)
}

fn usage(lan: &Lan) -> Result {
    let outcome = lan.run(&lan.a, &["--to", "nowhere", "--no-such-option", "1"], REFUSAL)?;
    ensure(outcome.exit.code == Some(2), || format!("{:?} {}", outcome.exit, outcome.stderr))
}
