//! Two hosts on a bridge, and the place of the clients between them.

use std::ffi::OsString;
use std::fs::File;
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sched::{CloneFlags, setns};

use super::{Host, Result, TestbedError, step, wait_for};

/// Which programs the hosts run.
#[derive(Debug, Clone)]
pub struct Tools {
    /// The `migrate` binary.
    pub migrate: PathBuf,
    /// The command that runs [`super::agent::run`]; three words are appended to it.
    pub agent: Vec<OsString>,
}

/// Hosts `a` and `b`, joined by a bridge in a third one, whose network is the clients' place.
#[derive(Debug)]
pub struct Lan {
    // Dropped in this order: the hosts before the bridge and the disk they share.
    /// The host that processes are moved from, at first.
    pub a: Host,
    /// The host that processes are moved to, at first.
    pub b: Host,
    /// The bridge, the shared disk, the clients.
    pub middle: Host,
    /// The `migrate` binary.
    pub(super) migrate: PathBuf,
}

impl Lan {
    /// The address of host `a`.
    pub const A: &str = "10.77.0.1";
    /// The address of host `b`.
    pub const B: &str = "10.77.0.2";
    /// The address of the clients.
    pub const CLIENT: &str = "10.77.0.9";
    /// An address that services listen on and that moves with them.
    pub const SERVICE: &str = "10.77.0.100";
    /// [`Lan::SERVICE`] in the form that `--move-ip` takes.
    pub const MOVE_IP: &str = "10.77.0.100/24@eth0";

    /// PIDs on `a` begin here, those on `b` at 2: what starts on `a` finds its PIDs free on `b`.
    pub const FIRST_PID: u32 = 10_000;

    /// Makes the hosts and the network, with the service address on `a`.
    ///
    /// # Errors
    /// A namespace or an interface could not be made: not root, or `ip` is missing.
    pub fn start(tools: &Tools) -> Result<Self> {
        let middle = Host::start(&tools.agent, "lan", 1, None)?;
        let a = Host::start(&tools.agent, "a", Self::FIRST_PID, Some(&middle))?;
        let b = Host::start(&tools.agent, "b", 1, Some(&middle))?;
        let lan = Self { a, b, middle, migrate: tools.migrate.clone() };
        lan.middle.net(&["ip", "link", "set", "lo", "up"])?;
        lan.middle.net(&["ip", "link", "add", "br0", "type", "bridge", "forward_delay", "0"])?;
        lan.middle.net(&["ip", "address", "add", &format!("{}/24", Self::CLIENT), "dev", "br0"])?;
        lan.middle.net(&["ip", "link", "set", "br0", "up"])?;
        lan.middle.net(&["ip", "link", "add", "void", "type", "bridge", "forward_delay", "0"])?;
        lan.middle.net(&["ip", "link", "set", "void", "up"])?;
        for (host, address) in [(&lan.a, Self::A), (&lan.b, Self::B)] {
            lan.plug(host, address)?;
        }
        lan.give_service_to(&lan.a)?;
        lan.await_paths()?;
        Ok(lan)
    }

    fn plug(&self, host: &Host, address: &str) -> Result<()> {
        let port = port(host);
        let init = host.init().to_string();
        let veth = ["type", "veth", "peer", "name", "eth0", "netns", &init];
        self.middle.net(&[&["ip", "link", "add", "name", &port], &veth[..]].concat())?;
        self.middle.net(&["ip", "link", "set", &port, "master", "br0", "up"])?;
        host.net(&["ip", "link", "set", "lo", "up"])?;
        host.net(&["ip", "address", "add", &format!("{address}/24"), "dev", "eth0"])?;
        host.net(&["ip", "link", "set", "eth0", "up"])?;
        Ok(())
    }

    /// Puts the service address on a host, which must not have it.
    ///
    /// # Errors
    /// `ip` failed.
    pub fn give_service_to(&self, host: &Host) -> Result<()> {
        host.net(&["ip", "address", "add", &format!("{}/24", Self::SERVICE), "dev", "eth0"]).map(drop)
    }

    /// Whether a host has the service address.
    ///
    /// # Errors
    /// `ip` failed.
    pub fn has_service(&self, host: &Host) -> Result<bool> {
        let list = host.net(&["ip", "-o", "-4", "address", "show", "dev", "eth0"])?;
        Ok(list.contains(&format!(" {}/", Self::SERVICE)))
    }

    /// Waits until the bridge forwards: a packet sent earlier is lost, which a test would not expect.
    fn await_paths(&self) -> Result<()> {
        wait_for("the bridge forwarding", Duration::from_secs(10), || {
            let ports = self.middle.net(&["ip", "-d", "-o", "link", "show", "master", "br0"])?;
            Ok((ports.matches("state forwarding").count() == 2).then_some(()))
        })
    }

    /// Cuts the link of a host: nothing comes through any more, and nobody is told.
    ///
    /// # Errors
    /// `ip` failed.
    pub fn cut(&self, host: &Host) -> Result<()> {
        // A bridge without any other port: frames are taken and lead nowhere.
        self.middle.net(&["ip", "link", "set", &port(host), "master", "void"]).map(drop)
    }

    /// Joins the link of a host again.
    ///
    /// # Errors
    /// `ip` failed.
    pub fn heal(&self, host: &Host) -> Result<()> {
        self.middle.net(&["ip", "link", "set", &port(host), "master", "br0"])?;
        self.await_paths()
    }

    /// Limits what a host can send, in Mbit/s.
    ///
    /// # Errors
    /// `tc` failed.
    pub fn limit_rate(&self, host: &Host, mbit: u32) -> Result<()> {
        let rate = format!("{mbit}mbit");
        let shape = ["rate", &rate, "burst", "256kb", "latency", "20ms"];
        host.net(&[&["tc", "qdisc", "replace", "dev", "eth0", "root", "tbf"], &shape[..]].concat()).map(drop)
    }

    /// Runs `work` in a new thread that lives in the network of the clients.
    ///
    /// # Errors
    /// The thread could not be started; the thread itself may fail to enter the namespace.
    pub fn client<T: Send + 'static>(
        &self,
        name: &str,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<JoinHandle<Result<T>>> {
        Self::inside(&self.middle, name, work)
    }

    /// Runs `work` in a new thread that lives in the network of a host.
    ///
    /// # Errors
    /// The thread could not be started; the thread itself may fail to enter the namespace.
    pub fn inside<T: Send + 'static>(
        host: &Host,
        name: &str,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<JoinHandle<Result<T>>> {
        let path = format!("/proc/{}/ns/net", host.init());
        let network = step(File::open(&path), || format!("opening {path}"))?;
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            setns(&network, CloneFlags::CLONE_NEWNET).map_err(|error| TestbedError::Io {
                step: "entering the network of a host".to_owned(),
                source: error.into(),
            })?;
            Ok(work())
        });
        step(thread, || format!("starting the thread {name}"))
    }

    /// The other one of `a` and `b`.
    pub fn other(&self, host: &Host) -> &Host {
        if host.name() == self.a.name() { &self.b } else { &self.a }
    }

    /// The address of a host.
    pub fn address(&self, host: &Host) -> &'static str {
        if host.name() == self.a.name() { Self::A } else { Self::B }
    }
}

fn port(host: &Host) -> String {
    format!("port-{}", host.name())
}
