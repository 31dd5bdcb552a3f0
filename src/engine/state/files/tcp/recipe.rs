//! What is done to a new socket to give it the options that a connection had. Worked out once for all connections that
//! have the same ones: only what a new socket has otherwise is set.

use std::collections::HashMap;
use std::ffi::c_int;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use libc::{AF_INET, IPPROTO_IP, SOL_SOCKET};
use prost::Message as _;

use super::super::Trouble;
use super::table::{CLASSES, LATER, SET, SO_BUF_LOCK, names, value_of};
use crate::engine::sys::socket;
use crate::proto::files::{OptionSet, SocketOption, TcpConnection};

/// The recipes that the connections of a process need.
#[derive(Debug, Default)]
pub(super) struct Recipes {
    /// What sockets of IPv4 and IPv6 have that nobody has set anything of, once asked for.
    families: [Option<NewSocket>; 2],
    /// By family and number of the set.
    known: HashMap<(c_int, u32), Arc<Recipe>>,
    /// By family and what is in the set, encoded.
    by_contents: HashMap<(c_int, Vec<u8>), Arc<Recipe>>,
}

/// A new socket of one family.
#[derive(Debug, Default)]
struct NewSocket {
    options: Vec<SocketOption>,
    receive_buffer: c_int,
    largest_buffer: usize,
}

/// How a new socket gets one set of options.
#[derive(Debug)]
pub(in super::super) struct Recipe {
    /// What is to be set, in this order.
    to_set: Vec<SocketOption>,
    /// It was done once, and all values had taken.
    tried: AtomicBool,
    /// SO_REUSEADDR, IP_TRANSPARENT and SO_BUF_LOCK as they were.
    pub(super) reuse: c_int,
    pub(super) transparent: c_int,
    /// SO_KEEPALIVE, which is set with the others.
    pub(super) keep_alive: c_int,
    pub(super) locked: c_int,
    /// The receive buffer of a new socket.
    pub(super) receive_buffer: c_int,
    /// To which size the kernel lets a receive buffer grow (`tcp_rmem`); 0 if it cannot be told.
    pub(super) largest_buffer: usize,
}

impl Recipes {
    /// The recipe for a connection, whose options are among `sets`.
    pub(super) fn of(&mut self, image: &TcpConnection, sets: &[OptionSet]) -> Result<Arc<Recipe>, Trouble> {
        let key = (image.family, image.option_set);
        if let Some(known) = self.known.get(&key) {
            return Ok(known.clone());
        }
        let set = sets.get(image.option_set as usize).ok_or(Trouble::Invalid("a set of socket options"))?;
        let recipe = self.of_set(image.family, set)?;
        self.known.insert(key, recipe.clone());
        Ok(recipe)
    }

    /// The recipe for a set; one that was there before is the same.
    fn of_set(&mut self, family: c_int, set: &OptionSet) -> Result<Arc<Recipe>, Trouble> {
        let key = (family, set.encode_to_vec());
        if let Some(recipe) = self.by_contents.get(&key) {
            return Ok(recipe.clone());
        }
        let [v4, v6] = &mut self.families;
        let slot = if family == AF_INET { v4 } else { v6 };
        let new = match slot {
            Some(new) => new,
            None => slot.insert(NewSocket::of(family)?),
        };
        let recipe = Arc::new(Recipe::new(&set.options, new)?);
        self.by_contents.insert(key, recipe.clone());
        Ok(recipe)
    }

    /// Other sets have the numbers from here on.
    pub(super) fn forget_numbers(&mut self) {
        self.known.clear();
    }
}

impl NewSocket {
    fn of(family: c_int) -> Result<Self, Trouble> {
        let fd = super::new_socket(family, 0)?;
        let mut options = Vec::new();
        for &(level, name) in names(family) {
            if let Ok(value) = socket::option(fd.as_fd(), level, name) {
                options.push(SocketOption { level, name, value });
            }
        }
        let receive_buffer = socket::int_option(fd.as_fd(), SOL_SOCKET, libc::SO_RCVBUF)
            .map_err(Trouble::step("asking for a socket's buffer"))?;
        let limits = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_rmem").unwrap_or_default();
        let largest_buffer = limits.split_whitespace().nth(2).and_then(|w| w.parse().ok()).unwrap_or(0);
        Ok(Self { options, receive_buffer, largest_buffer })
    }
}

impl Recipe {
    /// Those of `wanted` are set that a new socket has otherwise. Both are in our order.
    fn new(wanted: &[SocketOption], new: &NewSocket) -> Result<Self, Trouble> {
        let mut left = &new.options[..];
        let mut disturbed = false;
        let mut to_set = Vec::new();
        for option in wanted {
            let name = (option.level, option.name);
            if LATER.contains(&name) {
                continue;
            }
            let now = left.iter().position(|n| (n.level, n.name) == name);
            let now = now.and_then(|at| {
                let now = left.get(at);
                left = left.get(at + 1..).unwrap_or_default();
                now
            });
            if now.is_none() && !SET.contains(&name) {
                return Err(Trouble::Invalid("a socket option, or their order"));
            }
            let priority = name == (SOL_SOCKET, libc::SO_PRIORITY);
            if now.is_some_and(|now| now.value == option.value) && !(priority && disturbed) {
                continue;
            }
            if option.value.len() > socket::VALUE_BYTES {
                return Err(Trouble::Invalid("a socket option's length"));
            }
            to_set.push(option.clone());
            disturbed |= CLASSES.contains(&name);
        }
        let value = |level, name| value_of(wanted, level, name).unwrap_or(0);
        Ok(Self {
            to_set,
            tried: AtomicBool::new(false),
            reuse: value(SOL_SOCKET, libc::SO_REUSEADDR),
            transparent: value(IPPROTO_IP, libc::IP_TRANSPARENT),
            keep_alive: value(SOL_SOCKET, libc::SO_KEEPALIVE),
            locked: value(SOL_SOCKET, SO_BUF_LOCK) & 3,
            receive_buffer: new.receive_buffer,
            largest_buffer: new.largest_buffer,
        })
    }

    /// Does it to a new socket. What takes with one takes with all of the family: the first is looked at.
    pub(super) fn apply(&self, fd: BorrowedFd<'_>) -> Result<(), Trouble> {
        let first = !self.tried.load(Ordering::Relaxed);
        for SocketOption { level, name, value } in &self.to_set {
            socket::set_option(fd, *level, *name, value)
                .map_err(Trouble::step("setting an option of a TCP connection"))?;
            if first && !socket::option(fd, *level, *name).is_ok_and(|now| now == *value) {
                return Err(Trouble::Differs(format!("socket option {name} of level {level}")));
            }
        }
        self.tried.store(true, Ordering::Relaxed);
        Ok(())
    }
}
