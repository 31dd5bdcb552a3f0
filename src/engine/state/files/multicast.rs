//! Multicast groups that a socket has joined. The kernel does not list them per socket, but tells for one
//! group and device whether it is joined and from which sources: every group that a device has is asked for.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::BorrowedFd;

use libc::{IPPROTO_IP, IPPROTO_IPV6};
use nix::errno::Errno;

use super::inet::{device_index, device_name, ip_of};
use super::{Stop, Trouble};
use crate::engine::address::octets;
use crate::engine::procfs;
use crate::engine::sys::{datagram, socket};
use crate::proto::files::Membership;

/// Room for a socket address in the kernel's multicast structures.
const NAME_BYTES: usize = 128;
/// `struct group_filter`: the device, the group, mode and number of sources, then the sources.
const FILTER_BYTES: usize = 8 + NAME_BYTES + 8;
/// Most sources of one group (ten and sixty-four are the kernel's defaults).
const MAX_SOURCES: usize = 1024;

/// Groups of all devices: the device's number and the group.
fn groups(v6_too: bool) -> Vec<(u32, IpAddr)> {
    let mut found = Vec::new();
    let mut device = 0;
    for line in procfs::read_text("/proc/thread-self/net/igmp").unwrap_or_default().lines() {
        // A device: `2 eth0 : 1 V3`; below it, indented, its groups in the byte order of the processor.
        let first = line.split_whitespace().next().unwrap_or_default();
        if !line.starts_with(char::is_whitespace) {
            device = first.parse().unwrap_or(0);
        } else if let Ok(group) = u32::from_str_radix(first, 16) {
            found.push((device, Ipv4Addr::from(group.to_ne_bytes()).into()));
        }
    }
    let table = if v6_too { procfs::read_text("/proc/thread-self/net/igmp6") } else { Ok(String::new()) };
    for line in table.unwrap_or_default().lines() {
        let mut words = line.split_whitespace();
        let device = words.next().and_then(|w| w.parse().ok());
        let group = words.nth(1).and_then(|w| u128::from_str_radix(w, 16).ok());
        if let (Some(device), Some(group)) = (device, group) {
            found.push((device, Ipv6Addr::from(group).into()));
        }
    }
    found
}

fn level(group: IpAddr) -> i32 {
    if group.is_ipv4() { IPPROTO_IP } else { IPPROTO_IPV6 }
}

fn padded_name(address: IpAddr) -> Vec<u8> {
    let mut name = datagram::raw_of(SocketAddr::new(address, 0));
    name.resize(NAME_BYTES, 0);
    name
}

/// The head of `group_req`, `group_source_req` and `group_filter`.
fn request(device: u32, group: IpAddr) -> Vec<u8> {
    let mut bytes = device.to_ne_bytes().to_vec();
    bytes.resize(8, 0);
    bytes.extend_from_slice(&padded_name(group));
    bytes
}

pub(super) fn capture(fd: BorrowedFd<'_>, family: i32) -> Result<Vec<Membership>, Stop> {
    let mut joined = Vec::new();
    for (device, group) in groups(family == libc::AF_INET6) {
        let mut filter = request(device, group);
        filter.resize(FILTER_BYTES + MAX_SOURCES * NAME_BYTES, 0);
        let count = u32::try_from(MAX_SOURCES).unwrap_or(u32::MAX);
        if let Some(slot) = filter.get_mut(FILTER_BYTES - 4..FILTER_BYTES) {
            slot.copy_from_slice(&count.to_ne_bytes());
        }
        match datagram::ask_option(fd, level(group), libc::MCAST_MSFILTER, &mut filter) {
            Ok(()) => {}
            // Joined by others only. (Raw sockets of other kinds do not know the question.)
            Err(Errno::EADDRNOTAVAIL | Errno::ENOPROTOOPT | Errno::EINVAL | Errno::ENODEV) => continue,
            Err(errno) => return Err(Stop::Failed { step: "asking for a multicast group", errno }),
        }
        let word =
            |at: usize| filter.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_ne_bytes(*b));
        let (mode, count) = (word(FILTER_BYTES - 8), word(FILTER_BYTES - 4) as usize);
        if count > MAX_SOURCES {
            return Err(Stop::refuse(format!("has more than {MAX_SOURCES} sources in a multicast group")));
        }
        let names = filter.get(FILTER_BYTES..).unwrap_or_default().chunks(NAME_BYTES).take(count);
        let sources = names.filter_map(datagram::address_of).map(|a| octets(a.ip())).collect();
        let include = mode == libc::MCAST_INCLUDE.unsigned_abs();
        joined.push(Membership { group: octets(group), device: device_name(device)?, include, sources });
    }
    joined.sort_by(|a, b| (&a.device, &a.group).cmp(&(&b.device, &b.group)));
    Ok(joined)
}

pub(super) fn apply(fd: BorrowedFd<'_>, images: &[Membership]) -> Result<(), Trouble> {
    for image in images {
        if image.sources.len() > MAX_SOURCES {
            return Err(Trouble::Invalid("the sources of a multicast group"));
        }
        let group = ip_of(&image.group)?;
        let joining = request(device_index(&image.device)?, group);
        let set = |name, bytes: &[u8]| {
            socket::set_option(fd, level(group), name, bytes)
                .map_err(Trouble::step("joining a multicast group"))
        };
        if !image.include {
            set(libc::MCAST_JOIN_GROUP, &joining)?;
        }
        let each = if image.include { libc::MCAST_JOIN_SOURCE_GROUP } else { libc::MCAST_BLOCK_SOURCE };
        for source in &image.sources {
            let mut with_source = joining.clone();
            with_source.extend_from_slice(&padded_name(ip_of(source)?));
            set(each, &with_source)?;
        }
    }
    Ok(())
}
