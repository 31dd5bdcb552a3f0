//! What cannot be carried, by name; and standard streams that are left behind.

use std::io::{Read, Write};
use std::os::fd::AsFd;

use super::{Held, arrive, options};
use crate::engine::state::files::{
    Descriptors, FilesOptions, capture, capture_after, check, compare_here, describe,
};
use crate::engine::sys::socket;

/// The reasons of preflight and of the capture, which must agree.
pub(super) fn reasons(s: &Held, options: &FilesOptions) -> Vec<String> {
    let seen: Vec<String> =
        check(s.pid(), options).unwrap().reasons.iter().map(ToString::to_string).collect();
    match capture(s.pid(), options) {
        Ok(_) => assert!(seen.is_empty(), "{seen:?}"),
        Err(super::super::CaptureFilesError::Refused { reasons, .. }) => {
            assert_eq!(seen, reasons.iter().map(ToString::to_string).collect::<Vec<_>>());
        }
        Err(other) => panic!("{other:?}"),
    }
    seen
}

#[test]
fn everything_unknown_is_refused_by_name_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    let mut s = Held::source();
    s.call(libc::SYS_inotify_init1, &[0]);
    let memfd = s.with(|b| {
        let name = b.input_c_string(b"m");
        b.call(libc::SYS_memfd_create, &[name, 0u32.into()])
    });
    s.call(libc::SYS_flock, &[memfd.unwrap(), libc::LOCK_EX.into()]);
    s.call(libc::SYS_socket, &[libc::AF_VSOCK.into(), libc::SOCK_STREAM.into(), 0]);
    s.call(
        libc::SYS_socket,
        &[libc::AF_NETLINK.into(), libc::SOCK_RAW.into(), libc::NETLINK_NETFILTER.into()],
    );
    s.open("/proc/self/maps".as_ref(), libc::O_RDONLY);
    let locked = s.open(&path, libc::O_RDWR | libc::O_CREAT);
    s.call(libc::SYS_flock, &[locked.into(), libc::LOCK_EX.into()]);
    let deleted = dir.path().join("deleted");
    s.open(&deleted, libc::O_RDWR | libc::O_CREAT);
    std::fs::remove_file(&deleted).unwrap();
    s.open("/dev/ptmx".as_ref(), libc::O_RDWR);
    let epoll = s.call(libc::SYS_epoll_create1, &[0]) as i32;
    let (_, fired) = s.pipe(0);
    s.epoll_add(epoll, fired, libc::EPOLLOUT | libc::EPOLLONESHOT, 0);
    s.epoll_wait(epoll);
    let seen = reasons(&s, &options());
    let expected =
        ["inotify", "locks", "vsock", "netlink", "/proc", "locks", "deleted", "/dev/ptmx", "one-shot"];
    assert_eq!(seen.len(), expected.len(), "{seen:#?}");
    for (reason, word) in seen.iter().zip(expected) {
        assert!(reason.contains(word), "{reason} does not name {word}");
    }
}

#[test]
fn descriptors_in_flight_are_refused() {
    let mut s = Held::source();
    let (a, _) = s.socketpair(libc::SOCK_STREAM);
    socket::send_fds(s.take(a).as_fd(), &[std::io::stdin().as_fd()]).unwrap();
    let refused = capture(s.pid(), &options()).unwrap_err().to_string();
    assert!(refused.contains("unread descriptors"), "{refused}");
}

#[test]
fn pipes_that_lead_out_are_refused_or_left_behind() {
    let mut s = Held::source();
    let (r, w) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    // Standard streams: input from the pipe, output into a socket; both also held here.
    let give = |s: &mut Held, fd: std::os::fd::BorrowedFd<'_>, number: i64| {
        let (a, b) = s.socketpair(libc::SOCK_SEQPACKET);
        socket::send_fds(s.take(a).as_fd(), &[fd]).unwrap();
        let mut batch = crate::engine::remote::Batch::new();
        let control = batch.output(24);
        let byte = batch.output(1);
        let iov = batch.input(&[0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        batch.pointer_to(iov, 0, byte);
        let mut header = [0u8; 56];
        header[24] = 1;
        header[40] = 24;
        let header = batch.input(&header);
        batch.pointer_to(header, 16, iov);
        batch.pointer_to(header, 32, control);
        batch.call(libc::SYS_recvmsg, &[b.into(), header, 0u32.into()]);
        let outcome = crate::engine::remote::RemoteCalls::run_all_ok(s.calls(), "receiving", &batch).unwrap();
        let got = i64::from(outcome.data(control, 20)[16]);
        s.call(libc::SYS_dup3, &[got, number + 50, 0]);
        for fd in [got, a.into(), b.into()] {
            s.call(libc::SYS_close, &[fd]);
        }
        s.call(libc::SYS_dup3, &[number + 50, number, 0]);
        s.call(libc::SYS_close, &[number + 50]);
    };
    give(&mut s, r.as_fd(), 0);
    give(&mut s, theirs.as_fd(), 1);
    s.call(libc::SYS_dup3, &[1, 2, 0]);
    drop((r, theirs));
    let seen = reasons(&s, &options());
    let us = std::process::id().to_string();
    assert_eq!(seen.len(), 2, "{seen:?}");
    assert!(
        seen.iter().all(|r| r.contains("--shell-job") && r.contains("leads out") && r.contains(&us)),
        "{seen:?}"
    );
    let job = FilesOptions { shell_job: true, ..options() };
    assert!(reasons(&s, &job).is_empty());
    let image = capture(s.pid(), &job).unwrap().image;
    drop((w, ours));
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let d = arrive(&image, Some(&log));
    assert_eq!(std::fs::File::from(d.take(0)).read(&mut [0; 4]).unwrap(), 0);
    std::fs::File::from(d.take(1)).write_all(b"out").unwrap();
    std::fs::File::from(d.take(2)).write_all(b"err").unwrap();
    assert_eq!(std::fs::read(&log).unwrap(), b"outerr");
}

#[test]
fn files_are_compared_by_what_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    std::fs::write(&path, b"same").unwrap();
    let mut file = describe(&path, &std::fs::metadata(&path).unwrap(), false);
    super::super::add_content(&mut file).unwrap();
    assert_eq!(compare_here(&file, true), None);
    file.mtime_ns += 1;
    assert_eq!(compare_here(&file, false), None);
    std::fs::write(&path, b"SAME").unwrap();
    assert!(compare_here(&file, false).unwrap().why.contains("contents"));
    let now = describe(&path, &std::fs::metadata(&path).unwrap(), true);
    let same_tick = crate::proto::files::FileRef { content: file.content, ino: 0, ..now };
    assert!(compare_here(&same_tick, true).unwrap().why.contains("contents"));
    let shared = crate::proto::files::FileRef { writable: true, ..file.clone() };
    assert!(compare_here(&shared, false).unwrap().why.contains("writing"));
    std::fs::write(&path, b"longer").unwrap();
    assert!(compare_here(&file, false).unwrap().why.contains("6 bytes here"));
    std::fs::remove_file(&path).unwrap();
    assert!(compare_here(&file, true).unwrap().why.contains("not exist"));
}

#[test]
fn a_process_started_since_preflight_is_looked_at() {
    let mut s = Held::source();
    s.pipe(0);
    s.call(libc::SYS_socket, &[libc::AF_INET.into(), libc::SOCK_DGRAM.into(), 0]);
    let seen = check(s.pid(), &options()).unwrap();
    assert!(seen.reasons.is_empty());
    let again = |s: &Held| capture_after(Descriptors::take(s.pid()).unwrap(), &options(), &seen.scanned);
    again(&s).unwrap();
    let child = s.call(libc::SYS_fork, &[]);
    // The child came out of the injected call and is ours to end, whatever it runs into.
    let refused = again(&s);
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(child as i32), nix::sys::signal::Signal::SIGKILL)
        .unwrap();
    let Err(super::super::CaptureFilesError::Refused { reasons, .. }) = refused else {
        panic!("{refused:?}")
    };
    assert_eq!(reasons.len(), 3, "{reasons:?}");
    assert!(reasons.iter().all(|r| r.why.contains(&format!("(pid {child})"))), "{reasons:?}");
    assert!(reasons.iter().any(|r| r.why.contains("a UDP socket")), "{reasons:?}");
}
