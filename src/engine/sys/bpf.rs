//! bpf(2): which programs are loaded on this machine, and of which kind; arrays that programs share with us, programs
//! that look at packets, and programs that look at the files of a process, or at sockets.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "descriptors and sizes of small structures, as the kernel's argument types want them"
)]

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;

/// `BPF_PROG_GET_NEXT_ID`, `BPF_PROG_GET_FD_BY_ID`, `BPF_OBJ_GET_INFO_BY_FD`
const NEXT_ID: libc::c_int = 11;
const FD_BY_ID: libc::c_int = 13;
const INFO_BY_FD: libc::c_int = 15;

/// `BPF_MAP_CREATE`, `BPF_MAP_LOOKUP_ELEM`, `BPF_MAP_UPDATE_ELEM`, `BPF_PROG_LOAD`, `BPF_LINK_CREATE`
const MAP_CREATE: libc::c_int = 0;
const LOOK_UP: libc::c_int = 1;
const UPDATE: libc::c_int = 2;
const LOAD: libc::c_int = 5;
const LINK: libc::c_int = 28;
/// `BPF_ITER_CREATE`
const ITERATE: libc::c_int = 33;

/// `BPF_PROG_TYPE_TRACING`, `BPF_TRACE_ITER`
const TRACING: u32 = 26;
const ITERATOR: u32 = 28;
/// Bytes of the part of `union bpf_iter_link_info` about tasks: a thread, a process, a pidfd.
const TASK_BYTES: u32 = 12;

/// `BPF_MAP_TYPE_ARRAY`, `BPF_PROG_TYPE_SCHED_CLS`, `BPF_TCX_INGRESS`, `BPF_F_BEFORE`
const ARRAY: u32 = 2;
const CLASSIFIER: u32 = 3;
const INGRESS: u32 = 46;
const BEFORE: u32 = 8;

/// Bytes of an instruction (`struct bpf_insn`).
pub const INSTRUCTION_BYTES: usize = 8;

/// The fields of `union bpf_attr` that a command has, as words of four bytes.
fn bpf(command: libc::c_int, attributes: &mut [u32]) -> Result<i32, Errno> {
    let size = size_of_val(attributes);
    // SAFETY: `attributes` is readable and writable for `size` bytes, and the kernel uses no more of it. The pointers
    // in it are to room of the callers below, which lives for the call and is as large as the command needs.
    let rc = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_mut_ptr(), size) };
    Errno::result(rc).map(|rc| rc as i32)
}

/// The loaded program with the next higher id; `None` at the end.
pub fn next_program(after: u32) -> Result<Option<u32>, Errno> {
    let mut attributes = [after, 0, 0, 0];
    match bpf(NEXT_ID, &mut attributes) {
        Ok(_) => Ok(Some(attributes[1])),
        Err(Errno::ENOENT) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// The kind of a loaded program (`enum bpf_prog_type`).
pub fn program_kind(id: u32) -> Result<u32, Errno> {
    let program = super::owned_fd(bpf(FD_BY_ID, &mut [id, 0, 0, 0])?);
    Ok(info(program.as_fd())?[0])
}

/// Kind and id of the program behind a descriptor.
pub fn info(program: BorrowedFd<'_>) -> Result<[u32; 2], Errno> {
    // The beginning of `struct bpf_prog_info`.
    let mut info = [0u32; 2];
    let at = info.as_mut_ptr().expose_provenance() as u64;
    let size = size_of_val(&info) as u32;
    bpf(INFO_BY_FD, &mut [program.as_raw_fd() as u32, size, at as u32, (at >> 32) as u32])?;
    Ok(info)
}

/// The two words of a pointer.
fn words<T: ?Sized>(at: *const T) -> [u32; 2] {
    let at = at.cast::<u8>().expose_provenance() as u64;
    [at as u32, (at >> 32) as u32]
}

/// An array whose values programs and we can read and write.
#[derive(Debug)]
pub struct Array {
    fd: OwnedFd,
    value_bytes: usize,
}

impl Array {
    /// Of `entries` values.
    pub fn create(value_bytes: u32, entries: u32) -> Result<Self, Errno> {
        let fd = super::owned_fd(bpf(MAP_CREATE, &mut [ARRAY, 4, value_bytes, entries, 0])?);
        Ok(Self { fd, value_bytes: value_bytes as usize })
    }

    /// For the instructions of a program, which know it by the number of its descriptor.
    pub fn number(&self) -> i32 {
        self.fd.as_raw_fd()
    }

    /// Writes a value, all of it.
    pub fn set(&self, index: u32, value: &[u8]) -> Result<(), Errno> {
        self.command(UPDATE, index, value.as_ptr(), value.len())
    }

    /// Reads a value, all of it.
    pub fn read(&self, index: u32, value: &mut [u8]) -> Result<(), Errno> {
        self.command(LOOK_UP, index, value.as_mut_ptr(), value.len())
    }

    /// The kernel takes, or gives, as many bytes as a value of the array has.
    fn command(&self, command: libc::c_int, index: u32, at: *const u8, len: usize) -> Result<(), Errno> {
        if len != self.value_bytes {
            return Err(Errno::EINVAL);
        }
        let ([key, key_high], [at, at_high]) = (words(&raw const index), words(at));
        let array = self.fd.as_raw_fd() as u32;
        bpf(command, &mut [array, 0, key, key_high, at, at_high, 0, 0]).map(drop)
    }
}

/// Loads a program that looks at packets of a device. `licence` says which of the kernel's functions it may call.
pub fn load_classifier(instructions: &[u8], licence: &CStr) -> Result<OwnedFd, Errno> {
    let count = (instructions.len() / INSTRUCTION_BYTES) as u32;
    let ([at, at_high], [licence, licence_high]) = (words(instructions), words(licence.as_ptr()));
    bpf(LOAD, &mut [CLASSIFIER, count, at, at_high, licence, licence_high]).map(super::owned_fd)
}

/// Lets a program look at what comes in by a device, before others do, as long as the descriptor is open.
pub fn attach_at_ingress(program: BorrowedFd<'_>, device: u32) -> Result<OwnedFd, Errno> {
    bpf(LINK, &mut [program.as_raw_fd() as u32, device, INGRESS, BEFORE, 0, 0, 0, 0]).map(super::owned_fd)
}

/// Loads a program that is called for each of many things, of the kind that the function `kind` of the kernel's
/// description has as its arguments.
pub fn load_iterator(instructions: &[u8], licence: &CStr, kind: u32) -> Result<OwnedFd, Errno> {
    let count = (instructions.len() / INSTRUCTION_BYTES) as u32;
    let ([at, at_high], [licence, licence_high]) = (words(instructions), words(licence.as_ptr()));
    let mut attributes = [0; 28];
    attributes[..6].copy_from_slice(&[TRACING, count, at, at_high, licence, licence_high]);
    // `expected_attach_type` and `attach_btf_id`.
    attributes[17] = ITERATOR;
    attributes[27] = kind;
    bpf(LOAD, &mut attributes).map(super::owned_fd)
}

/// Lets such a program look at what this process has.
pub fn iterate_over(program: BorrowedFd<'_>, process: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    // This number would mean all processes. Nobody who has a standard input gets it.
    if process.as_raw_fd() == 0 {
        return Err(Errno::EBADF);
    }
    let which = [0, 0, process.as_raw_fd() as u32];
    let [at, at_high] = words(which.as_ptr());
    bpf(LINK, &mut [program.as_raw_fd() as u32, 0, ITERATOR, 0, at, at_high, TASK_BYTES]).map(super::owned_fd)
}

/// Lets such a program look at what the network namespace of the thread has that begins a pass.
pub fn iterate_here(program: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    bpf(LINK, &mut [program.as_raw_fd() as u32, 0, ITERATOR, 0, 0, 0, 0]).map(super::owned_fd)
}

/// One pass of it, which happens as it is read.
pub fn iterator(link: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    bpf(ITERATE, &mut [link.as_raw_fd() as u32, 0]).map(super::owned_fd)
}
