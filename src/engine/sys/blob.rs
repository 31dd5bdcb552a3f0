//! The only code that ever runs inside another process: a loop over a table of system calls, and the way
//! back to where the thread was. Position-independent; see `engine::inject` for how it is used.
//!
//! Registers on entry: `r15` the thread's lane, `r14` the area, `rbx` the table, `r12` the number of calls.

use std::arch::global_asm;

/// Byte offsets of the fields of a lane: what one thread needs to find back by itself.
pub mod lane {
    pub const MASK: usize = 0;
    pub const FLAGS: usize = 8;
    /// rax, rdi, rsi, rdx, r10, r8, r9, rcx, r11, rbx, r12.
    pub const REGS: usize = 16;
    pub const RSP: usize = 104;
    pub const RIP: usize = 112;
    pub const R14: usize = 120;
    pub const R15: usize = 128;
    pub const TGID: usize = 136;
    pub const TID: usize = 144;
    pub const AREA_BYTES: usize = 152;
    pub const STUB_ADDRESS: usize = 160;
    /// `mov r15, [rip + R15]; jmp [rip + RIP]`: 13 bytes of code in the lane itself, because the last
    /// register to come back is the one that points to the lane.
    pub const STUB: usize = 168;
    /// Bit 0..31: the doorbell signal.
    pub const SIGNAL: usize = 184;
    pub const BYTES: usize = 192;

    /// The code at [`STUB`].
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_possible_wrap,
        reason = "offsets below BYTES; there is no try_from in a constant"
    )]
    pub const STUB_CODE: [u8; 13] = {
        let r15 = (R15 as i32 - (STUB as i32 + 7)).to_le_bytes();
        let rip = (RIP as i32 - (STUB as i32 + 13)).to_le_bytes();
        [0x4c, 0x8b, 0x3d, r15[0], r15[1], r15[2], r15[3], 0xff, 0x25, rip[0], rip[1], rip[2], rip[3]]
    };
}

global_asm!(
    ".pushsection .rodata.migrate_blob,\"a\",@progbits",
    ".balign 16",
    ".globl migrate_blob_boot",
    ".globl migrate_blob_boot_rang",
    ".globl migrate_blob_loop",
    ".globl migrate_blob_loop_rang",
    ".globl migrate_blob_end",
    // One call, arguments already in the registers; its result stays in rbx.
    "migrate_blob_boot:",
    "  syscall",
    "  mov rbx, rax",
    "  mov rdi, [r15 + 136]",
    "  mov rsi, [r15 + 144]",
    "  mov edx, [r15 + 184]",
    "  mov eax, 234", // tgkill: the doorbell
    "  syscall",
    "migrate_blob_boot_rang:",
    // Nobody heard it: unmap what the call may have mapped, and go home.
    "  mov rdi, rbx",
    "  jmp 3f",
    "migrate_blob_loop:",
    "  mov rax, [rbx]",
    "  mov rdi, [rbx + 8]",
    "  mov rsi, [rbx + 16]",
    "  mov rdx, [rbx + 24]",
    "  mov r10, [rbx + 32]",
    "  mov r8, [rbx + 40]",
    "  mov r9, [rbx + 48]",
    "  syscall",
    "  mov [rbx + 56], rax",
    "  add rbx, 64",
    "  dec r12",
    "  jnz migrate_blob_loop",
    "  mov rdi, [r15 + 136]",
    "  mov rsi, [r15 + 144]",
    "  mov edx, [r15 + 184]",
    "  mov eax, 234",
    "  syscall",
    "migrate_blob_loop_rang:",
    // Nobody heard it. The last thread to leave unmaps the area.
    "  lock dec dword ptr [r14]",
    "  jnz 4f",
    "  mov rdi, r14",
    "3:",
    "  mov rsi, [r15 + 152]",
    "  mov eax, 11", // munmap
    "  syscall",
    "4:",
    // Flags first, while all signals are still blocked (popfq needs rsp for a moment); system calls and
    // moves leave them alone. Then the mask: a signal that is delivered right here finds the thread's own
    // stack pointer.
    "  lea rsp, [r15 + 8]",
    "  popfq",
    "  mov rsp, [r15 + 104]",
    "  mov eax, 14", // rt_sigprocmask
    "  mov edi, 2",  // SIG_SETMASK
    "  mov rsi, r15",
    "  mov edx, 0",
    "  mov r10d, 8",
    "  syscall",
    "  mov rax, [r15 + 16]",
    "  mov rdi, [r15 + 24]",
    "  mov rsi, [r15 + 32]",
    "  mov rdx, [r15 + 40]",
    "  mov r10, [r15 + 48]",
    "  mov r8, [r15 + 56]",
    "  mov r9, [r15 + 64]",
    "  mov rcx, [r15 + 72]",
    "  mov r11, [r15 + 80]",
    "  mov rbx, [r15 + 88]",
    "  mov r12, [r15 + 96]",
    "  mov r14, [r15 + 120]",
    "  jmp qword ptr [r15 + 160]",
    "migrate_blob_end:",
    ".popsection",
);

unsafe extern "C" {
    static migrate_blob_boot: u8;
    static migrate_blob_boot_rang: u8;
    static migrate_blob_loop: u8;
    static migrate_blob_loop_rang: u8;
    static migrate_blob_end: u8;
}

/// The code and the offsets of its entries and of the points right after the doorbells.
#[derive(Debug, Clone, Copy)]
pub struct Blob {
    pub code: &'static [u8],
    pub boot_rang: u64,
    pub table_loop: u64,
    pub loop_rang: u64,
}

/// The blob. Its first byte is the boot entry.
pub fn blob() -> Blob {
    let start = (&raw const migrate_blob_boot).addr();
    let offset = |p: *const u8| (p.addr() - start) as u64;
    let len = (&raw const migrate_blob_end).addr() - start;
    // SAFETY: the symbols above delimit one read-only section of this binary; nothing writes to it.
    let code = unsafe { std::slice::from_raw_parts(&raw const migrate_blob_boot, len) };
    Blob {
        code,
        boot_rang: offset(&raw const migrate_blob_boot_rang),
        table_loop: offset(&raw const migrate_blob_loop),
        loop_rang: offset(&raw const migrate_blob_loop_rang),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_lie_inside_and_in_order() {
        let b = blob();
        assert!(b.boot_rang < b.table_loop && b.table_loop < b.loop_rang);
        assert!(b.loop_rang < b.code.len() as u64 && b.code.len() < 320, "{}", b.code.len());
    }
}
