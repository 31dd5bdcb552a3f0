//! The program that looks at the segments which begin our connections: it hands each of them to the listening socket
//! as the end of a handshake whose outcome it knows.
//!
//! What the kernel is to believe of a connection stands in an array, at the place that the mark of its first segment
//! names. So the program reads nothing of the packet.

use std::net::{IpAddr, SocketAddr};

use crate::engine::bpf::program::{
    ADD, EXIT, IF_EQUAL, LOAD, MOVE, Program, SET, STACK, STORE, STORE_CONSTANT, SUBTRACT_32, UNLESS_EQUAL,
};
use crate::engine::lock;

/// Connections that the array has room for.
pub(super) const PLACES: u32 = 512;
/// The mark of a segment that only passes the lock.
pub(super) const PASSES: u32 = lock::OUR_MARK | 0xffff;

/// A value: the two ends (struct bpf_sock_tuple), what was agreed on (struct bpf_tcp_req_attrs), the version of IP, and
/// what became of it.
pub(super) const VALUE_BYTES: usize = 64;
const AGREED: i32 = 36;
const AGREED_BYTES: i32 = 20;
const VERSION: i16 = 56;
const OUTCOME: i16 = 60;
/// Bytes of the two ends.
const V4_ENDS: i32 = 12;
const V6_ENDS: i32 = 36;

/// The outcome before the program has run; nobody listens there; what listens is no socket of TCP. Otherwise it is what
/// the kernel has answered: 0, or an error as a negative number.
const NOT_SEEN: i32 = 1;
const NOBODY: i32 = 2;
const NOT_TCP: i32 = 3;

/// What was agreed on with the peer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Agreed {
    /// What our clock of timestamps says; none without them.
    pub(super) clock: Option<u32>,
    pub(super) segment_limit: u16,
    /// How the windows are scaled, ours and the peer's; none if they are not.
    pub(super) scales: Option<(u8, u8)>,
    pub(super) selective: bool,
}

/// The value for a connection.
pub(super) fn value(local: SocketAddr, remote: SocketAddr, agreed: &Agreed) -> Vec<u8> {
    let mut value = Vec::with_capacity(VALUE_BYTES);
    for end in [remote.ip(), local.ip()] {
        match end {
            IpAddr::V4(ip) => value.extend(ip.octets()),
            IpAddr::V6(ip) => value.extend(ip.octets()),
        }
    }
    value.extend(remote.port().to_be_bytes());
    value.extend(local.port().to_be_bytes());
    value.resize(AGREED.unsigned_abs() as usize, 0);
    let (ours, theirs) = agreed.scales.unwrap_or_default();
    // The last value of the peer's clock is not known: 0 lets any come.
    value.extend(0u32.to_ne_bytes());
    value.extend(agreed.clock.unwrap_or(0).to_ne_bytes());
    value.extend(agreed.segment_limit.to_ne_bytes());
    value.extend([ours, theirs]);
    // No congestion notification; then which options there are, and what is reserved.
    value.extend([0, agreed.scales.is_some().into(), agreed.selective.into(), agreed.clock.is_some().into()]);
    value.extend([0; 4]);
    value.extend(if local.is_ipv4() { 4u32 } else { 6 }.to_ne_bytes());
    value.extend(NOT_SEEN.to_ne_bytes());
    value
}

/// What the program has done with a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It did not come yet.
    NotSeen,
    /// The listening socket has it.
    Taken,
    /// No socket listens there, or the kernel refused.
    Refused,
}

/// By the value of a connection.
pub(super) fn outcome(value: &[u8]) -> Outcome {
    let at = OUTCOME.unsigned_abs() as usize;
    match value.get(at..).and_then(|b| b.first_chunk()).map(|b| i32::from_ne_bytes(*b)) {
        Some(0) => Outcome::Taken,
        Some(NOT_SEEN) => Outcome::NotSeen,
        _ => Outcome::Refused,
    }
}

/// Calls of the kernel (`BPF_FUNC_*`).
const MAP_LOOKUP: i32 = 1;
const SK_RELEASE: i32 = 86;
const SKC_LOOKUP_TCP: i32 = 99;
const SKC_TO_TCP_SOCK: i32 = 137;
/// Where struct __sk_buff has the mark.
const MARK: i16 = 8;
/// Let others look (`TCX_NEXT`), and the network namespace of the device.
const NEXT: i32 = -1;
const THIS_NAMESPACE: i32 = -1;

/// The instructions. `array` is the descriptor of the array, `assign` the number of `bpf_sk_assign_tcp_reqsk`.
pub(super) fn instructions(array: i32, assign: i32) -> Vec<u8> {
    let mut p = Program::new();
    // 6 is the packet, 7 the value, 8 the listening socket.
    p.push(MOVE, 6, 1, 0, 0);
    p.push(LOAD, 1, 6, MARK, 0);
    p.push(SUBTRACT_32, 1, 0, 0, lock::OUR_MARK.cast_signed());
    p.push(STORE, STACK, 1, -4, 0);
    p.load_map(1, array);
    p.push(MOVE, 2, STACK, 0, 0);
    p.push(ADD, 2, 0, 0, -4);
    p.call(MAP_LOOKUP);
    p.jump(IF_EQUAL, 0, 0, Label::Out);
    p.push(MOVE, 7, 0, 0, 0);

    p.push(LOAD, 1, 7, VERSION, 0);
    p.push(SET, 3, 0, 0, V4_ENDS);
    p.jump(IF_EQUAL, 1, 4, Label::Look);
    p.push(SET, 3, 0, 0, V6_ENDS);
    p.jump(UNLESS_EQUAL, 1, 6, Label::Out);
    p.here(Label::Look);
    p.push(MOVE, 1, 6, 0, 0);
    p.push(MOVE, 2, 7, 0, 0);
    p.push(SET, 4, 0, 0, THIS_NAMESPACE);
    p.push(SET, 5, 0, 0, 0);
    p.call(SKC_LOOKUP_TCP);
    p.push(STORE_CONSTANT, 7, 0, OUTCOME, NOBODY);
    p.jump(IF_EQUAL, 0, 0, Label::Out);

    p.push(MOVE, 8, 0, 0, 0);
    p.push(MOVE, 1, 8, 0, 0);
    p.call(SKC_TO_TCP_SOCK);
    p.push(STORE_CONSTANT, 7, 0, OUTCOME, NOT_TCP);
    p.jump(IF_EQUAL, 0, 0, Label::Release);
    p.push(MOVE, 1, 6, 0, 0);
    p.push(MOVE, 2, 0, 0, 0);
    p.push(MOVE, 3, 7, 0, 0);
    p.push(ADD, 3, 0, 0, AGREED);
    p.push(SET, 4, 0, 0, AGREED_BYTES);
    p.call_kernel(assign);
    p.push(STORE, 7, 0, OUTCOME, 0);
    p.here(Label::Release);
    p.push(MOVE, 1, 8, 0, 0);
    p.call(SK_RELEASE);
    p.here(Label::Out);
    p.push(SET, 0, 0, 0, NEXT);
    p.push(EXIT, 0, 0, 0, 0);
    p.finish()
}

/// Places that are jumped to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Label {
    Look,
    Release,
    Out,
}
