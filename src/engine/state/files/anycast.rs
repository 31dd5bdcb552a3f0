//! IPv6 anycast addresses that programs have joined (`IPV6_JOIN_ANYCAST`). The kernel lists them by device and not
//! by socket, among those that it has made itself.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::net::Ipv6Addr;

use libc::AF_INET6;

use super::scan::{Open, Table};
use crate::engine::procfs;
use crate::engine::reason::Reason;

/// Longer prefixes have no anycast address of their routers (RFC 6164).
const LONGEST_PREFIX: u32 = 126;

/// A reason for each address that may be one of the process: if it has an IPv6 socket.
pub(super) fn reasons(table: &Table) -> Vec<Reason> {
    // Mostly there are none, and then nobody's sockets need to be asked.
    let listed: Vec<(Ipv6Addr, String)> = read("anycast6").lines().filter_map(parse_anycast).collect();
    if listed.is_empty() {
        return Vec::new();
    }
    let is_six = |open: &&Open| open.socket_domain() == Some(AF_INET6);
    let Some(open) = table.opens.iter().find(is_six) else { return Vec::new() };
    let reason = |(address, device): (Ipv6Addr, String)| {
        let why = format!(
            "was joined by a socket (IPV6_JOIN_ANYCAST); the kernel does not tell by which, and fd {} may be it",
            open.number
        );
        Reason::new(format!("anycast address {address} on {device}"), why, "leave it first")
    };
    joined(listed).into_iter().map(reason).collect()
}

fn read(name: &str) -> String {
    procfs::read_text(format!("/proc/thread-self/net/{name}")).unwrap_or_default()
}

/// Those of the addresses that the kernel has not made itself, with their devices.
fn joined(mut listed: Vec<(Ipv6Addr, String)>) -> Vec<(Ipv6Addr, String)> {
    let own: HashSet<(Ipv6Addr, String)> = read("if_inet6").lines().filter_map(parse_routers).collect();
    let mut routers: HashMap<String, bool> = HashMap::new();
    let mut by_kernel = |entry: &(Ipv6Addr, String)| {
        own.contains(entry) && *routers.entry(entry.1.clone()).or_insert_with_key(|device| is_router(device))
    };
    listed.retain(|entry| !by_kernel(entry));
    listed
}

/// `2    eth0            fd090000000000000000000000000000      1`
fn parse_anycast(line: &str) -> Option<(Ipv6Addr, String)> {
    let mut words = line.split_whitespace();
    let device = words.nth(1)?.to_owned();
    Some((u128::from_str_radix(words.next()?, 16).ok()?.into(), device))
}

/// `fd090000000000000000000000000001 02 40 00 80 eth0`: the address of all routers on its prefix.
fn parse_routers(line: &str) -> Option<(Ipv6Addr, String)> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [address, _, prefix, _, _, device] = words.as_slice() else { return None };
    let address = u128::from_str_radix(address, 16).ok()?;
    let prefix = u32::from_str_radix(prefix, 16).ok().filter(|length| *length <= LONGEST_PREFIX)?;
    Some(((address & !(u128::MAX.checked_shr(prefix)?)).into(), (*device).to_owned()))
}

fn is_router(device: &str) -> bool {
    let setting = fs::read_to_string(format!("/proc/sys/net/ipv6/conf/{device}/forwarding"));
    setting.is_ok_and(|text| text.trim() != "0")
}
