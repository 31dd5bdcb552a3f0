//! The vdso of a process at its source: the place for injected code that needs no system call to exist.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::inject::{CodeRoom, io};
use super::procfs;
use super::remote::{InjectError, Tid};
use super::sys::blob;

/// The unused end of the vdso: behind its ELF file, up to the end of the page.
pub(super) fn tail(pid: Tid, mem: &File) -> Result<CodeRoom, InjectError> {
    const MAX_VDSO_BYTES: u64 = 64 * 1024;
    let no_room = |why| InjectError::NoRoom { tid: pid, why };
    let text = procfs::read(format!("/proc/{pid}/maps")).map_err(|e| io("reading its maps", pid, &e))?;
    let maps = procfs::parse_maps(&text).map_err(|_| no_room("its memory map cannot be read"))?;
    let vdso = maps.iter().find(|m| m.path == b"[vdso]").ok_or(no_room("it has no vdso"))?;
    let len = vdso.end - vdso.start;
    if len > MAX_VDSO_BYTES {
        return Err(no_room("its vdso is unexpectedly large"));
    }
    let mut image = vec![0u8; usize::try_from(len).unwrap_or(0)];
    mem.read_exact_at(&mut image, vdso.start).map_err(|e| io("reading its vdso", pid, &e))?;
    let used = elf_end(&image).ok_or(no_room("its vdso is not an ELF file"))?.next_multiple_of(16);
    let tail = image.get(used..).unwrap_or_default();
    // A service that was killed in the middle leaves its code there, which nobody will ever run.
    let code = blob::blob().code;
    if !tail.iter().all(|b| *b == 0) && !tail.starts_with(code) {
        return Err(no_room("the end of its vdso is in use"));
    }
    Ok(CodeRoom { start: vdso.start + used as u64, len: tail.len() })
}

/// The end of an ELF file's contents: segments and section table.
fn elf_end(image: &[u8]) -> Option<usize> {
    let word = |at: usize, len: usize| -> Option<u64> {
        let mut bytes = [0u8; 8];
        bytes[..len].copy_from_slice(image.get(at..at + len)?);
        Some(u64::from_le_bytes(bytes))
    };
    if !image.starts_with(b"\x7fELF") {
        return None;
    }
    let mut end = word(40, 8)?.checked_add(word(58, 2)? * word(60, 2)?)?;
    let (table, size, count) = (word(32, 8)?, word(54, 2)?, word(56, 2)?);
    for i in 0..count {
        let at = usize::try_from(table.checked_add(i * size)?).ok()?;
        end = end.max(word(at.checked_add(8)?, 8)?.checked_add(word(at.checked_add(32)?, 8)?)?);
    }
    let end = usize::try_from(end).ok()?;
    (end <= image.len()).then_some(end)
}
