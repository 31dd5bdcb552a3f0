//! A TCP endpoint of our own: it sends exactly what it is told to, and looks at every segment that comes.
//!
//! Places in a stream count from the first byte after the SYN; an end has a place like a byte.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "sequence numbers wrap"
)]

mod check;

use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use super::packet::{ACK, FIN, Options, PSH, SYN, Segment};
use super::wire::{Arrival, Side, Wire};

/// What goes wrong in a cell is a text.
pub(crate) type Outcome<T = ()> = Result<T, String>;

/// No part takes as long as this, but where something never comes.
const PATIENCE: Duration = Duration::from_secs(30);
/// The largest segment that we take.
pub(crate) const MSS: u16 = 1000;

/// What is offered in a handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Agreed {
    pub(crate) scaling: bool,
    pub(crate) stamps: bool,
    pub(crate) selective: bool,
}

/// Our factor, as a power of two. Small: windows that we offer are small, too.
const SCALE: u8 = 2;

impl Agreed {
    /// Bytes in a full segment to us.
    pub(crate) fn full(self) -> u64 {
        u64::from(MSS) - if self.stamps { 12 } else { 0 }
    }
}

/// What becomes of a segment that we send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It comes to where the address was last.
    Arrives,
    /// It does not come anywhere.
    Lost,
    /// It comes to this host.
    At(Side),
}

/// Which of the segments that come we take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ear {
    /// All.
    Open,
    /// None of the next so many.
    Lose(u32),
    /// Nothing below this place.
    From(u64),
    /// The first with something in it only after the second.
    Swap,
}

/// Our end of one connection.
pub(crate) struct Peer<'w> {
    wire: &'w Wire,
    inbox: Receiver<Arrival>,
    cell: u32,
    ports: (u16, u16),
    /// The host that has the address now.
    pub(crate) side: Side,
    pub(crate) agreed: Agreed,
    our_start: u32,
    their_start: u32,
    /// The first bytes of our stream; the others follow from their places.
    head: Vec<u8>,
    /// The end of what we have sent, of what was acknowledged, of what we may send.
    pub(crate) sent: u64,
    pub(crate) acked: u64,
    pub(crate) edge: u64,
    their_scale: u8,
    /// The end of what they have sent, of what we have of it in order, and what we have beyond that.
    pub(crate) seen: u64,
    pub(crate) have: u64,
    beyond: Vec<(u64, u64)>,
    /// What we tell that we have: all, once we answer by ourselves.
    known: u64,
    /// Where their end is, with its own place.
    pub(crate) fin: Option<u64>,
    swapped: Option<Segment>,
    /// How much we offer, and up to where we have offered, since when.
    pub(crate) window: u64,
    offers: Vec<(Instant, u64)>,
    /// When this part must have ended.
    limit: Instant,
    clock: u32,
    /// Their clock: first and last.
    heard: Option<(u32, Instant, u32)>,
    echoed: u32,
    /// Nothing of ours has come to the new host yet, as far as we know.
    pub(crate) silent: bool,
    /// The edge when the move began, while the process reads nothing.
    pub(crate) still: Option<u64>,
    pub(crate) ear: Ear,
    pub(crate) answering: bool,
    /// The last blocks that they have acknowledged out of order.
    pub(crate) blocks: Vec<(u64, u64)>,
    /// Bytes in the largest segment of the host.
    pub(crate) largest: u64,
    /// Whether it has sent its end.
    pub(crate) ended: bool,
    pub(crate) story: Vec<String>,
    /// Both directions run for themselves: what they send is told in `rest`.
    pub(crate) apart: bool,
    pub(crate) rest: Vec<String>,
}

impl<'w> Peer<'w> {
    pub(crate) fn new(wire: &'w Wire, ports: (u16, u16), cell: u32, side: Side, agreed: Agreed) -> Self {
        Self {
            wire,
            inbox: wire.open(ports.0),
            cell,
            ports,
            side,
            agreed,
            // Half of the streams pass the end of all numbers.
            our_start: if cell.is_multiple_of(2) { u32::MAX - 1000 } else { 5000 + cell },
            their_start: 0,
            head: Vec::new(),
            sent: 0,
            acked: 0,
            edge: 0,
            their_scale: 0,
            seen: 0,
            have: 0,
            beyond: Vec::new(),
            known: 0,
            fin: None,
            swapped: None,
            window: 0,
            offers: Vec::new(),
            limit: Instant::now() + PATIENCE,
            clock: if cell.is_multiple_of(3) { u32::MAX - 5 } else { 100 },
            heard: None,
            echoed: 0,
            silent: false,
            still: None,
            ear: Ear::Open,
            answering: false,
            blocks: Vec::new(),
            largest: 0,
            ended: false,
            story: Vec::new(),
            apart: false,
            rest: Vec::new(),
        }
    }

    /// Another part begins.
    pub(crate) fn begin(&mut self) {
        self.limit = Instant::now() + PATIENCE;
    }

    pub(crate) fn tell(&mut self, what: impl Into<String>) {
        self.story.push(what.into());
    }

    fn tell_theirs(&mut self, what: String) {
        if self.apart { self.rest.push(what) } else { self.story.push(what) }
    }

    /// Connects; what we say first is `head`, and the host has it afterwards.
    pub(crate) fn connect(&mut self, window: u64, head: Vec<u8>) -> Outcome {
        self.window = window;
        let mut syn = self.segment(self.our_start, SYN);
        syn.ack = 0;
        syn.options = self.offer(Agreed { ..self.agreed });
        syn.window = window.min(0xffff) as u16;
        self.offer_up_to(u64::from(syn.window));
        let asked = Instant::now();
        self.wire.send(self.side, &syn)?;
        let answer = self.next("the answer to the SYN")?.segment;
        if !answer.has(SYN) || !answer.has(ACK) || answer.ack != self.our_start.wrapping_add(1) {
            return Err(format!("no answer to a SYN: {answer:?}"));
        }
        self.agree(&answer, asked)?;
        self.head = head;
        self.acknowledge()?;
        self.say(0, self.head.len() as u64, false, Fate::Arrives)?;
        self.until_acked(self.head.len() as u64)
    }

    /// Waits for a SYN, and sends nothing.
    pub(crate) fn await_call(&mut self) -> Outcome {
        let call = self.next("a SYN")?.segment;
        if call.flags != SYN {
            return Err(format!("no SYN: {call:?}"));
        }
        let start = self.their_start;
        self.their_start = call.seq;
        if start != 0 && start != call.seq {
            return Err(format!("another SYN: {} and not {start}", call.seq));
        }
        let options = &call.options;
        if options.mss.is_none() || options.scale.is_none() || options.stamps.is_none() || !options.selective
        {
            return Err(format!("a SYN without an offer: {options:?}"));
        }
        Ok(())
    }

    /// Answers a SYN of the host that has the address, the first or the second, and waits until the
    /// connection is there.
    pub(crate) fn pick_up(&mut self, window: u64, mut lost: bool) -> Outcome {
        self.window = window;
        let (call, come) = loop {
            let arrival = self.next("the SYN")?;
            if arrival.side == self.side && !std::mem::take(&mut lost) {
                break (arrival.segment, arrival.at);
            }
        };
        if call.flags != SYN || call.seq != self.their_start {
            return Err(format!("not the SYN that it was, at {}: {call:?}", self.their_start));
        }
        self.note_stamps(&call, come)?;
        self.their_scale = if self.agreed.scaling { call.options.scale.unwrap_or(0) } else { 0 };
        self.edge = u64::from(call.window);
        let mut answer = self.segment(self.our_start, SYN | ACK);
        answer.ack = self.their_start.wrapping_add(1);
        answer.options = self.offer(self.agreed);
        answer.window = window.min(0xffff) as u16;
        self.offer_up_to(window);
        self.wire.send(self.side, &answer)?;
        self.receive("the end of the handshake").map(drop)
    }

    fn offer_up_to(&mut self, edge: u64) {
        if self.offers.last().is_none_or(|(_, before)| *before < edge) {
            self.offers.push((Instant::now(), edge));
        }
    }

    fn offer(&mut self, agreed: Agreed) -> Options {
        Options {
            mss: Some(MSS),
            scale: agreed.scaling.then_some(SCALE),
            selective: agreed.selective,
            stamps: agreed.stamps.then_some((self.clock, self.heard.map_or(0, |(_, _, last)| last))),
            ..Options::default()
        }
    }

    /// Takes the answer to a SYN that was sent at `asked`. The clock in it is that of a later instant, but of which one
    /// nobody knows: dated by when we read it, it would seem to have made haste if we are late.
    fn agree(&mut self, answer: &Segment, asked: Instant) -> Outcome {
        let options = &answer.options;
        let theirs = Agreed {
            scaling: options.scale.is_some(),
            stamps: options.stamps.is_some(),
            selective: options.selective,
        };
        if theirs != self.agreed || options.mss.is_none() {
            return Err(format!("offered {:?}, answered {options:?}", self.agreed));
        }
        self.their_start = answer.seq;
        self.their_scale = options.scale.unwrap_or(0);
        self.edge = u64::from(answer.window);
        self.note_stamps(answer, asked)
    }

    fn segment(&mut self, seq: u32, flags: u8) -> Segment {
        // A clock that goes on with each segment is one that a host can be held to.
        self.clock = self.clock.wrapping_add(1);
        if self.answering {
            self.known = self.have;
        }
        let blocks = if self.agreed.selective { self.beyond.as_slice() } else { &[] };
        let number = |at: u64| self.their_start.wrapping_add(1).wrapping_add(at as u32);
        Segment {
            from: self.ports.0,
            to: self.ports.1,
            seq,
            ack: number(self.known),
            flags,
            window: (self.window >> if self.agreed.scaling { SCALE } else { 0 }) as u16,
            options: Options {
                stamps: self.agreed.stamps.then_some((self.clock, self.heard.map_or(0, |(_, _, last)| last))),
                blocks: blocks.iter().map(|(from, to)| (number(*from), number(*to))).collect(),
                ..Options::default()
            },
            payload: Vec::new(),
        }
    }

    fn number(&self, at: u64) -> u32 {
        self.our_start.wrapping_add(1).wrapping_add(at as u32)
    }

    /// Sends a part of our stream, the end of it if `end`. Returns the segment.
    pub(crate) fn say(&mut self, from: u64, to: u64, end: bool, fate: Fate) -> Outcome<Segment> {
        let flags = ACK | if end { FIN } else { 0 } | if to > from { PSH } else { 0 };
        let mut segment = self.segment(self.number(from), flags);
        segment.payload = (from..to).map(|at| self.byte(at)).collect();
        self.sent = self.sent.max(to + u64::from(end));
        match fate {
            Fate::Lost => {}
            Fate::Arrives => {
                self.offer_up_to(self.known + self.window);
                self.wire.send(self.side, &segment)?;
            }
            Fate::At(side) => self.wire.send(side, &segment)?,
        }
        Ok(segment)
    }

    fn byte(&self, at: u64) -> u8 {
        self.head.get(at as usize).copied().unwrap_or_else(|| byte(at, self.cell, 0))
    }

    /// The same segment once more.
    pub(crate) fn repeat(&self, segment: &Segment, to: Side) -> Outcome {
        self.wire.send(to, segment)
    }

    /// Tells what we have.
    pub(crate) fn acknowledge(&mut self) -> Outcome {
        self.known = self.have;
        self.say(self.sent, self.sent, false, Fate::Arrives).map(drop)
    }

    /// Asks for an answer, by an old number: as a window probe does.
    pub(crate) fn probe(&mut self) -> Outcome {
        let segment = self.segment(self.number(self.sent).wrapping_sub(1), ACK);
        self.wire.send(self.side, &segment)
    }

    fn next(&mut self, what: &str) -> Outcome<Arrival> {
        self.inbox.recv_timeout(self.limit.saturating_duration_since(Instant::now())).map_err(|_| {
            format!(
                "waited in vain for {what}: sent {} acked {} edge {} seen {} have {} fin {:?}",
                self.sent, self.acked, self.edge, self.seen, self.have, self.fin
            )
        })
    }

    /// Waits for the next segment, looks at it, and does with it as told.
    pub(crate) fn receive(&mut self, what: &str) -> Outcome<Arrival> {
        let arrival = self.next(what)?;
        let again = arrival.segment.has(SYN) && arrival.segment.seq == self.their_start && !self.silent;
        if again {
            // They have not heard our answer to their SYN yet.
            return Ok(arrival);
        }
        let at = self.check(&arrival).map_err(|error| format!("{error}: {:?}", shown(&arrival)))?;
        let fresh = at + size(&arrival.segment) as i64;
        match self.ear {
            Ear::Open => self.take(&arrival.segment)?,
            Ear::Lose(0) => {
                self.ear = Ear::Open;
                self.take(&arrival.segment)?;
            }
            Ear::Lose(more) => self.ear = Ear::Lose(more - 1),
            Ear::From(place) if fresh > 0 && (fresh as u64) <= place => {}
            Ear::From(_) => self.take(&arrival.segment)?,
            Ear::Swap if size(&arrival.segment) == 0 => self.take(&arrival.segment)?,
            Ear::Swap => match self.swapped.take() {
                // The same once more does not count as the second.
                Some(first) if first.seq == arrival.segment.seq => self.swapped = Some(first),
                Some(first) => {
                    self.ear = Ear::Open;
                    self.take(&arrival.segment)?;
                    self.take(&first)?;
                }
                None => self.swapped = Some(arrival.segment.clone()),
            },
        }
        Ok(arrival)
    }

    /// Keeps what is in a segment, and answers it.
    fn take(&mut self, segment: &Segment) -> Outcome {
        let ahead = segment.seq.wrapping_sub(self.their_start.wrapping_add(1).wrapping_add(self.have as u32));
        let at = self.have as i64 + i64::from(ahead as i32);
        let asks = at < self.have as i64;
        if size(segment) > 0 {
            self.beyond.push((at.max(0) as u64, (at + size(segment) as i64) as u64));
            self.beyond.sort_unstable();
            let mut rest: Vec<(u64, u64)> = Vec::new();
            for (from, to) in std::mem::take(&mut self.beyond) {
                if from <= self.have {
                    self.have = self.have.max(to);
                } else if let Some(last) = rest.last_mut().filter(|last| from <= last.1) {
                    last.1 = last.1.max(to);
                } else {
                    rest.push((from, to));
                }
            }
            self.beyond = rest;
        }
        if self.answering && (asks || size(segment) > 0) {
            self.acknowledge()?;
        }
        Ok(())
    }

    /// Receives until something is so.
    pub(crate) fn until(&mut self, what: &str, so: impl Fn(&Self) -> bool) -> Outcome {
        while !so(self) {
            self.receive(what)?;
        }
        Ok(())
    }

    /// Waits until what we have sent is acknowledged so far.
    pub(crate) fn until_acked(&mut self, place: u64) -> Outcome {
        self.until(&format!("the acknowledgement of {place}"), |p| p.acked >= place)?;
        self.tell(format!("acked {place}"));
        Ok(())
    }

    /// Waits until we have what they sent so far.
    pub(crate) fn until_have(&mut self, place: u64) -> Outcome {
        self.until(&format!("what is before {place}"), |p| p.have >= place)?;
        self.tell(format!("have {place}"));
        Ok(())
    }

    /// Waits for a segment with nothing in it that was sent after `since`.
    pub(crate) fn until_answer(&mut self, since: Instant) -> Outcome {
        loop {
            let arrival = self.receive("an answer")?;
            if arrival.at >= since && size(&arrival.segment) == 0 {
                return Ok(());
            }
        }
    }

    /// Looks at what has come meanwhile.
    pub(crate) fn catch_up(&mut self) -> Outcome {
        while let Ok(arrival) = self.inbox.try_recv() {
            self.check(&arrival).map_err(|error| format!("{error}: {:?}", shown(&arrival)))?;
        }
        Ok(())
    }
}

/// What a segment takes of the stream.
pub(crate) fn size(segment: &Segment) -> usize {
    segment.payload.len() + usize::from(segment.has(FIN))
}

/// The byte at a place of a cell's stream, as in `tcp_grid.c`.
fn byte(at: u64, cell: u32, down: u32) -> u8 {
    let mixed = (at as u32).wrapping_add(1).wrapping_mul(2_654_435_761);
    (mixed.wrapping_add(cell.wrapping_mul(40_503)).wrapping_add(down.wrapping_mul(7919)) >> 13) as u8
}

fn shown(arrival: &Arrival) -> String {
    let s = &arrival.segment;
    let (side, size) = (arrival.side, s.payload.len());
    format!(
        "{side:?} seq {} ack {} flags {:#x} window {} {:?} {size} bytes",
        s.seq, s.ack, s.flags, s.window, s.options
    )
}
