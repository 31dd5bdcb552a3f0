//! Refusals of what is special about a process or about the other host: the command itself, threads of the
//! kernel, 32-bit programs, another processor, another version. And `migrate check`, which only asks.

use std::fmt::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use migrate::testbed::{Lan, Outcome, SHARED, STATE, Service, Spawn};

use super::refusals::{REFUSAL, says};
use crate::case::{Case, Need, Result, ensure};
use crate::stranger::{self, Stranger};
use crate::workload::Workload;

const MIGRATE: &str = env!("CARGO_BIN_EXE_migrate");

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("refusals/kernel_thread", |_| kernel_thread()).needs(Need::KernelThreads),
        Case::new("refusals/command_itself", command_itself),
        Case::new("refusals/commands_shell", commands_shell),
        Case::new("refusals/program_of_32_bits", program_of_32_bits).needs(Need::Programs32Bit),
        Case::new("refusals/another_processor", another_processor),
        Case::new("refusals/another_version", another_version),
        Case::new("check/consent", |lan| check(lan, &[], &[])),
        Case::new("check/all_reasons", |lan| {
            check(lan, &["inotify", "private_file"], &["inotify", "only-here"])
        }),
    ]
}

/// On this machine and not on a host: no thread of the kernel is in sight there.
fn kernel_thread() -> Result {
    let state = tempfile::tempdir()?;
    let output = Command::new(MIGRATE)
        .args(["--to", "127.0.0.1:9", "--json", "--state-dir"])
        .arg(state.path())
        .arg("2")
        .output()?;
    let report: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let text = report["reasons"].to_string();
    ensure(output.status.code() == Some(1), || format!("{:?} {report}", output.status))?;
    ensure(text.contains("thread of the kernel"), || text.clone())?;
    // In the same go.
    ensure(text.contains("127.0.0.1:9"), || text)
}

/// A shell's script with `migrate --to` of process `$$` in it.
fn script(service: &Service, script: &str) -> Spawn {
    let command = format!("{MIGRATE} --to {} --state-dir {STATE} --json $$", service.address);
    Spawn::new(["/bin/sh", "-c", &script.replace("MOVE", &command)]).private_output()
}

fn command_itself(lan: &Lan) -> Result {
    lan.share_identity()?;
    let service = lan.serve(&lan.b)?;
    let job = lan.a.spawn(&script(&service, "exec MOVE"))?;
    says(&lan.finish_move(&lan.a, &job, REFUSAL)?, &["this very process"])
}

/// The shell goes on after the command that was to move it.
fn commands_shell(lan: &Lan) -> Result {
    lan.share_identity()?;
    let service = lan.serve(&lan.b)?;
    let job = lan.a.spawn(&script(&service, "MOVE; status=$?; echo went on; exit $status"))?;
    let exit = lan.a.wait_exit(job.pid, REFUSAL)?;
    let text = lan.a.stdout(&job);
    ensure(exit.code == Some(1) && text.contains("ancestor"), || format!("{exit:?} {text}"))?;
    ensure(text.ends_with("went on\n"), || text)
}

/// A program for i386, made by hand: pause(2), again and again.
fn small_elf() -> Vec<u8> {
    const AT: u32 = 0x0804_8000;
    const HEADERS: u32 = 52 + 32;
    // mov eax, 29; int 0x80; jmp back
    const CODE: [u8; 9] = [0xb8, 29, 0, 0, 0, 0xcd, 0x80, 0xeb, 0xf7];
    let mut elf = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let half = |elf: &mut Vec<u8>, v: u16| elf.extend(v.to_le_bytes());
    let words = |elf: &mut Vec<u8>, list: &[u32]| list.iter().for_each(|v| elf.extend(v.to_le_bytes()));
    // An executable for the 386.
    half(&mut elf, 2);
    half(&mut elf, 3);
    // Version, entry, program headers, no section headers, no flags.
    words(&mut elf, &[1, AT + HEADERS, 52, 0, 0]);
    for v in [52, 32, 1, 40, 0, 0] {
        half(&mut elf, v);
    }
    let bytes = HEADERS + 9;
    // One segment to load: the whole file, to be read and executed.
    words(&mut elf, &[1, 0, AT, AT, bytes, bytes, 5, 0x1000]);
    elf.extend(CODE);
    elf
}

fn program_of_32_bits(lan: &Lan) -> Result {
    lan.share_identity()?;
    let service = lan.serve(&lan.b)?;
    let program = format!("{SHARED}/pause32");
    let file = lan.a.outside(&program);
    std::fs::write(&file, small_elf())?;
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755))?;
    let job = lan.a.spawn(&Spawn::new([program.as_str()]))?;
    migrate::testbed::wait_for("the program's sleep", REFUSAL, || {
        let exe = std::fs::read_link(lan.a.proc(job.pid).join("exe")).unwrap_or_default();
        let status = std::fs::read_to_string(lan.a.proc(job.pid).join("status")).unwrap_or_default();
        Ok((exe.ends_with("pause32") && status.contains("State:\tS")).then_some(()))
    })?;
    says(&lan.move_to(&lan.a, &service, job.pid, &[], REFUSAL)?, &["32-bit"])?;
    let status = std::fs::read_to_string(lan.a.proc(job.pid).join("status"))?;
    ensure(status.contains("State:\tS") && status.contains("TracerPid:\t0"), || status.clone())?;
    // It takes signals as ever.
    lan.a.signal(job.pid, libc::SIGTERM)?;
    let exit = lan.a.wait_exit(job.pid, REFUSAL)?;
    ensure(exit.signal == Some(libc::SIGTERM), || format!("{exit:?}"))
}

/// `b` says of its processor that it has no `cx16`, which all have.
fn another_processor(lan: &Lan) -> Result {
    lan.share_identity()?;
    let without = std::fs::read_to_string("/proc/cpuinfo")?.replace(" cx16", "");
    let file = format!("{STATE}/cpuinfo");
    std::fs::write(lan.b.outside(&file), without)?;
    let mount = Spawn::new(["mount", "--bind", &file, "/proc/cpuinfo"]);
    let (exit, _, error) = lan.b.run(&mount, REFUSAL)?;
    ensure(exit.code == Some(0), || format!("mount: {error}"))?;
    super::refusals::refused(
        lan,
        Workload::start(&lan.a, "counter", &["inotify"])?,
        &[],
        &["cx16", "inotify"],
    )
}

/// A destination of another version, by real QUIC: both versions are named, beside what else is in the way.
fn another_version(lan: &Lan) -> Result {
    let mut workload = Workload::start(&lan.a, "counter", &["inotify"])?;
    lan.identity(&lan.a)?;
    let stranger = Stranger::start(&lan.b, lan.address(&lan.b))?;
    let trust = ["trust", "add", "b", &stranger.fingerprint, "--state-dir", STATE];
    let outcome = lan.run(&lan.a, &trust, REFUSAL)?;
    ensure(outcome.exit.code == Some(0), || outcome.stderr.clone())?;
    let job = lan.start_move(&lan.a, &stranger.address, workload.pid(), &[])?;
    let ours = migrate::wire::PROTOCOL_VERSION;
    let versions = format!("version {ours} here, {} there", stranger::VERSION);
    says(&lan.finish_move(&lan.a, &job, REFUSAL)?, &[&versions, "inotify"])?;
    workload.check_going_on(&lan.a)
}

/// `migrate check PID --to`: what a move would say, and nothing is touched.
fn check(lan: &Lan, states: &[&str], words: &[&str]) -> Result {
    let mut workload = Workload::start(&lan.a, "counter", states)?;
    lan.share_identity()?;
    let service = lan.serve(&lan.b)?;
    let before = lan.b.processes()?;
    let pid = workload.pid().to_string();
    let command = ["check", &pid, "--to", &service.address, "--state-dir", STATE];
    let told = |outcome: &Outcome| format!("{:?} {} {}", outcome.exit, outcome.report, outcome.stderr);
    let outcome = lan.run(&lan.a, &[&command[..], &["--json"]].concat(), REFUSAL)?;
    let wanted = i32::from(!words.is_empty());
    ensure(outcome.exit.code == Some(wanted), || told(&outcome))?;
    let reasons = outcome.reasons().to_lowercase();
    ensure(reasons.is_empty() == words.is_empty(), || told(&outcome))?;
    for word in words {
        ensure(reasons.contains(word), || format!("no reason names {word:?}: {}", told(&outcome)))?;
    }
    let outcome = lan.run(&lan.a, &command, REFUSAL)?;
    ensure(outcome.exit.code == Some(wanted), || told(&outcome))?;
    workload.check_going_on(&lan.a)?;
    let mut left = String::new();
    for host in [&lan.a, &lan.b] {
        let records = std::fs::read_dir(host.outside(format!("{STATE}/outgoing")));
        let records = records.map_or(0, |list| list.flatten().filter(is_record).count());
        write!(left, "{records} ")?;
    }
    ensure(left == "0 0 " && lan.b.processes()? == before, || format!("left: {left} {:?}", lan.b.processes()))
}

fn is_record(entry: &std::fs::DirEntry) -> bool {
    entry.path().extension().is_some_and(|extension| extension == "json")
}
