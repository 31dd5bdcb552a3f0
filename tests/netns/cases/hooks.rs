//! The operator's hooks: which stages are told, in which order, with what environment; and that one that fails
//! before the commit keeps the process where it is.

use std::path::PathBuf;
use std::time::Duration;

use migrate::testbed::{Job, Lan, SHARED, TestbedError, wait_for};

use super::crash::SETTLE;
use super::limbo::{at_state, held_from, sentinels};
use super::refusals::says;
use crate::case::{Case, Result, ensure};
use crate::relay::Way;
use crate::workload::Workload;

const MOVE: Duration = Duration::from_secs(60);

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("hooks/stages_of_a_move", stages),
        Case::new("hooks/a_failing_pre_freeze", |lan| {
            failing(lan, "pre-freeze", &["pre-freeze S", "failed S"])
        }),
        Case::new("hooks/a_failing_network_lock", |lan| {
            failing(lan, "network-lock", &["pre-freeze S", "network-lock t", "network-unlock t", "failed S"])
        }),
        Case::new("hooks/the_sentinel_tells_as_well", by_the_sentinel),
    ]
}

/// A hook that holds one stage until it is let go, at whichever host; it can be held once.
pub(crate) struct Hold<'a> {
    lan: &'a Lan,
    pub(crate) command: String,
}

impl<'a> Hold<'a> {
    /// It ends with this exit status.
    pub(crate) fn at(lan: &'a Lan, stage: &str, exit: u8) -> Self {
        let command = format!(
            "[ $MIGRATE_STAGE = {stage} ] || exit 0; touch {SHARED}/held; \
             while [ ! -e {SHARED}/go ]; do sleep 0.001; done; rm {SHARED}/held {SHARED}/go; exit {exit}"
        );
        Self { lan, command }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.lan.a.outside(format!("{SHARED}/{name}"))
    }

    /// Waits until it holds.
    pub(crate) fn until_held(&self, job: &Job) -> Result {
        Ok(wait_for("the hook", MOVE, || match self.lan.a.exit_of(job.pid) {
            Some(exit) => Err(TestbedError::Program(format!("the move ended with {exit:?} before its hook"))),
            None => Ok(self.file("held").exists().then_some(())),
        })?)
    }

    pub(crate) fn let_go(&self) -> Result {
        Ok(std::fs::write(self.file("go"), "")?)
    }
}

/// A command that writes down its stage, and what else is asked of it, in a file both hosts see.
fn noting(what: &str, file: &str) -> String {
    format!("echo $MIGRATE_STAGE {what} >> {SHARED}/{file}")
}

/// The letter that `/proc` has for the state of the process.
const STATE_LETTER: &str = "$(cut -d' ' -f3 /proc/$MIGRATE_PID/stat)";

fn lines(lan: &Lan, file: &str) -> Vec<String> {
    let text = std::fs::read_to_string(lan.a.outside(format!("{SHARED}/{file}"))).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

fn await_lines(lan: &Lan, file: &str, count: usize) -> Result<Vec<String>> {
    Ok(wait_for(&format!("{count} lines of {file}"), SETTLE, || {
        let lines = lines(lan, file);
        Ok((lines.len() >= count).then_some(lines))
    })?)
}

fn stages(lan: &Lan) -> Result {
    let mut workload = Workload::start(&lan.a, "counter", &[])?;
    lan.share_identity()?;
    let what = format!("$MIGRATE_SIDE $MIGRATE_ID $MIGRATE_PID $MIGRATE_DEST {STATE_LETTER}");
    let hook = noting(&what, "all");
    let first = noting("first", "all");
    let service = lan.serve_with(&lan.b, &["--hook", &hook])?;
    let options = ["--hook", &first, "--hook", &hook];
    let outcome = lan.move_to(&lan.a, &service, workload.pid(), &options, MOVE)?.expect_moved()?;
    workload.check_going_on(&lan.b)?;
    let id = outcome.report["migration_id"].as_str().ok_or("no id")?.to_owned();
    let all = await_lines(lan, "all", 8)?;
    let (pid, to) = (workload.pid(), &service.address);
    let source = |stage: &str, state: &str| format!("{stage} source {id} {pid} {to} {state}");
    let in_order =
        |text: &str, next: &str| all.iter().position(|l| l == text) < all.iter().position(|l| l == next);
    let unlock = format!("network-unlock destination {id} {pid} {to} t");
    let expected = [
        "pre-freeze first",
        "network-lock first",
        "post-resume first",
        &source("network-lock", "t"),
        &unlock,
    ];
    for line in expected {
        ensure(all.iter().filter(|l| *l == line).count() == 1, || format!("not once {line:?}: {all:?}"))?;
    }
    // The state is one of a running process; at the source the process is on its way out.
    for (stage, side) in [("pre-freeze", "source"), ("post-resume", "source"), ("post-resume", "destination")]
    {
        let start = format!("{stage} {side} {id} {pid} {to} ");
        let seen = all.iter().filter(|l| l.starts_with(start.trim_end())).count();
        ensure(seen == 1, || format!("{start}: {all:?}"))?;
    }
    ensure(all.len() == 8, || format!("{all:?}"))?;
    ensure(
        in_order("pre-freeze first", "network-lock first")
            && in_order("network-lock first", &source("network-lock", "t"))
            && in_order(&source("network-lock", "t"), &unlock)
            && in_order(&unlock, "post-resume first"),
        || format!("the order: {all:?}"),
    )
}

/// A hook that says no at this stage.
fn failing(lan: &Lan, stage: &str, expected: &[&str]) -> Result {
    let mut workload = Workload::start(&lan.a, "counter", &[])?;
    workload.check(&lan.a)?;
    lan.share_identity()?;
    // A process that runs may be seen at work.
    let note = format!("s={STATE_LETTER}; [ $s != R ] || s=S; {}", noting("$s", "source"));
    let hook = format!("{note}; [ $MIGRATE_STAGE != {stage} ]");
    let there = noting("there", "destination");
    let service = lan.serve_with(&lan.b, &["--hook", &there])?;
    let before = lan.b.processes()?;
    let options = ["--hook", &hook, "--move-ip", Lan::MOVE_IP];
    let outcome = lan.move_to(&lan.a, &service, workload.pid(), &options, MOVE)?;
    says(&outcome, &["hook", stage])?;
    workload.check_going_on(&lan.a)?;
    let seen = lines(lan, "source");
    ensure(seen == expected, || format!("{seen:?} instead of {expected:?}"))?;
    ensure(lan.has_service(&lan.a)? && !lan.has_service(&lan.b)?, || "the address is gone".to_owned())?;
    await_lines(lan, "destination", 1)?;
    let seen = lines(lan, "destination");
    ensure(seen == ["failed there"], || format!("{seen:?}"))?;
    wait_for("nothing being left on b", SETTLE, || Ok((lan.b.processes()? == before).then_some(())))?;
    Ok(())
}

/// The command is killed in limbo: its sentinel asks, gives the process back, and tells.
fn by_the_sentinel(lan: &Lan) -> Result {
    let mut workload = Workload::start(&lan.a, "counter", &[])?;
    lan.share_identity()?;
    lan.serve(&lan.b)?;
    // The commit gets no further than there, and meets a cut link then.
    let relay = held_from(lan, Way::Forth, "limbo")?;
    let hook = noting("$MIGRATE_SIDE", "source");
    let job = lan.start_move(&lan.a, &relay.address, workload.pid(), &["--hook", &hook])?;
    at_state(&lan.a, &job, "limbo")?;
    lan.cut(&lan.b)?;
    lan.a.kill(job.pid)?;
    relay.release();
    let pid = workload.pid();
    wait_for("the destination giving up", SETTLE, || Ok((!lan.b.proc(pid).exists()).then_some(())))?;
    let seen = lines(lan, "source");
    ensure(seen == ["pre-freeze source", "network-lock source"], || format!("{seen:?}"))?;
    lan.heal(&lan.b)?;
    wait_for("the end of the sentinel", SETTLE, || {
        Ok(sentinels(&lan.a).is_ok_and(|list| list.is_empty()).then_some(()))
    })?;
    workload.check_going_on(&lan.a)?;
    let seen = lines(lan, "source");
    ensure(seen[2..] == ["network-unlock source", "failed source"], || format!("{seen:?}"))
}
