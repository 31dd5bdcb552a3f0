//! How each thread is scheduled: policy, nice, real-time priority, CPUs, disk priority. All of it is read
//! and set from outside.

use nix::errno::Errno;

use super::calls::{AttrError, failed, read_as};
use crate::engine::procfs::parse_cpu_list;
use crate::engine::reason::Reason;
use crate::engine::remote::Tid;
use crate::engine::sys::attrs::{self, SchedAttr};
use crate::proto::image::{Sched, Thread};

const ONLINE: &str = "/sys/devices/system/cpu/online";
/// Most bytes of a CPU mask: 8192 CPUs.
const MAX_MASK_BYTES: usize = 1024;
/// SCHED_NORMAL (also known as SCHED_OTHER) and SCHED_BATCH.
const FAIR: [u32; 2] = [0, 3];

/// What threads have unless they are told otherwise.
#[derive(Debug)]
pub struct Defaults {
    online: Vec<usize>,
    slice_ns: u64,
}

impl Defaults {
    /// Those of this machine.
    ///
    /// # Errors
    /// If the kernel does not tell.
    pub fn here() -> Result<Self, AttrError> {
        let online = read_as(ONLINE.into(), parse_cpu_list)?;
        let ours = attrs::sched_attr(0).map_err(failed("reading the scheduling", 0))?;
        let slice_ns = if FAIR.contains(&ours.policy) { ours.runtime } else { 0 };
        Ok(Self { online, slice_ns })
    }
}

fn cpus(mask: &[u8]) -> impl Iterator<Item = usize> {
    mask.iter()
        .enumerate()
        .flat_map(|(i, byte)| (0..8).filter(move |b| byte & (1 << b) != 0).map(move |b| i * 8 + b))
}

/// How a thread is scheduled. A thread that may run on all CPUs has an empty mask: at the destination it
/// may again run on all there are.
///
/// # Errors
/// If the kernel does not tell.
pub fn capture(tid: Tid, defaults: &Defaults) -> Result<Sched, AttrError> {
    let attr = attrs::sched_attr(tid).map_err(failed("reading the scheduling", tid))?;
    let mut affinity = attrs::affinity(tid).map_err(failed("reading the CPUs", tid))?;
    let allowed: Vec<usize> = cpus(&affinity).collect();
    if defaults.online.iter().all(|cpu| allowed.contains(cpu)) {
        affinity.clear();
    }
    while affinity.last() == Some(&0) {
        affinity.pop();
    }
    let ioprio = attrs::ioprio(tid).map_err(failed("reading the disk priority", tid))?;
    // For a fair policy this is the length of a slice; the usual one is the kernel's own choice.
    let usual = FAIR.contains(&attr.policy) && attr.runtime == defaults.slice_ns;
    Ok(Sched {
        policy: attr.policy,
        nice: attr.nice,
        rt_priority: attr.priority,
        affinity,
        flags: attr.flags,
        runtime: if usual { 0 } else { attr.runtime },
        deadline: attr.deadline,
        period: attr.period,
        ioprio,
    })
}

/// What is in the way of scheduling these threads so here.
///
/// # Errors
/// If the kernel does not tell which CPUs there are.
pub fn check_here(threads: &[Thread]) -> Result<Vec<Reason>, AttrError> {
    let online = read_as(ONLINE.into(), parse_cpu_list)?;
    let mut reasons = Vec::new();
    for thread in threads {
        let mask = thread.sched.as_ref().map_or(&[][..], |s| &s.affinity);
        let missing: Vec<usize> = cpus(mask).filter(|cpu| !online.contains(cpu)).collect();
        if !missing.is_empty() {
            let why = format!("is bound to CPUs that are not here: {missing:?}");
            let remedy = "let it run on other CPUs (taskset) before the move";
            reasons.push(Reason::new(format!("thread {}", thread.tid), why, remedy));
        }
    }
    Ok(reasons)
}

/// Schedules a thread so.
///
/// # Errors
/// If the kernel does not allow it.
pub fn restore(tid: Tid, wanted: &Sched) -> Result<(), AttrError> {
    if wanted.affinity.len() > MAX_MASK_BYTES {
        return Err(failed("setting the CPUs", tid)(Errno::EINVAL));
    }
    let all = [0xff; MAX_MASK_BYTES];
    let mask = if wanted.affinity.is_empty() { &all[..] } else { &wanted.affinity };
    attrs::set_affinity(tid, mask).map_err(failed("setting the CPUs", tid))?;
    // The kernel lays a smaller set on us without a word where not all of the CPUs are there.
    let have: Vec<usize> = cpus(&attrs::affinity(tid).map_err(failed("reading the CPUs", tid))?).collect();
    if !cpus(&wanted.affinity).all(|cpu| have.contains(&cpu)) {
        return Err(failed("setting the CPUs", tid)(Errno::ENODEV));
    }
    let attr = SchedAttr {
        policy: wanted.policy,
        flags: wanted.flags,
        nice: wanted.nice,
        priority: wanted.rt_priority,
        runtime: wanted.runtime,
        deadline: wanted.deadline,
        period: wanted.period,
        ..SchedAttr::default()
    };
    attrs::set_sched_attr(tid, attr).map_err(failed("setting the scheduling", tid))?;
    // Without a priority of its own a thread has one by its nice value, and must keep that freedom.
    if attrs::ioprio(tid).map_err(failed("reading the disk priority", tid))? != wanted.ioprio {
        attrs::set_ioprio(tid, wanted.ioprio).map_err(failed("setting the disk priority", tid))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::trial::Killed;

    #[test]
    fn what_is_set_on_one_thread_can_be_set_on_another() {
        let (a, b) = (Killed::sleeper(), Killed::sleeper());
        let (pid_a, pid_b) = (a.pid(), b.pid());
        let defaults = Defaults::here().unwrap();
        let plain = capture(pid_a, &defaults).unwrap();
        let batch = SchedAttr { policy: 3, nice: 7, runtime: 9_000_000, ..SchedAttr::default() };
        attrs::set_sched_attr(pid_a, batch).unwrap();
        attrs::set_affinity(pid_a, &[1]).unwrap();
        attrs::set_ioprio(pid_a, 2 << 13 | 6).unwrap();
        let changed = capture(pid_a, &defaults).unwrap();
        restore(pid_b, &changed).unwrap();
        let copied = capture(pid_b, &defaults).unwrap();
        restore(pid_b, &plain).unwrap();
        let mut back = capture(pid_b, &defaults).unwrap();
        let real_time = Sched { policy: 1, rt_priority: 5, ioprio: 1 << 13 | 3, ..Sched::default() };
        let fifo = restore(pid_b, &real_time).and_then(|()| capture(pid_b, &defaults));
        let ours = attrs::sched_attr(0).unwrap().nice;
        assert_eq!((plain.policy, plain.nice, plain.runtime), (0, ours, 0));
        assert_eq!(plain.affinity, [0u8; 0]);
        assert_eq!((changed.policy, changed.nice, changed.runtime), (3, 7, 9_000_000));
        assert_eq!((changed.affinity.as_slice(), changed.ioprio), (&[1u8][..], 2 << 13 | 6));
        assert_eq!(copied, changed);
        back.ioprio = plain.ioprio;
        assert_eq!(back, plain);
        let fifo = fifo.unwrap();
        assert_eq!((fifo.policy, fifo.rt_priority), (1, 5));
    }

    #[test]
    fn cpus_that_are_not_here_are_refused() {
        let mut mask = vec![0u8; 1024];
        mask[1023] = 0x80;
        let thread = |affinity| Thread {
            tid: 5,
            sched: Some(Sched { affinity, ..Sched::default() }),
            ..Thread::default()
        };
        let reasons = check_here(&[thread(mask), thread(vec![1]), thread(vec![])]).unwrap();
        assert_eq!(reasons.len(), 1);
        assert!(reasons[0].why.contains("8191"), "{reasons:?}");
    }
}
