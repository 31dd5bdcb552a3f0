//! What a segment of a host can be wrong about: flags, numbers, bytes, windows, options and clocks.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "sequence numbers wrap"
)]

use std::time::Instant;

use super::{Outcome, Peer, byte, size};
use crate::grid::packet::{ACK, FIN, PSH, SYN, Segment};
use crate::grid::wire::Arrival;

/// What a host may offer more while its process does not read.
const GROWTH: u64 = 32 << 10;
/// How much faster than ours the clock of a host may seem.
const HASTE_MS: u64 = 1500;

impl Peer<'_> {
    /// Everything that a segment can be wrong about.
    pub(super) fn check(&mut self, arrival: &Arrival) -> Outcome<i64> {
        let segment = &arrival.segment;
        if segment.flags & !(FIN | PSH | ACK) != 0 || !segment.has(ACK) {
            return Err("flags".to_owned());
        }
        let options = &segment.options;
        if options.strange.is_some() || options.mss.is_some() || options.scale.is_some() || options.selective
        {
            return Err("an option out of place".to_owned());
        }
        let at = self.check_bytes(segment, arrival.at)?;
        self.largest = self.largest.max(segment.payload.len() as u64);
        self.check_answer(segment)?;
        self.note_stamps(segment, arrival.at)?;
        Ok(at)
    }

    fn check_bytes(&mut self, segment: &Segment, come: Instant) -> Outcome<i64> {
        let ahead = segment.seq.wrapping_sub(self.their_start.wrapping_add(1).wrapping_add(self.seen as u32));
        let at = self.seen as i64 + i64::from(ahead as i32);
        let end = at + segment.payload.len() as i64;
        if at > self.seen as i64 {
            return Err(format!("a gap: at {at} after {}", self.seen));
        }
        if at < -1 || (at < 0 && size(segment) > 0) {
            return Err(format!("at {at}, before the beginning"));
        }
        if segment.payload.len() as u64 > self.agreed.full() {
            return Err(format!("{} bytes, more than fit", segment.payload.len()));
        }
        if let Some(wrong) =
            (0..).zip(&segment.payload).find(|(i, b)| byte((at + i) as u64, self.cell, 1) != **b)
        {
            return Err(format!("byte {} is wrong", at + wrong.0));
        }
        let offered = self.offers.iter().rev().find(|(since, _)| *since <= come).map_or(0, |(_, edge)| *edge);
        if size(segment) > 0 && end as u64 > offered {
            return Err(format!("up to {end}, but {offered} were offered"));
        }
        let fin = segment.has(FIN).then(|| end as u64 + 1);
        if let Some(known) = self.fin
            && (fin.is_some_and(|fin| fin != known) || end as u64 >= known && !segment.payload.is_empty())
        {
            return Err(format!("its end was {known}, now {fin:?} after {end}"));
        }
        self.fin = self.fin.or(fin);
        self.ended |= fin.is_some();
        // What was sent before is not worth telling: it depends on clocks. Nor is whether an end comes alone.
        if !segment.payload.is_empty() && end as u64 > self.seen {
            self.tell_theirs(format!("< {}..{end}", self.seen));
            self.seen = end as u64;
        }
        if let Some(fin) = fin.filter(|fin| *fin > self.seen) {
            self.tell_theirs(format!("< end {fin}"));
            self.seen = fin;
        }
        Ok(at)
    }

    fn check_answer(&mut self, segment: &Segment) -> Outcome {
        let more = segment.ack.wrapping_sub(self.number(self.acked)) as i32;
        let acked = self.acked as i64 + i64::from(more);
        if more < 0 {
            return Err(format!("acknowledges {acked} after {}", self.acked));
        }
        if acked as u64 > self.sent {
            return Err(format!("acknowledges {acked} of {}", self.sent));
        }
        self.acked = acked as u64;
        let edge = self.acked + (u64::from(segment.window) << self.their_scale);
        if edge < self.edge {
            return Err(format!("the window shrinks from {} to {edge}", self.edge));
        }
        if let Some(still) = self.still
            && edge > still + GROWTH
        {
            return Err(format!("the window has grown from {still} to {edge} while nobody reads"));
        }
        self.edge = edge;
        if !segment.options.blocks.is_empty() {
            if !self.agreed.selective {
                return Err("selective, as not agreed".to_owned());
            }
            let acked = self.acked;
            let place = |number: u32| {
                acked.wrapping_add_signed(i64::from(number.wrapping_sub(segment.ack).cast_signed()))
            };
            self.blocks =
                segment.options.blocks.iter().map(|(from, to)| (place(*from), place(*to))).collect();
            if self.blocks.iter().any(|(from, to)| from >= to || *to > self.sent) {
                return Err(format!("acknowledges selectively what was not sent: {:?}", self.blocks));
            }
        }
        Ok(())
    }

    pub(super) fn note_stamps(&mut self, segment: &Segment, at: Instant) -> Outcome {
        let Some((clock, echo)) = segment.options.stamps else {
            return if self.agreed.stamps { Err("no timestamps".to_owned()) } else { Ok(()) };
        };
        if !self.agreed.stamps {
            // A SYN offers what we need not take.
            return if segment.has(SYN) { Ok(()) } else { Err("timestamps, as not agreed".to_owned()) };
        }
        let (first, began, last) = self.heard.unwrap_or((clock, at, clock));
        if (clock.wrapping_sub(last) as i32) < 0 {
            return Err(format!("the clock goes back from {last} to {clock}"));
        }
        let passed = u64::try_from((at - began).as_millis()).unwrap_or(u64::MAX);
        if u64::from(clock.wrapping_sub(first)) > passed + HASTE_MS {
            return Err(format!("the clock has gone on by {} in {passed} ms", clock.wrapping_sub(first)));
        }
        self.heard = Some((first, began, clock));
        // A new host has heard nothing yet, and says so by a zero.
        let none = echo == 0 && (self.silent || segment.has(SYN));
        if !none {
            if (self.clock.wrapping_sub(echo) as i32) < 0 || self.clock.wrapping_sub(echo) > 10_000 {
                return Err(format!("echoes {echo} of {}", self.clock));
            }
            if self.echoed != 0 && (echo.wrapping_sub(self.echoed) as i32) < 0 {
                return Err(format!("echoes {echo} after {}", self.echoed));
            }
            self.echoed = echo;
            self.silent = false;
        }
        Ok(())
    }
}
