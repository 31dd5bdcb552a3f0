//! Clocks that go on: a process in a time namespace of its own, and hosts whose clocks differ.

use std::time::Duration;

use migrate::testbed::{Host, Lan, STATE, Service, Spawn};

use crate::case::{Case, Need, Result, ensure};
use crate::workload::{Workload, build};

const MOVE: Duration = Duration::from_secs(60);
const SOON: Duration = Duration::from_secs(10);
/// What a time namespace adds to the clocks of this machine, seconds: more than any timer waits for.
const PROCESS: [i64; 2] = [100_000, 700_000];
const MACHINE: [i64; 2] = [40_000, 60_000];

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("clocks/time_namespace", time_namespace).needs(Need::Program("unshare")),
        Case::new("clocks/another_machine", another_machine).needs(Need::Program("unshare")),
        Case::new("clocks/refused", refused).needs(Need::Program("unshare")).needs(Need::Program("setpriv")),
    ]
}

/// `unshare` before a command, for clocks that read so much more.
fn ahead_by([monotonic, boottime]: [i64; 2]) -> Vec<String> {
    let options = [format!("--monotonic={monotonic}"), format!("--boottime={boottime}")];
    ["unshare".to_owned(), "--time".to_owned()].into_iter().chain(options).collect()
}

fn start(host: &Host) -> Result<Workload> {
    let program = [build("zoo_clocks")?, "go_on".to_owned()];
    Workload::spawn(host, &Spawn::new(ahead_by(PROCESS).iter().chain(&program)))
}

/// CLOCK_MONOTONIC and CLOCK_BOOTTIME of a process, against the machine's.
fn offsets(host: &Host, pid: i32) -> Result<Vec<i64>> {
    let text = std::fs::read_to_string(host.proc(pid).join("timens_offsets"))?;
    let seconds = text.lines().map(|line| Ok(line.split_whitespace().nth(1).unwrap_or("0").parse()?));
    seconds.collect()
}

/// The same kernel: the offsets stay exactly what they are.
fn time_namespace(lan: &Lan) -> Result {
    lan.share_identity()?;
    let services = [lan.serve(&lan.a)?, lan.serve(&lan.b)?];
    let mut workload = start(&lan.a)?;
    for (from, to, service) in [(&lan.a, &lan.b, &services[1]), (&lan.b, &lan.a, &services[0])] {
        ensure(offsets(from, workload.pid())? == PROCESS, || "started with other clocks".to_owned())?;
        lan.move_to(from, service, workload.pid(), &[], MOVE)?.expect_moved()?;
        workload.check_going_on(to)?;
        ensure(offsets(to, workload.pid())? == PROCESS, || "has other clocks".to_owned())?;
    }
    Ok(())
}

/// `b` as another machine: another boot, other clocks. The process is not told.
fn another_machine(lan: &Lan) -> Result {
    lan.share_identity()?;
    let boot = format!("{STATE}/boot_id");
    std::fs::write(lan.b.outside(&boot), "01234567-89ab-cdef-0123-456789abcdef\n")?;
    let mount = Spawn::new(["mount", "--bind", &boot, "/proc/sys/kernel/random/boot_id"]);
    let (exit, _, error) = lan.b.run(&mount, SOON)?;
    ensure(exit.code == Some(0), || format!("mount: {error}"))?;

    let mut workload = start(&lan.a)?;
    let address = format!("{}:7077", Lan::B);
    let job = lan.b.spawn(&on_b(&["serve", "--listen", &address, "--state-dir", STATE, "-v"]))?;
    lan.b.wait_line(&job, "listening on", 0, SOON)?;
    lan.move_to(&lan.a, &Service { job, address }, workload.pid(), &[], MOVE)?.expect_moved()?;
    workload.check_going_on(&lan.b)?;
    close_to(PROCESS, &offsets(&lan.b, workload.pid())?)?;

    let back = lan.serve(&lan.a)?;
    let pid = workload.pid().to_string();
    let job = lan.b.spawn(&on_b(&["--to", &back.address, "--state-dir", STATE, "--json", &pid]))?;
    lan.finish_move(&lan.b, &job, MOVE)?.expect_moved()?;
    workload.check_going_on(&lan.a)?;
    close_to(PROCESS, &offsets(&lan.a, workload.pid())?)
}

/// A service that may not set clocks refuses those of a time namespace by name, and has nothing against others.
fn refused(lan: &Lan) -> Result {
    lan.share_identity()?;
    let address = format!("{}:7077", Lan::B);
    let without = ["setpriv", "--bounding-set=-sys_time", env!("CARGO_BIN_EXE_migrate")];
    let words = without.into_iter().chain(["serve", "--listen", &address, "--state-dir", STATE]);
    let job = lan.b.spawn(&Spawn::new(words).in_agents_session().private_output())?;
    lan.b.wait_line(&job, "listening on", 0, SOON)?;
    let service = Service { job, address };
    let mut ordinary = Workload::start(&lan.a, "zoo_clocks", &["go_on"])?;
    let mut workload = start(&lan.a)?;
    for (process, named) in [(&mut workload, true), (&mut ordinary, false)] {
        let outcome = lan.move_to(&lan.a, &service, process.pid(), &[], MOVE)?;
        let reasons = outcome.reasons();
        // It cannot give the right to set clocks either, which is a reason of its own.
        ensure(outcome.exit.code == Some(1), || format!("{:?} {}", outcome.exit, outcome.report))?;
        ensure(reasons.contains("time namespace") == named, || reasons.clone())?;
        process.check_going_on(&lan.a)?;
    }
    Ok(())
}

fn on_b(words: &[&str]) -> Spawn {
    let command = ahead_by(MACHINE).into_iter().chain([env!("CARGO_BIN_EXE_migrate").to_owned()]);
    let words = words.iter().map(|word| (*word).to_owned());
    Spawn::new(command.chain(words)).in_agents_session().private_output()
}

/// All on one kernel in truth: what the moves added is what they took to agree on the clocks.
fn close_to(wanted: [i64; 2], found: &[i64]) -> Result {
    let close = found.len() == 2 && wanted.iter().zip(found).all(|(w, f)| w.abs_diff(*f) <= 2);
    ensure(close, || format!("clocks {found:?} s ahead, not {wanted:?}"))
}
