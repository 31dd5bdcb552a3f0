//! The packet filter that picks out TCP for some ports, so that other traffic costs no room.

use std::collections::BTreeSet;

use super::segment::TCP;
use super::{Keeps, Version};

/// More are not told apart: a filter has 4096 instructions.
const MAX_PORTS: usize = 1000;
const MAX_PAIRS: usize = 700;

const LOAD_WORD: u16 = 0x20;
const LOAD_HALF: u16 = 0x28;
const LOAD_BYTE: u16 = 0x30;
const IF_EQUAL: u16 = 0x15;
const AND: u16 = 0x54;
const RETURN: u16 = 0x06;
/// Where the TCP header has its flags, and two of them.
const FLAGS_AT: u32 = 13;
const SYN: u32 = 0x02;
const ACK: u32 = 0x10;
/// What the kernel knows beside the packet (`SKF_AD_OFF`): its protocol, whom it is for, the kind of its device.
const PROTOCOL: u32 = 0xffff_f000;
const PACKET_TYPE: u32 = 0xffff_f000 + 4;
const DEVICE_TYPE: u32 = 0xffff_f000 + 28;
const TO_THIS_HOST: u32 = 0;
/// `ARPHRD_LOOPBACK`.
const LOOPBACK: u32 = 772;

/// The instructions for a packet socket without link headers; none if there are no ports. The loopback device is
/// left out: there we put packets in.
pub(super) fn program(version: Version, keeps: Keeps, ports: &BTreeSet<u16>) -> Option<Vec<u8>> {
    if ports.is_empty() {
        return None;
    }
    let (mut program, port) = begin(version);
    if keeps == Keeps::Requests {
        program.push(LOAD_BYTE, port - 2 + FLAGS_AT);
        program.push(AND, SYN | ACK);
        program.unless(SYN, 0);
    }
    if ports.len() <= MAX_PORTS {
        program.push(LOAD_HALF, port);
        for port in ports {
            program.when((*port).into(), u32::MAX);
        }
        program.push(RETURN, 0);
    } else {
        program.push(RETURN, u32::MAX);
    }
    Some(program.0)
}

/// The same, for what comes from these ports of peers to ports of ours: pairs of ours and theirs. Of so many as there are
/// room for.
pub(super) fn program_for_peers(version: Version, pairs: &BTreeSet<(u16, u16)>) -> Option<Vec<u8>> {
    if pairs.is_empty() {
        return None;
    }
    let (mut program, port) = begin(version);
    for (ours, theirs) in pairs.iter().take(MAX_PAIRS) {
        program.push(LOAD_HALF, port - 2);
        // Over the three that follow.
        program.jump(IF_EQUAL, [0, 3], (*theirs).into());
        program.push(LOAD_HALF, port);
        program.when((*ours).into(), u32::MAX);
    }
    program.push(RETURN, 0);
    Some(program.0)
}

/// What both begin with, and where the port is that a segment is for.
fn begin(version: Version) -> (Program, u32) {
    let (protocol, port) = match version {
        Version::V4 => (9, 20 + 2),
        Version::V6 => (6, 40 + 2),
    };
    let mut program = Program::default();
    program.push(LOAD_WORD, PROTOCOL);
    program.unless(version.ether_type().into(), 0);
    program.push(LOAD_WORD, PACKET_TYPE);
    program.unless(TO_THIS_HOST, 0);
    program.push(LOAD_WORD, DEVICE_TYPE);
    program.when(LOOPBACK, 0);
    program.push(LOAD_BYTE, protocol);
    program.unless(TCP.into(), 0);
    (program, port)
}

#[derive(Default)]
struct Program(Vec<u8>);

impl Program {
    fn push(&mut self, code: u16, value: u32) {
        self.jump(code, [0, 0], value);
    }

    /// struct sock_filter: code, how many to skip if true and if not, value.
    fn jump(&mut self, code: u16, skip: [u8; 2], value: u32) {
        self.0.extend(code.to_ne_bytes());
        self.0.extend(skip);
        self.0.extend(value.to_ne_bytes());
    }

    /// Ends with `result` if what was loaded is `value`.
    fn when(&mut self, value: u32, result: u32) {
        self.jump(IF_EQUAL, [0, 1], value);
        self.push(RETURN, result);
    }

    /// Ends with `result` if it is anything else.
    fn unless(&mut self, value: u32, result: u32) {
        self.jump(IF_EQUAL, [1, 0], value);
        self.push(RETURN, result);
    }
}
