//! epoll: its registrations, by the number each was made with and the description behind it.

use super::Stop;
use super::scan::{Open, Table};
use crate::engine::procfs;
use crate::engine::remote::Tid;
use crate::engine::sys::{fds, socket};
use crate::proto::files::{Epoll, Watch};

/// Bits that say how to report and not what: a one-shot registration that has fired keeps only these.
const HOW: u32 = 0xf000_0000;

/// Whether this is a one-shot registration that has fired. epoll_ctl cannot make one: it has to be armed and to fire.
pub(super) fn is_spent(events: u32) -> bool {
    events & !HOW == 0
}

/// What one is armed with so that it fires: such a description is ready for something ([`always_ready`]).
pub(super) const ANYTHING: u32 = (libc::EPOLLIN | libc::EPOLLOUT | libc::EPOLLRDHUP).cast_unsigned();

/// Whether a description is ready to be read or written whatever its state: sockets and eventfds, which were just
/// made, take something. (Listening sockets do not.)
fn always_ready(table: &Table, description: usize) -> bool {
    let Some(open) = table.open(description) else { return false };
    let events = libc::POLLIN | libc::POLLOUT;
    let ready = fds::poll_now(open.fd(), events).is_ok_and(|seen| seen != 0);
    // Connections that wait to be accepted come later.
    let socket = open.link_starts_with("socket:[")
        && socket::int_option(open.fd(), libc::SOL_SOCKET, libc::SO_ACCEPTCONN) != Ok(1);
    ready && (socket || open.link_starts_with("anon_inode:[eventfd"))
}

#[derive(Debug, PartialEq, Eq)]
struct Line {
    number: u32,
    events: u32,
    data: u64,
    inode: u64,
}

/// `tfd: 5 events: 19 data: 5 pos:0 ino:1f sdev:a`, numbers after `events` in hexadecimal. There are thousands of them.
fn parse(line: &str) -> Option<Line> {
    let (mut number, mut events, mut data, mut inode) = (None, None, None, None);
    let mut words = line.split_ascii_whitespace();
    while let Some(word) = words.next() {
        let (name, value) = word.split_once(':')?;
        let value = if value.is_empty() { words.next()? } else { value };
        match name {
            "tfd" => number = value.parse().ok(),
            "events" => events = u32::from_str_radix(value, 16).ok(),
            "data" => data = u64::from_str_radix(value, 16).ok(),
            "ino" => inode = u64::from_str_radix(value, 16).ok(),
            _ => {}
        }
    }
    Some(Line { number: number?, events: events?, data: data?, inode: inode? })
}

pub(super) fn capture(table: &Table, open: &Open) -> Result<Epoll, Stop> {
    let mut watches = Vec::new();
    let mut seen = std::collections::HashMap::<u32, u32>::new();
    for line in open.info.lines().filter(|l| l.starts_with("tfd:")) {
        let Some(line) = parse(line) else {
            return Err(Stop::refuse("is an epoll whose registrations this kernel does not tell"));
        };
        // A number can be registered more than once, where it was closed and used again.
        let nth = seen.entry(line.number).or_default();
        let description = find(table, open, &line, *nth)?;
        *nth += 1;
        let Some(description) = description else {
            if table.running && !is_there(table.pid, open.number, &line) {
                continue;
            }
            return Err(Stop::refuse(format!(
                "is an epoll that watches what fd {} once was, which lives on outside the process",
                line.number
            )));
        };
        if is_spent(line.events) && !always_ready(table, description) {
            return Err(Stop::advise(
                format!("is an epoll with a one-shot registration of fd {} that has fired", line.number),
                "try again",
            ));
        }
        let description = u32::try_from(description).unwrap_or(u32::MAX);
        watches.push(Watch { number: line.number, description, events: line.events, data: line.data });
    }
    Ok(Epoll { watches })
}

/// Whether a registration of a running process is there still, and of nothing that the process has opened since.
fn is_there(pid: Tid, epoll: i32, line: &Line) -> bool {
    if procfs::socket_behind(format!("/proc/{pid}/fd/{}", line.number)) == Some(line.inode) {
        return false;
    }
    let info = procfs::read_text(format!("/proc/{pid}/fdinfo/{epoll}")).unwrap_or_default();
    let mut lines = info.lines().filter(|l| l.starts_with("tfd:")).filter_map(parse);
    lines.any(|now| (now.number, now.inode) == (line.number, line.inode))
}

/// The description that a registration watches: most often the one its number still leads to.
fn find(table: &Table, epoll: &Open, line: &Line, nth: u32) -> Result<Option<usize>, Stop> {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let is_it = |number: i32| {
        fds::kcmp_epoll(table.pid, number, epoll.number, line.number, nth)
            .map_err(Stop::failed("comparing an epoll registration (kcmp)"))
    };
    let number = i32::try_from(line.number).unwrap_or(-1);
    // A socket has an inode of its own and is never opened again: the same inode is the same description. (The
    // kernel looks through all registrations to answer kcmp, which takes long where there are thousands.)
    let same = |open: &Open| open.stat.file_type().is_socket() && open.stat.ino() == line.inode;
    if let Ok(at) = table.opens.binary_search_by_key(&number, |o| o.number)
        && let Some(open) = table.opens.get(at)
        && (same(open) || is_it(number)?)
    {
        return Ok(table.description_of.get(at).copied());
    }
    for (description, first) in table.first.iter().enumerate() {
        if let Some(open) = table.opens.get(*first).filter(|o| o.stat.ino() == line.inode)
            && is_it(open.number)?
        {
            return Ok(Some(description));
        }
    }
    Ok(None)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
    use proptest::prelude::*;

    const LINE: &str = "tfd:       15 events: 80002019 data: ffffffffffff000f  pos:0 ino:1af sdev:9";

    #[test]
    fn lines() {
        let events = 0x8000_2019;
        let line = Line { number: 15, events, data: 0xffff_ffff_ffff_000f, inode: 0x1af };
        assert_eq!(parse(LINE), Some(line));
        for without in ["tfd:       15", "events: 80002019", "data: ffffffffffff000f", "ino:1af"] {
            assert_eq!(parse(&LINE.replace(without, "")), None, "{without}");
        }
        assert_eq!(parse("tfd: 5 events: 19 data: 5 pos:0 ino:"), None);
        assert_eq!(parse("tfd: 5 events: 19 data: 5 ino:x"), None);
    }

    #[test]
    fn a_registration_is_left_behind_when_its_number_is_closed_only() {
        use std::os::fd::AsRawFd;
        let epoll = Epoll::new(EpollCreateFlags::empty()).unwrap();
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        epoll.add(&socket, EpollEvent::new(EpollFlags::EPOLLIN, 7)).unwrap();
        let (pid, number) = (std::process::id().cast_signed(), epoll.0.as_raw_fd());
        let info = procfs::read_text(format!("/proc/self/fdinfo/{number}")).unwrap();
        let line = info.lines().filter(|l| l.starts_with("tfd:")).find_map(parse).unwrap();
        assert!(!is_there(pid, number, &line), "the process has it, and it is new");
        let elsewhere = socket.try_clone().unwrap();
        // Whatever it leads to afterwards is no socket with this inode.
        drop(socket);
        assert!(is_there(pid, number, &line), "it watches what the number once was");
        drop(elsewhere);
        assert!(!is_there(pid, number, &line), "it is over");
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".{0,60}", at in 0..LINE.len()) {
            let _ = (parse(&text), parse(&LINE[at..]), parse(&format!("{}{text}", &LINE[..at])));
        }
    }
}
