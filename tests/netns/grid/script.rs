//! What the peer of a cell does, from the SYN to the last acknowledgement. Each step waits for a segment or
//! for a part of the move, none for time; so each cell has one story to tell.

use std::sync::Mutex;
use std::time::Instant;

use super::gates::{Gates, Part};
use super::packet::Segment;
use super::peer::{Agreed, Ear, Fate, Outcome, Peer, size};
use super::table::{Cell, Fault, State, Window};
use super::wire::{Side, Wire};

/// The port of the workload with usual buffers; the next one has small ones.
pub(crate) const PORT: u16 = 900;
/// The order in front of each connection: see `tcp_grid.c`.
const ORDER: u64 = 32;
const MAGIC: u32 = 0x6469_7267;
/// Input that is not read before the move.
const UNREAD: u64 = 1500;
/// What the fault is about.
const LAST: u64 = 700;
/// Where it is cut into two segments.
const CUT: u64 = 400;
/// What the peer says after it, to see that the connection lives.
const MORE: u64 = 500;
/// What the process writes after the move.
const LATE: u32 = 1200;
/// What the peer offers when nothing is to stop the other end.
const OPEN: u64 = 60_000;
/// As in other stacks: what a packet can carry, to fill a small queue with few of them.
const LARGE: u64 = 1400;

/// How a connection must look in `/proc/net/tcp` at the freeze.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Look {
    pub(crate) port: u16,
    pub(crate) state: u8,
    pub(crate) unread: u64,
    pub(crate) unacknowledged: u64,
}

/// What is common to a round.
pub(crate) struct Round<'w> {
    pub(crate) wire: &'w Wire,
    pub(crate) gates: &'w Gates,
    pub(crate) from: Side,
    pub(crate) looks: &'w Mutex<Vec<Look>>,
    /// Bytes of each cell that the process must have read and written at its end, by number.
    pub(crate) totals: &'w Mutex<Vec<(u32, u64, u64)>>,
}

/// Plays a cell; its number is its own in all rounds of a case.
pub(crate) fn play(
    round: &Round<'_>,
    cell: Cell,
    number: u32,
    port: u16,
    dialled: u16,
) -> Outcome<Vec<String>> {
    let mut next = Part::Ordered;
    let mut script = Script { round, cell, number, port, dialled, last: None, next: &mut next };
    let result = script.run();
    // The others are not to wait for one that has failed.
    for part in [Part::Ordered, Part::Before, Part::AtSource, Part::AtDestination, Part::Live, Part::On] {
        if part >= next {
            round.gates.done(part);
        }
    }
    result
}

struct Script<'a, 'w> {
    round: &'a Round<'w>,
    cell: Cell,
    number: u32,
    port: u16,
    dialled: u16,
    /// The last that was sent before the move.
    last: Option<Segment>,
    next: &'a mut Part,
}

fn after(part: Part) -> Part {
    match part {
        Part::Ordered => Part::Before,
        Part::Before => Part::AtSource,
        Part::AtSource => Part::AtDestination,
        Part::AtDestination => Part::Live,
        Part::Live | Part::On => Part::On,
    }
}

impl<'w> Script<'_, 'w> {
    fn run(&mut self) -> Outcome<Vec<String>> {
        let round = self.round;
        let small = u16::from(self.cell.window == Window::OursZero);
        let ports = (self.port, PORT + small);
        let plain = Agreed { scaling: true, stamps: true, selective: true };
        let dials = self.cell.state == State::SynSent;
        let agreed = if dials { plain } else { self.cell.agreed };
        let mut p = Peer::new(round.wire, ports, self.number, round.from, agreed);
        let told = |error: String, story: &[String]| format!("{error}\n        after {}", story.join(", "));
        let result = if dials { self.dialled(&mut p) } else { self.connected(&mut p) };
        result.map_err(|error| told(error, &p.story))?;
        p.story.append(&mut p.rest);
        Ok(p.story)
    }

    /// Done with a part: waits for the next one.
    fn pass(&mut self, part: Part, p: &mut Peer<'w>) -> Outcome {
        self.round.gates.done(part);
        *self.next = after(part);
        self.round.gates.enter(*self.next)?;
        p.begin();
        Ok(())
    }

    fn order(&self, dial: u16) -> Vec<u8> {
        let cell = &self.cell;
        let late = if cell.state.has_shut() { 0 } else { LATE };
        let shut = match cell.state {
            State::LastAck => 2,
            state => u8::from(state.has_shut()),
        };
        let mut order = Vec::new();
        for word in [MAGIC, self.number, cell.written(), late] {
            order.extend(word.to_le_bytes());
        }
        order.extend(dial.to_le_bytes());
        order.push(shut);
        order.resize(usize::try_from(ORDER).unwrap_or(0), 0);
        order
    }

    fn connected(&mut self, p: &mut Peer<'w>) -> Outcome {
        let cell = self.cell;
        p.connect(cell.first_window(), self.order(0))?;
        // Nothing shows on the wire of an end that must wait.
        self.pass(Part::Ordered, p)?;
        self.prepare(p)?;
        p.still = Some(p.edge);
        self.look(p);
        self.pass(Part::Before, p)?;
        p.catch_up()?;
        let quiet = cell.state == State::TimeWait;
        self.frozen(p, self.round.from)?;
        self.pass(Part::AtSource, p)?;
        self.frozen_there(p, self.round.from.other())?;
        p.side = self.round.from.other();
        p.silent = true;
        (p.largest, p.ended) = (0, false);
        p.tell("moved");
        self.pass(Part::AtDestination, p)?;
        if !quiet {
            self.revive(p)?;
            self.repair(p)?;
            self.more(p)?;
        }
        (p.still, p.apart) = (None, true);
        self.pass(Part::Live, p)?;
        if !quiet {
            self.end(p)?;
        }
        let written = if cell.state.has_shut() { cell.written() } else { cell.written() + LATE };
        let read = p.sent - 1;
        self.round.totals.lock().unwrap().push((self.number, read, written.into()));
        Ok(())
    }

    fn look(&self, p: &Peer<'_>) {
        let cell = &self.cell;
        let whole = u64::from(cell.written()) + u64::from(cell.state.has_shut());
        // Nothing of it is acknowledged but what had to be, to come into this state.
        let outstanding = if cell.state == State::FinWait2 { 0 } else { whole };
        if cell.state != State::TimeWait {
            self.round.looks.lock().unwrap().push(Look {
                port: self.port,
                state: cell.state.number(),
                unread: p.acked - ORDER,
                unacknowledged: outstanding,
            });
        }
    }

    /// Brings the connection into its state, up to the last segment before the move.
    fn prepare(&mut self, p: &mut Peer<'w>) -> Outcome {
        let cell = self.cell;
        match cell.fault {
            Fault::DownLostBefore => p.ear = Ear::Lose(u32::MAX),
            Fault::DownReorderedBefore => p.ear = Ear::From(cell.agreed.full()),
            _ => {}
        }
        if cell.state != State::LastAck {
            self.await_output(p)?;
        }
        let tells = matches!(cell.state, State::FinWait2 | State::TimeWait);
        if tells || cell.fault == Fault::DownReorderedBefore {
            p.acknowledge()?;
        }
        if cell.window == Window::OursZero {
            while p.edge > p.acked {
                let to = p.edge.min(p.acked + LARGE);
                self.last = Some(p.say(p.acked, to, false, Fate::Arrives)?);
                p.until(&format!("an acknowledgement of {to}"), |p| p.acked >= to)?;
            }
            p.tell(format!("full at {}", p.acked));
        } else if cell.has_unread() {
            for half in 0..2 {
                let from = ORDER + half * (UNREAD / 2);
                self.last = Some(p.say(from, from + UNREAD / 2, false, Fate::Arrives)?);
                p.until_acked(from + UNREAD / 2)?;
            }
        }
        let sent = p.sent;
        match cell.fault {
            Fault::UpLostBefore => {
                p.say(sent, sent + LAST, false, Fate::Lost)?;
            }
            Fault::UpReorderedBefore => {
                self.last = Some(p.say(sent, sent + CUT, false, Fate::Lost)?);
                let since = Instant::now();
                p.say(sent + CUT, sent + LAST, false, Fate::Arrives)?;
                Self::until_out_of_order(p, since, sent + CUT, sent + LAST)?;
            }
            _ => {}
        }
        // The answer of the process may come before that of its kernel.
        p.apart = cell.state == State::LastAck;
        if cell.state.peer_has_shut() {
            let end = p.sent;
            self.last = Some(p.say(end, end, true, Fate::Arrives)?);
            p.until_acked(end + 1)?;
        }
        if cell.state == State::LastAck {
            self.await_output(p)?;
        }
        p.apart = false;
        p.story.append(&mut p.rest);
        Ok(())
    }

    /// What the kernel has sent of the output that was ordered: all that our window takes.
    fn await_output(&self, p: &mut Peer<'w>) -> Outcome {
        let whole = u64::from(self.cell.written());
        let fin =
            self.cell.state.has_shut() && whole <= self.cell.first_window() && self.cell.first_window() > 0;
        let place = whole.min(self.cell.first_window()) + u64::from(fin);
        p.until(&format!("{place} of the output"), |p| p.seen >= place)
    }

    /// Waits for the answer to something out of order: where it may, a receiver tells what it has.
    fn until_out_of_order(p: &mut Peer<'w>, since: Instant, from: u64, to: u64) -> Outcome {
        if p.agreed.selective {
            return p.until("what has come out of order", |p| p.blocks.contains(&(from, to)));
        }
        p.until_answer(since)
    }

    /// The freeze at the source.
    fn frozen(&mut self, p: &mut Peer<'w>, source: Side) -> Outcome {
        let sent = p.sent;
        match self.cell.fault {
            Fault::UpFrozenAtSource => drop(p.say(sent, sent + LAST, false, Fate::At(source))?),
            Fault::UpReorderedFrozen => {
                self.last = Some(p.say(sent, sent + CUT, false, Fate::Lost)?);
                p.say(sent + CUT, sent + LAST, false, Fate::At(source))?;
            }
            Fault::UpDoubledFrozen => self.again(p, source)?,
            _ => {}
        }
        Ok(())
    }

    /// The same at the destination.
    fn frozen_there(&mut self, p: &mut Peer<'w>, destination: Side) -> Outcome {
        let sent = p.sent;
        match self.cell.fault {
            Fault::UpFrozenAtDestination => drop(p.say(sent, sent + LAST, false, Fate::At(destination))?),
            Fault::UpReorderedFrozen | Fault::UpDoubledFrozen => self.again(p, destination)?,
            _ => {}
        }
        Ok(())
    }

    fn again(&self, p: &Peer<'w>, to: Side) -> Outcome {
        self.last.as_ref().map_or(Ok(()), |last| p.repeat(last, to))
    }

    /// The first words of the destination, until all that was written before the move is here.
    fn revive(&mut self, p: &mut Peer<'w>) -> Outcome {
        let cell = self.cell;
        let written = u64::from(cell.written());
        let whole = written + u64::from(cell.state.has_shut());
        let acknowledged = if cell.state == State::FinWait2 { whole } else { 0 };
        let owed = whole > acknowledged;
        let missing = written.saturating_sub(p.have);
        let first = |p: &mut Peer<'w>| p.receive("the first word of the destination").map(drop);
        p.ear = match cell.fault {
            Fault::DownLostAfter => Ear::Lose(1 + u32::from(owed && cell.window != Window::PeerZero)),
            Fault::DownReorderedAfter => Ear::Swap,
            _ => Ear::Open,
        };
        p.answering = !matches!(cell.fault, Fault::UpLostAfter | Fault::DownAckLost);
        first(p)?;
        if cell.fault == Fault::DownDoubledAfter {
            p.acknowledge()?;
        }
        if !p.answering {
            if owed {
                let zero = cell.window == Window::PeerZero;
                while size(&p.receive("what is owed, once more")?.segment) == 0 && !zero {}
            }
            p.answering = true;
            p.acknowledge()?;
        }
        if cell.window == Window::PeerZero {
            if owed {
                // By its own timer: what we say could be lost.
                let since = Instant::now();
                p.until_answer(since)?;
            }
            if written > 0 {
                // Room for two segments, and not for more.
                p.window = 2 * p.agreed.full();
                p.acknowledge()?;
                p.until_have(p.window)?;
            }
            p.window = OPEN;
            p.acknowledge()?;
        }
        p.until_have(whole)?;
        // What comes before the end is sent again, the new host does not take: it acknowledges too much.
        p.until("the end once more", |p| !cell.state.has_shut() || p.ended)?;
        if cell.fault == Fault::DownLostAfter && p.ended {
            // It was lost, but was known before: without this it would come again and again after our end.
            p.acknowledge()?;
        }
        if missing >= p.agreed.full() && p.largest != p.agreed.full() {
            return Err(format!("segments of {}, not of {} bytes", p.largest, p.agreed.full()));
        }
        // What is not needed any more: a small window stays so until the output is through.
        p.window = OPEN;
        if cell.state.has_shut() && p.fin != Some(whole) {
            return Err(format!("the end is at {:?}, not at {whole}", p.fin));
        }
        Ok(())
    }

    /// What was lost on the way is sent again, and what was late comes.
    fn repair(&mut self, p: &mut Peer<'w>) -> Outcome {
        let (acked, sent) = (p.acked, p.sent);
        let since = Instant::now();
        // See below: what was kept on its way may not be taken then.
        let outdated = u64::from(self.cell.written()) > self.cell.first_window();
        match self.cell.fault {
            // It was kept, and nobody has to send it again.
            Fault::UpFrozenAtSource | Fault::UpFrozenAtDestination | Fault::UpReorderedFrozen
                if !outdated =>
            {
                p.until_acked(sent)
            }
            Fault::UpLostBefore | Fault::UpFrozenAtSource | Fault::UpFrozenAtDestination => {
                p.say(acked, sent, false, Fate::Arrives)?;
                p.until_acked(sent)
            }
            Fault::UpReorderedBefore | Fault::UpReorderedFrozen => {
                // It may have come by now, or half of it.
                let acked = sent - LAST;
                // Of one that acknowledges less than a window ago, a stack need not take anything (RFC 5961).
                if outdated {
                    p.say(acked, acked + CUT, false, Fate::Arrives)?;
                } else {
                    self.again(p, p.side)?;
                }
                p.until_acked(acked + CUT)?;
                // What had come out of order is forgotten; a peer must be ready for that.
                p.say(acked + CUT, sent, false, Fate::Arrives)?;
                p.until_acked(sent)
            }
            Fault::UpAckLost => {
                self.again(p, p.side)?;
                if self.last.is_some() { p.until_answer(since) } else { Ok(()) }
            }
            Fault::UpReorderedAfter => {
                p.say(sent + CUT, sent + LAST, false, Fate::Arrives)?;
                Self::until_out_of_order(p, since, sent + CUT, sent + LAST)?;
                p.say(sent, sent + CUT, false, Fate::Arrives)?;
                p.until_acked(sent + LAST)
            }
            Fault::UpDoubledAfter => {
                let segment = p.say(sent, sent + LAST, false, Fate::Arrives)?;
                p.until_acked(sent + LAST)?;
                let since = Instant::now();
                p.repeat(&segment, p.side)?;
                p.until_answer(since)
            }
            _ => Ok(()),
        }
    }

    /// The connection lives: it takes more, or says that it cannot.
    fn more(&mut self, p: &mut Peer<'w>) -> Outcome {
        let sent = p.sent;
        if self.cell.window == Window::OursZero {
            let since = Instant::now();
            p.probe()?;
            p.until_answer(since)?;
            p.tell(format!("still full at {}, up to {}", p.acked, p.edge - p.acked));
            return Ok(());
        }
        if !self.cell.state.peer_has_shut() {
            p.say(sent, sent + MORE, false, Fate::Arrives)?;
            p.until_acked(sent + MORE)?;
        }
        Ok(())
    }

    /// The process reads and writes again, and both end.
    fn end(&mut self, p: &mut Peer<'w>) -> Outcome {
        let cell = self.cell;
        if cell.window == Window::OursZero {
            let sent = p.sent;
            p.until("room", |p| p.edge >= sent + MORE)?;
            p.say(sent, sent + MORE, false, Fate::Arrives)?;
            p.until_acked(sent + MORE)?;
        }
        let mut whole = u64::from(cell.written());
        if !cell.state.has_shut() {
            whole += u64::from(LATE);
            p.until_have(whole)?;
        }
        if !cell.state.peer_has_shut() {
            let sent = p.sent;
            p.say(sent, sent, true, Fate::Arrives)?;
            p.until_acked(sent + 1)?;
        }
        p.until_have(whole + 1)?;
        if p.fin == Some(whole + 1) {
            Ok(())
        } else {
            Err(format!("the end is at {:?}, not after {whole}", p.fin))
        }
    }
}

/// A connection that the process is making: the other end does not answer before the move.
impl<'w> Script<'_, 'w> {
    fn dialled(&mut self, p: &mut Peer<'w>) -> Outcome {
        let ports = (self.dialled, self.dialled);
        let mut called = Peer::new(self.round.wire, ports, self.number, self.round.from, self.cell.agreed);
        p.connect(OPEN, self.order(self.dialled))?;
        called.await_call()?;
        self.pass(Part::Ordered, p)?;
        let looks = [(self.port, State::Established, 0), (self.dialled, State::SynSent, 1)];
        self.round.looks.lock().unwrap().extend(looks.map(|(port, state, unacknowledged)| Look {
            port,
            state: state.number(),
            unread: 0,
            unacknowledged,
        }));
        self.pass(Part::Before, p)?;
        let there = self.round.from.other();
        (p.side, called.side, p.silent) = (there, there, true);
        self.pass(Part::AtSource, p)?;
        self.pass(Part::AtDestination, p)?;
        called.begin();
        p.answering = true;
        p.receive("the first word of the destination")?;
        called.pick_up(OPEN, self.cell.fault == Fault::DownLostAfter)?;
        called.answering = true;
        called.say(0, MORE, false, Fate::Arrives)?;
        called.until_acked(MORE)?;
        self.pass(Part::Live, p)?;
        called.begin();
        (p.apart, called.apart) = (true, true);
        called.until_have(LATE.into())?;
        for end in [&mut *p, &mut called] {
            let sent = end.sent;
            end.say(sent, sent, true, Fate::Arrives)?;
            end.until_acked(sent + 1)?;
        }
        p.until_have(1)?;
        called.until_have(u64::from(LATE) + 1)?;
        p.story.append(&mut called.story);
        p.story.append(&mut called.rest);
        let mut totals = self.round.totals.lock().unwrap();
        totals.push((self.number, ORDER, 0));
        totals.push((self.number, MORE, LATE.into()));
        Ok(())
    }
}
