//! The socket options of TCP connections, read as bytes. A server has connections by the thousand, most of them
//! with the same options: each different set is kept once.

use std::collections::HashMap;
use std::ffi::c_int;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use libc::{AF_INET, IPPROTO_IP, IPPROTO_IPV6, IPPROTO_TCP, SOL_SOCKET};
use nix::errno::Errno;

use super::super::Stop;
use super::super::options::{COMMON, TCP};
use crate::engine::sys::socket;
use crate::proto::files::{OptionSet, SocketOption};

/// `SO_BUF_LOCK`: which buffer sizes the program has set, bit 0 send, bit 1 receive.
pub(super) const SO_BUF_LOCK: c_int = 72;
/// The bits of IP_TOS that belong to the kernel (ECN).
const KERNELS_BITS: u8 = 3;
/// They change SO_PRIORITY.
pub(super) const CLASSES: [Name; 2] = [(IPPROTO_IP, libc::IP_TOS), (IPPROTO_IPV6, libc::IPV6_TCLASS)];

pub(super) type Name = (c_int, c_int);

/// What is not simply set on a new socket: what a connection has of its own, what the kernel changes all
/// the time, what only a listening socket may be given, and what is set when the connection is live.
const NOT_SET: &[Name] = &[
    (SOL_SOCKET, libc::SO_REUSEADDR),
    (SOL_SOCKET, libc::SO_INCOMING_CPU),
    (IPPROTO_IP, libc::IP_TRANSPARENT),
    (IPPROTO_TCP, libc::TCP_MAXSEG),
    (IPPROTO_TCP, libc::TCP_WINDOW_CLAMP),
    (IPPROTO_TCP, libc::TCP_QUICKACK),
    (IPPROTO_TCP, libc::TCP_FASTOPEN),
    (IPPROTO_TCP, libc::TCP_FASTOPEN_CONNECT),
    (IPPROTO_TCP, libc::TCP_FASTOPEN_NO_COOKIE),
];

/// Carried, but set at their own time.
pub(super) const LATER: &[Name] =
    &[(SOL_SOCKET, libc::SO_REUSEADDR), (IPPROTO_IP, libc::IP_TRANSPARENT), (SOL_SOCKET, SO_BUF_LOCK)];

/// The options that are set on a new socket, in this order: IP_TOS changes SO_PRIORITY.
pub(super) static SET: LazyLock<Vec<Name>> =
    LazyLock::new(|| TCP.iter().chain(COMMON).copied().filter(|name| !NOT_SET.contains(name)).collect());
/// Those that IPv4 has.
static SET_IPV4: LazyLock<Vec<Name>> =
    LazyLock::new(|| SET.iter().copied().filter(|(level, _)| *level != IPPROTO_IPV6).collect());

/// Those that a socket of this family has, in the order in which they are set.
pub(super) fn names(family: c_int) -> &'static [Name] {
    if family == AF_INET { &SET_IPV4 } else { &SET }
}

/// The value of an option that is an `int`.
pub(super) fn value_of(options: &[SocketOption], level: c_int, name: c_int) -> Option<c_int> {
    let option = options.iter().rev().find(|o| (o.level, o.name) == (level, name))?;
    Some(c_int::from_ne_bytes(*option.value.first_chunk::<4>()?))
}

/// The options of a socket of this family: the number of the set in the image, and what is in it.
#[derive(Debug, Clone)]
pub(in super::super) struct Known {
    pub(super) family: c_int,
    pub(super) number: u32,
    pub(super) set: Arc<OptionSet>,
}

impl Known {
    /// The value of an option that is an `int`; 0 if it is not there.
    pub(super) fn value(&self, level: c_int, name: c_int) -> c_int {
        value_of(&self.set.options, level, name).unwrap_or(0)
    }
}

/// The different sets that connections have. Several threads may add to it.
#[derive(Debug, Default)]
pub(in super::super) struct Sets(Mutex<HashMap<Vec<u8>, Known>>);

impl Sets {
    /// Reads the options that a connection has, but for the sizes of its buffers.
    pub(super) fn read(&self, fd: BorrowedFd<'_>, family: c_int) -> Result<Known, Stop> {
        let mut bytes = Vec::with_capacity(1024);
        let mut room = [0; socket::VALUE_BYTES];
        for &(level, name) in names(family).iter().chain(LATER) {
            let value = match socket::read_option(fd, level, name, &mut room) {
                Ok(value) => value,
                // Not an option of this family, type or kernel.
                Err(Errno::ENOPROTOOPT | Errno::EOPNOTSUPP | Errno::EINVAL | Errno::ENOTCONN) => continue,
                Err(errno) => return Err(Stop::Failed { step: "reading a socket option", errno }),
            };
            for word in [level, name, c_int::try_from(value.len()).unwrap_or(0)] {
                bytes.extend(word.to_ne_bytes());
            }
            let start = bytes.len();
            bytes.extend(value);
            if CLASSES.contains(&(level, name))
                && let Some(first) = bytes.get_mut(start)
            {
                *first &= !KERNELS_BITS;
            }
        }
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = known.get(&bytes) {
            return Ok(Known { family, ..known.clone() });
        }
        let number = u32::try_from(known.len()).unwrap_or(u32::MAX);
        let one = Known { family, number, set: Arc::new(OptionSet { options: parse(&bytes) }) };
        known.insert(bytes, one.clone());
        Ok(one)
    }

    /// All that there are by now, by number.
    pub(in super::super) fn all(&self) -> Vec<OptionSet> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<&Known> = known.values().collect();
        all.sort_unstable_by_key(|known| known.number);
        all.into_iter().map(|known| known.set.as_ref().clone()).collect()
    }

    /// All of them, by number.
    pub(super) fn into_all(self) -> Vec<OptionSet> {
        let known = self.0.into_inner().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<Known> = known.into_values().collect();
        all.sort_unstable_by_key(|known| known.number);
        all.into_iter().map(|known| Arc::unwrap_or_clone(known.set)).collect()
    }
}

/// Each option: level, name, length, value.
fn parse(mut bytes: &[u8]) -> Vec<SocketOption> {
    let mut options = Vec::new();
    let word = |bytes: &mut &[u8]| {
        let (first, rest) = bytes.split_first_chunk::<4>()?;
        *bytes = rest;
        Some(c_int::from_ne_bytes(*first))
    };
    while let (Some(level), Some(name), Some(len)) = (word(&mut bytes), word(&mut bytes), word(&mut bytes)) {
        let (value, rest) = bytes.split_at(bytes.len().min(usize::try_from(len).unwrap_or(0)));
        options.push(SocketOption { level, name, value: value.to_vec() });
        bytes = rest;
    }
    options
}
