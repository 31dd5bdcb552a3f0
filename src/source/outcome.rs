//! The end of a migration in words: what the report says to the operator.

use super::protocol::{Cause, Outcome};
use crate::engine::reason::Reason;
use crate::report::{self, Report};

/// Fills in outcome and reasons. `seen` are reasons that single steps have reported.
pub(super) fn describe(report: &mut Report, outcome: Outcome, seen: Vec<Reason>) {
    let process = format!("pid {}", report.pid);
    report.reasons.extend(seen);
    match outcome {
        Outcome::Moved => report.outcome = report::Outcome::Moved,
        Outcome::Unknown => {
            report.outcome = report::Outcome::Unknown;
            report.reasons.push(Reason::new(
                process,
                "the right to run was offered to the destination, which has not said whether it took it; \
                 until it does, the process is held here, stopped",
                format!(
                    "it is asked again in the background; by hand: migrate resume {}",
                    report.migration_id
                ),
            ));
        }
        Outcome::Unfinished => {
            report.outcome = report::Outcome::Unknown;
            report.reasons.push(Reason::new(
                process,
                "runs at the destination, which misses pages that are held here and cannot be reached: \
                 there the process waits where it touches them, and here its stopped original is kept",
                format!(
                    "it is tried again in the background; by hand: migrate resume {} [--to HOST:PORT]",
                    report.migration_id
                ),
            ));
        }
        Outcome::Lost(reasons) => {
            report.outcome = report::Outcome::Unknown;
            report.reasons.push(Reason::new(
                process,
                "was taken over by the destination and has ended there, because pages that it missed could \
                 not be had any more; it runs on neither side",
                "start it anew",
            ));
            report.reasons.extend(reasons);
        }
        Outcome::NotMoved(cause) => {
            report.outcome = report::Outcome::NotMoved;
            match cause {
                Cause::Refused(reasons) => report.reasons.extend(reasons),
                Cause::GivenUp(reasons) if !reasons.is_empty() => report.reasons.extend(reasons),
                // The single reasons have been taken down already.
                Cause::Failed { .. } if !report.reasons.is_empty() => {}
                cause => report.reasons.push(Reason::new(process, cause.to_string(), "")),
            }
        }
    }
}
