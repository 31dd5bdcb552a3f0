//! `migrate demo`: two hosts on this machine, a redis under writes, and the move of it from one to the
//! other, with the proof that nothing was lost.
//!
//! Everything happens in namespaces that end with this command ([`crate::testbed`]), however it ends.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::testbed::load::{Activity, Load, Store};
use crate::testbed::redis::{self, Redis};
use crate::testbed::{Lan, Outcome, Result, TestbedError, Tools, agent, wait_for};

const VALUE_BYTES: usize = 1000;
/// How long the writer runs before the move, and after it.
const UNDER_LOAD: Duration = Duration::from_secs(2);
const MOVE: Duration = Duration::from_secs(120);

/// The options of `migrate demo`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// How many keys of 1 kB the server holds.
    #[arg(long, default_value_t = 100_000)]
    keys: u64,
    /// Run as the first process of a simulated host: name, first PID, `whole-run` or `private`.
    #[arg(long, hide = true, num_args = 3)]
    node_agent: Option<Vec<String>>,
}

/// Runs the demo, telling what happens on standard output.
///
/// # Errors
/// A part of the grounds could not be made, the move failed, or data is missing.
pub fn run(args: &Args) -> Result<()> {
    match args.node_agent.as_deref() {
        Some([name, first_pid, run]) => be_agent(name, first_pid, run),
        _ => show(args),
    }
}

fn be_agent(name: &str, first_pid: &str, run: &str) -> Result<()> {
    let first_pid = first_pid.parse().map_err(|_| TestbedError::Program(format!("PID {first_pid:?}")))?;
    agent::run(name, first_pid, run == "whole-run")
        .map_err(|source| TestbedError::Io { step: format!("running host {name}"), source })
}

fn show(args: &Args) -> Result<()> {
    check_machine()?;
    let migrate = std::env::current_exe()
        .map_err(|source| TestbedError::Io { step: "finding this program".to_owned(), source })?;
    let agent = vec![migrate.clone().into_os_string(), "demo".into(), "--node-agent".into()];
    println!("Making two hosts, a ({}) and b ({}), on this machine.", Lan::A, Lan::B);
    let lan = Lan::start(&Tools { migrate, agent })?;
    lan.share_identity()?;

    let address = SocketAddr::new(Lan::SERVICE.parse().map_err(|_| bad("address"))?, redis::PORT);
    let server = lan.a.spawn(&redis::server())?;
    client(&lan, move || {
        wait_for("redis answering", Duration::from_secs(20), || Ok(Redis::connect(address).ok().map(drop)))
    })??;
    let keys = args.keys;
    let load = client(&lan, move || Load::fill::<Redis>(address, keys, VALUE_BYTES))?
        .map_err(|source| TestbedError::Io { step: "filling redis".to_owned(), source })?;
    println!("redis-server runs on a as PID {}, at {address}, with {keys} keys of 1 kB.", server.pid);

    let (stop, writes) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let (stopped, counted) = (Arc::clone(&stop), Arc::clone(&writes));
    let writer = lan.client("writer", move || {
        let mut load = load;
        let activity = load.write_until::<Redis>(address, &stopped, &counted);
        (load, activity)
    })?;
    println!("A client on the network writes to it all the time, and notes what is acknowledged.\n");
    let moved = move_under_load(&lan, server.pid, &writes);
    stop.store(true, Ordering::Relaxed);
    let (load, activity) = writer.join().map_err(|_| bad("writer"))??;
    let outcome = moved?;

    report(&outcome, &activity);
    let keys = load.keys();
    let wrong = client(&lan, move || load.verify::<Redis>(address))?
        .map_err(|source| TestbedError::Io { step: "reading redis on b".to_owned(), source })?;
    if !wrong.is_empty() {
        return Err(TestbedError::Program(format!("acknowledged writes are missing: {}", wrong.join("; "))));
    }
    println!("Checked on b: all {keys} keys have the value that was acknowledged last. Nothing was lost.");
    Ok(())
}

fn move_under_load(lan: &Lan, pid: i32, writes: &AtomicU64) -> Result<Outcome> {
    run_for(UNDER_LOAD, writes)?;
    let service = lan.serve(&lan.b)?;
    println!("on b$ migrate serve --listen {}", service.address);
    let options = ["--tcp-close", "--move-ip", Lan::MOVE_IP];
    println!("on a$ migrate --to {} {} {pid}\n", service.address, options.join(" "));
    let outcome = lan.move_to(&lan.a, &service, pid, &options, MOVE)?.expect_moved()?;
    run_for(UNDER_LOAD, writes)?;
    Ok(outcome)
}

/// Waits for a time in which the writer must get on.
fn run_for(time: Duration, writes: &AtomicU64) -> Result<()> {
    let (start, before) = (Instant::now(), writes.load(Ordering::Relaxed));
    wait_for("more acknowledged writes", Duration::from_secs(30), || {
        let more = writes.load(Ordering::Relaxed) > before + 100;
        Ok((more && start.elapsed() >= time).then_some(()))
    })
}

fn report(outcome: &Outcome, activity: &Activity) {
    let number = |name: &str| outcome.report[name].as_f64().unwrap_or_default();
    let mib = |name: &str| number(name) / 1_048_576.0;
    let rounds = outcome.report["rounds"].as_array().map_or(0, Vec::len);
    println!("Moved to b, same PID, while it ran:");
    println!("  total time          {:9.1} ms", number("total_ms"));
    println!("  stopped for         {:9.1} ms", number("downtime_ms"));
    println!("  pause the client saw{:9.1} ms", activity.longest_pause.as_secs_f64() * 1000.0);
    println!("  memory              {:9.1} MiB in {rounds} rounds", mib("memory_bytes"));
    println!("  on the wire         {:9.1} MiB", mib("bytes_wire"));
    println!("  sent while stopped  {:9} pages", number("pages_after_freeze"));
    println!("  writes acknowledged {:9}\n", activity.writes);
}

/// Says at once what is missing, with the command that helps.
fn check_machine() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        return Err(TestbedError::Program("the demo makes namespaces: run it as root".to_owned()));
    }
    for (program, package) in [
        ("redis-server", "redis-server"),
        ("ip", "iproute2"),
        ("unshare", "util-linux"),
        ("nsenter", "util-linux"),
        ("setsid", "util-linux"),
    ] {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let found = std::env::split_paths(&path).any(|folder: PathBuf| folder.join(program).exists());
        if !found {
            return Err(TestbedError::Program(format!(
                "{program} is not installed: apt-get install {package}"
            )));
        }
    }
    Ok(())
}

fn client<T: Send + 'static>(lan: &Lan, work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    lan.client("client", work)?.join().map_err(|_| bad("client"))?
}

fn bad(part: &str) -> TestbedError {
    TestbedError::Program(format!("the {part} of the demo is broken"))
}
