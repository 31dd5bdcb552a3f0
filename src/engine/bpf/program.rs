//! Instructions of programs, put together by hand: they are few.

use super::super::sys::bpf::INSTRUCTION_BYTES;

/// The codes of instructions: 64-bit moves and sums, 32-bit ones, loads and stores of words and of double words, jumps.
pub(in crate::engine) const MOVE: u8 = 0xbf;
pub(in crate::engine) const SET: u8 = 0xb7;
pub(in crate::engine) const ADD: u8 = 0x07;
pub(in crate::engine) const SUBTRACT_32: u8 = 0x14;
pub(in crate::engine) const LOAD: u8 = 0x61;
pub(in crate::engine) const LOAD_DOUBLE: u8 = 0x79;
pub(in crate::engine) const STORE: u8 = 0x63;
pub(in crate::engine) const STORE_DOUBLE: u8 = 0x7b;
pub(in crate::engine) const STORE_CONSTANT: u8 = 0x62;
pub(in crate::engine) const IF_EQUAL: u8 = 0x15;
pub(in crate::engine) const UNLESS_EQUAL: u8 = 0x55;
pub(in crate::engine) const EXIT: u8 = 0x95;
const LOAD_MAP: u8 = 0x18;
const CALL: u8 = 0x85;
/// As the source of an instruction: the constant is the descriptor of a map, or of one whose only value is meant; the
/// number of a kernel's function.
const IS_MAP: u8 = 1;
const IS_VALUE: u8 = 2;
const IS_KERNEL_FUNCTION: u8 = 2;
/// The register with the end of the stack.
pub(in crate::engine) const STACK: u8 = 10;

/// A program, with the places `L` in it that are jumped to.
#[derive(Debug)]
pub(in crate::engine) struct Program<L> {
    bytes: Vec<u8>,
    /// Where jumps are, and where to.
    jumps: Vec<(usize, L)>,
    labels: Vec<(L, usize)>,
}

impl<L: Copy + PartialEq> Program<L> {
    pub(in crate::engine) fn new() -> Self {
        Self { bytes: Vec::new(), jumps: Vec::new(), labels: Vec::new() }
    }

    /// struct bpf_insn: code, two registers of four bits, offset, constant.
    pub(in crate::engine) fn push(&mut self, code: u8, to: u8, from: u8, offset: i16, constant: i32) {
        self.bytes.extend([code, from << 4 | to]);
        self.bytes.extend(offset.to_ne_bytes());
        self.bytes.extend(constant.to_ne_bytes());
    }

    /// Calls one of the numbered functions that all programs have.
    pub(in crate::engine) fn call(&mut self, function: i32) {
        self.push(CALL, 0, 0, 0, function);
    }

    /// Calls a function of the kernel by its number in the description.
    pub(in crate::engine) fn call_kernel(&mut self, function: i32) {
        self.push(CALL, 0, IS_KERNEL_FUNCTION, 0, function);
    }

    /// Puts a map into a register.
    pub(in crate::engine) fn load_map(&mut self, to: u8, map: i32) {
        self.push(LOAD_MAP, to, IS_MAP, 0, map);
        self.push(0, 0, 0, 0, 0);
    }

    /// Puts the place of the first value of an array into a register.
    pub(in crate::engine) fn load_value(&mut self, to: u8, array: i32) {
        self.push(LOAD_MAP, to, IS_VALUE, 0, array);
        self.push(0, 0, 0, 0, 0);
    }

    pub(in crate::engine) fn jump(&mut self, code: u8, register: u8, value: i32, label: L) {
        self.jumps.push((self.bytes.len(), label));
        self.push(code, register, 0, 0, value);
    }

    pub(in crate::engine) fn here(&mut self, label: L) {
        self.labels.push((label, self.bytes.len()));
    }

    pub(in crate::engine) fn finish(mut self) -> Vec<u8> {
        for (at, label) in self.jumps {
            let target = self.labels.iter().find(|(other, _)| *other == label).map_or(at, |(_, at)| *at);
            let offset = (target.saturating_sub(at) / INSTRUCTION_BYTES).saturating_sub(1);
            let offset = i16::try_from(offset).unwrap_or(0).to_ne_bytes();
            if let Some(field) = self.bytes.get_mut(at + 2..at + 4) {
                field.copy_from_slice(&offset);
            }
        }
        self.bytes
    }
}
