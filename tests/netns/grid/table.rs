//! The cells of the grid: what a connection is like at the freeze, and what the network does to it around
//! the move. A plain product, without what cannot be.

use super::peer::Agreed;

/// The state of the moved end at the freeze.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    Established,
    CloseWait,
    FinWait1,
    FinWait2,
    Closing,
    LastAck,
    TimeWait,
    SynSent,
}

/// What its queues hold at the freeze.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Queue {
    Empty,
    /// Input that the process has not read.
    Unread,
    /// Output that was sent and not acknowledged.
    Unacked,
    /// Output that was never sent.
    Unsent,
    /// Output of both kinds.
    Partly,
    /// That, and unread input.
    Both,
}

/// Which window is closed at the freeze.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Window {
    Open,
    PeerZero,
    OursZero,
}

/// What the network does. `Up` is what the peer sends, `Down` what the moved end sends. The last segment
/// before the move, one during the freeze, or the first after.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    UpLostBefore,
    /// The later of two has come, the earlier comes after the move.
    UpReorderedBefore,
    /// It has come, its acknowledgement is lost: it comes again.
    UpAckLost,
    /// Sent to the source when the address is gone from there.
    UpFrozenAtSource,
    /// Sent to the destination when the address is there, and the connection is not live yet.
    UpFrozenAtDestination,
    /// The later of two comes to the source in the freeze, the earlier to the destination.
    UpReorderedFrozen,
    /// What had come already comes again in the freeze, at both hosts.
    UpDoubledFrozen,
    /// The peer's first word to the destination is lost.
    UpLostAfter,
    UpReorderedAfter,
    UpDoubledAfter,
    DownLostBefore,
    /// It has come, the peer's acknowledgement is lost.
    DownAckLost,
    DownReorderedBefore,
    /// The first segments of the destination are lost.
    DownLostAfter,
    DownReorderedAfter,
    DownDoubledAfter,
}

const STATES: [State; 8] = [
    State::Established,
    State::CloseWait,
    State::FinWait1,
    State::FinWait2,
    State::Closing,
    State::LastAck,
    State::TimeWait,
    State::SynSent,
];
const QUEUES: [Queue; 6] =
    [Queue::Empty, Queue::Unread, Queue::Unacked, Queue::Unsent, Queue::Partly, Queue::Both];
const WINDOWS: [Window; 3] = [Window::Open, Window::PeerZero, Window::OursZero];
const FAULTS: [Fault; 17] = [
    Fault::None,
    Fault::UpLostBefore,
    Fault::UpReorderedBefore,
    Fault::UpAckLost,
    Fault::UpFrozenAtSource,
    Fault::UpFrozenAtDestination,
    Fault::UpReorderedFrozen,
    Fault::UpDoubledFrozen,
    Fault::UpLostAfter,
    Fault::UpReorderedAfter,
    Fault::UpDoubledAfter,
    Fault::DownLostBefore,
    Fault::DownAckLost,
    Fault::DownReorderedBefore,
    Fault::DownLostAfter,
    Fault::DownReorderedAfter,
    Fault::DownDoubledAfter,
];

/// One connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cell {
    pub(crate) state: State,
    pub(crate) queue: Queue,
    pub(crate) window: Window,
    pub(crate) fault: Fault,
    pub(crate) agreed: Agreed,
}

impl State {
    /// The process has ended its output.
    pub(crate) fn has_shut(self) -> bool {
        matches!(self, Self::FinWait1 | Self::FinWait2 | Self::Closing | Self::LastAck | Self::TimeWait)
    }

    /// The peer has ended its own.
    pub(crate) fn peer_has_shut(self) -> bool {
        matches!(self, Self::CloseWait | Self::Closing | Self::LastAck | Self::TimeWait)
    }

    /// As the kernel numbers them.
    pub(crate) fn number(self) -> u8 {
        match self {
            Self::Established => 1,
            Self::SynSent => 2,
            Self::FinWait1 => 4,
            Self::FinWait2 => 5,
            Self::TimeWait => 6,
            Self::CloseWait => 8,
            Self::LastAck => 9,
            Self::Closing => 11,
        }
    }
}

impl Cell {
    pub(crate) fn name(&self) -> String {
        let mut name = format!("{:?}/{:?}/{:?}/{:?}/", self.state, self.queue, self.window, self.fault);
        for (on, letter) in
            [(self.agreed.scaling, 'w'), (self.agreed.stamps, 't'), (self.agreed.selective, 's')]
        {
            name.push(if on { letter } else { '-' });
        }
        name
    }

    /// Output that the process writes before the move.
    pub(crate) fn written(&self) -> u32 {
        match self.queue {
            Queue::Empty | Queue::Unread => 0,
            Queue::Unacked => 1500,
            Queue::Unsent | Queue::Partly | Queue::Both => 5000,
        }
    }

    /// The window that the peer offers before the move.
    pub(crate) fn first_window(&self) -> u64 {
        match (self.window, self.queue) {
            (Window::PeerZero, _) => 0,
            (_, Queue::Partly | Queue::Both) => 2 * self.agreed.full(),
            _ => 60_000,
        }
    }

    /// Unread input, apart from a full queue.
    pub(crate) fn has_unread(&self) -> bool {
        matches!(self.queue, Queue::Unread | Queue::Both)
    }

    /// How much of its output is under way at the freeze: with its end, if that was sent.
    pub(crate) fn under_way(&self) -> u64 {
        let written = u64::from(self.written()).min(self.first_window());
        let fin =
            self.state.has_shut() && written == u64::from(self.written()) && self.window != Window::PeerZero;
        if self.state == State::FinWait2 || self.state == State::TimeWait {
            0
        } else {
            written + u64::from(fin)
        }
    }

    fn fits(&self) -> bool {
        use Fault as F;
        use Queue as Q;
        use State as S;
        use Window as W;
        let state_fits = match self.state {
            S::FinWait2 => matches!(self.queue, Q::Empty | Q::Unread) && self.window != W::PeerZero,
            S::TimeWait => (self.queue, self.window, self.fault) == (Q::Empty, W::Open, F::None),
            S::SynSent => {
                (self.queue, self.window) == (Q::Empty, W::Open)
                    && matches!(self.fault, F::None | F::DownLostAfter)
            }
            _ => true,
        };
        let window_fits = match self.window {
            W::Open => self.queue != Q::Unsent,
            W::PeerZero => matches!(self.queue, Q::Empty | Q::Unread | Q::Unsent),
            W::OursZero => self.has_unread() && !self.state.peer_has_shut(),
        };
        // The peer can still say something.
        let up = !self.state.peer_has_shut() && self.window != W::OursZero;
        let segments = matches!(self.queue, Q::Unacked | Q::Partly | Q::Both);
        let fault_fits = match self.fault {
            F::UpLostBefore
            | F::UpReorderedBefore
            | F::UpFrozenAtSource
            | F::UpFrozenAtDestination
            | F::UpReorderedFrozen
            | F::UpReorderedAfter
            | F::UpDoubledAfter => up,
            F::DownLostBefore | F::DownAckLost => self.under_way() > 0,
            F::DownReorderedBefore => segments,
            F::DownReorderedAfter => matches!(self.queue, Q::Unsent | Q::Partly | Q::Both),
            F::None
            | F::UpAckLost
            | F::UpDoubledFrozen
            | F::UpLostAfter
            | F::DownLostAfter
            | F::DownDoubledAfter => true,
        };
        state_fits && window_fits && fault_fits
    }
}

fn agreed(bits: usize) -> Agreed {
    Agreed { scaling: bits & 1 == 0, stamps: bits & 2 == 0, selective: bits & 4 == 0 }
}

/// All cells: without a fault each with every set of options, with a fault each with one of them, in turns.
pub(crate) fn cells() -> Vec<Cell> {
    let mut cells = Vec::new();
    let mut turn = 0;
    for state in STATES {
        for queue in QUEUES {
            for window in WINDOWS {
                for fault in FAULTS {
                    let cell = Cell { state, queue, window, fault, agreed: agreed(turn) };
                    if !cell.fits() {
                        continue;
                    }
                    if fault == Fault::None {
                        cells.extend((0..8).map(|bits| Cell { agreed: agreed(bits), ..cell }));
                    } else {
                        cells.push(cell);
                        turn += 1;
                    }
                }
            }
        }
    }
    cells
}
