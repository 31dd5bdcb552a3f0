//! Settings as valid types: what is here has passed every check that needs no look at a process or a peer.

use std::fmt;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

pub use crate::engine::address::MoveIp;
pub use crate::engine::hook::{Hook, MAX_COMMANDS as MAX_HOOKS};
pub use crate::engine::remap::Remap;
pub use crate::engine::state::files::FilesOptions;
use crate::pageserver::pack::Compression;

/// Port of `migrate serve` unless another is chosen.
pub const DEFAULT_PORT: u16 = 7077;
/// Where identity, trusted peers and records of migrations are kept unless elsewhere is chosen.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/migrate";
/// Rounds of pre-copy before the freeze, at most: later ones rarely shrink what is left.
pub const DEFAULT_MAX_ROUNDS: u32 = 30;
/// Downtime that is fine with most clients, and the goal of this program.
pub const DEFAULT_MAX_DOWNTIME: Duration = Duration::from_millis(10);

/// Settings of a move, at the source.
#[derive(Debug, Clone)]
pub struct SourceConfig {
    /// Where identity and trusted peers are kept.
    pub state_dir: PathBuf,
    /// The destination.
    pub to: Destination,
    /// The process.
    pub pid: i32,
    /// When its memory travels.
    pub mode: Mode,
    /// Rounds of pre-copy, at most.
    pub max_rounds: u32,
    /// Freeze once the rest is expected to take no longer than this.
    pub max_downtime: Duration,
    /// How long the process may go on at the source, and what happens then.
    pub timeout: Option<Timeout>,
    /// Bytes per second, at most.
    pub bandwidth: Option<Bandwidth>,
    /// Whether pages are compressed.
    pub compression: Compression,
    /// What the operator allows and has seen to.
    pub allowed: Allowed,
    /// Show a line per round on standard error.
    pub progress: bool,
}

/// Settings of the destination service.
#[derive(Debug, Clone)]
pub struct ServeConfig {
    /// Where identity and trusted peers are kept.
    pub state_dir: PathBuf,
    /// Address and port to listen on.
    pub listen: SocketAddr,
    /// Commands to run at the stages of each move to here.
    pub hooks: Vec<Hook>,
}

/// Settings of `migrate check`.
#[derive(Debug, Clone)]
pub struct CheckConfig {
    /// Where identity and trusted peers are kept.
    pub state_dir: PathBuf,
    /// The process to examine; without one, this host's kernel.
    pub pid: Option<i32>,
    /// The destination to ask, too.
    pub to: Option<Destination>,
    /// As for the move; no hook is run.
    pub allowed: Allowed,
}

/// What the operator allows for a move, and has seen to.
#[derive(Debug, Clone, Default)]
pub struct Allowed {
    /// What may become of connections and standard streams, instead of a refusal.
    pub files: FilesOptions,
    /// Addresses that move with the process.
    pub move_ips: Vec<MoveIp>,
    /// Addresses that sockets have in place of others at the destination.
    pub tcp_remaps: Vec<Remap>,
    /// Commands to run at the stages of the move.
    pub hooks: Vec<Hook>,
}

/// When the memory of the process travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Mode {
    /// As much as pays and fits into the downtime before the process runs at the destination, the rest after.
    #[default]
    Auto,
    /// All of it before.
    Precopy,
    /// All of it after.
    Postcopy,
}

/// How long a migration may take until the process is frozen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeout {
    /// Since the migration began.
    pub after: Duration,
    /// What to do then.
    pub then: OnTimeout,
}

/// What happens when the time is over and the process is not frozen yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum OnTimeout {
    /// It stays at the source.
    #[default]
    Cancel,
    /// It is frozen, and what is left of its memory follows by post-copy.
    Postcopy,
    /// It is frozen, and what is left is sent while it stands still.
    Force,
}

/// A setting that cannot be understood; the text says what is expected.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// Not a rate.
    #[error("a rate is a number above 0 with K, M or G (bytes) or Kbit, Mbit, Gbit, such as 100M or 1Gbit")]
    Bandwidth,
    /// Not a duration.
    #[error("a duration is a number with us, ms, s or m, such as 10ms or 1.5s")]
    Duration,
    /// Not a destination.
    #[error("a destination is HOST:PORT, such as node2:7077, 10.0.0.2:7077 or [fd00::2]:7077")]
    Destination,
}

/// A rate in bytes per second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bandwidth(u64);

impl Bandwidth {
    /// Bytes per second, above 0.
    pub fn bytes_per_second(self) -> u64 {
        self.0
    }
}

impl FromStr for Bandwidth {
    type Err = ConfigError;

    /// `K`, `M`, `G` (also with `iB`) count bytes in powers of 1024, as QEMU and virsh do; `KB`, `MB`, `GB` in
    /// powers of 1000; `Kbit`, `Mbit`, `Gbit` are bits in powers of 1000, as tc has them. `/s` may follow.
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let text = text.strip_suffix("/s").unwrap_or(text);
        let (number, unit) = split_unit(text).ok_or(ConfigError::Bandwidth)?;
        let (k, m, g) = (1024.0, 1024.0 * 1024.0, 1024.0 * 1024.0 * 1024.0);
        let factor = match unit.to_ascii_lowercase().as_str() {
            "" | "b" => 1.0,
            "k" | "kib" => k,
            "m" | "mib" => m,
            "g" | "gib" => g,
            "kb" => 1e3,
            "mb" => 1e6,
            "gb" => 1e9,
            "bit" => 1.0 / 8.0,
            "kbit" => 1e3 / 8.0,
            "mbit" => 1e6 / 8.0,
            "gbit" => 1e9 / 8.0,
            _ => return Err(ConfigError::Bandwidth),
        };
        let bytes = number * factor;
        if !(1.0..1e15).contains(&bytes) {
            return Err(ConfigError::Bandwidth);
        }
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the range was checked")]
        Ok(Self(bytes as u64))
    }
}

/// Reads a duration such as `10ms`.
///
/// # Errors
/// [`ConfigError::Duration`].
pub fn parse_duration(text: &str) -> Result<Duration, ConfigError> {
    let (number, unit) = split_unit(text).ok_or(ConfigError::Duration)?;
    let factor = match unit {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "m" | "min" => 60.0,
        _ => return Err(ConfigError::Duration),
    };
    Duration::try_from_secs_f64(number * factor)
        .ok()
        .filter(|d| *d < Duration::from_secs(1_000_000_000))
        .ok_or(ConfigError::Duration)
}

/// A decimal number and what follows it.
fn split_unit(text: &str) -> Option<(f64, &str)> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at_checked(end)?;
    Some((number.parse().ok()?, unit))
}

/// A destination service: a name or address, and a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Destination {
    host: String,
    port: u16,
}

impl Destination {
    /// The addresses that the name stands for now, in the order to try them.
    ///
    /// # Errors
    /// What the resolver says; an error too if it knows no address.
    pub fn resolve(&self) -> io::Result<Vec<SocketAddr>> {
        let addrs: Vec<_> = (self.host.as_str(), self.port).to_socket_addrs()?.collect();
        if addrs.is_empty() {
            return Err(io::Error::new(io::ErrorKind::NotFound, "the name has no address"));
        }
        Ok(addrs)
    }
}

impl FromStr for Destination {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let (host, port) = text.rsplit_once(':').ok_or(ConfigError::Destination)?;
        let port: u16 = port.parse().map_err(|_| ConfigError::Destination)?;
        let bracketed = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
        let good = match bracketed {
            Some(v6) => v6.parse::<std::net::Ipv6Addr>().is_ok(),
            None => !host.is_empty() && host.bytes().all(|b| b.is_ascii_graphic() && !b"[]:/@".contains(&b)),
        };
        if !good || port == 0 {
            return Err(ConfigError::Destination);
        }
        Ok(Self { host: bracketed.unwrap_or(host).to_owned(), port })
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_as_operators_know_them() {
        for (text, bytes) in [
            ("100M", 100 << 20),
            ("100MiB/s", 100 << 20),
            ("1G", 1 << 30),
            ("1.5k", 1536),
            ("1Gbit", 125_000_000),
            ("100mbit", 12_500_000),
            ("10MB/s", 10_000_000),
            ("4096", 4096),
        ] {
            assert_eq!(text.parse::<Bandwidth>(), Ok(Bandwidth(bytes)), "{text}");
        }
        for bad in ["", "M", "0", "-1M", "1X", "1 M", "1e3", "1..2M", "99999999999G", "é"] {
            assert_eq!(bad.parse::<Bandwidth>(), Err(ConfigError::Bandwidth), "{bad}");
        }
    }

    #[test]
    fn durations_need_a_unit() {
        assert_eq!(parse_duration("10ms"), Ok(Duration::from_millis(10)));
        assert_eq!(parse_duration("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(parse_duration("250us"), Ok(Duration::from_micros(250)));
        for bad in ["", "10", "ms", "1h", "-1s", "99999999999999999999s"] {
            assert_eq!(parse_duration(bad), Err(ConfigError::Duration), "{bad}");
        }
    }

    #[test]
    fn addresses_to_move_are_checked() {
        for good in ["10.0.0.5/24@eth0", "fd00::5/64@br-1", "10.0.0.5/32@veth.1"] {
            assert_eq!(good.parse::<MoveIp>().unwrap().to_string(), good);
        }
        for bad in [
            "10.0.0.5@eth0",
            "10.0.0.5/33@eth0",
            "10.0.0.5/24",
            "10.0.0.5/24@",
            "10.0.0.5/24@a/b",
            "x/24@eth0",
        ] {
            assert!(bad.parse::<MoveIp>().is_err(), "{bad}");
        }
        assert!(format!("10.0.0.5/24@{}", "e".repeat(16)).parse::<MoveIp>().is_err());
        assert!("0.0.0.0/0@eth0".parse::<MoveIp>().is_err());
    }

    #[test]
    fn destinations_are_names_or_addresses_with_a_port() {
        for good in ["node2:7077", "10.0.0.2:1", "[fd00::2]:7077", "a.b-c.example:65535"] {
            assert_eq!(good.parse::<Destination>().unwrap().to_string(), good);
        }
        for bad in ["node2", ":7077", "node2:", "node2:0", "node2:65536", "fd00::2:7077", "[x]:1", "a b:1"] {
            assert!(bad.parse::<Destination>().is_err(), "{bad}");
        }
        let local = "[::1]:7077".parse::<Destination>().unwrap().resolve().unwrap();
        assert_eq!(local, vec!["[::1]:7077".parse().unwrap()]);
    }
}
