//! Unix sockets that are not one of a connected pair: those that listen, wait for datagrams (connected or
//! not), or do nothing. Names and unread datagrams with their senders' names come along.
//!
//! A datagram socket that is connected to a name outside the process (a system logger) is connected to
//! whoever has that name at the destination.

use std::ffi::c_int;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use libc::SOL_SOCKET;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, UnixAddr, sendto, shutdown};

use super::options::{self, COMMON};
use super::scan::Open;
use super::unix::{self, UNIX};
use super::unix_diag::UnixState;
use super::unix_names::{NAME_BYTES, UnixNames, path_of};
use super::{RestoreFilesError, Stop, Trouble, filter};
use crate::engine::remote::Tid;
use crate::engine::sys::{datagram, socket};
use crate::proto::files::description::Kind;
use crate::proto::files::{Files, UnixMessage, UnixName, UnixSingle};

/// The name without the family before it.
fn bare(raw: &[u8]) -> Vec<u8> {
    raw.get(2..).unwrap_or_default().to_vec()
}

/// The name of a unix socket, empty for none. (Of another kind of socket: nothing of use.)
pub(super) fn own_name(open: &Open) -> Result<Vec<u8>, Stop> {
    let raw = datagram::raw_name(open.fd()).map_err(Stop::failed("asking for a unix socket's name"))?;
    Ok(bare(&raw))
}

/// The name of what a socket is connected to, empty if that has none.
pub(super) fn peer_name(open: &Open) -> Result<Option<Vec<u8>>, Stop> {
    let raw = datagram::raw_peer(open.fd()).map_err(Stop::failed("asking for a unix socket's peer"))?;
    Ok(raw.map(|raw| bare(&raw)))
}

pub(super) fn capture(
    pid: Tid,
    open: &Open,
    kind: c_int,
    state: &UnixState,
    peer: Option<Vec<u8>>,
    contents: bool,
) -> Result<UnixSingle, Stop> {
    let fd = open.fd();
    if peer.as_ref().is_some_and(Vec::is_empty) {
        return Err(Stop::refuse("is a unix connection with a name, which cannot be carried yet"));
    }
    let peer = peer.unwrap_or_default();
    if !peer.is_empty() && state.peer == 0 {
        return Err(Stop::refuse("is connected to a unix socket that is gone"));
    }
    if path_of(&peer).is_some_and(Path::is_relative) {
        return Err(Stop::refuse("is connected to a unix socket by a relative path"));
    }
    if state.listening && state.waiting > 0 {
        let why = format!("is a listening unix socket with {} connections not accepted yet", state.waiting);
        return Err(Stop::advise(why, "try again"));
    }
    let mut options = options::capture(fd, &[UNIX, COMMON])?;
    options.extend(options::capture_buffers(fd)?);
    let mut image = UnixSingle {
        r#type: kind,
        name: name(pid, open, state)?,
        listening: state.listening,
        backlog: state.backlog,
        peer,
        shutdown: state.shutdown & 3,
        options,
        filter: filter::capture(fd)?,
        ..UnixSingle::default()
    };
    if image.listening {
        let creator = unix::capture_pair(pid, open)?;
        (image.uid, image.gid) = (creator.uid, creator.gid);
    }
    if contents && kind == libc::SOCK_DGRAM {
        image.queue = unix::unread(pid, fd, kind)?;
        if !image.queue.is_empty() && image.name.is_none() {
            return Err(Stop::refuse("is a unix socket without a name that has unread datagrams"));
        }
    }
    Ok(image)
}

fn name(pid: Tid, open: &Open, state: &UnixState) -> Result<Option<UnixName>, Stop> {
    let mut name = UnixName { name: own_name(open)?, ..UnixName::default() };
    if name.name.is_empty() {
        return Ok(None);
    }
    if let (Some(path), Some(inode)) = (path_of(&name.name), state.file) {
        let absolute = match path.is_absolute() {
            true => path.to_owned(),
            false => fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default().join(path),
        };
        let seen =
            PathBuf::from(format!("/proc/{pid}/root")).join(absolute.strip_prefix("/").unwrap_or(path));
        // Another file, or none: that of this socket was removed, and may stay away.
        if let Some(meta) = fs::symlink_metadata(seen).ok().filter(|meta| meta.ino() == inode) {
            name.file = absolute.as_os_str().as_bytes().to_vec();
            (name.mode, name.uid, name.gid) = (meta.mode(), meta.uid(), meta.gid());
        }
    }
    Ok(Some(name))
}

/// Checks what a peer sent, before anything is made of it.
pub(super) fn validate(image: &UnixSingle) -> Result<(), Trouble> {
    let names = image.queue.iter().map(|d| &d.from).chain([&image.peer]);
    let long = names.into_iter().any(|name| name.len() > NAME_BYTES);
    let bytes = image.queue.iter().map(|d| d.data.len()).sum::<usize>();
    if !unix::TYPES.contains(&image.r#type) || long || bytes > unix::QUEUE_BYTES || image.shutdown > 3 {
        return Err(Trouble::Invalid("a unix socket"));
    }
    Ok(())
}

/// Makes the socket with its name. The process itself makes it listen, as its clients see who did.
pub(super) fn make(image: &UnixSingle, names: &mut UnixNames) -> Result<OwnedFd, Trouble> {
    validate(image)?;
    let fd = socket::socket(libc::AF_UNIX, image.r#type, 0).map_err(Trouble::step("making a unix socket"))?;
    options::apply(fd.as_fd(), &image.options, &[UNIX, COMMON])?;
    options::apply_buffers(fd.as_fd(), &image.options)?;
    if let Some(name) = &image.name {
        names.bind(fd.as_fd(), name)?;
    }
    Ok(fd)
}

/// When all sockets have their names: sends them what was unread, connects them.
pub(super) fn complete(
    files: &Files,
    made: &[Option<OwnedFd>],
    names: &UnixNames,
) -> Result<(), RestoreFilesError> {
    let singles = || {
        let all = files.descriptions.iter().zip(made).enumerate();
        all.filter_map(|(index, (description, fd))| match (&description.kind, fd) {
            (Some(Kind::UnixSingle(image)), Some(fd)) => Some((index, image, fd.as_fd())),
            _ => None,
        })
    };
    for (index, image, fd) in singles() {
        let number =
            files.fds.iter().find(|f| f.description as usize == index).map_or(u32::MAX, |f| f.number);
        let finish = || -> Result<(), Trouble> {
            for message in &image.queue {
                let sender = singles().find(|(_, other, _)| {
                    let name = other.name.as_ref().map(|name| &name.name);
                    !message.from.is_empty() && name == Some(&message.from)
                });
                send(image, message, sender.map(|(.., fd)| fd), names)?;
            }
            if !image.peer.is_empty() {
                names
                    .reach(&image.peer, |raw| datagram::connect_raw(fd, raw))
                    .map_err(Trouble::step("connecting to a unix socket by its name"))?;
            }
            if let Some(how) = unix::how(image.shutdown) {
                shutdown(fd.as_raw_fd(), how).map_err(Trouble::step("shutting down a unix socket"))?;
            }
            filter::apply(fd, image.filter.as_ref())
        };
        finish().map_err(|trouble| trouble.for_fd(number))?;
    }
    Ok(())
}

/// Sends one datagram in the name of its sender. A path can be the name of several sockets; who has an
/// abstract one must send it itself.
fn send(
    to: &UnixSingle,
    message: &UnixMessage,
    sender: Option<BorrowedFd<'_>>,
    names: &UnixNames,
) -> Result<(), Trouble> {
    let step = Trouble::step("filling a unix socket");
    let own = socket::socket(libc::AF_UNIX, to.r#type, 0).map_err(Trouble::step("making a unix socket"))?;
    let mut alias = UnixNames::default();
    let sender = match sender {
        Some(sender) if path_of(&message.from).is_none() => sender,
        _ => {
            if !message.from.is_empty() {
                let name = UnixName { name: message.from.clone(), ..UnixName::default() };
                alias.bind(own.as_fd(), &name)?;
            }
            let room = c_int::try_from(message.data.len()).unwrap_or(c_int::MAX / 4).max(1 << 16);
            socket::set_int_option(own.as_fd(), SOL_SOCKET, libc::SO_SNDBUFFORCE, room)
                .map_err(Trouble::step("sizing a unix socket"))?;
            own.as_fd()
        }
    };
    let name = to.name.as_ref().map(|name| name.name.as_slice()).unwrap_or_default();
    let sent = names.reach(name, |raw| {
        let address = address_of(raw)?;
        sendto(sender.as_raw_fd(), &message.data, &address, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL)
    });
    sent.map(drop).map_err(step)
}

fn address_of(raw: &[u8]) -> Result<UnixAddr, Errno> {
    let name = bare(raw);
    match path_of(&name) {
        Some(path) => UnixAddr::new(path),
        None => UnixAddr::new_abstract(name.get(1..).unwrap_or_default()),
    }
}
