//! Open file descriptions that another process has too.

use std::path::Path;
use std::process::{Command, Stdio};

use super::refusals::reasons;
use super::{FilesOptions, Held, capture, moved, options};
use crate::engine::trial::Killed;

/// A process that has the descriptions of some descriptors of another too, for as long as it is held.
struct Holder(Killed);

impl Holder {
    fn of(s: &Held, numbers: [i32; 2]) -> Self {
        let [stdin, stdout] = numbers.map(|number| Stdio::from(s.take(number)));
        Self(Killed::spawn(
            Command::new("sleep").arg("1000").stdin(stdin).stdout(stdout).stderr(Stdio::null()),
        ))
    }

    fn words(&self) -> String {
        format!("(pid {})", self.0.id())
    }
}

fn eventfd(s: &mut Held) -> i32 {
    s.call(libc::SYS_eventfd2, &[0, 0]) as i32
}

#[test]
fn anonymous_objects_held_by_another_are_refused() {
    let mut s = Held::source();
    let event = eventfd(&mut s);
    let epoll = s.call(libc::SYS_epoll_create1, &[0]) as i32;
    let timer = s.call(libc::SYS_timerfd_create, &[1, 0]) as i32;
    let signal = s.with(|b| {
        let mask = b.input(&[0, 2, 0, 0, 0, 0, 0, 0]);
        b.call(libc::SYS_signalfd4, &[(-1i32).into(), mask, 8u32.into(), 0u32.into()])
    });
    let signal = signal.unwrap() as i32;
    // Of the same names, and its own.
    for _ in 0..3 {
        eventfd(&mut s);
    }
    s.call(libc::SYS_epoll_create1, &[0]);
    let holders = [Holder::of(&s, [event, epoll]), Holder::of(&s, [timer, signal])];
    let second = Holder::of(&s, [event, event]);
    let seen = reasons(&s, &options());
    assert_eq!(seen.len(), 4, "{seen:#?}");
    for (at, (number, what)) in
        [(event, "an eventfd"), (epoll, "an epoll"), (timer, "a timerfd"), (signal, "a signalfd")]
            .into_iter()
            .enumerate()
    {
        assert!(seen[at].starts_with(&format!("fd {number}: is {what} that another")), "{}", seen[at]);
        let holder = holders[at / 2].0.id().to_string();
        assert!(seen[at].contains(&holder), "{}", seen[at]);
    }
    assert!(seen[0].contains(&second.0.id().to_string()), "{}", seen[0]);
    drop((holders, second));
    assert_eq!(reasons(&s, &options()), [""; 0]);
}

#[test]
fn a_shared_position_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    std::fs::write(&path, b"contents").unwrap();
    let mut s = Held::source();
    for _ in 0..3 {
        eventfd(&mut s);
    }
    let file = s.open(&path, libc::O_RDONLY);
    // The same file, opened again, and a directory that is being read.
    let apart = s.open(&path, libc::O_RDONLY);
    let list = s.open(dir.path(), libc::O_RDONLY);
    let mut batch = crate::engine::remote::Batch::new();
    let out = batch.output(1024);
    batch.call(libc::SYS_getdents64, &[list.into(), out, 1024.into()]);
    crate::engine::remote::RemoteCalls::run_all_ok(s.calls(), "reading a directory", &batch).unwrap();
    let holder = Holder::of(&s, [file, list]);
    let reopened = format!("/proc/{}/fd/{apart}", s.pid());
    let other = std::fs::File::open(reopened).unwrap();
    let seen = reasons(&s, &options());
    drop(other);
    assert_eq!(seen.len(), 2, "{seen:#?}");
    for (reason, number) in seen.iter().zip([file, list]) {
        assert!(reason.starts_with(&format!("fd {number}: shares its open file")), "{reason}");
        assert!(reason.contains(&holder.words()) && reason.contains("position"), "{reason}");
        assert!(reason.contains("--shell-job"), "{reason}");
    }
    assert_eq!(reasons(&s, &FilesOptions { shell_job: true, ..options() }), [""; 0]);
    drop(holder);
    assert_eq!(reasons(&s, &options()), [""; 0]);
}

#[test]
fn what_is_shared_without_harm_moves() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("f");
    std::fs::write(&path, b"contents").unwrap();
    let mut s = Held::source();
    // Standard input, with a second descriptor; then what has no position to share.
    let stdin = s.open(&path, libc::O_RDWR);
    assert_eq!(stdin, 0);
    let double = s.call(libc::SYS_fcntl, &[0, libc::F_DUPFD.into(), 10]) as i32;
    s.call(libc::SYS_lseek, &[0, 3, 0]);
    let log = s.open(&path, libc::O_WRONLY | libc::O_APPEND);
    s.call(libc::SYS_fcntl, &[log.into(), libc::F_DUPFD.into(), 20]);
    s.call(libc::SYS_close, &[log.into()]);
    let stands = s.open(&path, libc::O_PATH);
    s.call(libc::SYS_dup3, &[stands.into(), 21, 0]);
    s.call(libc::SYS_close, &[stands.into()]);
    let list = s.open(dir.path(), libc::O_RDONLY);
    s.call(libc::SYS_dup3, &[list.into(), 22, 0]);
    s.call(libc::SYS_close, &[list.into()]);
    let null = s.open(Path::new("/dev/null"), libc::O_RDWR);
    s.call(libc::SYS_dup3, &[null.into(), 23, 0]);
    s.call(libc::SYS_close, &[null.into()]);
    let holders = [Holder::of(&s, [double, 20]), Holder::of(&s, [21, 22]), Holder::of(&s, [23, 23])];
    assert_eq!(reasons(&s, &options()), [""; 0]);
    // Opened so that it could be read too, the log has a position that matters.
    let read_too = s.open(&path, libc::O_RDWR | libc::O_APPEND);
    s.call(libc::SYS_dup3, &[read_too.into(), 24, 0]);
    s.call(libc::SYS_close, &[read_too.into()]);
    let one_more = Holder::of(&s, [24, 24]);
    assert_eq!(reasons(&s, &options()).len(), 1);
    drop(one_more);
    capture(s.pid(), &options()).unwrap();
    let d = moved(s, &options());
    drop(holders);
    let mut rest = String::new();
    let mut twin = std::fs::File::from(d.take(0));
    std::io::Read::read_to_string(&mut twin, &mut rest).unwrap();
    assert_eq!(rest, "tents");
}
