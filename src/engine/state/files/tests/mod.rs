//! Round trips with real processes: state is made in one by injected calls, captured from outside, and
//! built again in another one; then the descriptors of the new process are taken over and tried.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss
)]

mod connections;
mod groups;
mod ip;
mod multicast_if;
mod network;
mod objects;
mod refusals;
mod shared;
mod sockets;
mod unix;

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::{Command, Stdio};

use super::{AheadSockets, CapturedFiles, FilesOptions, SilentConnections, build, capture, install};
use crate::engine::clocks::Shift;
use crate::engine::freeze::Frozen;
use crate::engine::remote::{Arg, Batch, RemoteCalls};
use crate::engine::state::objects::Objects;
use crate::engine::sys::{pidfd, socket};
use crate::engine::trial::{Killed, PATIENCE, until, until_asleep};

/// A stopped process that runs our calls; killed at the end.
pub(super) struct Held {
    child: Killed,
    frozen: Option<Frozen>,
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(frozen) = self.frozen.take() {
            frozen.kill();
        }
    }
}

impl Held {
    /// A process with `stdin` at 0 and nothing else.
    fn start(stdin: Stdio) -> Self {
        let mut command = Command::new("sleep");
        let child =
            Killed::spawn(command.arg("1000").stdin(stdin).stdout(Stdio::null()).stderr(Stdio::null()));
        until_asleep(child.id());
        let frozen = Frozen::freeze(child.pid(), PATIENCE).unwrap();
        let mut held = Self { child, frozen: Some(frozen) };
        held.call(libc::SYS_close_range, &[1, 10_000, 0]);
        held
    }

    /// An ordinary process without descriptors.
    pub(super) fn source() -> Self {
        let mut held = Self::start(Stdio::null());
        held.call(libc::SYS_close, &[0]);
        held
    }

    pub(super) fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    pub(super) fn calls(&mut self) -> &mut Frozen {
        self.frozen.as_mut().unwrap()
    }

    /// One system call with plain arguments, which must succeed.
    pub(super) fn call(&mut self, number: i64, args: &[i64]) -> i64 {
        self.try_call(number, args).unwrap()
    }

    pub(super) fn try_call(&mut self, number: i64, args: &[i64]) -> nix::Result<i64> {
        let args: Vec<Arg> = args.iter().map(|a| Arg::from(*a)).collect();
        self.with(|batch| batch.call(number, &args))
    }

    /// One call with data.
    pub(super) fn with(&mut self, add: impl FnOnce(&mut Batch) -> usize) -> nix::Result<i64> {
        let mut batch = Batch::new();
        let index = add(&mut batch);
        self.calls().run(&batch).unwrap().ret(index).map(|v| v as i64)
    }

    /// A call that returns two descriptors in memory: `pipe2`, `socketpair`.
    fn pair(&mut self, number: i64, before: &[i64], after: &[i64]) -> (i32, i32) {
        let mut batch = Batch::new();
        let out = batch.output(8);
        let mut args: Vec<Arg> = before.iter().map(|a| Arg::from(*a)).collect();
        args.push(out);
        args.extend(after.iter().map(|a| Arg::from(*a)));
        batch.call(number, &args);
        let outcome = self.calls().run_all_ok("making a pair", &batch).unwrap();
        let data = outcome.data(out, 8);
        let word = |i: usize| i32::from_ne_bytes(data[4 * i..4 * i + 4].try_into().unwrap());
        (word(0), word(1))
    }

    pub(super) fn pipe(&mut self, flags: i32) -> (i32, i32) {
        self.pair(libc::SYS_pipe2, &[], &[flags.into()])
    }

    pub(super) fn socketpair(&mut self, kind: i32) -> (i32, i32) {
        self.pair(libc::SYS_socketpair, &[1, kind.into(), 0], &[])
    }

    pub(super) fn write(&mut self, fd: i32, bytes: &[u8]) {
        let written = self.with(|b| {
            let data = b.input(bytes);
            b.call(libc::SYS_write, &[fd.into(), data, bytes.len().into()])
        });
        assert_eq!(written, Ok(bytes.len() as i64));
    }

    pub(super) fn open(&mut self, path: &std::path::Path, flags: i32) -> i32 {
        use std::os::unix::ffi::OsStrExt;
        self.with(|b| {
            let path = b.input_c_string(path.as_os_str().as_bytes());
            b.call(libc::SYS_openat, &[libc::AT_FDCWD.into(), path, flags.into(), 0o600.into()])
        })
        .unwrap() as i32
    }

    pub(super) fn epoll_add(&mut self, epoll: i32, fd: i32, events: i32, data: u64) {
        self.with(|b| {
            let mut event = events.to_ne_bytes().to_vec();
            event.extend_from_slice(&data.to_ne_bytes());
            let event = b.input(&event);
            b.call(libc::SYS_epoll_ctl, &[epoll.into(), 1.into(), fd.into(), event])
        })
        .unwrap();
    }

    /// What epoll_wait reports now: (events, data), sorted.
    pub(super) fn epoll_wait(&mut self, epoll: i32) -> Vec<(u32, u64)> {
        let mut batch = Batch::new();
        let out = batch.output(12 * 64);
        let index = batch.call(libc::SYS_epoll_wait, &[epoll.into(), out, 64.into(), 0.into()]);
        let outcome = self.calls().run(&batch).unwrap();
        let count = outcome.ret(index).unwrap() as usize;
        let mut seen: Vec<(u32, u64)> = outcome
            .data(out, 12 * count)
            .chunks(12)
            .map(|e| {
                (
                    u32::from_ne_bytes(e[..4].try_into().unwrap()),
                    u64::from_ne_bytes(e[4..].try_into().unwrap()),
                )
            })
            .collect();
        seen.sort_unstable();
        seen
    }

    /// A duplicate of one of its descriptors.
    pub(super) fn take(&self, number: i32) -> OwnedFd {
        let process = pidfd::PidFd::open(self.child.id()).unwrap();
        pidfd::take_fd(process.as_fd(), number).unwrap()
    }

    /// Its descriptors: number, what it leads to, flags as in fdinfo (with O_CLOEXEC).
    pub(super) fn listing(&self) -> Vec<(i32, String)> {
        let mut seen: Vec<(i32, String)> = std::fs::read_dir(format!("/proc/{}/fd", self.pid()))
            .unwrap()
            .map(|e| {
                let e = e.unwrap();
                let number: i32 = e.file_name().to_str().unwrap().parse().unwrap();
                let link = std::fs::read_link(e.path()).unwrap().display().to_string();
                let link = link.split_once(":[").map_or(link.clone(), |(kind, rest)| {
                    if kind == "anon_inode" { rest.to_owned() } else { kind.to_owned() }
                });
                let info = std::fs::read_to_string(format!("/proc/{}/fdinfo/{number}", self.pid())).unwrap();
                let flags = info.lines().find(|l| l.starts_with("flags")).unwrap();
                (number, format!("{link} {flags}"))
            })
            .collect();
        seen.sort();
        seen
    }
}

pub(super) fn options() -> FilesOptions {
    FilesOptions::default()
}

/// Captures `source`, ends it, and builds its descriptors again in a new process.
pub(super) fn moved(source: Held, options: &FilesOptions) -> Held {
    let before = source.listing();
    let CapturedFiles { image, closing, .. } = capture(source.pid(), options).unwrap();
    drop(source);
    super::close_peers(closing);
    let there = arrive(&image, None);
    if !options.shell_job {
        assert_eq!(there.listing(), before);
    }
    there
}

pub(super) fn arrive(image: &crate::proto::files::Files, log: Option<&std::path::Path>) -> Held {
    arrive_silent(image, log).0
}

/// Whether nobody has the ports of an image, whose process is gone. A process that another test is starting has copies
/// of the sockets that we have taken from it, until it becomes another program.
pub(super) fn all_free(image: &crate::proto::files::Files) -> bool {
    use crate::proto::files::description::Kind;
    let in_use = |fd: OwnedFd, address, port| {
        let _ = socket::set_int_option(fd.as_fd(), libc::IPPROTO_IP, libc::IP_FREEBIND, 1);
        socket::bind(fd.as_fd(), address, port) == Err(nix::errno::Errno::EADDRINUSE)
    };
    let free = |kind: &Kind| match kind {
        Kind::Tcp(tcp) => super::tcp::listen_port(tcp).is_none_or(|port| super::port_free(&port).is_none()),
        Kind::IpSocket(ip) if ip.r#type == libc::SOCK_DGRAM => ip.local.as_ref().is_none_or(|local| {
            let address = super::inet::ip_of(&local.address).unwrap();
            let fd = socket::socket(ip.family, libc::SOCK_DGRAM, ip.protocol).unwrap();
            !in_use(fd, address, u16::try_from(local.port).unwrap())
        }),
        Kind::Netlink(netlink) => {
            let fd = socket::socket(libc::AF_NETLINK, libc::SOCK_RAW, netlink.protocol).unwrap();
            let address = nix::sys::socket::NetlinkAddr::new(netlink.port, 0);
            nix::sys::socket::bind(fd.as_raw_fd(), &address) != Err(nix::errno::Errno::EADDRINUSE)
        }
        Kind::UnixSingle(unix) => unix.name.as_ref().is_none_or(|name| {
            // The kernel lists one without a file with an @ for the zero.
            let listed = format!(" {}", String::from_utf8_lossy(&name.name).replace('\0', "@"));
            let all = std::fs::read_to_string("/proc/thread-self/net/unix").unwrap();
            !all.lines().any(|line| line.ends_with(&listed))
        }),
        _ => true,
    };
    image.descriptions.iter().filter_map(|description| description.kind.as_ref()).all(free)
}

/// With connections that are to be woken.
pub(super) fn arrive_silent(
    image: &crate::proto::files::Files,
    log: Option<&std::path::Path>,
) -> (Held, SilentConnections) {
    let (there, silent, _) = arrive_after(image, log, AheadSockets::default());
    (there, silent)
}

/// Likewise, where sockets were made ahead; how many of them were of use.
pub(super) fn arrive_after(
    image: &crate::proto::files::Files,
    log: Option<&std::path::Path>,
    ahead: AheadSockets,
) -> (Held, SilentConnections, usize) {
    until("that its ports are free", || all_free(image));
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut there = Held::start(Stdio::from(OwnedFd::from(theirs)));
    let mut built = build(image, log, &Shift::default(), &Objects::default(), ahead).unwrap();
    let (silent, made_ahead) = (built.take_connections(), built.made_ahead);
    let mut names = std::mem::take(&mut built.names);
    install(there.calls(), 0, ours.as_fd(), built).unwrap();
    names.publish();
    (there, silent, made_ahead)
}
