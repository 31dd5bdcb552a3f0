//! `migrate check PID`: the examination before a move, without the move.

use std::sync::Arc;

use super::looks::Looks;
use super::{SourceError, ask, connect, new_id, orphans, plan};
use crate::config::{CheckConfig, Destination};
use crate::engine::kernel::Host;
use crate::engine::reason::Reason;
use crate::engine::remote::Tid;
use crate::identity::Node;
use crate::transport::Settings;

/// What was found out about a process.
#[derive(Debug, serde::Serialize)]
pub struct Verdict {
    /// The process.
    pub pid: Tid,
    /// Everything against the move, here and at the destination that was asked.
    pub reasons: Vec<Reason>,
    /// What would be different afterwards, and is no obstacle.
    pub notes: Vec<Reason>,
}

/// Examines the process, and asks the destination if there is one. Nothing is touched on either side.
///
/// # Errors
/// [`SourceError`] before anything was even looked at.
pub fn check(config: &CheckConfig, pid: Tid) -> Result<Verdict, SourceError> {
    let host = Host::probe()?;
    let mut looks = Looks::default();
    loop {
        let (verdict, reached) = look(config, pid, &host)?;
        if verdict.reasons.is_empty() || !reached || looks.stand(&verdict.reasons) {
            return Ok(verdict);
        }
    }
}

/// One look; true unless there is a destination that was not reached.
fn look(config: &CheckConfig, pid: Tid, host: &Host) -> Result<(Verdict, bool), SourceError> {
    let mut plan = plan::survey(new_id()?, pid, &config.allowed, host);
    plan.notes.extend(orphans::notes(pid, &config.allowed));
    let mut reached = true;
    if let Some(to) = &config.to {
        plan.begin.check_only = true;
        let said = destination_says(config, to, plan.begin)?;
        reached = said.is_ok();
        plan.reasons.extend(said.unwrap_or_else(|unreached| vec![unreached]));
    }
    Ok((Verdict { pid, reasons: plan.reasons, notes: plan.notes }, reached))
}

fn destination_says(
    config: &CheckConfig,
    to: &Destination,
    begin: crate::proto::control::Begin,
) -> Result<Result<Vec<Reason>, Reason>, SourceError> {
    let node = Arc::new(Node::open(&config.state_dir)?);
    let link = connect(node, to, crate::hello::hello(), Settings::default());
    Ok(link.map(|mut link| ask_strictly(&mut link, begin)))
}

/// Silence is no consent, where the answer is all that was wanted.
fn ask_strictly(link: &mut crate::transport::Link, begin: crate::proto::control::Begin) -> Vec<Reason> {
    match ask(link, begin) {
        super::Answer::Consent => Vec::new(),
        super::Answer::Against(reasons) => reasons,
        super::Answer::Silence => vec![Reason::new("destination", "has not answered in time", "")],
    }
}
