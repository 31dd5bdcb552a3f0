//! The destination's driver, in the model.

use std::time::Duration;

use super::network::{heard, link_id};
use super::{Body, Event, LATENCY, PROCESS, STEP, There, World};
use crate::dest::machine::{DestMachine, answer_unknown};
use crate::dest::protocol::{Action, Event as Told, Tell};
use crate::journal::IncomingState;

/// Part of an action: what can be done, or not, before a crash.
#[derive(Debug)]
pub(super) enum Do {
    Action(Action),
    RaiseFence,
    ClearExitkill,
    Report(Told),
}

impl World {
    pub(super) fn dest_receives(&mut self, link: usize, body: Body) -> Result<(), String> {
        match body {
            Body::Begin => {
                // An id is good for one migration.
                if self.dest.is_some() || self.dest_seen || self.incoming.is_some() {
                    return Ok(());
                }
                self.dest_seen = true;
                let (machine, actions) = DestMachine::begin(link_id(link));
                self.dest = Some(machine);
                self.dest_data_link = Some(link);
                self.dest_plan(actions);
                if !self.links[link].up {
                    self.at(LATENCY, Event::LinkGone { link, at_source: false });
                }
                Ok(())
            }
            Body::Round(round) if self.collecting() => self.dest_event(Told::RoundPlaced(round)),
            Body::Final if self.collecting() => {
                self.misses = self.owes;
                self.dest_event(Told::Applied(PROCESS))
            }
            Body::Round(_) | Body::Final => Ok(()),
            // Pages of a connection that another has taken the place of are nobody's.
            Body::Pages if self.dest_data_link == Some(link) => {
                self.misses = false;
                self.dest_event(Told::Drained(link_id(link)))
            }
            Body::Pages => Ok(()),
            Body::ToDest(message) if self.dest.is_some() => {
                self.dest_event(Told::Message(link_id(link), message))
            }
            Body::ToDest(message) => {
                if let Some(word) = answer_unknown(&message) {
                    self.transmit(link, Body::ToSource(heard(word)));
                }
                Ok(())
            }
            Body::ToSource(_) => Err("a message to the source reached the destination".into()),
        }
    }

    /// Whether page frames and state still have somebody who wants them; the driver drops others.
    fn collecting(&self) -> bool {
        self.dest.as_ref().is_some_and(|machine| machine.state_name() == "receiving")
    }

    pub(super) fn dest_event(&mut self, event: Told) -> Result<(), String> {
        let now = self.now;
        if !self.dest_up {
            return Ok(());
        }
        let Some(machine) = &mut self.dest else { return Ok(()) };
        let actions = machine.handle(now, event).map_err(|wrong| format!("destination: {wrong}"))?;
        self.dest_plan(actions);
        Ok(())
    }

    fn dest_plan(&mut self, actions: Vec<Action>) {
        self.dest_lists += 1;
        let idle = self.dest_todo.is_empty();
        for action in actions {
            let parts = match action {
                Action::Accept => vec![Do::RaiseFence, Do::ClearExitkill, Do::Report(Told::Accepted)],
                action => vec![Do::Action(action)],
            };
            self.dest_todo.extend(parts.into_iter().map(|part| (self.dest_lists, part)));
        }
        if idle && !self.dest_todo.is_empty() {
            self.at(STEP, Event::DestStep(self.incarnation));
        }
    }

    pub(super) fn dest_step(&mut self) {
        let Some((list, what)) = self.dest_todo.pop_front() else { return };
        self.note(|| format!("destination does {what:?}"));
        let can_fail = matches!(
            what,
            Do::Action(Action::Build | Action::Record(_)) | Do::RaiseFence | Do::ClearExitkill
        );
        if can_fail && std::mem::take(&mut self.fail_dest) {
            self.dest_todo.retain(|(other, _)| *other != list);
            self.dest_tells(Told::Failed { step: "a step", error: "of the test".into() });
        } else {
            self.dest_does(what);
        }
        if !self.dest_todo.is_empty() {
            self.at(STEP, Event::DestStep(self.incarnation));
        }
    }

    fn dest_tells(&mut self, event: Told) {
        self.at(STEP, Event::Dest(self.incarnation, event));
    }

    fn dest_does(&mut self, what: Do) {
        match (what, &mut self.there) {
            (Do::RaiseFence, There::Skeleton { fence, .. }) => *fence = true,
            (Do::ClearExitkill, There::Skeleton { exitkill, .. }) => *exitkill = false,
            (Do::RaiseFence | Do::ClearExitkill, _) => {}
            (Do::Report(event), _) => self.dest_tells(event),
            (Do::Action(action), _) => self.dest_acts(action),
        }
    }

    fn dest_acts(&mut self, action: Action) {
        match action {
            Action::Send(link, word) => self.dest_sends(usize::try_from(link.0).unwrap_or(0), word),
            Action::Arm(after) => {
                self.dest_timer += 1;
                self.at(after, Event::DestTimer(self.incarnation, self.dest_timer));
            }
            Action::Disarm => self.dest_timer += 1,
            Action::Build => {
                self.there = There::Skeleton { exitkill: true, fence: false };
                self.dest_tells(Told::Built);
            }
            Action::Record(_) => {
                self.incoming = Some(IncomingState::Prepared);
                self.dest_tells(Told::Recorded);
            }
            Action::RecordAccepted => self.incoming = Some(IncomingState::Accepted),
            Action::AddAddresses => self.address_there = true,
            Action::Resume(_) => {
                if matches!(self.there, There::Skeleton { .. } | There::Stopped) {
                    self.there = There::Running;
                }
            }
            Action::Attach(link) => self.dest_data_link = usize::try_from(link.0).ok(),
            Action::KillLost => {
                self.misses = false;
                self.there = There::Ended;
            }
            Action::Kill => {
                self.misses = false;
                self.there = There::None;
            }
            Action::Forget => self.incoming = None,
            // The driver may drop the machine now or later.
            Action::Finish(_) if self.random().is_multiple_of(2) => self.dest = None,
            Action::Finish(_) => {}
            // Taken apart by `dest_plan`.
            Action::Accept => {}
        }
    }

    fn dest_sends(&mut self, link: usize, word: Tell) {
        // As the driver does: only it knows whether anything is missing.
        let word = if word == Tell::Resumed && !self.misses { Tell::Drained } else { word };
        self.transmit(link, Body::ToSource(heard(word)));
    }

    /// The service dies, and with it what is bound to it.
    pub(super) fn kill_dest(&mut self, back: Duration) {
        if !self.dest_up {
            return;
        }
        self.dest_up = false;
        self.incarnation += 1;
        self.dest = None;
        self.dest_seen = false;
        self.dest_todo.clear();
        self.fail_dest = false;
        self.there = match self.there {
            There::Skeleton { exitkill: true, .. } => {
                self.misses = false;
                There::None
            }
            There::Skeleton { exitkill: false, fence: true } => There::Stopped,
            There::Skeleton { exitkill: false, fence: false } => There::Running,
            other => other,
        };
        for link in 0..self.links.len() {
            if std::mem::replace(&mut self.links[link].up, false) {
                self.at(LATENCY * 2, Event::LinkGone { link, at_source: true });
            }
        }
        self.at(back, Event::DestRestart);
    }

    /// A new service reads the journal before it listens.
    pub(super) fn dest_restart(&mut self) {
        self.dest_up = true;
        let Some(state) = self.incoming else { return };
        let alive = matches!(self.there, There::Running | There::Stopped);
        let (machine, actions) = DestMachine::recovered(PROCESS, state == IncomingState::Accepted, alive);
        self.dest = Some(machine);
        self.dest_plan(actions);
    }
}
