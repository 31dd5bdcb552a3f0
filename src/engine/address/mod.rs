//! Addresses that move with the process: `--move-ip ADDR/PREFIX@DEV`.
//!
//! The source takes its addresses away at the freeze, the destination adds them after it has accepted the
//! process and announces them, so that neighbours learn the new link-layer address. At no time may both
//! have one. Everything slow (sockets, device look-ups) happens in [`AddressSet`]'s constructors, before
//! the freeze.

mod announce;
mod octets;
mod route;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests;

pub use octets::{end_of, ip_of, octets};

use std::fmt;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::str::FromStr;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use crate::engine::address::announce::Announcer;
use crate::engine::address::route::Routes;
use crate::engine::reason::Reason;

/// The inode of the network namespace of this thread, by which the kernel tells them apart; 0 if it cannot be told.
pub fn network_here() -> u64 {
    std::fs::metadata("/proc/thread-self/ns/net").map_or(0, |network| network.ino())
}

/// Longest name of a network device (`IFNAMSIZ` without its NUL).
const MAX_DEVICE_BYTES: usize = 15;

/// An address that the operator wants to move.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MoveIp {
    /// The address.
    pub address: IpAddr,
    /// Bits of its network.
    pub prefix: u8,
    /// The device that has it; the same name on both hosts.
    pub device: String,
}

/// Why a text is no [`MoveIp`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("an address to move is written ADDRESS/PREFIX@DEVICE, for example 192.0.2.7/24@eth0")]
pub struct BadMoveIp;

impl FromStr for MoveIp {
    type Err = BadMoveIp;

    fn from_str(text: &str) -> Result<Self, BadMoveIp> {
        let (network, device) = text.split_once('@').ok_or(BadMoveIp)?;
        let (address, prefix) = network.split_once('/').ok_or(BadMoveIp)?;
        let address: IpAddr = address.parse().map_err(|_| BadMoveIp)?;
        let prefix: u8 = prefix.parse().map_err(|_| BadMoveIp)?;
        let device_ok = (1..=MAX_DEVICE_BYTES).contains(&device.len())
            && device != "."
            && device != ".."
            && device.bytes().all(|b| b.is_ascii_graphic() && !b"/:".contains(&b));
        if prefix > bits(address) || !device_ok || address.is_unspecified() || address.is_multicast() {
            return Err(BadMoveIp);
        }
        Ok(Self { address, prefix, device: device.to_owned() })
    }
}

fn bits(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

impl fmt::Display for MoveIp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}@{}", self.address, self.prefix, self.device)
    }
}

impl TryFrom<String> for MoveIp {
    type Error = BadMoveIp;

    fn try_from(text: String) -> Result<Self, BadMoveIp> {
        text.parse()
    }
}

impl From<MoveIp> for String {
    fn from(spec: MoveIp) -> Self {
        spec.to_string()
    }
}

/// An address with all that is needed to add it as it was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    /// Which address, where.
    pub spec: MoveIp,
    /// The other end of a point-to-point link.
    pub peer: Option<IpAddr>,
    /// IPv4 broadcast address.
    pub broadcast: Option<IpAddr>,
    /// IPv4 label.
    pub label: Option<String>,
    /// `IFA_F_*`, those that can be asked for.
    pub flags: u32,
    /// `RT_SCOPE_*`.
    pub scope: u8,
    /// Seconds that it stays preferred and valid; `u32::MAX` is for ever.
    pub lifetimes: (u32, u32),
    /// Metric of its prefix route; 0 is the default.
    pub metric: u32,
}

impl Address {
    /// The address as `ip address add` would make it: for a host that never had it.
    pub fn new(spec: MoveIp) -> Self {
        let forever = (u32::MAX, u32::MAX);
        Self {
            spec,
            peer: None,
            broadcast: None,
            label: None,
            flags: 0,
            scope: 0,
            lifetimes: forever,
            metric: 0,
        }
    }
}

/// Why an address could not be looked at, taken or given.
#[derive(Debug, thiserror::Error)]
pub enum AddressError {
    /// The kernel refused.
    #[error("{step} {what}")]
    Sys {
        /// What was being done.
        step: &'static str,
        /// To which address or device.
        what: String,
        /// The kernel's answer.
        #[source]
        errno: Errno,
    },
    /// Preflight's reasons, where preflight was not asked or something has changed since.
    #[error("{}", .0.iter().map(Reason::to_string).collect::<Vec<_>>().join("; "))]
    Refused(Vec<Reason>),
}

/// What hinders taking these addresses from this host.
///
/// # Errors
/// If the kernel cannot be asked.
pub fn check_source(specs: &[MoveIp]) -> Result<Vec<Reason>, AddressError> {
    Routes::open()?.find(specs).map(|(_, reasons)| reasons)
}

/// What hinders adding these addresses here.
///
/// # Errors
/// If the kernel cannot be asked.
pub fn check_destination(specs: &[MoveIp]) -> Result<Vec<Reason>, AddressError> {
    Routes::open()?.check_absent(specs)
}

/// Which of these addresses this host does not have.
///
/// # Errors
/// If the kernel cannot be asked.
pub fn absent_here(addresses: &[IpAddr]) -> Result<Vec<IpAddr>, AddressError> {
    if addresses.is_empty() {
        return Ok(Vec::new());
    }
    let present = Routes::open()?.present()?;
    Ok(addresses.iter().copied().filter(|ip| !ip.is_loopback() && !present.contains(ip)).collect())
}

/// Addresses, the device of each, and open sockets: ready to be removed and added without delay.
#[derive(Debug)]
pub struct AddressSet {
    routes: Routes,
    addresses: Vec<(u32, Address)>,
    announcer: Announcer,
}

impl AddressSet {
    /// For the source: finds these addresses on this host.
    ///
    /// # Errors
    /// If one is not there or cannot be taken away without a loss, or the kernel cannot be asked.
    pub fn at_source(specs: &[MoveIp]) -> Result<Self, AddressError> {
        let mut routes = Routes::open()?;
        let (addresses, reasons) = routes.find(specs)?;
        if !reasons.is_empty() {
            return Err(AddressError::Refused(reasons));
        }
        Self::with_devices(routes, &addresses)
    }

    /// For the destination, and for records of a journal.
    ///
    /// # Errors
    /// If a device is not there, or the kernel cannot be asked.
    pub fn of(addresses: &[Address]) -> Result<Self, AddressError> {
        Self::with_devices(Routes::open()?, addresses)
    }

    fn with_devices(mut routes: Routes, addresses: &[Address]) -> Result<Self, AddressError> {
        let mut announcer = Announcer::new();
        let mut with_index = Vec::with_capacity(addresses.len());
        for address in addresses {
            let device = &address.spec.device;
            let link =
                routes.link(device)?.ok_or_else(|| AddressError::Refused(vec![no_device(&address.spec)]))?;
            announcer.prepare(&link, address.spec.address).map_err(|errno| AddressError::Sys {
                step: "opening a packet socket for",
                what: device.clone(),
                errno,
            })?;
            with_index.push((link.index, address.clone()));
        }
        Ok(Self { routes, addresses: with_index, announcer })
    }

    /// The addresses, for the journal.
    pub fn records(&self) -> Vec<Address> {
        self.addresses.iter().map(|(_, address)| address.clone()).collect()
    }

    /// Removes all of them. If one cannot be removed, those before it are added again.
    ///
    /// # Errors
    /// If one cannot be removed, also because it is no longer there.
    pub fn remove(&mut self) -> Result<(), AddressError> {
        for at in 0..self.addresses.len() {
            let Some((index, address)) = self.addresses.get(at) else { break };
            if let Err(errno) = self.routes.remove(*index, address) {
                let what = address.spec.to_string();
                for (index, address) in self.addresses.iter().take(at).rev() {
                    let _ = self.routes.add(*index, address); // the first error is the one to report
                }
                return Err(AddressError::Sys { step: "removing", what, errno });
            }
        }
        Ok(())
    }

    /// Adds all of them and announces them; one that is there already is announced only. Goes on after an
    /// error, so that as much as possible works.
    ///
    /// # Errors
    /// The first error.
    pub fn add(&mut self) -> Result<(), AddressError> {
        let mut first_error = None;
        for (index, address) in &self.addresses {
            let step = match self.routes.add(*index, address) {
                Ok(()) | Err(Errno::EEXIST) => {
                    self.announcer.announce(*index, address.spec.address).map_err(|e| ("announcing", e))
                }
                Err(errno) => Err(("adding", errno)),
            };
            if let Err((step, errno)) = step {
                let what = address.spec.to_string();
                first_error.get_or_insert(AddressError::Sys { step, what, errno });
            }
        }
        first_error.map_or(Ok(()), Err)
    }
}

fn no_device(spec: &MoveIp) -> Reason {
    Reason::new(format!("--move-ip {spec}"), format!("there is no device {} on this host", spec.device), "")
}
