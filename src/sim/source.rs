//! The source's driver, in the model.

use std::time::Duration;

use super::{Body, Event, Here, LATENCY, OPERATOR, Opener, PROCESS, SENTINEL, STEP, World};
use crate::config::Mode;
use crate::dest::protocol::Message as ToDest;
use crate::journal::OutgoingState;
use crate::source::machine::SourceMachine;
use crate::source::policy::{Limits, Round};
use crate::source::protocol::{Action, Event as Told, Tell};

/// Part of an action: what can be done, or not, before a crash.
#[derive(Debug)]
pub(super) enum Do {
    Action(Action),
    Journal(OutgoingState),
    TakeAddresses,
    RaiseFence,
    Kill,
    Report(Told),
}

impl World {
    pub(super) fn start_source(&mut self) {
        let (machine, actions) =
            SourceMachine::start(PROCESS, Limits { mode: Mode::Precopy, ..Limits::default() });
        self.source = Some(machine);
        self.source_plan(actions);
    }

    pub(super) fn source_event(&mut self, event: Told) -> Result<(), String> {
        let now = self.now;
        let Some(machine) = &mut self.source else { return Ok(()) };
        let actions = machine.handle(now, event).map_err(|wrong| format!("source: {wrong}"))?;
        self.source_plan(actions);
        Ok(())
    }

    fn source_plan(&mut self, actions: Vec<Action>) {
        self.source_lists += 1;
        let idle = self.source_todo.is_empty();
        for action in actions {
            let parts = match action {
                Action::TakeAddresses => vec![Do::Journal(OutgoingState::Taking), Do::TakeAddresses],
                Action::EnterLimbo => {
                    vec![Do::Journal(OutgoingState::Limbo), Do::RaiseFence, Do::Report(Told::LimboEntered)]
                }
                Action::Serve if self.owes => {
                    vec![Do::Journal(OutgoingState::Serving), Do::Action(Action::Serve)]
                }
                Action::Conclude(_) => vec![
                    Do::Journal(OutgoingState::Moved),
                    Do::Kill,
                    Do::Report(Told::Killed { recorded: true }),
                ],
                action => vec![Do::Action(action)],
            };
            self.source_todo.extend(parts.into_iter().map(|part| (self.source_lists, part)));
        }
        if idle && !self.source_todo.is_empty() {
            self.at(STEP, Event::SourceStep);
        }
    }

    pub(super) fn source_step(&mut self) {
        if self.source.is_none() {
            return;
        }
        let Some((list, what)) = self.source_todo.pop_front() else { return };
        self.note(|| format!("source does {what:?}"));
        let can_fail = matches!(
            what,
            Do::Action(
                Action::StartSentinel | Action::StartRound(_) | Action::Freeze { .. } | Action::SendFinal
            ) | Do::Journal(OutgoingState::Taking | OutgoingState::Limbo)
                | Do::TakeAddresses
                | Do::RaiseFence
        );
        if can_fail && std::mem::take(&mut self.fail_source) {
            self.source_todo.retain(|(other, _)| *other != list);
            self.source_tells(Told::Failed { step: "a step", error: "of the test".into() });
        } else {
            self.source_does(what);
        }
        if !self.source_todo.is_empty() {
            self.at(STEP, Event::SourceStep);
        }
    }

    fn source_tells(&mut self, event: Told) {
        self.at(STEP, Event::Source(event));
    }

    fn source_does(&mut self, what: Do) {
        match what {
            Do::Journal(state) => self.outgoing = Some(state),
            Do::TakeAddresses => self.address_here = false,
            Do::RaiseFence => {
                if let Here::Frozen { fence } = &mut self.here {
                    *fence = true;
                }
            }
            Do::Kill => self.here = Here::Dead,
            Do::Report(event) => self.source_tells(event),
            Do::Action(action) => self.source_acts(action),
        }
    }

    fn source_acts(&mut self, action: Action) {
        match action {
            Action::Send(word) => self.source_sends(word),
            Action::Arm(after) => {
                self.source_timer += 1;
                self.at(after, Event::SourceTimer(self.source_timer));
            }
            Action::StartSentinel => self.resolvers[SENTINEL].wanted = true,
            Action::StartRound(round) | Action::Announce(round) => {
                self.transmit(self.source_link, Body::Round(round));
                // Two rounds: the first does not fit into the downtime, the second does.
                let dirty_after = if round == 1 { 100_000 } else { 0 };
                let measured = Round {
                    pages: 9000,
                    bytes: 1,
                    duration: Duration::from_millis(90),
                    dirty_after,
                    ..Round::default()
                };
                self.source_tells(Told::RoundSent(measured));
            }
            Action::Freeze { .. } => {
                self.here = Here::Frozen { fence: false };
                self.source_tells(Told::Frozen);
            }
            Action::SendFinal => self.transmit(self.source_link, Body::Final),
            Action::Serve if self.owes => {
                self.transmit(self.source_link, Body::Pages);
                self.source_tells(Told::AllSent);
            }
            Action::Serve => self.source_tells(Told::NothingOwed),
            Action::Connect => {
                self.links[self.source_link].up = false;
                let link = self.connect(Opener::Source);
                self.source_link = link.unwrap_or(self.source_link);
                let told = if link.is_some() { Told::Connected } else { Told::LinkLost };
                self.at(LATENCY * 2, Event::Source(told));
            }
            Action::LowerFence => {
                if let Here::Frozen { fence } = &mut self.here {
                    *fence = false;
                }
            }
            Action::ReturnAddresses => self.address_here = true,
            Action::Thaw(_) => self.release(),
            Action::Forget => self.outgoing = None,
            Action::Finish(outcome) => {
                self.outcome = Some(outcome);
                self.end_source();
            }
            // Nothing to do but to end: the kernel lets go of the process when we do.
            Action::LeaveHeld(_) => {}
            // Taken apart by `source_plan`.
            Action::TakeAddresses | Action::EnterLimbo | Action::Conclude(_) => {}
        }
    }

    fn source_sends(&mut self, word: Tell) {
        let body = match word {
            Tell::Begin => Body::Begin,
            Tell::Commit => Body::ToDest(ToDest::Commit),
            Tell::Query => Body::ToDest(ToDest::Query),
            Tell::Resume => Body::ToDest(ToDest::Resume),
            Tell::Gone(_) => Body::ToDest(ToDest::Gone(vec![])),
            Tell::Confirm => Body::ToDest(ToDest::Confirm),
            Tell::Abort(_) => Body::ToDest(ToDest::Abort(vec![])),
        };
        self.transmit(self.source_link, body);
    }

    /// The source command ends, by a signal or on its own: the kernel releases the process.
    pub(super) fn end_source(&mut self) {
        if self.source.take().is_none() {
            return;
        }
        self.source_todo.clear();
        self.release();
        if self.outcome.is_none() {
            // Its socket says goodbye for it, unless the network is away.
            for link in 0..self.links.len() {
                if self.links[link].opener == Opener::Source
                    && std::mem::replace(&mut self.links[link].up, false)
                {
                    self.at(LATENCY * 2, Event::LinkGone { link, at_source: false });
                }
            }
        }
        for which in [SENTINEL, OPERATOR] {
            if self.resolvers[which].wanted {
                self.start_resolver(which);
            }
        }
    }

    /// What the kernel does with a process whose tracer lets go, alive or dead.
    fn release(&mut self) {
        self.here = match self.here {
            Here::Frozen { fence: true } => Here::Stopped,
            Here::Frozen { fence: false } => Here::Running,
            other => other,
        };
    }
}
