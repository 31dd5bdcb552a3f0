//! What sockets over IP have in common: addresses with their devices, options, options that name a device.

use std::ffi::c_int;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, BorrowedFd};

use libc::{IPPROTO_IP, IPPROTO_IPV6, SOL_SOCKET, SOL_UDP};
use nix::errno::Errno;
use nix::net::if_::{if_indextoname, if_nametoindex};

use super::{Stop, Trouble};
use crate::engine::address;
use crate::engine::sys::{datagram, socket};
use crate::proto::files::{DeviceOption, Endpoint};

const SO_TXREHASH: c_int = 74;
const SO_RCVMARK: c_int = 75;
const SO_RCVPRIORITY: c_int = 82;
const IP_RECVERR_RFC4884: c_int = 26;
const IP_LOCAL_PORT_RANGE: c_int = 51;
const IPV6_RECVERR_RFC4884: c_int = 31;
const IPV6_HDRINCL: c_int = 36;
const UDP_NO_CHECK6_TX: c_int = 101;
const UDP_NO_CHECK6_RX: c_int = 102;
const UDPLITE_SEND_CSCOV: c_int = 10;
const UDPLITE_RECV_CSCOV: c_int = 11;
const SOL_RAW: c_int = 255;
const ICMP_FILTER: c_int = 1;
const IPV6_CHECKSUM: c_int = 7;

/// What a socket of datagrams has beyond [`super::options::COMMON`]. `SO_INCOMING_CPU` is not among them: here
/// the kernel changes it itself.
pub(super) const DATAGRAM: &[(c_int, c_int)] = &[
    (IPPROTO_IPV6, libc::IPV6_V6ONLY),
    (SOL_SOCKET, libc::SO_REUSEADDR),
    (SOL_SOCKET, libc::SO_REUSEPORT),
    (SOL_SOCKET, libc::SO_NO_CHECK),
    (SOL_SOCKET, libc::SO_RXQ_OVFL),
    (SOL_SOCKET, libc::SO_WIFI_STATUS),
    (SOL_SOCKET, libc::SO_SELECT_ERR_QUEUE),
    (SOL_SOCKET, libc::SO_TXTIME),
    (SOL_SOCKET, libc::SO_MAX_PACING_RATE),
    (SOL_SOCKET, SO_TXREHASH),
    (SOL_SOCKET, SO_RCVMARK),
    (SOL_SOCKET, SO_RCVPRIORITY),
    (IPPROTO_IP, libc::IP_TOS),
    (IPPROTO_IP, libc::IP_TTL),
    (IPPROTO_IP, libc::IP_HDRINCL),
    (IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT),
    (IPPROTO_IP, libc::IP_MTU_DISCOVER),
    (IPPROTO_IP, libc::IP_RECVERR),
    (IPPROTO_IP, IP_RECVERR_RFC4884),
    (IPPROTO_IP, libc::IP_RECVTOS),
    (IPPROTO_IP, libc::IP_RECVTTL),
    (IPPROTO_IP, libc::IP_RECVOPTS),
    (IPPROTO_IP, libc::IP_RETOPTS),
    (IPPROTO_IP, libc::IP_PKTINFO),
    (IPPROTO_IP, libc::IP_PASSSEC),
    (IPPROTO_IP, libc::IP_RECVORIGDSTADDR),
    (IPPROTO_IP, libc::IP_CHECKSUM),
    (IPPROTO_IP, libc::IP_RECVFRAGSIZE),
    (IPPROTO_IP, libc::IP_NODEFRAG),
    (IPPROTO_IP, libc::IP_MULTICAST_TTL),
    (IPPROTO_IP, libc::IP_MULTICAST_LOOP),
    (IPPROTO_IP, libc::IP_MULTICAST_ALL),
    (IPPROTO_IP, IP_LOCAL_PORT_RANGE),
    (IPPROTO_IPV6, libc::IPV6_TCLASS),
    (IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS),
    (IPPROTO_IPV6, IPV6_HDRINCL),
    (IPPROTO_IPV6, libc::IPV6_MULTICAST_HOPS),
    (IPPROTO_IPV6, libc::IPV6_MULTICAST_LOOP),
    (IPPROTO_IPV6, libc::IPV6_MULTICAST_ALL),
    (IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER),
    (IPPROTO_IPV6, libc::IPV6_DONTFRAG),
    (IPPROTO_IPV6, libc::IPV6_RECVERR),
    (IPPROTO_IPV6, IPV6_RECVERR_RFC4884),
    (IPPROTO_IPV6, libc::IPV6_RECVTCLASS),
    (IPPROTO_IPV6, libc::IPV6_RECVPKTINFO),
    (IPPROTO_IPV6, libc::IPV6_RECVHOPLIMIT),
    (IPPROTO_IPV6, libc::IPV6_RECVRTHDR),
    (IPPROTO_IPV6, libc::IPV6_RECVHOPOPTS),
    (IPPROTO_IPV6, libc::IPV6_RECVDSTOPTS),
    (IPPROTO_IPV6, libc::IPV6_RECVPATHMTU),
    (IPPROTO_IPV6, libc::IPV6_RECVORIGDSTADDR),
    (IPPROTO_IPV6, libc::IPV6_RECVFRAGSIZE),
    (IPPROTO_IPV6, libc::IPV6_FLOWINFO_SEND),
    (IPPROTO_IPV6, libc::IPV6_ROUTER_ALERT_ISOLATE),
    (IPPROTO_IPV6, libc::IPV6_AUTOFLOWLABEL),
    (IPPROTO_IPV6, libc::IPV6_ADDR_PREFERENCES),
    (SOL_UDP, libc::UDP_CORK),
    (SOL_UDP, UDP_NO_CHECK6_TX),
    (SOL_UDP, UDP_NO_CHECK6_RX),
    (SOL_UDP, libc::UDP_SEGMENT),
    (SOL_UDP, libc::UDP_GRO),
    (libc::IPPROTO_UDPLITE, UDPLITE_SEND_CSCOV),
    (libc::IPPROTO_UDPLITE, UDPLITE_RECV_CSCOV),
    (SOL_RAW, ICMP_FILTER),
    (SOL_RAW, IPV6_CHECKSUM),
    (libc::IPPROTO_ICMPV6, ICMP_FILTER),
];

/// How an option names a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Names {
    Index,
    IndexInNetworkOrder,
    /// By one of its addresses.
    Address,
}

const DEVICES: [(c_int, c_int, Names); 4] = [
    (IPPROTO_IP, libc::IP_UNICAST_IF, Names::IndexInNetworkOrder),
    (IPPROTO_IP, libc::IP_MULTICAST_IF, Names::Address),
    (IPPROTO_IPV6, libc::IPV6_UNICAST_IF, Names::IndexInNetworkOrder),
    (IPPROTO_IPV6, libc::IPV6_MULTICAST_IF, Names::Index),
];

/// Longest device name.
const DEVICE_BYTES: usize = libc::IFNAMSIZ;

/// An address that a peer sent.
pub(super) fn ip_of(bytes: &[u8]) -> Result<IpAddr, Trouble> {
    address::ip_of(bytes).ok_or(Trouble::Invalid("an address"))
}

pub(super) fn device_name(index: u32) -> Result<String, Stop> {
    let name = if_indextoname(index).map_err(Stop::failed("asking for the name of a network device"))?;
    Ok(name.to_string_lossy().into_owned())
}

pub(super) fn device_index(name: &str) -> Result<u32, Trouble> {
    if name.len() >= DEVICE_BYTES {
        return Err(Trouble::Invalid("the name of a network device"));
    }
    if_nametoindex(name).map_err(Trouble::step("finding the network device of a socket"))
}

pub(super) fn endpoint(address: SocketAddr) -> Result<Endpoint, Stop> {
    let device = match address {
        SocketAddr::V6(v6) if v6.scope_id() != 0 => device_name(v6.scope_id())?,
        _ => String::new(),
    };
    Ok(Endpoint { address: address::octets(address.ip()), port: address.port().into(), device })
}

pub(super) fn address_of(image: &Endpoint) -> Result<SocketAddr, Trouble> {
    let port = u16::try_from(image.port).map_err(|_| Trouble::Invalid("a port"))?;
    match ip_of(&image.address)? {
        IpAddr::V6(v6) if !image.device.is_empty() => {
            Ok(SocketAddrV6::new(v6, port, 0, device_index(&image.device)?).into())
        }
        ip => Ok(SocketAddr::new(ip, port)),
    }
}

/// The socket's own address.
pub(super) fn own_address(fd: BorrowedFd<'_>) -> Result<SocketAddr, Errno> {
    datagram::address_of(&datagram::raw_name(fd)?).ok_or(Errno::EAFNOSUPPORT)
}

/// Reads the options that name a device. (`IP_MULTICAST_IF` given by number alone: see [`super::multicast_if`].)
pub(super) fn capture_devices(fd: BorrowedFd<'_>) -> Result<Vec<DeviceOption>, Stop> {
    let mut found = Vec::new();
    for (level, name, names) in DEVICES {
        let Ok(value) = socket::option(fd, level, name) else { continue };
        let Some(word) = value.first_chunk::<4>().filter(|w| **w != [0; 4]) else { continue };
        let (device, address) = match names {
            Names::Index => (device_name(u32::from_ne_bytes(*word))?, Vec::new()),
            Names::IndexInNetworkOrder => (device_name(u32::from_be_bytes(*word))?, Vec::new()),
            Names::Address => (device_with(Ipv4Addr::from(*word)).unwrap_or_default(), word.to_vec()),
        };
        found.push(DeviceOption { level, name, device, address });
    }
    Ok(found)
}

fn device_with(address: Ipv4Addr) -> Option<String> {
    let has = |i: &nix::ifaddrs::InterfaceAddress| {
        i.address.as_ref().and_then(|a| a.as_sockaddr_in()).is_some_and(|a| a.ip() == address)
    };
    nix::ifaddrs::getifaddrs().ok()?.find(has).map(|i| i.interface_name)
}

pub(super) fn apply_devices(fd: BorrowedFd<'_>, images: &[DeviceOption]) -> Result<(), Trouble> {
    for image in images {
        let known = DEVICES.iter().find(|(level, name, _)| (*level, *name) == (image.level, image.name));
        let (level, name, names) = *known.ok_or(Trouble::Invalid("an option that names a device"))?;
        let value = match names {
            Names::Index => device_index(&image.device)?.to_ne_bytes().to_vec(),
            Names::IndexInNetworkOrder => device_index(&image.device)?.to_be_bytes().to_vec(),
            Names::Address => {
                let IpAddr::V4(address) = ip_of(&image.address)? else {
                    return Err(Trouble::Invalid("an option that names a device"));
                };
                // With its number too (`ip_mreqn`), the address need not be there yet.
                let device = Some(image.device.clone()).filter(|d| !d.is_empty());
                let device = device.or_else(|| device_with(address)).unwrap_or_default();
                let mut request = vec![0; 4];
                request.extend_from_slice(&address.octets());
                request.extend_from_slice(&device_index(&device)?.to_ne_bytes());
                request
            }
        };
        socket::set_option(fd, level, name, &value).map_err(Trouble::step("setting a socket's device"))?;
    }
    Ok(())
}

/// Whether this machine has an address: the way to an own address starts from itself.
pub(super) fn is_here(address: IpAddr) -> bool {
    let family = if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let probe = || -> Result<bool, Errno> {
        let fd = socket::socket(family, libc::SOCK_DGRAM, 0)?;
        datagram::connect_raw(fd.as_fd(), &datagram::raw_of(SocketAddr::new(address, 9)))?;
        Ok(own_address(fd.as_fd())?.ip() == address)
    };
    // All of 127.0.0.0/8 is here, and is reached from 127.0.0.1.
    if address.is_loopback() {
        return true;
    }
    let unicast = !address.is_multicast() && address != IpAddr::V4(Ipv4Addr::BROADCAST);
    unicast && !address.is_unspecified() && probe().unwrap_or(false)
}

/// The loopback address that a socket of this family is reached by.
pub(super) fn loopback(v4: bool) -> IpAddr {
    if v4 { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() }
}
