//! System V segments into the process: attached as a whole, and cut to what the source has of them.
//!
//! The parts of one attach belong together: shmdt(2) takes all of them away. So they are made by one shmat,
//! at the address where it was, and what the source has unmapped of it is unmapped again.

use crate::engine::remote::{Arg, Batch, InjectError};
use crate::engine::state::objects::{attach_range, same_attach};
use crate::proto::image::{Layout, Object, Vma};

/// The calls that attach the segments of the mappings with these indices, and what each must return.
///
/// # Errors
/// If the map does not fit its objects, which the check of the map has seen to.
pub(super) fn attach(wanted: &Layout, new: &[usize]) -> Result<(Batch, Vec<Option<u64>>), InjectError> {
    let mut batch = Batch::new();
    let mut expected = Vec::new();
    let mut push = |batch: &mut Batch, number, args: &[Arg], result| {
        batch.call(number, args);
        expected.push(Some(result));
    };
    let mut parts: Vec<&Vma> = new.iter().filter_map(|i| wanted.vmas.get(*i)).collect();
    parts.sort_by_key(|v| v.start);
    while let Some(first) = parts.first().copied() {
        let (attach, rest): (Vec<&Vma>, Vec<&Vma>) = parts.iter().partition(|v| same_attach(v, first));
        parts = rest;
        let object = wanted.objects.iter().find(|o| o.id == first.shm_inode);
        let range = object.and_then(|o| Some((o, segment(o)?, attach_range(first, o)?)));
        let Some((_, id, (start, end))) = range else {
            return Err(InjectError::NoRoom { tid: 0, why: "an attach without its segment" });
        };
        let executable = attach.iter().any(|v| v.prot & libc::PROT_EXEC.unsigned_abs() != 0);
        let read_only = attach.iter().all(|v| v.never_writable);
        let mut flags = if executable { libc::SHM_EXEC } else { 0 };
        flags |= if read_only { libc::SHM_RDONLY } else { 0 };
        push(&mut batch, libc::SYS_shmat, &[id.into(), start.into(), flags.into()], start);
        let given = prot(executable, read_only);
        let mut at = start;
        for vma in &attach {
            if at < vma.start {
                push(&mut batch, libc::SYS_munmap, &[at.into(), (vma.start - at).into()], 0);
            }
            at = vma.end;
            let len = vma.end - vma.start;
            if vma.prot != given {
                push(&mut batch, libc::SYS_mprotect, &[vma.start.into(), len.into(), vma.prot.into()], 0);
            }
            for advice in &vma.advice {
                push(&mut batch, libc::SYS_madvise, &[vma.start.into(), len.into(), (*advice).into()], 0);
            }
        }
        if at < end {
            push(&mut batch, libc::SYS_munmap, &[at.into(), (end - at).into()], 0);
        }
    }
    Ok((batch, expected))
}

fn segment(object: &Object) -> Option<i32> {
    object.segment.as_ref().map(|s| s.id)
}

fn prot(executable: bool, read_only: bool) -> u32 {
    let mut prot = libc::PROT_READ;
    prot |= if executable { libc::PROT_EXEC } else { 0 };
    prot |= if read_only { 0 } else { libc::PROT_WRITE };
    prot.unsigned_abs()
}
