//! What the kernel knows of devices, addresses and routes, and how it is changed.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr};

use nix::errno::Errno;

use super::octets::{ip_of, octets};
use crate::engine::address::{Address, AddressError, MoveIp, no_device};
use crate::engine::reason::Reason;
use crate::engine::sys::netlink::{CREATE, Netlink, attributes, push_attribute, u32_at};
use crate::engine::sys::packet::MAC_BYTES;

const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
const RTM_GETROUTE: u16 = 26;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const ARPHRD_ETHER: u16 = 1;

const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_LABEL: u16 = 3;
const IFA_BROADCAST: u16 = 4;
const IFA_CACHEINFO: u16 = 6;
const IFA_FLAGS: u16 = 8;
const IFA_RT_PRIORITY: u16 = 9;

const IFA_F_SECONDARY: u32 = 0x01;
const IFA_F_NODAD: u32 = 0x02;
/// NODAD, OPTIMISTIC, HOMEADDRESS, MANAGETEMPADDR, NOPREFIXROUTE, MCAUTOJOIN: the others describe a state.
const SETTABLE_FLAGS: u32 = 0x02 | 0x04 | 0x10 | 0x100 | 0x200 | 0x400;

const RTA_OIF: u16 = 4;
const RTA_PREFSRC: u16 = 7;
const RTPROT_KERNEL: u8 = 2;

/// Bytes of `struct ifinfomsg`, `struct ifaddrmsg`, `struct rtmsg`.
const IFINFOMSG: usize = 16;
const IFADDRMSG: usize = 8;
const RTMSG: usize = 12;

/// A network device.
#[derive(Debug, Clone, Copy)]
pub(super) struct Link {
    pub(super) index: u32,
    /// Its Ethernet address; none for loopback and tunnels.
    pub(super) mac: Option<[u8; MAC_BYTES]>,
}

/// An address and where the kernel says it is.
#[derive(Debug)]
struct Found {
    index: u32,
    address: IpAddr,
    prefix: u8,
    secondary: bool,
    peer: Option<IpAddr>,
    broadcast: Option<IpAddr>,
    label: Option<String>,
    flags: u32,
    scope: u8,
    lifetimes: (u32, u32),
    metric: u32,
}

/// A conversation with this network namespace.
#[derive(Debug)]
pub(super) struct Routes(Netlink);

impl Routes {
    pub(super) fn open() -> Result<Self, AddressError> {
        Netlink::open().map(Self).map_err(|errno| error("opening", "a netlink socket", errno))
    }

    /// The device of this name.
    pub(super) fn link(&mut self, name: &str) -> Result<Option<Link>, AddressError> {
        let mut body = vec![0; IFINFOMSG];
        let mut nul_terminated = name.as_bytes().to_vec();
        nul_terminated.push(0);
        push_attribute(&mut body, IFLA_IFNAME, &nul_terminated);
        match self.0.query(RTM_GETLINK, &body) {
            Err(Errno::ENODEV) => Ok(None),
            Err(errno) => Err(error("looking up device", name, errno)),
            Ok(answers) => Ok(answers.first().and_then(|answer| parse_link(answer))),
        }
    }

    /// Finds the addresses as they are, and all that hinders taking them away.
    pub(super) fn find(&mut self, specs: &[MoveIp]) -> Result<(Vec<Address>, Vec<Reason>), AddressError> {
        let (mut addresses, mut reasons) = (Vec::new(), duplicates(specs));
        let present = self.addresses()?;
        for spec in specs {
            let object = format!("--move-ip {spec}");
            let Some(link) = self.link(&spec.device)? else {
                reasons.push(no_device(spec));
                continue;
            };
            let here = |f: &&Found| f.index == link.index && f.address == spec.address;
            match present.iter().find(here) {
                None => reasons.push(Reason::new(
                    object,
                    format!("{} does not have this address", spec.device),
                    "",
                )),
                Some(found) if found.prefix != spec.prefix => reasons.push(Reason::new(
                    object,
                    format!("its prefix on {} is /{}", spec.device, found.prefix),
                    "give the prefix as it is",
                )),
                Some(found) => {
                    if let Some((why, remedy)) = self.collateral(spec, found, &present)? {
                        reasons.push(Reason::new(object, why, remedy));
                    }
                    addresses.push(address_of(spec, found));
                }
            }
        }
        Ok((addresses, reasons))
    }

    /// All that hinders adding the addresses here.
    pub(super) fn check_absent(&mut self, specs: &[MoveIp]) -> Result<Vec<Reason>, AddressError> {
        let mut reasons = duplicates(specs);
        let present = self.addresses()?;
        for spec in specs {
            if self.link(&spec.device)?.is_none() {
                reasons.push(no_device(spec));
            }
            if present.iter().any(|found| found.address == spec.address) {
                let why = "the destination has this address already";
                reasons.push(Reason::new(format!("--move-ip {spec}"), why, ""));
            }
        }
        Ok(reasons)
    }

    /// What the kernel would take away together with the address, and would not give back with it.
    fn collateral(
        &mut self,
        spec: &MoveIp,
        found: &Found,
        present: &[Found],
    ) -> Result<Option<(String, String)>, AddressError> {
        let IpAddr::V4(ip) = spec.address else { return Ok(None) };
        let others = || {
            present
                .iter()
                .filter(|o| o.index == found.index && o.address.is_ipv4() && o.address != found.address)
        };
        let same_network = |o: &&Found| match o.address {
            IpAddr::V4(other) => {
                o.prefix == found.prefix && network(other, o.prefix) == network(ip, o.prefix)
            }
            IpAddr::V6(_) => false,
        };
        if !found.secondary
            && !promotes_secondaries(&spec.device)
            && let Some(other) = others().find(|o| o.secondary && same_network(o))
        {
            let why = format!("{} would be removed with it, being secondary in its network", other.address);
            return Ok(Some((why, format!("sysctl -w net.ipv4.conf.{}.promote_secondaries=1", spec.device))));
        }
        let last_of_device = others().next().is_none();
        if self.routes_lost(found.index, ip, last_of_device)? {
            let why = if last_of_device {
                format!("it is the only address of {}: its routes would be lost", spec.device)
            } else {
                "a route has it as its source and would be lost".to_owned()
            };
            return Ok(Some((why, "move an address that no route depends on".to_owned())));
        }
        Ok(None)
    }

    /// Whether routes not made by the kernel go with the address: those of a device without addresses, and
    /// those that prefer the address as their source.
    fn routes_lost(&mut self, index: u32, ip: Ipv4Addr, last_of_device: bool) -> Result<bool, AddressError> {
        let mut body = vec![0; RTMSG];
        body[0] = FAMILY_V4;
        let routes = self.0.dump(RTM_GETROUTE, &body).map_err(|e| error("listing", "routes", e))?;
        Ok(routes.iter().any(|route| {
            if route.get(5).is_none_or(|protocol| *protocol == RTPROT_KERNEL) {
                return false;
            }
            attributes(route.get(RTMSG..).unwrap_or_default()).any(|(kind, value)| match kind {
                RTA_OIF => last_of_device && u32_at(value, 0) == Some(index),
                RTA_PREFSRC => value == ip.octets(),
                _ => false,
            })
        }))
    }

    fn addresses(&mut self) -> Result<Vec<Found>, AddressError> {
        let all = self.0.dump(RTM_GETADDR, &[0; IFADDRMSG]).map_err(|e| error("listing", "addresses", e))?;
        Ok(all.iter().filter_map(|body| parse_address(body)).collect())
    }

    /// All addresses of this host.
    pub(super) fn present(&mut self) -> Result<HashSet<IpAddr>, AddressError> {
        Ok(self.addresses()?.into_iter().map(|found| found.address).collect())
    }

    pub(super) fn add(&mut self, index: u32, address: &Address) -> Result<(), Errno> {
        self.0.request(RTM_NEWADDR, CREATE, &encode(index, address))
    }

    pub(super) fn remove(&mut self, index: u32, address: &Address) -> Result<(), Errno> {
        self.0.request(RTM_DELADDR, 0, &encode(index, address))
    }
}

const FAMILY_V4: u8 = 2;
const FAMILY_V6: u8 = 10;

fn encode(index: u32, address: &Address) -> Vec<u8> {
    let spec = &address.spec;
    let v6 = spec.address.is_ipv6();
    // Duplicate detection would keep the address unusable for a second; we know that it is ours alone.
    let flags = address.flags | if v6 { IFA_F_NODAD } else { 0 };
    let mut body = vec![if v6 { FAMILY_V6 } else { FAMILY_V4 }, spec.prefix, 0, address.scope];
    body.extend(index.to_ne_bytes());
    push_attribute(&mut body, IFA_LOCAL, &octets(spec.address));
    push_attribute(&mut body, IFA_ADDRESS, &octets(address.peer.unwrap_or(spec.address)));
    if let Some(broadcast) = address.broadcast {
        push_attribute(&mut body, IFA_BROADCAST, &octets(broadcast));
    }
    if let Some(label) = &address.label {
        push_attribute(&mut body, IFA_LABEL, &[label.as_bytes(), b"\0"].concat());
    }
    push_attribute(&mut body, IFA_FLAGS, &flags.to_ne_bytes());
    if address.metric != 0 {
        push_attribute(&mut body, IFA_RT_PRIORITY, &address.metric.to_ne_bytes());
    }
    let (preferred, valid) = address.lifetimes;
    let mut cache_info = [preferred.to_ne_bytes(), valid.to_ne_bytes()].concat();
    cache_info.resize(16, 0);
    push_attribute(&mut body, IFA_CACHEINFO, &cache_info);
    body
}

fn parse_link(body: &[u8]) -> Option<Link> {
    let index = u32_at(body, 4)?;
    let ethernet = body.get(2..4)? == ARPHRD_ETHER.to_ne_bytes();
    let mac = attributes(body.get(IFINFOMSG..)?).find(|(kind, _)| *kind == IFLA_ADDRESS);
    Some(Link { index, mac: mac.filter(|_| ethernet).and_then(|(_, value)| value.try_into().ok()) })
}

fn parse_address(body: &[u8]) -> Option<Found> {
    let (prefix, scope, index) = (*body.get(1)?, *body.get(3)?, u32_at(body, 4)?);
    let (mut address, mut local, mut found_flags) = (None, None, u32::from(*body.get(2)?));
    let (mut broadcast, mut label, mut lifetimes, mut metric) = (None, None, (u32::MAX, u32::MAX), 0);
    for (kind, value) in attributes(body.get(IFADDRMSG..)?) {
        match kind {
            IFA_ADDRESS => address = ip_of(value),
            IFA_LOCAL => local = ip_of(value),
            IFA_BROADCAST => broadcast = ip_of(value),
            IFA_LABEL => label = String::from_utf8(value.split(|b| *b == 0).next()?.to_vec()).ok(),
            IFA_FLAGS => found_flags = u32_at(value, 0)?,
            IFA_CACHEINFO => lifetimes = (u32_at(value, 0)?, u32_at(value, 4)?),
            IFA_RT_PRIORITY => metric = u32_at(value, 0)?,
            _ => {}
        }
    }
    let own = local.or(address)?;
    Some(Found {
        index,
        address: own,
        prefix,
        secondary: found_flags & IFA_F_SECONDARY != 0,
        peer: address.filter(|peer| *peer != own),
        broadcast,
        label,
        flags: found_flags & SETTABLE_FLAGS,
        scope,
        lifetimes,
        metric,
    })
}

fn address_of(spec: &MoveIp, found: &Found) -> Address {
    Address {
        spec: spec.clone(),
        peer: found.peer,
        broadcast: found.broadcast,
        label: found.label.clone(),
        flags: found.flags,
        scope: found.scope,
        lifetimes: found.lifetimes,
        metric: found.metric,
    }
}

fn duplicates(specs: &[MoveIp]) -> Vec<Reason> {
    let mut seen = HashSet::new();
    let twice = specs.iter().filter(|spec| !seen.insert(spec.address));
    twice.map(|spec| Reason::new(format!("--move-ip {spec}"), "is given twice", "")).collect()
}

fn network(ip: Ipv4Addr, prefix: u8) -> u32 {
    let host_bits = 32u32.saturating_sub(u32::from(prefix));
    u32::from(ip).checked_shr(host_bits).unwrap_or(0)
}

/// Whether the kernel promotes a secondary address instead of removing it with its primary.
fn promotes_secondaries(device: &str) -> bool {
    let on = |name: &str| {
        let path = format!("/proc/sys/net/ipv4/conf/{name}/promote_secondaries");
        std::fs::read_to_string(path).is_ok_and(|text| text.trim() != "0")
    };
    on("all") || on(device)
}

fn error(step: &'static str, what: &str, errno: Errno) -> AddressError {
    AddressError::Sys { step, what: what.to_owned(), errno }
}
