//! System V segments live outside of processes: what stays of them, and where.

use std::time::Duration;

use migrate::testbed::{Host, Lan, Spawn, wait_for};

use crate::case::{Case, Result, ensure};
use crate::workload::Workload;

const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("segments/without_key_none_stays", |lan| moved(lan, "sysv", 0)),
        Case::new("segments/with_key_it_stays", |lan| moved(lan, "sysv_key", 1)),
        Case::new("segments/failed_move_leaves_none", failed_move),
    ]
}

/// The rows of the kernel's table, without those that are attached.
fn unattached(host: &Host) -> Result<Vec<String>> {
    let is_free = |row: &String| row.split_whitespace().nth(6) == Some("0");
    Ok(segments(host)?.into_iter().filter(is_free).collect())
}

/// The rows of the kernel's table, as a program on the host reads it.
fn segments(host: &Host) -> Result<Vec<String>> {
    let script = "cat /proc/sysvipc/shm; echo end";
    let job = host.spawn(&Spawn::new(["/bin/sh", "-c", script]))?;
    host.wait_line(&job, "end", 0, PATIENCE)?;
    let rows = host.stdout(&job);
    Ok(rows.lines().skip(1).filter(|row| *row != "end").map(str::to_owned).collect())
}

fn moved(lan: &Lan, kind: &str, stay: usize) -> Result {
    let workload = Workload::start(&lan.a, "zoo_shared", &[kind])?;
    lan.share_identity()?;
    let service = lan.serve(&lan.b)?;
    lan.move_to(&lan.a, &service, workload.pid(), &[], PATIENCE)?.expect_moved()?;
    let left = segments(&lan.a)?;
    ensure(left.len() == stay, || format!("at the source there is {left:?}"))?;
    ensure(unattached(&lan.b)?.is_empty(), || "the destination has more than is attached".to_owned())
}

/// The command is killed while its first round is under way, when the destination has made the segments.
fn failed_move(lan: &Lan) -> Result {
    let words = ["2", "32", "/run/shared/writer", "4", "sysv"];
    let mut workload = Workload::start(&lan.a, "writer", &words)?;
    lan.share_identity()?;
    let service = lan.serve(&lan.b)?;
    let job = lan.start_move(&lan.a, &service.address, workload.pid(), &["--bandwidth", "8mbit"])?;
    wait_for("segments at the destination", PATIENCE, || {
        let rows = segments(&lan.b).map_err(|e| migrate::testbed::TestbedError::Program(e.to_string()))?;
        Ok((!rows.is_empty()).then_some(()))
    })?;
    lan.a.signal(job.pid, libc::SIGKILL)?;
    wait_for("no segments at the destination", PATIENCE, || {
        let rows = segments(&lan.b).map_err(|e| migrate::testbed::TestbedError::Program(e.to_string()))?;
        Ok(rows.is_empty().then_some(()))
    })?;
    workload.check_going_on(&lan.a)
}
