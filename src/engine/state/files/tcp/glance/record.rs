//! What the members of a socket mean: the same as the calls that ask for them.

#![allow(clippy::cast_possible_truncation, reason = "members have as many bits as what is made of them")]

use super::layout::{Layout, NUMBER_TO, Part};
use crate::engine::address;
use crate::engine::lock::{self, Connection};
use crate::engine::sys::tcp::WINDOW_BYTES;
use crate::proto::files::TcpConnection;

use super::super::STATE_LISTEN;
use super::super::connection::{ESTABLISHED, SCALING, SELECTIVE, TIMESTAMPS};

/// `TCPI_OPT_ECN`, `TCPI_OPT_ECN_SEEN`, `TCPI_OPT_SYN_DATA`, `TCPI_OPT_TFO_CHILD`
const CONGESTION: u32 = 8;
const CONGESTION_SEEN: u32 = 16;
const FIRST_DATA: u32 = 32;
const FAST_OPEN_CHILD: u32 = 128;
/// `ecn_flags`: it was agreed on, and has come; and all that is known of them (`TCP_ECN_OK` to `TCP_ECN_SEEN`).
const ECN_AGREED: u64 = 1;
const ECN_SEEN: u64 = 8;
const ECN_KNOWN: u64 = 15;
const INET: u64 = libc::AF_INET as u64;
const INET6: u64 = libc::AF_INET6 as u64;

const STREAM: u64 = libc::SOCK_STREAM as u64;
/// `TCP_CLOSE`
const CLOSED: u32 = 7;
const LISTENS: u32 = STATE_LISTEN as u32;

/// What a socket is to the lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Named {
    /// It has no connection, and nobody waits for it.
    Nothing,
    /// It is connected, or on its way there.
    Connection(Connection),
    /// More than is said here: connections without an inode of their own, or a protocol that may have such.
    More,
}

/// One socket.
#[derive(Debug, Clone, Copy)]
pub(super) struct Record<'a> {
    pub(super) layout: &'static Layout,
    pub(super) bytes: &'a [u8],
}

impl Record<'_> {
    fn value(&self, part: Part) -> u64 {
        self.layout.value_of(self.bytes, part)
    }

    /// Of members that have 32 bits or fewer.
    fn word(&self, part: Part) -> u32 {
        self.value(part) as u32
    }

    /// Of the descriptor.
    pub(super) fn number(&self) -> u64 {
        let number = self.bytes.get(NUMBER_TO..).and_then(|bytes| bytes.first_chunk());
        number.map_or(u64::MAX, |bytes| u64::from_ne_bytes(*bytes))
    }

    pub(super) fn inode(&self) -> u64 {
        self.value(Part::Inode)
    }

    /// `F_GETFL`
    pub(super) fn flags(&self) -> i32 {
        self.word(Part::Flags).cast_signed()
    }

    /// `F_GETSIG`, if nobody is the owner. In newer kernels, what says so is only there when one of both was ever set.
    pub(super) fn signal_for_nobody(&self) -> Option<u32> {
        (self.value(Part::Owner) == 0).then(|| self.word(Part::Signal))
    }

    /// Whether both copies of the socket are the same.
    fn is_whole(&self) -> bool {
        let again = self.layout.socket.end..;
        let first = self.bytes.get(self.layout.socket.clone());
        first.is_some_and(|first| self.bytes.get(again) == Some(first))
    }

    /// Whether it is a connection of which all is said here: it is established, both its queues are empty, and there is
    /// nothing unusual.
    pub(super) fn is_quiet(&self) -> bool {
        const NOT_THERE: &[Part] = &[
            Part::ErrorsQueued,
            Part::Received,
            Part::Backlog,
            Part::Error,
            Part::Shutdown,
            Part::UpperLayer,
            Part::InRepair,
            Part::InMicroseconds,
            Part::Urgent,
            Part::Multipath,
            Part::Keys,
        ];
        self.is_whole()
            && self.value(Part::State) == u64::from(ESTABLISHED)
            && self.value(Part::Kind) == STREAM
            && NOT_THERE.iter().all(|part| self.value(*part) == 0)
            && self.value(Part::Congestion) & !ECN_KNOWN == 0
            && self.word(Part::Written) == self.word(Part::Unacknowledged)
            && self.word(Part::Written) == self.word(Part::Next)
            && self.word(Part::Expected) == self.word(Part::Copied)
    }

    /// An address; `None` if it is none that is carried.
    fn address(&self, v4: Part, v6: Part) -> Option<Vec<u8>> {
        let bytes = match self.value(Part::Family) {
            INET => self.layout.bytes_of(self.bytes, v4),
            INET6 => self.layout.bytes_of(self.bytes, v6),
            _ => return None,
        };
        // Those of a link are refused, in words that are not ours.
        let of_link = matches!(bytes, [0xfe, second, _, _, _, ..] if second & 0xc0 == 0x80);
        (!of_link && bytes.iter().any(|byte| *byte != 0)).then(|| bytes.to_vec())
    }

    /// For a record that names a socket.
    pub(super) fn named(&self) -> Named {
        if ![INET, INET6].contains(&self.value(Part::Family)) {
            return Named::Nothing;
        }
        // The first word of such a record.
        if self.bytes.first_chunk().is_none_or(|bytes| u64::from_ne_bytes(*bytes) == 0) {
            return if self.value(Part::Kind) == STREAM { Named::More } else { Named::Nothing };
        }
        match self.word(Part::State) {
            CLOSED => Named::Nothing,
            LISTENS if self.nobody_waits() => Named::Nothing,
            state if lock::is_connection(state) => self.ends().map_or(Named::More, Named::Connection),
            _ => Named::More,
        }
    }

    /// Where it listens. If this kernel does not tell, somebody may.
    fn nobody_waits(&self) -> bool {
        let parts = [Part::Unaccepted, Part::HalfOpen];
        parts.into_iter().all(|part| self.layout.has(part) && self.value(part) == 0)
    }

    fn ends(&self) -> Option<Connection> {
        let (local, remote) = match self.value(Part::Family) {
            INET => (Part::LocalV4, Part::RemoteV4),
            _ => (Part::LocalV6, Part::RemoteV6),
        };
        let end = |ip, port| address::end_of(self.layout.bytes_of(self.bytes, ip), self.port(port));
        let remote = Some(end(remote, Part::RemotePort)?);
        Some(Connection { local: end(local, Part::LocalPort)?, remote })
    }

    fn port(&self, part: Part) -> u32 {
        u32::from(u16::from_be(self.value(part) as u16))
    }

    /// `tcpi_options`
    fn negotiated(&self) -> u32 {
        let ecn = self.value(Part::Congestion);
        let known = [
            (TIMESTAMPS, self.value(Part::Timestamps) != 0),
            (SELECTIVE, self.value(Part::Selective) != 0),
            (SCALING, self.value(Part::Scaled) != 0),
            (CONGESTION, ecn & ECN_AGREED != 0),
            (CONGESTION_SEEN, ecn & ECN_SEEN != 0),
            (FIRST_DATA, self.value(Part::FirstDataTaken) != 0),
            (FAST_OPEN_CHILD, self.value(Part::ChildOfFastOpen) != 0),
        ];
        known.into_iter().filter(|(_, is_so)| *is_so).map(|(bit, _)| bit).sum()
    }

    /// The clock of the timestamps (`TCP_TIMESTAMP`): milliseconds. The last bit means something else where the kernel
    /// has clocks of microseconds too.
    fn clock(&self) -> u32 {
        let now = self.bytes.first_chunk().map_or(0, |bytes| u64::from_ne_bytes(*bytes));
        let clock = ((now / 1_000_000) as u32).wrapping_add(self.word(Part::ClockOffset));
        if self.layout.has(Part::InMicroseconds) { clock & !1 } else { clock }
    }

    /// `struct tcp_repair_window`
    fn window(&self) -> Vec<u8> {
        let mut window = Vec::with_capacity(WINDOW_BYTES);
        for part in [
            Part::WindowUpdate,
            Part::SendWindow,
            Part::LargestWindow,
            Part::ReceiveWindow,
            Part::Acknowledged,
        ] {
            window.extend(self.word(part).to_ne_bytes());
        }
        window
    }

    /// The connection, but for its options; `None` if there is more to it.
    pub(super) fn quiet(&self) -> Option<TcpConnection> {
        if !self.is_quiet() {
            return None;
        }
        let negotiated = self.negotiated();
        let scale = |part| if negotiated & SCALING == 0 { 0 } else { self.word(part) };
        Some(TcpConnection {
            family: self.value(Part::Family) as i32,
            local: self.address(Part::LocalV4, Part::LocalV6)?,
            local_port: self.port(Part::LocalPort),
            remote: self.address(Part::RemoteV4, Part::RemoteV6)?,
            remote_port: self.port(Part::RemotePort),
            receive_sequence: self.word(Part::Expected),
            send_sequence: self.word(Part::Written),
            negotiated,
            send_scale: scale(Part::SendScale),
            receive_scale: scale(Part::ReceiveScale),
            segment_limit: self.word(Part::SegmentLimit),
            timestamp: if negotiated & TIMESTAMPS == 0 { 0 } else { self.clock() },
            window: self.window(),
            window_clamp: self.word(Part::Clamp),
            send_buffer: self.word(Part::SendBuffer),
            receive_buffer: self.word(Part::ReceiveBuffer),
            ..TcpConnection::default()
        })
    }
}
