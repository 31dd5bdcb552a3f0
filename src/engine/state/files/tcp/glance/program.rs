//! The program that is called for each file of a process: of a TCP socket it copies what the layout says into a record.
//! It judges nothing. And a smaller one, which says what sockets there are, and of those of TCP where they end.

use super::layout::{HEAD_BYTES, Layout, NUMBER_TO, Of, Part, Range};
use crate::engine::bpf::program::{ADD, EXIT, IF_EQUAL, LOAD, LOAD_DOUBLE, MOVE, Program, SET, STORE_DOUBLE};

/// Calls of the kernel (`BPF_FUNC_*`).
const KTIME_GET_NS: i32 = 5;
const PROBE_READ_KERNEL: i32 = 113;
const SEQ_WRITE: i32 = 127;
const SKC_TO_TCP_SOCK: i32 = 137;
const SOCK_FROM_FILE: i32 = 162;
/// Where struct bpf_iter__task_file has what, by the kernel's rules for such structures.
const META: i16 = 0;
const NUMBER: i16 = 16;
const FILE: i16 = 24;
/// Where a record has the time; the number of the descriptor follows.
const TIME_TO: i16 = 0;
/// Where one of the smaller program says that it is a socket of TCP.
const IS_TCP_TO: i16 = 0;
const _: () = assert!(NUMBER_TO == 8 && HEAD_BYTES == 16);

/// Where is jumped to: to the end, or to where the record is handed over.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Place {
    Out,
    Said,
}

use Place::{Out, Said};

/// The instructions of the smaller one. `record` as below.
pub(super) fn instructions_for_names(layout: &Layout, record: i32) -> Option<Vec<u8>> {
    let mut p = Program::new();
    begin(&mut p);
    p.push(LOAD_DOUBLE, 8, 0, layout.socket_to_sock, 0);
    p.jump(IF_EQUAL, 8, 0, Out);
    p.load_value(9, record);
    // What is not copied must not be that of the socket before.
    p.push(SET, 1, 0, 0, 0);
    for at in (0..layout.bytes).step_by(8) {
        p.push(STORE_DOUBLE, 9, 1, i16::try_from(at).ok()?, 0);
    }
    p.push(LOAD, 1, 6, NUMBER, 0);
    p.push(STORE_DOUBLE, 9, 1, i16::try_from(NUMBER_TO).ok()?, 0);
    for part in [Part::Inode, Part::Family, Part::Kind] {
        copy(&mut p, layout, layout.range_of(part)?)?;
    }
    p.push(MOVE, 1, 8, 0, 0);
    p.call(SKC_TO_TCP_SOCK);
    p.jump(IF_EQUAL, 0, 0, Said);
    p.push(MOVE, 8, 0, 0, 0);
    p.push(SET, 1, 0, 0, 1);
    p.push(STORE_DOUBLE, 9, 1, IS_TCP_TO, 0);
    for range in layout.ranges.iter().filter(|range| range.of == Of::Socket) {
        copy(&mut p, layout, *range)?;
    }
    p.here(Said);
    end(&mut p, layout)?;
    Some(p.finish())
}

/// The instructions. `record` is the descriptor of an array with room for one record.
pub(super) fn instructions(layout: &Layout, record: i32) -> Option<Vec<u8>> {
    let mut p = Program::new();
    begin(&mut p);
    p.push(LOAD_DOUBLE, 1, 0, layout.socket_to_sock, 0);
    p.jump(IF_EQUAL, 1, 0, Out);
    p.call(SKC_TO_TCP_SOCK);
    p.jump(IF_EQUAL, 0, 0, Out);
    p.push(MOVE, 8, 0, 0, 0);
    p.load_value(9, record);
    p.call(KTIME_GET_NS);
    p.push(STORE_DOUBLE, 9, 0, TIME_TO, 0);
    p.push(LOAD, 1, 6, NUMBER, 0);
    p.push(STORE_DOUBLE, 9, 1, i16::try_from(NUMBER_TO).ok()?, 0);
    for range in &layout.ranges {
        copy(&mut p, layout, *range)?;
    }
    for range in layout.ranges.iter().filter(|range| range.of == Of::Socket) {
        copy(&mut p, layout, Range { to: range.to + layout.socket.len(), ..*range })?;
    }
    end(&mut p, layout)?;
    Some(p.finish())
}

/// 6 is what we are called with, 7 the file, 8 the socket, 9 the record. What is no socket is passed over.
fn begin(p: &mut Program<Place>) {
    p.push(MOVE, 6, 1, 0, 0);
    p.push(LOAD_DOUBLE, 7, 6, FILE, 0);
    p.jump(IF_EQUAL, 7, 0, Out);
    p.push(MOVE, 1, 7, 0, 0);
    p.call(SOCK_FROM_FILE);
    p.jump(IF_EQUAL, 0, 0, Out);
}

/// Hands the record over.
fn end(p: &mut Program<Place>, layout: &Layout) -> Option<()> {
    p.push(LOAD_DOUBLE, 1, 6, META, 0);
    p.push(LOAD_DOUBLE, 1, 1, layout.meta_to_seq, 0);
    p.push(MOVE, 2, 9, 0, 0);
    p.push(SET, 3, 0, 0, i32::try_from(layout.bytes).ok()?);
    p.call(SEQ_WRITE);
    p.here(Out);
    p.push(SET, 0, 0, 0, 0);
    p.push(EXIT, 0, 0, 0, 0);
    Some(())
}

fn copy(p: &mut Program<Place>, layout: &Layout, range: Range) -> Option<()> {
    let number = |value: usize| i32::try_from(value).ok();
    match range.of {
        Of::File => p.push(MOVE, 3, 7, 0, 0),
        Of::Inode => p.push(LOAD_DOUBLE, 3, 7, layout.file_to_inode, 0),
        Of::Socket => p.push(MOVE, 3, 8, 0, 0),
    }
    p.push(ADD, 3, 0, 0, number(range.from)?);
    p.push(MOVE, 1, 9, 0, 0);
    p.push(ADD, 1, 0, 0, number(range.to)?);
    p.push(SET, 2, 0, 0, number(range.len)?);
    p.call(PROBE_READ_KERNEL);
    Some(())
}
