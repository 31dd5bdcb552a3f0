//! Files, pipes, counters, timers, epoll.

use std::io::{Read, Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use super::{Held, moved, options};
use crate::engine::sys::fds;
use crate::engine::trial::until;

#[test]
fn regular_files_keep_offset_flags_and_sharing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("data");
    std::fs::write(&path, b"0123456789").unwrap();
    let mut s = Held::source();
    let a = s.open(&path, libc::O_RDWR);
    s.call(libc::SYS_lseek, &[a.into(), 4, 0]);
    let shared = s.call(libc::SYS_fcntl, &[a.into(), libc::F_DUPFD_CLOEXEC.into(), 7]) as i32;
    let apart = s.open(&path, libc::O_WRONLY | libc::O_APPEND | libc::O_CLOEXEC | libc::O_NONBLOCK);
    let dir_fd = s.open(dir.path(), libc::O_RDONLY | libc::O_DIRECTORY);
    let path_only = s.open(&path, libc::O_PATH);
    let null = s.open("/dev/null".as_ref(), libc::O_RDWR);
    let d = moved(s, &options());
    let mut file = std::fs::File::from(d.take(a));
    assert_eq!(file.stream_position().unwrap(), 4);
    file.read_exact(&mut [0; 3]).unwrap();
    assert_eq!(std::fs::File::from(d.take(shared)).stream_position().unwrap(), 7);
    std::fs::File::from(d.take(apart)).write_all(b"!").unwrap();
    assert_eq!(file.read_at(&mut [0; 16], 0).unwrap(), 11);
    assert_eq!(fds::kcmp_file(d.pid(), a, shared), Ok(std::cmp::Ordering::Equal));
    assert_ne!(fds::kcmp_file(d.pid(), a, apart), Ok(std::cmp::Ordering::Equal));
    for fd in [dir_fd, path_only, null] {
        d.take(fd);
    }
}

#[test]
fn many_and_sparse_numbers() {
    let mut s = Held::source();
    let null = s.open("/dev/zero".as_ref(), libc::O_RDONLY);
    for n in [3, 9, 600, 5000, 5001, 15_000, 15_001, 16_000, 16_001] {
        s.call(libc::SYS_dup3, &[null.into(), n, libc::O_CLOEXEC.into()]);
    }
    for n in 700..1300 {
        s.call(libc::SYS_dup3, &[null.into(), n, 0]);
    }
    let eventfd = s.call(libc::SYS_eventfd2, &[5, 0]) as i32;
    s.call(libc::SYS_dup3, &[eventfd.into(), 15_002, 0]);
    let d = moved(s, &options());
    assert_eq!(fds::kcmp_file(d.pid(), eventfd, 15_002), Ok(std::cmp::Ordering::Equal));
    assert_eq!(fds::kcmp_file(d.pid(), 3, 700), Ok(std::cmp::Ordering::Equal));
}

#[test]
fn numbers_beyond_a_gap_longer_than_the_gap() {
    let mut s = Held::source();
    let first = s.call(libc::SYS_eventfd2, &[1, 0]);
    for n in 1500..4000 {
        s.call(libc::SYS_dup3, &[first, n, 0]);
    }
    let last = s.call(libc::SYS_eventfd2, &[2, 0]);
    s.call(libc::SYS_dup3, &[last, 4000, 0]);
    let d = moved(s, &options());
    let mut count = [0; 8];
    std::fs::File::from(d.take(4000)).read_exact(&mut count).unwrap();
    assert_eq!(u64::from_ne_bytes(count), 2);
    std::fs::File::from(d.take(3999)).read_exact(&mut count).unwrap();
    assert_eq!(u64::from_ne_bytes(count), 1);
}

#[test]
fn pipes_keep_contents_size_packets_and_closed_ends() {
    let mut s = Held::source();
    let (r, w) = s.pipe(libc::O_NONBLOCK);
    s.call(libc::SYS_fcntl, &[w.into(), libc::F_SETPIPE_SZ.into(), 1 << 20]);
    s.call(libc::SYS_fcntl, &[r.into(), libc::F_SETFL.into(), 0]);
    let bulk: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
    for part in bulk.chunks(50_000) {
        s.write(w, part);
    }
    let (pr, pw) = s.pipe(libc::O_DIRECT);
    for packet in [&b"one"[..], b"", b"three"] {
        if !packet.is_empty() {
            s.write(pw, packet);
        }
    }
    let (hr, hw) = s.pipe(0);
    s.write(hw, b"last words");
    s.call(libc::SYS_close, &[hw.into()]);
    let (gr, gw) = s.pipe(0);
    s.call(libc::SYS_close, &[gr.into()]);
    // The source keeps what it had: captured twice, the contents are there twice.
    super::capture(s.pid(), &options()).unwrap();
    let d = moved(s, &options());
    assert_eq!(fds::pipe_size(d.take(r).as_fd()), Ok(1 << 20));
    let mut seen = vec![0; bulk.len()];
    std::fs::File::from(d.take(r)).read_exact(&mut seen).unwrap();
    assert!(seen == bulk);
    assert_eq!(fds::readable_bytes(d.take(r).as_fd()), Ok(0));
    let mut packets = std::fs::File::from(d.take(pr));
    let mut buffer = [0; 64];
    assert_eq!(packets.read(&mut buffer).unwrap(), 3);
    assert_eq!(packets.read(&mut buffer).unwrap(), 5);
    let mut rest = String::new();
    std::fs::File::from(d.take(hr)).read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "last words");
    let broken = std::fs::File::from(d.take(gw)).write(b"x").unwrap_err();
    assert_eq!(broken.kind(), std::io::ErrorKind::BrokenPipe);
}

#[test]
fn eventfd_counts() {
    let mut s = Held::source();
    let plain = s.call(libc::SYS_eventfd2, &[3, libc::EFD_NONBLOCK.into()]) as i32;
    s.write(plain, &(1u64 << 40).to_ne_bytes());
    let semaphore = s.call(libc::SYS_eventfd2, &[2, libc::EFD_SEMAPHORE.into()]) as i32;
    let d = moved(s, &options());
    let mut count = [0; 8];
    std::fs::File::from(d.take(plain)).read_exact(&mut count).unwrap();
    assert_eq!(u64::from_ne_bytes(count), (1 << 40) + 3);
    for _ in 0..2 {
        std::fs::File::from(d.take(semaphore)).read_exact(&mut count).unwrap();
        assert_eq!(u64::from_ne_bytes(count), 1);
    }
}

fn set_timer(s: &mut Held, fd: i32, flags: i32, interval_ns: i64, value_ns: i64) {
    let words = [0, interval_ns, value_ns / 1_000_000_000, value_ns % 1_000_000_000];
    let bytes: Vec<u8> = words.iter().flat_map(|w: &i64| w.to_ne_bytes()).collect();
    s.with(|b| {
        let spec = b.input(&bytes);
        b.call(libc::SYS_timerfd_settime, &[fd.into(), flags.into(), spec, 0.into()])
    })
    .unwrap();
}

#[test]
fn timerfd_keeps_deadline_interval_and_ticks() {
    let mut s = Held::source();
    let create = |s: &mut Held, clock: i32| s.call(libc::SYS_timerfd_create, &[clock.into(), 0]) as i32;
    let far = create(&mut s, libc::CLOCK_MONOTONIC);
    set_timer(&mut s, far, 0, 500, 3_600_000_000_000);
    let absolute = create(&mut s, libc::CLOCK_REALTIME);
    let deadline = fds::clock_ns(libc::CLOCK_REALTIME).unwrap() + 1_000_000_000_000;
    set_timer(&mut s, absolute, libc::TFD_TIMER_ABSTIME | libc::TFD_TIMER_CANCEL_ON_SET, 0, deadline);
    let fired = create(&mut s, libc::CLOCK_BOOTTIME);
    set_timer(&mut s, fired, 0, 0, 1);
    let periodic = create(&mut s, libc::CLOCK_MONOTONIC);
    set_timer(&mut s, periodic, 0, 100_000_000, 1);
    let idle = create(&mut s, libc::CLOCK_MONOTONIC);
    // Wait until both have gone off: readable.
    for fd in [fired, periodic] {
        let ours = s.take(fd);
        until("the end of the time", || fds::poll_now(ours.as_fd(), libc::POLLIN).unwrap() != 0);
    }
    let d = moved(s, &options());
    let left = |fd: i32| {
        let spec = fds::timerfd_gettime(d.take(fd).as_fd()).unwrap();
        (spec.it_value.tv_sec, spec.it_interval.tv_nsec)
    };
    assert!((3590..3600).contains(&left(far).0));
    assert_eq!(left(far).1, 500);
    assert!((990..1000).contains(&left(absolute).0));
    let info = std::fs::read_to_string(format!("/proc/{}/fdinfo/{absolute}", d.pid())).unwrap();
    assert!(info.contains("settime flags: 03"), "{info}");
    let mut ticks = [0; 8];
    std::fs::File::from(d.take(fired)).read_exact(&mut ticks).unwrap();
    assert_eq!(u64::from_ne_bytes(ticks), 1);
    std::fs::File::from(d.take(periodic)).read_exact(&mut ticks).unwrap();
    assert!(u64::from_ne_bytes(ticks) >= 1);
    assert_eq!(left(periodic).1, 100_000_000);
    assert_eq!(fds::poll_now(d.take(idle).as_fd(), libc::POLLIN), Ok(0));
}

#[test]
fn signalfd_keeps_its_mask() {
    let mut s = Held::source();
    let mask: u64 = 1 << (libc::SIGUSR1 - 1) | 1 << (libc::SIGRTMIN() - 1);
    let fd = s
        .with(|b| {
            let mask = b.input(&mask.to_ne_bytes());
            b.call(libc::SYS_signalfd4, &[(-1).into(), mask, 8.into(), libc::SFD_CLOEXEC.into()])
        })
        .unwrap();
    let d = moved(s, &options());
    let info = std::fs::read_to_string(format!("/proc/{}/fdinfo/{fd}", d.pid())).unwrap();
    assert!(info.contains(&format!("sigmask:\t{mask:016x}")), "{info}");
}

#[test]
fn epoll_keeps_registrations_also_by_closed_and_reused_numbers() {
    let mut s = Held::source();
    let epoll = s.call(libc::SYS_epoll_create1, &[libc::EPOLL_CLOEXEC.into()]) as i32;
    let inner = s.call(libc::SYS_epoll_create1, &[0]) as i32;
    let ready = |s: &mut Held| s.call(libc::SYS_eventfd2, &[1, 0]) as i32;
    let (a, b, c, e) = (ready(&mut s), ready(&mut s), ready(&mut s), ready(&mut s));
    s.epoll_add(epoll, a, libc::EPOLLIN, 0xdead_beef_0000_0001);
    // Registered as b, then b is closed, alive as 20.
    s.epoll_add(epoll, b, libc::EPOLLIN | libc::EPOLLET, 2);
    s.call(libc::SYS_dup3, &[b.into(), 20, 0]);
    s.call(libc::SYS_close, &[b.into()]);
    // Registered as c, then c leads elsewhere and is registered again; the first is alive as 21.
    s.epoll_add(epoll, c, libc::EPOLLIN, 3);
    s.call(libc::SYS_dup3, &[c.into(), 21, 0]);
    s.call(libc::SYS_dup3, &[e.into(), c.into(), 0]);
    s.epoll_add(epoll, c, libc::EPOLLIN | libc::EPOLLOUT | libc::EPOLLONESHOT, 4);
    s.epoll_add(inner, a, libc::EPOLLIN, 5);
    s.epoll_add(epoll, inner, libc::EPOLLIN, 6);
    let mut d = moved(s, &options());
    let expected = vec![(1, 2), (1, 3), (1, 6), (1, 0xdead_beef_0000_0001), (5, 4)];
    assert_eq!(d.epoll_wait(epoll), expected);
    assert_eq!(fds::kcmp_file(d.pid(), c, e), Ok(std::cmp::Ordering::Equal));
    assert_ne!(fds::kcmp_file(d.pid(), 21, c), Ok(std::cmp::Ordering::Equal));
    assert!(fds::kcmp_epoll(d.pid(), 20, epoll, b as u32, 0).unwrap());
}

#[test]
fn sigio_goes_to_the_process_itself() {
    let mut s = Held::source();
    let pid = s.pid();
    let (r, _) = s.pipe(0);
    s.call(libc::SYS_fcntl, &[r.into(), libc::F_SETOWN.into(), pid.into()]);
    s.call(libc::SYS_fcntl, &[r.into(), fds::F_SETSIG.into(), 34]);
    s.call(libc::SYS_fcntl, &[r.into(), libc::F_SETFL.into(), (libc::O_ASYNC | libc::O_NONBLOCK).into()]);
    let d = moved(s, &options());
    let (owner, signal) = fds::signal_owner(d.take(r).as_fd()).unwrap();
    assert_eq!((owner.pid, owner.kind, signal), (d.pid(), 1, 34));
}

#[test]
fn many_that_look_alike_are_told_apart() {
    let mut s = Held::source();
    let mut batch = crate::engine::remote::Batch::new();
    for _ in 0..300 {
        batch.call(libc::SYS_epoll_create1, &[0u32.into()]);
        batch.call(libc::SYS_eventfd2, &[1u32.into(), 0u32.into()]);
    }
    for n in 0..300u32 {
        batch.call(libc::SYS_dup3, &[n.into(), (900 - n).into(), 0u32.into()]);
    }
    crate::engine::remote::RemoteCalls::run_all_ok(s.calls(), "filling", &batch).unwrap();
    let d = moved(s, &options());
    for n in 0..300 {
        let same = |other| fds::kcmp_file(d.pid(), n, other) == Ok(std::cmp::Ordering::Equal);
        assert!(same(900 - n) && !same(n + 1) && !same(899 - n));
    }
}
