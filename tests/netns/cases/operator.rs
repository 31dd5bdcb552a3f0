//! What operators see of a migration under way, and how they step in: status, cancel, postcopy, timeouts.

use std::time::Duration;

use migrate::testbed::{Host, Job, Lan, Outcome, STATE, wait_for};
use serde_json::Value;

use crate::case::{Case, Result, ensure, fail};
use crate::workload::Workload;

const MOVE: Duration = Duration::from_secs(120);
/// How long a command may take, and what it waits for.
const COMMAND: Duration = Duration::from_secs(30);
/// A link on which the writer's memory takes many seconds.
const SLOW: &[&str] = &["--bandwidth", "8M"];
/// One on which it takes a minute: for moves that are cancelled, at an instant that a busy machine may delay.
const SLOWER: &[&str] = &["--bandwidth", "1M"];
/// For moves whose time ends in the middle of the first round, however late that begins.
const TIMED: &[&str] = &["--bandwidth", "4M", "--timeout", "4s"];
/// The writer of these cases: 2 threads over 64 MiB.
const WRITER: &[&str] = &["2", "64", "/run/shared/writer", "4"];

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("operator/status_then_cancel", status_then_cancel),
        Case::new("operator/orders_to_nobody", orders_to_nobody),
        Case::new("operator/switch_during_precopy", switch_during_precopy),
        Case::new("operator/cancel_while_frozen", cancel_while_frozen),
        Case::new("operator/two_services_and_a_dead_one", two_services),
        Case::new("operator/timeout_cancel", timeout_cancel),
        Case::new("operator/timeout_force", timeout_force),
        Case::new("operator/timeout_postcopy", timeout_postcopy),
    ]
}

/// Runs a command that takes orders or asks; its JSON is the report.
fn ask(lan: &Lan, host: &Host, words: &[&str]) -> Result<Outcome> {
    Ok(lan.run(host, &[words, &["--json", "--state-dir", STATE]].concat(), COMMAND)?)
}

/// What `migrate status` knows on a host.
fn migrations(lan: &Lan, host: &Host) -> Result<Vec<Value>> {
    let outcome = ask(lan, host, &["status"])?;
    ensure(outcome.exit.code == Some(0), || format!("status: {:?} {}", outcome.exit, outcome.stderr))?;
    match outcome.report["migrations"].as_array() {
        Some(list) => Ok(list.clone()),
        None => fail(format!("status printed {}", outcome.report)),
    }
}

/// Waits until the one migration of a host is at this phase, with memory under way.
fn at_phase(lan: &Lan, host: &Host, phase: &str) -> Result<Value> {
    let what = format!("a migration on {} at {phase}", host.name());
    Ok(wait_for(&what, COMMAND, || {
        let list = migrations(lan, host).unwrap_or_default();
        // What remains is known a moment after the first bytes have gone.
        let counts = |m: &Value| m["side"] != "source" || phase != "precopy" || m["pages_remaining"].is_u64();
        let found = list.iter().find(|m| m["phase"] == phase && m["bytes_per_second"] != 0 && counts(m));
        Ok(found.cloned())
    })?)
}

fn id_of(migration: &Value) -> Result<String> {
    migration["migration_id"]
        .as_str()
        .map(str::to_owned)
        .ok_or_else(|| format!("no id in {migration}").into())
}

/// Starts a move that takes long enough to step in.
fn slow_move(lan: &Lan, workload: &Workload, rate: &[&str], options: &[&str]) -> Result<Job> {
    lan.share_identity()?;
    let service = lan.serve(&lan.b)?;
    Ok(lan.start_move(&lan.a, &service.address, workload.pid(), &[rate, options].concat())?)
}

fn expect_answer(outcome: &Outcome, code: i32, word: &str) -> Result {
    ensure(outcome.exit.code == Some(code) && outcome.report["outcome"] == word, || {
        format!("not {code} {word}: {:?} {} {}", outcome.exit, outcome.report, outcome.stderr)
    })
}

fn expect_not_moved(outcome: &Outcome, word: &str) -> Result {
    ensure(
        outcome.exit.code == Some(1)
            && outcome.report["outcome"] == "not_moved"
            && outcome.reasons().contains(word),
        || format!("{:?} {} {}", outcome.exit, outcome.report, outcome.stderr),
    )
}

/// The process works on at `a`, and `b` has nothing of it.
fn only_at_a(lan: &Lan, workload: &mut Workload) -> Result {
    workload.check_going_on(&lan.a)?;
    let pid = workload.pid();
    wait_for("nothing of it being left on b", COMMAND, || Ok((!lan.b.proc(pid).exists()).then_some(())))?;
    Ok(())
}

/// Both sides show the migration under one id; a cancel by the beginning of it leaves the process as it was.
fn status_then_cancel(lan: &Lan) -> Result {
    let mut workload = Workload::start(&lan.a, "writer", WRITER)?;
    workload.check(&lan.a)?;
    let job = slow_move(lan, &workload, SLOWER, &[])?;
    let here = at_phase(lan, &lan.a, "precopy")?;
    let there = at_phase(lan, &lan.b, "precopy")?;
    let id = id_of(&here)?;
    ensure(id_of(&there)? == id, || format!("{here} {there}"))?;
    for (migration, side) in [(&here, "source"), (&there, "destination")] {
        ensure(
            migration["side"] == side
                && migration["pid"] == workload.pid()
                && migration["command"] == "writer"
                && migration["round"] == 1
                && migration["elapsed_ms"].is_u64(),
            || migration.to_string(),
        )?;
    }
    ensure(here["migrate_pid"] == job.pid && here["pages_remaining"].as_u64() > Some(0), || {
        here.to_string()
    })?;

    let words = ["status", &id[..6], "--state-dir", STATE];
    let table = lan.begin(&lan.a, &words)?;
    lan.a.wait_exit(table.pid, COMMAND)?;
    let text = lan.a.stdout(&table);
    ensure(
        text.lines().count() == 2 && text.contains(&id[..12]) && text.contains("pre-copy round 1"),
        || text.clone(),
    )?;

    // At the destination nobody decides about it.
    let refused = ask(lan, &lan.b, &["cancel", &id])?;
    expect_answer(&refused, 1, "refused")?;
    ensure(lan.a.exit_of(job.pid).is_none(), || "the move has ended".to_owned())?;

    expect_answer(&ask(lan, &lan.a, &["cancel", &id[..6]])?, 0, "cancelled")?;
    // At once: nothing is waited for any more.
    workload.check(&lan.a)?;
    expect_not_moved(&lan.finish_move(&lan.a, &job, MOVE)?, "cancelled")?;
    only_at_a(lan, &mut workload)?;
    for host in [&lan.a, &lan.b] {
        wait_for("an empty list", COMMAND, || {
            Ok(migrations(lan, host).is_ok_and(|list| list.is_empty()).then_some(()))
        })?;
    }
    let sockets = std::fs::read_dir(lan.a.outside(STATE).join("run"))?.count();
    ensure(sockets == 0, || format!("{sockets} sockets are left"))
}

/// Orders about migrations that do not exist.
fn orders_to_nobody(lan: &Lan) -> Result {
    ensure(migrations(lan, &lan.a)?.is_empty(), || "something on a fresh host".to_owned())?;
    lan.share_identity()?;
    lan.serve(&lan.b)?;
    for words in [["cancel", "ab"], ["postcopy", "ab"], ["status", "ab"]] {
        for host in [&lan.a, &lan.b] {
            let outcome = ask(lan, host, &words)?;
            ensure(outcome.exit.code == Some(1) && outcome.stderr.contains("no migration ab"), || {
                format!("{words:?}: {:?} {}", outcome.exit, outcome.stderr)
            })?;
        }
    }
    ensure(migrations(lan, &lan.b)?.is_empty(), || "something on a fresh service".to_owned())
}

/// `migrate postcopy` cuts the first round short: the process runs at the destination with all its memory.
fn switch_during_precopy(lan: &Lan) -> Result {
    let mut workload = Workload::start(&lan.a, "writer", WRITER)?;
    workload.check(&lan.a)?;
    let job = slow_move(lan, &workload, SLOW, &[])?;
    let id = id_of(&at_phase(lan, &lan.a, "precopy")?)?;
    expect_answer(&ask(lan, &lan.a, &["postcopy", &id])?, 0, "switched")?;
    let outcome = lan.finish_move(&lan.a, &job, MOVE)?.expect_moved()?;
    cut_short(&outcome.report)?;
    workload.check_going_on(&lan.b)
}

/// One round, that has left something to be sent later.
fn cut_short(report: &Value) -> Result {
    let rounds = report["rounds"].as_array().map(Vec::as_slice).unwrap_or_default();
    let [round] = rounds else { return fail(format!("not one round: {report}")) };
    ensure(round["dirty_after"].as_u64() > round["pages"].as_u64(), || format!("not cut short: {report}"))
}

/// Even a process that stands still for its last pages can be had back.
fn cancel_while_frozen(lan: &Lan) -> Result {
    let mut workload = Workload::start(&lan.a, "writer", WRITER)?;
    workload.check(&lan.a)?;
    let force = ["--mode", "precopy", "--timeout", "100ms", "--on-timeout", "force"];
    let job = slow_move(lan, &workload, SLOWER, &force)?;
    let id = id_of(&at_phase(lan, &lan.a, "frozen")?)?;
    let late = ask(lan, &lan.a, &["postcopy", &id])?;
    expect_answer(&late, 1, "too_late")?;
    expect_answer(&ask(lan, &lan.a, &["cancel", &id])?, 0, "cancelled")?;
    workload.check(&lan.a)?;
    expect_not_moved(&lan.finish_move(&lan.a, &job, MOVE)?, "cancelled")?;
    only_at_a(lan, &mut workload)
}

/// Two services keep out of each other's way in one state directory; the socket of a killed one is removed.
fn two_services(lan: &Lan) -> Result {
    let mut first = Workload::start(&lan.a, "counter", &[])?;
    let mut second = Workload::start(&lan.a, "writer", WRITER)?;
    first.check(&lan.a)?;
    second.check(&lan.a)?;
    let job = slow_move(lan, &second, SLOWER, &[])?;
    let address = format!("{}:7078", Lan::B);
    let service = lan.begin(&lan.b, &["serve", "--listen", &address, "--state-dir", STATE])?;
    lan.b.wait_line(&service, "listening on", 0, COMMAND)?;
    let slowest = ["--bandwidth", "20K", "--compress", "none"];
    let other = lan.start_move(&lan.a, &address, first.pid(), &slowest)?;

    let both = |host: &Host| {
        wait_for("both migrations", COMMAND, || {
            let list = migrations(lan, host).unwrap_or_default();
            Ok((list.len() == 2 && list.iter().all(|m| m["phase"] == "precopy")).then_some(list))
        })
    };
    let (here, there) = (both(&lan.a)?, both(&lan.b)?);
    let ids = |list: &[Value]| {
        let mut ids: Vec<_> = list.iter().map(|m| m["migration_id"].to_string()).collect();
        ids.sort_unstable();
        ids
    };
    ensure(ids(&here) == ids(&there), || format!("{here:?} {there:?}"))?;

    let run = lan.b.outside(STATE).join("run");
    ensure(std::fs::read_dir(&run)?.count() == 2, || "not two sockets".to_owned())?;
    lan.b.kill(service.pid)?;
    ensure(std::fs::read_dir(&run)?.count() == 2, || "a killed service cannot tidy up".to_owned())?;
    let left = migrations(lan, &lan.b)?;
    let still = |m: &Value| m["pid"] == second.pid();
    ensure(left.len() == 1 && left.iter().all(still), || format!("{left:?}"))?;
    ensure(std::fs::read_dir(&run)?.count() == 1, || "the dead socket is still there".to_owned())?;

    expect_not_moved(&lan.finish_move(&lan.a, &other, MOVE)?, "lost")?;
    expect_answer(&ask(lan, &lan.a, &["cancel", &id_of(&left[0])?])?, 0, "cancelled")?;
    expect_not_moved(&lan.finish_move(&lan.a, &job, MOVE)?, "cancelled")?;
    only_at_a(lan, &mut first)?;
    only_at_a(lan, &mut second)
}

/// The end of the time: the process stays, and the report says why.
fn timeout_cancel(lan: &Lan) -> Result {
    let mut workload = Workload::start(&lan.a, "writer", WRITER)?;
    workload.check(&lan.a)?;
    let job = slow_move(lan, &workload, SLOW, &["--timeout", "1s"])?;
    expect_not_moved(&lan.finish_move(&lan.a, &job, MOVE)?, "--timeout 1s")?;
    only_at_a(lan, &mut workload)
}

/// The end of the time: the process is frozen within the first round, and moved with all its memory.
fn timeout_force(lan: &Lan) -> Result {
    let mut workload = Workload::start(&lan.a, "writer", WRITER)?;
    workload.check(&lan.a)?;
    let job = slow_move(lan, &workload, TIMED, &["--on-timeout", "force"])?;
    let outcome = lan.finish_move(&lan.a, &job, MOVE)?.expect_moved()?;
    cut_short(&outcome.report)?;
    ensure(outcome.report["mode"] == "precopy", || outcome.report.to_string())?;
    workload.check_going_on(&lan.b)
}

/// The end of the time: the process is frozen within the first round, and what that has not sent follows.
fn timeout_postcopy(lan: &Lan) -> Result {
    let mut workload = Workload::start(&lan.a, "writer", WRITER)?;
    workload.check(&lan.a)?;
    // Allowed in each mode, as `migrate postcopy` is.
    let options = ["--mode", "precopy", "--on-timeout", "postcopy"];
    let job = slow_move(lan, &workload, TIMED, &options)?;
    let outcome = lan.finish_move(&lan.a, &job, MOVE)?.expect_moved()?;
    cut_short(&outcome.report)?;
    ensure(outcome.report["mode"] == "hybrid", || outcome.report.to_string())?;
    workload.check_going_on(&lan.b)
}
