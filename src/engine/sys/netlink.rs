//! A netlink socket: requests out, acknowledgements and dumps in, attributes as byte slices.
//!
//! Knows the framing, not the meaning: see `engine::address` and `engine::lock`. The kernel is trusted to
//! answer, not to be well-formed: every length is checked before a slice is taken.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, setsockopt,
    socket, sockopt,
};
use nix::sys::time::TimeVal;

/// Bytes of `struct nlmsghdr`.
const HEADER_BYTES: usize = 16;
/// One datagram of a dump never exceeds this (the kernel uses at most 32 KiB).
const RECEIVE_BYTES: usize = 64 * 1024;
/// Messages we accept in one dump: far more than addresses or routes of a host we serve.
const MAX_MESSAGES: usize = 100_000;
/// An unanswered request must not hold up a migration.
const ANSWER_SECONDS: i64 = 2;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_DUMP: u16 = 0x300;
/// `NLM_F_CREATE | NLM_F_EXCL`: make it, `EEXIST` if it is there.
pub(crate) const CREATE: u16 = 0x600;

/// `NLA_F_NESTED`.
const NESTED: u16 = 0x8000;

/// Body of one message: its own header and its attributes.
pub(crate) type Body = Vec<u8>;

/// A socket of the network namespace that its thread was in when it was made.
#[derive(Debug)]
pub(crate) struct Netlink {
    fd: OwnedFd,
    sequence: u32,
}

impl Netlink {
    /// Opens the socket for devices, addresses and routes.
    pub(crate) fn open() -> Result<Self, Errno> {
        Self::open_for(SockProtocol::NetlinkRoute)
    }

    /// Opens a socket of this netlink protocol.
    pub(crate) fn open_for(protocol: SockProtocol) -> Result<Self, Errno> {
        let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::new(ANSWER_SECONDS, 0))?;
        Ok(Self { fd, sequence: 0 })
    }

    /// Sends a request and waits for its acknowledgement; the error is the kernel's.
    pub(crate) fn request(&mut self, kind: u16, flags: u16, body: &[u8]) -> Result<(), Errno> {
        self.exchange(kind, NLM_F_ACK | flags, body).map(|_| ())
    }

    /// Asks for one object and returns the answers' bodies.
    pub(crate) fn query(&mut self, kind: u16, body: &[u8]) -> Result<Vec<Body>, Errno> {
        self.exchange(kind, NLM_F_ACK, body)
    }

    /// Asks for all objects of a kind. The kernel filters little: the caller must.
    pub(crate) fn dump(&mut self, kind: u16, body: &[u8]) -> Result<Vec<Body>, Errno> {
        self.exchange(kind, NLM_F_DUMP, body)
    }

    /// Like [`Netlink::dump`], for what may be long: hands each object over instead of keeping it.
    pub(crate) fn for_each(
        &mut self,
        kind: u16,
        body: &[u8],
        take: &mut dyn FnMut(&[u8]),
    ) -> Result<(), Errno> {
        let each = &mut |body: &[u8]| {
            take(body);
            Ok(())
        };
        let sequence = self.send_one(kind, NLM_F_DUMP, body)?;
        self.receive(sequence..=sequence, each)
    }

    /// Sends messages that are carried out all together or not at all, each of (kind, flags, body), between
    /// `begin` and `end`; the error is the kernel's first.
    pub(crate) fn transact(
        &mut self,
        begin: (u16, &[u8]),
        messages: &[(u16, u16, Body)],
        end: (u16, &[u8]),
    ) -> Result<(), Errno> {
        let Some(last) = messages.len().checked_sub(1) else { return Ok(()) };
        let mut bytes = Vec::with_capacity(
            messages.iter().map(|(_, _, body)| HEADER_BYTES + body.len() + 3).sum::<usize>() + 64,
        );
        let first = self.next_sequence();
        push_message(&mut bytes, begin.0, 0, first, begin.1)?;
        for (at, (kind, flags, body)) in messages.iter().enumerate() {
            let sequence = self.next_sequence();
            // One answer for all of them; those that fail answer in any case.
            let ack = if at == last { NLM_F_ACK } else { 0 };
            push_message(&mut bytes, *kind, flags | ack, sequence, body)?;
        }
        let answered = self.sequence;
        let sequence = self.next_sequence();
        push_message(&mut bytes, end.0, 0, sequence, end.1)?;
        send(self.fd.as_raw_fd(), &bytes, MsgFlags::empty())?;
        self.receive(first..=answered, &mut |_| Ok(()))
    }

    /// Makes room for messages of this many bytes, beyond what the host allows to all.
    pub(crate) fn allow_long_messages(&self, bytes: usize) -> Result<(), Errno> {
        setsockopt(&self.fd, sockopt::SndBufForce, &bytes)
    }

    fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }

    fn exchange(&mut self, kind: u16, flags: u16, body: &[u8]) -> Result<Vec<Body>, Errno> {
        let sequence = self.send_one(kind, flags, body)?;
        let mut answers = Vec::new();
        self.receive(sequence..=sequence, &mut |body| {
            if answers.len() >= MAX_MESSAGES {
                return Err(Errno::EMSGSIZE);
            }
            answers.push(body.to_vec());
            Ok(())
        })?;
        Ok(answers)
    }

    fn send_one(&mut self, kind: u16, flags: u16, body: &[u8]) -> Result<u32, Errno> {
        let sequence = self.next_sequence();
        let mut message = Vec::with_capacity(HEADER_BYTES + body.len() + 3);
        push_message(&mut message, kind, flags, sequence, body)?;
        send(self.fd.as_raw_fd(), &message, MsgFlags::empty())?;
        Ok(sequence)
    }

    /// Reads the answers to what was sent with these sequence numbers, up to the first error or the end.
    fn receive(
        &mut self,
        expected: std::ops::RangeInclusive<u32>,
        take: &mut dyn FnMut(&[u8]) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        let mut buffer = vec![0; RECEIVE_BYTES];
        loop {
            let received = recv(self.fd.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            for (kind, sequence, body) in messages(buffer.get(..received).unwrap_or_default()) {
                if !expected.contains(&sequence) {
                    continue; // the rest of an earlier exchange that ran into its timeout
                }
                match kind {
                    NLMSG_DONE => return Ok(()),
                    NLMSG_ERROR => {
                        return match i32_at(body, 0).ok_or(Errno::EBADMSG)? {
                            0 => Ok(()),
                            code => Err(Errno::from_raw(code.wrapping_neg())),
                        };
                    }
                    _ => take(body)?,
                }
            }
        }
    }
}

impl AsFd for Netlink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn push_message(out: &mut Vec<u8>, kind: u16, flags: u16, sequence: u32, body: &[u8]) -> Result<(), Errno> {
    let length = u32::try_from(HEADER_BYTES + body.len()).map_err(|_| Errno::EMSGSIZE)?;
    out.extend(length.to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    out.extend(sequence.to_ne_bytes());
    out.extend(0u32.to_ne_bytes());
    out.extend(body);
    out.resize(out.len().next_multiple_of(4), 0);
    Ok(())
}

/// Splits a datagram into messages: kind, sequence, body. Stops at the first that does not fit.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, u32, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::try_from(u32_at(bytes, 0)?).ok()?;
        let body = bytes.get(HEADER_BYTES..length)?;
        let item = (u16_at(bytes, 4)?, u32_at(bytes, 8)?, body);
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(item)
    })
}

/// Splits what follows a message's own header into attributes: type (without flag bits) and value.
pub(crate) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes, 0)?);
        let value = bytes.get(4..length)?;
        let kind = u16_at(bytes, 2)? & 0x3fff;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// Appends an attribute. Values are addresses, names and numbers: some tens of bytes.
pub(crate) fn push_attribute(message: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    message.extend(length.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(value);
    message.resize(message.len().next_multiple_of(4), 0);
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// Appends an attribute that consists of attributes.
pub(crate) fn push_nested(message: &mut Vec<u8>, kind: u16, fill: impl FnOnce(&mut Vec<u8>)) {
    let start = message.len();
    message.extend([0; 4]);
    fill(message);
    let length = u16::try_from(message.len() - start).unwrap_or(u16::MAX);
    if let Some(header) = message.get_mut(start..start + 4) {
        header[..2].copy_from_slice(&length.to_ne_bytes());
        header[2..].copy_from_slice(&(kind | NESTED).to_ne_bytes());
    }
}

fn i32_at(bytes: &[u8], at: usize) -> Option<i32> {
    Some(i32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn truncated_messages_end_the_walk() {
        assert_eq!(messages(&[]).count(), 0);
        assert_eq!(messages(&[255; 40]).count(), 0);
        let mut zero_length = vec![0u8; 32];
        assert_eq!(messages(&zero_length).count(), 0, "a length below the header");
        zero_length[0] = 16;
        assert_eq!(messages(&zero_length).count(), 1);
        assert_eq!(attributes(&[3, 0, 1, 0]).count(), 0, "a length below the header");
        assert_eq!(attributes(&[8, 0, 1, 0, 9]).count(), 0, "a value beyond the end");
        let mut message = Vec::new();
        push_attribute(&mut message, 7, b"abc");
        push_attribute(&mut message, 8, b"");
        assert_eq!(attributes(&message).collect::<Vec<_>>(), vec![(7, &b"abc"[..]), (8, &b""[..])]);
    }

    #[test]
    fn the_kernels_error_comes_back() {
        let mut netlink = Netlink::open().unwrap();
        assert_eq!(netlink.request(0x3ff, 0, &[0; 8]), Err(Errno::EOPNOTSUPP));
        assert!(!netlink.dump(18, &[0; 16]).unwrap().is_empty(), "every namespace has `lo`");
    }
}
