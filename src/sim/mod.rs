//! The pair test: both machines, the resolver and a model of the process, in simulated time.
//!
//! A [`World`] runs one migration as a sequence of events; everything that a driver does is an event of its
//! own, so that a [`Fault`] can strike between any two of them. The kernel's rules are modelled as they
//! are: a dead tracer releases its tracees, a pending SIGSTOP then stops them, and a skeleton that is bound
//! to its tracer dies with it. After every event at most one side may run the process; when all links are
//! up and all services back, exactly one does, and it is the one that the source reported.

mod dest;
mod network;
mod resolver;
mod source;
#[allow(clippy::unwrap_used)]
mod tests;

use std::collections::VecDeque;
use std::time::Duration;

use crate::dest::machine::DestMachine;
use crate::dest::protocol as d;
use crate::journal::{IncomingState, OutgoingState};
use crate::migration::ProcessKey;
use crate::sim::network::link_id;
use crate::sim::resolver::Resolver;
use crate::source::machine::SourceMachine;
use crate::source::protocol as s;

/// One thing that goes wrong, right before an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// kill -9 of the source command.
    KillSource,
    /// kill -9 of the destination service, which comes back.
    KillDest { back_ms: u64 },
    /// kill -9 of the sentinel.
    KillSentinel,
    /// All connections end and none can be made for a while. `late`: what is under way arrives after it
    /// instead of never. `silent`: nobody is told before the transport's idle timeout.
    Cut { heal_ms: u64, late: bool, silent: bool },
    /// The message that would arrive now does not.
    Drop,
    /// It arrives later, perhaps after younger ones.
    Delay { ms: u64 },
    /// It arrives now and again later.
    Duplicate { ms: u64 },
    /// The operator cancels.
    Cancel,
    /// The source's next action that can fail fails.
    FailSource,
    /// The destination's does.
    FailDest,
    /// The process at the destination ends, if it runs.
    Exit,
    /// An operator runs `migrate resume` as soon as the source command is gone.
    Operator,
}

/// The process at the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Here {
    Running,
    Frozen { fence: bool },
    Stopped,
    Dead,
}

/// The process at the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum There {
    None,
    Skeleton { exitkill: bool, fence: bool },
    Running,
    Stopped,
    Ended,
}

/// What is to happen at some time.
#[derive(Debug)]
enum Event {
    Source(s::Event),
    SourceStep,
    SourceTimer(u64),
    /// With the incarnation of the service that it is meant for, as the next two.
    Dest(u64, d::Event),
    DestStep(u64),
    DestTimer(u64, u64),
    DestRestart,
    Deliver(Packet),
    /// The side that is told that its connection is gone.
    LinkGone {
        link: usize,
        at_source: bool,
    },
    Heal,
    Resolver(usize, resolver::Event),
}

/// A message on its way.
#[derive(Debug, Clone)]
struct Packet {
    link: usize,
    body: Body,
}

#[derive(Debug, Clone)]
enum Body {
    Begin,
    Round(u32),
    Final,
    /// All pages that are owed.
    Pages,
    ToDest(d::Message),
    ToSource(s::Message),
}

/// Who opened a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Opener {
    Source,
    Resolver(usize),
}

#[derive(Debug)]
struct Link {
    opener: Opener,
    up: bool,
    /// The service at its other end: keys die with it, so nothing reaches its successor.
    incarnation: u64,
}

const LATENCY: Duration = Duration::from_millis(1);
const STEP: Duration = Duration::from_micros(100);
const PROCESS: ProcessKey = ProcessKey { pid: 7, start_ticks: 42 };
/// More events than any run needs: a run that gets there never ends.
const MAX_EVENTS: usize = 5000;

/// One migration and all that surrounds it.
#[derive(Debug)]
struct World {
    now: Duration,
    sequence: u64,
    queue: Vec<(Duration, u64, Event)>,
    events: usize,
    trace: Option<Vec<String>>,
    rng: Option<u64>,

    /// Post-copy: pages are owed after the resume.
    owes: bool,
    /// The process at the destination misses pages that only the source has.
    misses: bool,
    here: Here,
    there: There,
    ever_ran_there: bool,
    /// The number of the event by which it first ran there.
    accepted_at: usize,
    address_here: bool,
    address_there: bool,
    outgoing: Option<OutgoingState>,
    incoming: Option<IncomingState>,

    links: Vec<Link>,
    network_up: bool,

    source: Option<SourceMachine>,
    source_todo: VecDeque<(u64, source::Do)>,
    source_lists: u64,
    source_timer: u64,
    source_link: usize,
    fail_source: bool,
    outcome: Option<s::Outcome>,

    dest_up: bool,
    incarnation: u64,
    dest: Option<DestMachine>,
    dest_seen: bool,
    /// The connection whose pages are taken.
    dest_data_link: Option<usize>,
    dest_todo: VecDeque<(u64, dest::Do)>,
    dest_lists: u64,
    dest_timer: u64,
    fail_dest: bool,

    /// The sentinel and the operator's command.
    resolvers: [Resolver; 2],
    /// The journal's lock.
    lock: Option<usize>,
}

const SENTINEL: usize = 0;
const OPERATOR: usize = 1;

impl World {
    /// A world where the migration has just been asked for, in pre-copy only or with post-copy. With a seed,
    /// every delay is random.
    fn new(seed: Option<u64>, owes: bool) -> Self {
        let mut world = Self {
            now: Duration::ZERO,
            sequence: 0,
            queue: Vec::new(),
            events: 0,
            trace: None,
            rng: seed.map(|s| s.wrapping_mul(2).wrapping_add(1)),
            owes,
            misses: false,
            here: Here::Running,
            there: There::None,
            ever_ran_there: false,
            accepted_at: 0,
            address_here: true,
            address_there: false,
            outgoing: None,
            incoming: None,
            links: vec![Link { opener: Opener::Source, up: true, incarnation: 0 }],
            network_up: true,
            source: None,
            source_todo: VecDeque::new(),
            source_lists: 0,
            source_timer: 0,
            source_link: 0,
            fail_source: false,
            outcome: None,
            dest_up: true,
            incarnation: 0,
            dest: None,
            dest_seen: false,
            dest_data_link: None,
            dest_todo: VecDeque::new(),
            dest_lists: 0,
            dest_timer: 0,
            fail_dest: false,
            resolvers: [Resolver::default(), Resolver::default()],
            lock: None,
        };
        world.start_source();
        world
    }

    /// A pseudo-random number (SplitMix64), or 0 without a seed.
    fn random(&mut self) -> u64 {
        let Some(state) = &mut self.rng else { return 0 };
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn at(&mut self, delay: Duration, event: Event) {
        let jitter = Duration::from_micros(self.random() % 3000);
        self.sequence += 1;
        self.queue.push((self.now + delay + jitter, self.sequence, event));
    }

    fn note(&mut self, text: impl FnOnce() -> String) {
        let line = self.trace.is_some().then(text);
        let now = self.now;
        if let (Some(trace), Some(line)) = (&mut self.trace, line) {
            trace.push(format!("{:>10.1} ms  {line}", now.as_secs_f64() * 1e3));
        }
    }

    /// Runs to the end; `faults` strike before the event with their number.
    fn run(&mut self, faults: &[(usize, Fault)]) -> Result<(), String> {
        loop {
            let next =
                self.queue.iter().enumerate().min_by_key(|(_, (time, sequence, _))| (*time, *sequence));
            let Some(index) = next.map(|(index, _)| index) else {
                if self.tidy() {
                    continue;
                }
                return self.check_end();
            };
            let (time, _, event) = self.queue.swap_remove(index);
            self.now = self.now.max(time);
            let mut event = Some(event);
            let number = self.events;
            for (_, fault) in faults.iter().filter(|(at, _)| *at == number) {
                self.note(|| format!("FAULT {fault:?}"));
                self.strike(*fault, &mut event);
                self.check()?;
            }
            self.events += 1;
            if self.events > MAX_EVENTS {
                return Err("the run does not end".into());
            }
            if let Some(event) = event {
                self.note(|| format!("{event:?}"));
                self.happen(event)?;
            }
            self.check()?;
        }
    }

    fn happen(&mut self, event: Event) -> Result<(), String> {
        match event {
            Event::Source(event) => self.source_event(event)?,
            Event::SourceStep => self.source_step(),
            Event::SourceTimer(number) if number == self.source_timer => {
                self.source_event(s::Event::Timeout)?;
            }
            Event::Dest(incarnation, event) if incarnation == self.incarnation => self.dest_event(event)?,
            Event::DestStep(incarnation) if incarnation == self.incarnation => self.dest_step(),
            Event::DestTimer(incarnation, number)
                if incarnation == self.incarnation && number == self.dest_timer =>
            {
                self.dest_event(d::Event::Timeout)?;
            }
            Event::SourceTimer(_) | Event::Dest(..) | Event::DestStep(_) | Event::DestTimer(..) => {}
            Event::DestRestart => self.dest_restart(),
            Event::Deliver(packet) => self.deliver(packet)?,
            Event::LinkGone { link, at_source: true } if link == self.source_link => {
                self.source_event(s::Event::LinkLost)?;
            }
            Event::LinkGone { at_source: true, .. } => {}
            Event::LinkGone { link, at_source: false } => {
                self.dest_event(d::Event::LinkLost(link_id(link)))?
            }
            Event::Heal => self.network_up = true,
            Event::Resolver(which, event) => self.resolver_event(which, event),
        }
        Ok(())
    }

    fn strike(&mut self, fault: Fault, event: &mut Option<Event>) {
        match (fault, &event) {
            (Fault::KillSource, _) => self.end_source(),
            (Fault::KillDest { back_ms }, _) => self.kill_dest(Duration::from_millis(back_ms)),
            (Fault::KillSentinel, _) => self.kill_resolver(SENTINEL),
            (Fault::Cut { heal_ms, late, silent }, _) => {
                if let Some(packet) = event.take_if(|e| matches!(e, Event::Deliver(_))) {
                    self.queue.push((self.now, 0, packet));
                }
                self.cut(Duration::from_millis(heal_ms), late, silent);
            }
            (Fault::Drop, Some(Event::Deliver(_))) => *event = None,
            (Fault::Delay { ms }, Some(Event::Deliver(_))) => {
                if let Some(packet) = event.take() {
                    self.at(Duration::from_millis(ms), packet);
                }
            }
            (Fault::Duplicate { ms }, Some(Event::Deliver(packet))) => {
                let copy = packet.clone();
                self.at(Duration::from_millis(ms), Event::Deliver(copy));
            }
            (Fault::Drop | Fault::Delay { .. } | Fault::Duplicate { .. }, _) => {}
            (Fault::Cancel, _) => self.at(Duration::ZERO, Event::Source(s::Event::Cancel)),
            (Fault::FailSource, _) => self.fail_source = true,
            (Fault::FailDest, _) => self.fail_dest = true,
            (Fault::Exit, _) if self.there == There::Running => {
                self.there = There::Ended;
                self.misses = false;
                if let Some(link) = self.dest_data_link {
                    self.at(STEP, Event::Dest(self.incarnation, d::Event::Drained(link_id(link))));
                }
            }
            (Fault::Exit, _) => {}
            (Fault::Operator, _) => self.resolvers[OPERATOR].wanted = true,
        }
    }

    /// When nothing is left to happen: what an operator would do. False if there is nothing for him.
    fn tidy(&mut self) -> bool {
        if self.outgoing.is_none() || self.source.is_some() || self.resolvers[OPERATOR].alive {
            return false;
        }
        self.start_resolver(OPERATOR);
        true
    }

    /// What must hold at any time.
    fn check(&mut self) -> Result<(), String> {
        if self.there == There::Running && !self.ever_ran_there {
            (self.ever_ran_there, self.accepted_at) = (true, self.events);
        }
        if self.here == Here::Running && self.ever_ran_there {
            return Err("it runs here although it has run there".into());
        }
        if self.misses && self.here == Here::Dead {
            return Err("pages are missing there, and here the process that has them is dead".into());
        }
        if self.address_here && self.address_there {
            return Err("both have the address".into());
        }
        Ok(())
    }

    /// What must hold when everything works again and nothing is left to do.
    fn check_end(&self) -> Result<(), String> {
        let ensure = |what: &str, ok: bool| if ok { Ok(()) } else { Err(what.to_owned()) };
        ensure("the source command never ended", self.source.is_none())?;
        ensure("the destination never came back", self.dest_up && self.network_up)?;
        ensure("the source's journal has a leftover", self.outgoing.is_none())?;
        ensure("the lock was never given back", self.lock.is_none())?;
        ensure("pages are missing at the end", !self.misses)?;
        match (self.here, self.there) {
            (Here::Running, There::None) => {
                ensure("it runs here without its address", self.address_here && !self.address_there)?;
                ensure("the destination's journal has a leftover", self.incoming.is_none())?;
                ensure("reported as moved, but runs here", self.outcome != Some(s::Outcome::Moved))
            }
            (Here::Dead, There::Running | There::Ended) => {
                ensure("it runs there without its address", self.address_there && !self.address_here)?;
                let stayed = matches!(self.outcome, Some(s::Outcome::NotMoved(_)));
                ensure("reported as not moved, but runs there", !stayed)
            }
            (here, there) => Err(format!("at the end: here {here:?}, there {there:?}")),
        }
    }
}
