//! The sentinel and `migrate resume`, in the model: the same decisions, one step at a time.

use std::collections::VecDeque;
use std::time::Duration;

use super::{Body, Event as At, Here, LATENCY, Opener, STEP, World};
use crate::dest::protocol::Message as ToDest;
use crate::journal::OutgoingState;
use crate::migration::Fate;
use crate::source::resolve::{Step, WHEN_SERVED, steps_after, steps_for};

const PAUSE: Duration = Duration::from_secs(1);

/// One that resolves, once the source command is gone.
#[derive(Debug, Default)]
pub(super) struct Resolver {
    /// To be started when the source command ends.
    pub(super) wanted: bool,
    pub(super) alive: bool,
    /// What the journal said when it was read.
    basis: Option<OutgoingState>,
    /// It has written itself into the record as the one who serves.
    serves: bool,
    steps: VecDeque<Step>,
    /// The connection that an answer is awaited on.
    link: Option<usize>,
}

#[derive(Debug)]
pub(super) enum Event {
    Look,
    Answer(usize, Fate),
    Resumed(usize),
    Served(usize),
    Patience(Option<usize>),
    Lock,
    Step,
}

impl World {
    pub(super) fn start_resolver(&mut self, which: usize) {
        self.resolvers[which] = Resolver { alive: true, ..Resolver::default() };
        self.at(STEP, At::Resolver(which, Event::Look));
    }

    pub(super) fn kill_resolver(&mut self, which: usize) {
        self.resolvers[which] = Resolver::default();
        if self.lock == Some(which) {
            self.lock = None;
        }
    }

    pub(super) fn resolver_event(&mut self, which: usize, event: Event) {
        if !self.resolvers[which].alive {
            return;
        }
        match event {
            Event::Look => self.look(which),
            Event::Answer(link, fate) if self.resolvers[which].link == Some(link) => {
                self.resolvers[which].link = None;
                self.decided(which, steps_after(fate, self.owes));
            }
            Event::Resumed(link) if self.resolvers[which].link == Some(link) => {
                self.transmit(link, Body::Pages);
            }
            Event::Served(link) if self.resolvers[which].link == Some(link) => {
                self.resolvers[which].link = None;
                self.decided(which, WHEN_SERVED);
            }
            Event::Answer(..) | Event::Resumed(_) | Event::Served(_) => {}
            Event::Patience(link) if self.resolvers[which].link == link => {
                self.resolvers[which].link = None;
                self.at(STEP, At::Resolver(which, Event::Look));
            }
            Event::Patience(_) => {}
            Event::Lock if self.lock.is_some() => self.at(STEP, At::Resolver(which, Event::Lock)),
            Event::Lock if self.outgoing == self.resolvers[which].basis => {
                self.lock = Some(which);
                self.at(STEP, At::Resolver(which, Event::Step));
            }
            Event::Lock => self.at(STEP, At::Resolver(which, Event::Look)),
            Event::Step => self.resolver_step(which),
        }
    }

    fn look(&mut self, which: usize) {
        let basis = self.outgoing;
        self.resolvers[which].basis = basis;
        let Some(state) = basis else {
            self.resolvers[which].alive = false;
            return;
        };
        if let Some(steps) = steps_for(state) {
            return self.decided(which, steps);
        }
        if state == OutgoingState::Serving && !self.resolvers[which].serves {
            if self.resolvers.iter().any(|other| other.alive && other.serves) {
                // Its owner lives: the sentinel waits, an operator is told so.
                return self.at(PAUSE, At::Resolver(which, Event::Look));
            }
            return self.decided(which, &[Step::RecordServing]);
        }
        let link = self.connect(Opener::Resolver(which));
        if let Some(link) = link {
            self.resolvers[which].link = Some(link);
            let serving = state == OutgoingState::Serving;
            self.transmit(link, Body::ToDest(if serving { ToDest::Resume } else { ToDest::Query }));
        }
        self.at(PAUSE, At::Resolver(which, Event::Patience(link)));
    }

    fn decided(&mut self, which: usize, steps: &[Step]) {
        self.resolvers[which].steps = steps.iter().copied().collect();
        self.at(STEP, At::Resolver(which, Event::Lock));
    }

    fn resolver_step(&mut self, which: usize) {
        let Some(step) = self.resolvers[which].steps.pop_front() else {
            self.lock = None;
            if self.outgoing == Some(OutgoingState::Serving) {
                self.at(STEP, At::Resolver(which, Event::Look));
            } else {
                self.resolvers[which].alive = false;
            }
            return;
        };
        self.note(|| format!("resolver {which} does {step:?}"));
        match step {
            // The simulation has no connections.
            Step::LeaveRepair | Step::DropConnections => {}
            Step::ReturnAddresses => self.address_here = true,
            Step::LowerFence if self.here == Here::Stopped => self.here = Here::Running,
            // Their order is held by the tests of `resolve`.
            Step::LowerFence | Step::Hook(_) | Step::Unlock => {}
            Step::RecordServing => {
                self.outgoing = Some(OutgoingState::Serving);
                for (other, resolver) in self.resolvers.iter_mut().enumerate() {
                    resolver.serves = other == which;
                }
            }
            Step::RecordMoved => self.outgoing = Some(OutgoingState::Moved),
            Step::Kill => self.here = Here::Dead,
            Step::Confirm => {
                if let Some(link) = self.connect(Opener::Resolver(which)) {
                    self.transmit(link, Body::ToDest(ToDest::Confirm));
                }
            }
            Step::Forget => self.outgoing = None,
        }
        self.at(LATENCY, At::Resolver(which, Event::Step));
    }
}
