//! The device of `IP_MULTICAST_IF`, where it was chosen by its number alone: the option then reads as the address,
//! which is none.
//!
//! The socket is asked for the way to a multicast group, of a datagram that is not sent, from a source address that
//! settles the answer (`ip_route_output_key_hash_rcu` in net/ipv4/route.c, Linux 6.18):
//!
//! - From 127.0.0.1, a device other than the loopback is refused; without a device, the way is by the loopback.
//! - From an address that nobody has, a device is taken, and without one there is no way. The kernel looks only if
//!   the socket has `IP_TRANSPARENT`, so it gets that for the moment: only while its process is stopped.
//!
//! Which device it is shows by comparison: sockets of ours are given each in turn, and asked the same.

use std::ffi::c_int;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};

use libc::{AF_INET, AF_INET6, IPPROTO_IP, IPPROTO_IPV6, SOCK_DGRAM, SOCK_RAW, SOL_SOCKET};
use nix::errno::Errno;
use nix::net::if_::if_nameindex;

use super::Stop;
use crate::engine::sys::{datagram, socket};
use crate::proto::files::DeviceOption;

/// For documentation (RFC 5737): nobody has it.
const NOBODYS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);

type Answer = Result<(), Errno>;

/// What a socket says of the way from either address. The second is asked for only while its process is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Answers {
    loopback: Answer,
    nobodys: Option<Answer>,
}

/// The device, if the socket has one that the option does not tell.
///
/// # Errors
/// A refusal if it has one, and it could be several.
pub(super) fn capture(
    fd: BorrowedFd<'_>,
    (family, kind, protocol): (c_int, c_int, c_int),
    own: SocketAddr,
    stopped: bool,
) -> Result<Option<DeviceOption>, Stop> {
    let is = |level, name, value| socket::int_option(fd, level, name) == Ok(value);
    // One bound to a device sends by that. (IPv6 alone: neither does a raw socket of it know the option.)
    let hides = is(IPPROTO_IP, libc::IP_MULTICAST_IF, 0)
        && socket::option(fd, SOL_SOCKET, libc::SO_BINDTODEVICE).is_ok_and(|name| name.is_empty())
        && !(family == AF_INET6 && (kind == SOCK_RAW || is(IPPROTO_IPV6, libc::IPV6_V6ONLY, 1)))
        && protocol != libc::IPPROTO_ICMPV6;
    // Who asks a socket without a port gives it one: not while its process could notice.
    let portless = kind == SOCK_DGRAM && own.port() == 0;
    if !hides || portless && !stopped {
        return Ok(None);
    }
    let answers = ask(fd, protocol, stopped);
    if portless {
        datagram::disconnect(fd).map_err(Stop::failed("giving up the port of a socket"))?;
    }
    let answers = answers.map_err(Stop::failed("asking a socket for its way to a multicast group"))?;
    let none = Answers { loopback: Ok(()), nobodys: stopped.then_some(Err(Errno::ENETUNREACH)) };
    // One that is bound to an IPv6 address has no way to send IPv4.
    let six_only = family == AF_INET6 && !own.ip().to_canonical().is_ipv4() && !own.ip().is_unspecified();
    if answers == none || six_only && answers.loopback == Err(Errno::ENETUNREACH) {
        return Ok(None);
    }
    let which = devices_like(answers).map_err(Stop::failed("comparing the ways to a multicast group"))?;
    match which {
        Some(devices) => match devices.as_slice() {
            [device] => Ok(Some(DeviceOption {
                level: IPPROTO_IP,
                name: libc::IP_MULTICAST_IF,
                device: device.clone(),
                address: vec![0; 4],
            })),
            several => {
                let which = if several.is_empty() { "one that is gone".into() } else { several.join(" or ") };
                Err(Stop::advise(
                    format!(
                        "sends multicast through an interface set by its number, which cannot be read ({which})"
                    ),
                    "set it by address",
                ))
            }
        },
        None => Ok(None),
    }
}

/// The devices by which a socket gives these answers; nothing if one without a device does, or if they do not come
/// from the search for a way (but, say, from a program of its control group).
fn devices_like(answers: Answers) -> Result<Option<Vec<String>>, Errno> {
    let answers_of = |device: u32| {
        let twin = socket::socket(AF_INET, SOCK_DGRAM, 0)?;
        let request = [[0; 4], [0; 4], device.to_ne_bytes()].concat();
        socket::set_option(twin.as_fd(), IPPROTO_IP, libc::IP_MULTICAST_IF, &request)?;
        ask(twin.as_fd(), libc::IPPROTO_UDP, answers.nobodys.is_some())
    };
    if answers_of(0)? == answers {
        return Ok(None);
    }
    let mut devices = Vec::new();
    for device in &if_nameindex()? {
        // One that vanishes meanwhile is none.
        if answers_of(device.index()) == Ok(answers) {
            devices.push(device.name().to_string_lossy().into_owned());
        }
    }
    let of_a_search = [Ok(()), Err(Errno::EINVAL), Err(Errno::ENETUNREACH), Err(Errno::ENODEV)];
    let known = of_a_search.contains(&answers.loopback);
    Ok((known || !devices.is_empty()).then_some(devices))
}

fn ask(fd: BorrowedFd<'_>, protocol: c_int, stopped: bool) -> Result<Answers, Errno> {
    // A program that writes the header itself would have to have one.
    let writes_header = socket::int_option(fd, IPPROTO_IP, libc::IP_HDRINCL) == Ok(1);
    let way = |source| datagram::multicast_way(fd, source, protocol == libc::IPPROTO_ICMP && !writes_header);
    let loopback = way(Ipv4Addr::LOCALHOST);
    if !stopped {
        return Ok(Answers { loopback, nobodys: None });
    }
    let had = socket::int_option(fd, IPPROTO_IP, libc::IP_TRANSPARENT)?;
    let set = |value| match had {
        0 => socket::set_int_option(fd, IPPROTO_IP, libc::IP_TRANSPARENT, value),
        _ => Ok(()),
    };
    set(1)?;
    let nobodys = way(NOBODYS);
    set(0)?;
    Ok(Answers { loopback, nobodys: Some(nobodys) })
}
