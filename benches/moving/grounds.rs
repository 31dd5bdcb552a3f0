//! The test grounds with a redis on them, moved back and forth.

use std::net::SocketAddrV4;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use migrate::testbed::{Host, Job, Lan, Service, Spawn, redis};
use serde_json::Value;

use crate::client::Seen;
use crate::data::Data;

const MOVE: Duration = Duration::from_secs(300);

/// One redis, filled, on one of the two hosts.
pub(crate) struct Grounds<'a> {
    pub(crate) lan: &'a Lan,
    services: &'a [Service; 2],
    server: Job,
    pub(crate) data: Data,
    at: usize,
}

/// A move as seen from outside.
#[derive(Debug)]
pub(crate) struct Moved {
    pub(crate) report: Value,
    /// When the command was started.
    pub(crate) started: Instant,
    /// Peak resident memory of the command, KiB.
    pub(crate) peak_kib: u64,
}

impl Moved {
    pub(crate) fn number(&self, name: &str) -> f64 {
        self.report[name].as_f64().unwrap_or_default()
    }

    pub(crate) fn phase(&self, name: &str) -> f64 {
        self.report["phases"][name].as_f64().unwrap_or_default()
    }
}

pub(crate) fn address() -> Result<SocketAddrV4> {
    Ok(SocketAddrV4::new(Lan::SERVICE.parse()?, redis::PORT))
}

impl<'a> Grounds<'a> {
    /// Starts redis on the host that has the service address, and fills it.
    pub(crate) fn start(lan: &'a Lan, services: &'a [Service; 2], mib: usize) -> Result<Self> {
        let at = usize::from(!lan.has_service(&lan.a)?);
        let data = Data::new(mib);
        let server = hosts(lan)[at].spawn(&redis::server())?;
        let grounds = Self { lan, services, server, data: data.clone(), at };
        let address = address()?;
        let filled = lan.client("filler", move || data.fill(address))?;
        filled.join().map_err(|_| anyhow!("the filler panicked"))??.context("filling redis")?;
        Ok(grounds)
    }

    /// Moves redis to the other host.
    pub(crate) fn shift(&mut self) -> Result<Moved> {
        self.shift_with(&[])
    }

    /// Moves redis to the other host, with more options. Its connections end.
    pub(crate) fn shift_with(&mut self, more: &[&str]) -> Result<Moved> {
        self.shift_by(&[&["--tcp-close"], more].concat())
    }

    /// Moves redis with its connections, with more options.
    pub(crate) fn shift_connected(&mut self, more: &[&str]) -> Result<Moved> {
        self.shift_by(&[&["--tcp-established"], more].concat())
    }

    fn shift_by(&mut self, more: &[&str]) -> Result<Moved> {
        let (from, service) = (hosts(self.lan)[self.at], &self.services[1 - self.at]);
        let started = Instant::now();
        let options = [&["--move-ip", Lan::MOVE_IP], more].concat();
        let command = self.lan.start_move(from, &service.address, self.server.pid, &options)?;
        let mut peak_kib = 0;
        while from.exit_of(command.pid).is_none() && started.elapsed() < MOVE {
            peak_kib = peak_kib.max(peak(from, command.pid));
            std::thread::sleep(Duration::from_millis(10));
        }
        let outcome = self.lan.finish_move(from, &command, Duration::from_secs(1))?.expect_moved()?;
        self.at = 1 - self.at;
        if std::env::var_os("REPORTS").is_some() {
            eprintln!("{}\n{}", outcome.report, outcome.stderr);
        }
        Ok(Moved { report: outcome.report, started, peak_kib })
    }

    /// Binds the server to one processor.
    pub(crate) fn pin(&self, cpu: usize) -> Result<()> {
        let words = ["taskset", "-a", "-c", "-p", &cpu.to_string(), &self.server.pid.to_string()];
        let (exit, _, errors) = hosts(self.lan)[self.at].run(&Spawn::new(words), Duration::from_secs(10))?;
        ensure!(exit.code == Some(0), "taskset: {errors}");
        Ok(())
    }

    /// A client that runs until its [`Seen`] says stop.
    pub(crate) fn client(
        &self,
        work: impl Fn(SocketAddrV4, &Data, &Seen) -> std::io::Result<()> + Send + 'static,
        seen: &Arc<Seen>,
    ) -> Result<JoinHandle<migrate::testbed::Result<std::io::Result<()>>>> {
        let (address, data, seen) = (address()?, self.data.clone(), seen.clone());
        Ok(self.lan.client("client", move || work(address, &data, &seen))?)
    }
}

impl Drop for Grounds<'_> {
    fn drop(&mut self) {
        let _ = hosts(self.lan)[self.at].kill(self.server.pid);
    }
}

pub(crate) fn hosts(lan: &Lan) -> [&Host; 2] {
    [&lan.a, &lan.b]
}

/// The largest resident memory that a process has had, in KiB; 0 if it is gone.
pub(crate) fn peak(host: &Host, pid: i32) -> u64 {
    let status = std::fs::read_to_string(host.proc(pid).join("status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|text| text.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0)
}
