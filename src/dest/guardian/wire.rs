//! What a service and its guardian say to each other: packets with descriptors, over a unix socket that
//! keeps them apart and in order.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

use crate::engine::sys::owned_fd;
use crate::engine::sys::socket::MAX_FDS_PER_MESSAGE;
use crate::lazy::Held;

/// What a packet is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    /// The guardian is there.
    Ready = b'R',
    /// Descriptors: to be kept, or those that were.
    Keep = b'K',
    /// These are needed no more.
    Release = b'D',
    /// All that is kept is wanted.
    Take = b'T',
    /// That was all of it.
    End = b'E',
    /// The guardian is needed no more.
    Go = b'G',
}

/// A packet that was received.
#[derive(Debug)]
pub(super) struct Packet {
    pub(super) kind: Kind,
    /// What it names, with its descriptors if it carries any.
    pub(super) what: Vec<Held>,
    pub(super) fds: Vec<OwnedFd>,
}

const MAX_BYTES: usize = 1 + 4 * MAX_FDS_PER_MESSAGE;
const BOOK: u32 = u32::MAX;
const OBJECT: u32 = 1 << 31;

fn number(held: Held) -> u32 {
    match held {
        Held::Book => BOOK,
        Held::Object(index) => OBJECT | index,
        Held::Space(mm) => mm,
    }
}

fn held(number: u32) -> Held {
    match number {
        BOOK => Held::Book,
        n if n & OBJECT != 0 => Held::Object(n & !OBJECT),
        mm => Held::Space(mm),
    }
}

fn kind(byte: u8) -> Option<Kind> {
    [Kind::Ready, Kind::Keep, Kind::Release, Kind::Take, Kind::End, Kind::Go]
        .into_iter()
        .find(|kind| *kind as u8 == byte)
}

/// Sends what is to be said of these, in as many packets as it takes. They are in the other's hands when
/// this returns.
pub(super) fn send(
    line: BorrowedFd<'_>,
    kind: Kind,
    what: &[(Held, Option<BorrowedFd<'_>>)],
    flags: MsgFlags,
) -> io::Result<()> {
    let mut pieces: Vec<_> = what.chunks(MAX_FDS_PER_MESSAGE).collect();
    if pieces.is_empty() {
        pieces.push(&[]);
    }
    for piece in pieces {
        let mut bytes = vec![kind as u8];
        piece.iter().for_each(|(held, _)| bytes.extend_from_slice(&number(*held).to_le_bytes()));
        let fds: Vec<RawFd> = piece.iter().filter_map(|(_, fd)| fd.map(|fd| fd.as_raw_fd())).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let control = if fds.is_empty() { &rights[..0] } else { &rights[..] };
        let flags = flags | MsgFlags::MSG_NOSIGNAL;
        loop {
            match sendmsg::<()>(line.as_raw_fd(), &[IoSlice::new(&bytes)], control, flags, None) {
                Ok(_) => break,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
    Ok(())
}

/// The next packet; `None` if the other end is closed.
pub(super) fn receive(line: BorrowedFd<'_>) -> io::Result<Option<Packet>> {
    let mut bytes = [0; MAX_BYTES];
    let mut control = cmsg_space!([RawFd; MAX_FDS_PER_MESSAGE]);
    let mut fds = Vec::new();
    let len = {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let got = loop {
            match recvmsg::<()>(line.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC)
            {
                Ok(got) => break got,
                Err(Errno::EINTR) => {}
                Err(Errno::ECONNRESET) => return Ok(None),
                Err(errno) => return Err(errno.into()),
            }
        };
        for message in got.cmsgs()? {
            if let ControlMessageOwned::ScmRights(numbers) = message {
                fds.extend(numbers.into_iter().map(owned_fd));
            }
        }
        got.bytes
    };
    let bytes = bytes.get(..len).unwrap_or_default();
    let Some((first, rest)) = bytes.split_first() else { return Ok(None) };
    let kind = kind(*first).ok_or(io::ErrorKind::InvalidData)?;
    let what = rest
        .chunks_exact(4)
        .map(|n| held(u32::from_le_bytes(n.try_into().unwrap_or_default())))
        .collect::<Vec<_>>();
    if kind == Kind::Keep && what.len() != fds.len() {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(Some(Packet { kind, what, fds }))
}

/// Sends a word alone.
pub(super) fn say(line: &impl AsFd, kind: Kind) -> io::Result<()> {
    send(line.as_fd(), kind, &[], MsgFlags::empty())
}
