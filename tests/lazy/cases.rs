//! One behaviour each.

use std::collections::HashSet;

use migrate::engine::sys::vm::{self, RemoteRange};

use crate::rig::{HUGE, PAGE, Rig, Take, contents};

/// Everything by faults only, then everything by faults against a push.
fn in_both_ways(case: &str, take: Take, same_maps: bool) {
    let mut rig = Rig::start(case, take);
    rig.worker.go();
    // No push until it is through, so that each page that it touches faults.
    let stats = {
        let asked = rig.worker.line();
        assert_eq!(asked, "ok");
        rig.source.push(&rig.lazy, 64 * PAGE);
        assert!(rig.lazy.wait_done(std::time::Duration::from_secs(60)));
        rig.stop()
    };
    assert!(stats.asked > 0);
    drop(rig);

    let mut rig = Rig::start(case, take);
    rig.worker.go();
    rig.source.push(&rig.lazy, 5 * PAGE);
    rig.finish(same_maps);
}

#[test]
fn eight_threads_find_their_pages() {
    in_both_ways("threads", Take::All, true);
    in_both_ways("threads", Take::Most, true);
}

#[test]
fn the_kernel_waits_for_pages_as_well() {
    let mut rig = Rig::start("kernel", Take::All);
    // Somebody else's read, too.
    let at = rig.worker.regions[0].start + 200 * PAGE;
    let (mut got, mut want) = ([0; 4096], [0; 4096]);
    vm::read(rig.worker.pid(), &mut got, &[RemoteRange { start: at, len: 4096 }]).unwrap();
    contents(at, &mut want);
    assert_eq!(got, want);
    rig.worker.go();
    let stats = rig.finish(true);
    assert_eq!(stats.installed, 256);
    in_both_ways("kernel", Take::Most, true);
}

#[test]
fn a_signal_that_is_due_repeats_a_fault_and_no_request() {
    let first = |worker: &crate::rig::Worker| HashSet::from([worker.regions[0].start]);
    let mut rig = Rig::start_holding("signals", Take::All, first);
    rig.worker.go();
    assert_eq!(rig.worker.line(), "waiting");
    // The thread is in its fault, inside of read(2), when the signal comes.
    rig.wait_asked_for(rig.worker.regions[0].start);
    rig.worker.go();
    // The page is not sent until its fault has come many times.
    let start = std::time::Instant::now();
    while rig.lazy.stats().faults < 5000 {
        assert!(start.elapsed() < std::time::Duration::from_secs(60), "{:?}", rig.lazy.stats());
        std::thread::yield_now();
    }
    rig.source.release(&rig.lazy);
    let asked = rig.source.asked.lock().unwrap().clone();
    let once: HashSet<u64> = asked.iter().copied().collect();
    assert_eq!(asked.len(), once.len(), "a page was asked for twice");
    rig.source.push(&rig.lazy, 64 * PAGE);
    rig.finish(true);
}

#[test]
fn fifty_children_have_all_pages() {
    in_both_ways("forks", Take::All, true);
    in_both_ways("forks", Take::Most, true);
}

#[test]
fn a_vforked_child_executes_another_program() {
    in_both_ways("spawn", Take::All, true);
}

#[test]
fn execve_leaves_nothing_missing() {
    let mut rig = Rig::start("exec", Take::All);
    rig.worker.go();
    assert_eq!(rig.worker.line(), "ok");
    rig.source.push(&rig.lazy, 64 * PAGE);
    assert!(rig.lazy.is_done());
    let stats = rig.stop();
    assert!(stats.dropped > 0 && stats.installed > 0);
}

#[test]
fn storms_of_mremap_and_madvise() {
    for _ in 0..3 {
        in_both_ways("storms", Take::All, false);
    }
    in_both_ways("storms", Take::Most, false);
}

#[test]
fn shared_memory_comes_once_for_all_its_mappings() {
    in_both_ways("shared", Take::All, true);
    in_both_ways("shared", Take::Most, true);
}

#[test]
fn shared_memory_is_emptied_by_a_hole_and_by_nothing_else() {
    for _ in 0..3 {
        in_both_ways("holes", Take::All, true);
    }
}

#[test]
fn shared_memory_that_is_mapped_again_is_all_there() {
    for push in [true, false] {
        let mut rig = Rig::start("regrow", Take::All);
        rig.worker.go();
        assert_eq!(rig.worker.line(), "waiting");
        if push {
            rig.source.push(&rig.lazy, 64 * PAGE);
        }
        rig.worker.go();
        assert_eq!(rig.worker.line(), "ok");
        rig.source.push(&rig.lazy, 64 * PAGE);
        assert!(rig.lazy.is_done());
        let stats = rig.stop();
        assert_eq!((stats.installed, stats.dropped), (512, 0));
    }
}

#[test]
fn huge_pages_are_put_together() {
    in_both_ways("huge", Take::All, true);
    in_both_ways("huge", Take::Most, true);
    // Mixed so much that parts have to be given up.
    let mut rig = Rig::start("huge", Take::All);
    let names: Vec<u64> =
        rig.missing.iter().flat_map(|(s, e)| (s..e).step_by(usize::try_from(HUGE).unwrap())).collect();
    assert_eq!(names.len(), 8);
    for part in 0..3 {
        for name in &names {
            let mut bytes = vec![0; 4096];
            contents(name + part * PAGE, &mut bytes);
            rig.lazy.install(name + part * PAGE, &bytes).unwrap();
        }
    }
    assert!(!rig.lazy.is_done());
    rig.worker.go();
    rig.source.push(&rig.lazy, 64 * PAGE);
    let stats = rig.finish(true);
    assert!(stats.evicted > 0);
}

#[test]
fn a_killed_process_misses_nothing() {
    let mut rig = Rig::start_holding("stuck", Take::All, |worker| {
        let r = &worker.regions[0];
        (r.start..r.end).step_by(4096).collect()
    });
    rig.worker.go();
    rig.wait_asked(5);
    rig.worker.kill();
    let asked = rig.source.asked.lock().unwrap().clone();
    rig.source.release(&rig.lazy);
    assert!(rig.lazy.is_done(), "{asked:?} of a dead process");
    let stats = rig.stop();
    assert_eq!((stats.installed, stats.dropped), (0, 64));
}

#[test]
fn giving_up_kills_rather_than_shows_zeros() {
    let mut rig = Rig::start_holding("stuck", Take::All, |worker| {
        let r = &worker.regions[0];
        (r.start..r.end).step_by(4096).collect()
    });
    rig.worker.go();
    rig.wait_asked(5);
    rig.stop();
    assert_eq!(rig.worker.line(), "", "it must neither find a wrong page nor end well");
}

#[test]
fn a_fault_that_was_never_read_is_not_reported_for_ever() {
    let mut rig = Rig::start("stuck", Take::All);
    rig.leave_unread();
    rig.worker.go();
    rig.await_a_fault();
    rig.stop();
    assert_eq!(rig.worker.line(), "", "it must neither find a wrong page nor end well");
}

#[test]
fn what_was_asked_for_can_be_asked_for_again() {
    let mut rig = Rig::start_holding("stuck", Take::All, |worker| {
        let r = &worker.regions[0];
        (r.start..r.end).step_by(4096).collect()
    });
    rig.worker.go();
    rig.wait_asked(5);
    let before = rig.source.asked.lock().unwrap().len();
    assert_eq!(rig.lazy.missing().total(), 64 * PAGE);
    rig.lazy.ask_again();
    rig.wait_asked(before + 5);
    rig.source.release(&rig.lazy);
    rig.source.push(&rig.lazy, PAGE);
    let stats = rig.finish(true);
    assert_eq!(stats.unwanted, 0);
}

#[test]
fn zeros_are_placed_with_and_without_pages() {
    let mut rig = Rig::start("stuck", Take::All);
    let start = rig.worker.regions[0].start;
    rig.lazy.install_zero(start, 32, true).unwrap();
    rig.lazy.install_zero(start + 32 * PAGE, 32, false).unwrap();
    assert!(rig.lazy.is_done());
    let stats = rig.stop();
    assert_eq!((stats.installed, stats.unwanted), (64, 0));
    let mut got = vec![1; 64 * 4096];
    let len = got.len();
    vm::read(rig.worker.pid(), &mut got, &[RemoteRange { start, len }]).unwrap();
    assert!(got.iter().all(|b| *b == 0));
    assert!(rig.lazy.install(start + 1, &[0; 4096]).is_err());
    assert!(rig.lazy.install(u64::MAX - 4095, &[0; 8192]).is_err());
    assert!(rig.lazy.install_zero(start, u64::MAX, false).is_err());
}

#[test]
fn another_goes_on_where_one_was_killed() {
    let small = ["threads", "kernel", "forks", "storms", "shared", "holes"].map(|case| (case, 32 * PAGE));
    for (case, piece) in small.into_iter().chain([("huge", HUGE)]) {
        println!("{case}");
        let mut rig = Rig::start(case, Take::All);
        rig.worker.go();
        while rig.source.push_some(&rig.lazy, piece) {
            rig.hand_over();
        }
        rig.finish(false);
    }
}
