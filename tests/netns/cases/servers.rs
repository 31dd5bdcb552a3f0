//! Real servers under a writer that reconnects to the service address: no acknowledged write is missing.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use migrate::testbed::load::{Load, Store};
use migrate::testbed::redis::{self, Redis};
use migrate::testbed::{Lan, Spawn, TestbedError, wait_for};

use crate::case::{Case, Need, Result, ensure};
use crate::memcached::{self, Memcached};
use crate::resets::Resets;

const KEYS: u64 = 200_000;
/// About 160 MiB.
const MANY_KEYS: u64 = 800_000;
const VALUE_BYTES: usize = 120;
/// The writer must get on this much, before the move and again after it.
const SOME_WRITES: u64 = 2_000;
const MOVE: Duration = Duration::from_secs(120);

pub(crate) fn cases() -> Vec<Case> {
    let redis = || Need::Program("redis-server");
    let memcached = || Need::Program("memcached");
    vec![
        Case::new("servers/redis_unmoved", |lan| {
            serve::<Redis>(lan, &redis::server(), redis::PORT, KEYS, None)
        })
        .needs(redis()),
        Case::new("servers/memcached_unmoved", |lan| {
            serve::<Memcached>(lan, &memcached::server(), memcached::PORT, KEYS, None)
        })
        .needs(memcached()),
        Case::new("servers/redis", |lan| {
            serve::<Redis>(lan, &redis::server(), redis::PORT, KEYS, Some("auto"))
        })
        .needs(redis()),
        Case::new("servers/memcached", |lan| {
            serve::<Memcached>(lan, &memcached::server(), memcached::PORT, KEYS, Some("auto"))
        })
        .needs(memcached()),
        Case::new("servers/redis_connected", |lan| connected::<Redis>(lan, &redis::server(), redis::PORT))
            .needs(redis()),
        Case::new("servers/memcached_connected", |lan| {
            connected::<Memcached>(lan, &memcached::server(), memcached::PORT)
        })
        .needs(memcached()),
        limited("auto").needs(redis()),
        limited("postcopy").needs(redis()),
    ]
}

/// More memory than goes over a gigabit while somebody waits.
fn limited(mode: &'static str) -> Case {
    Case::new(format!("servers/redis_over_1_gbit_{mode}"), move |lan| {
        lan.limit_rate(&lan.a, 1000)?;
        lan.limit_rate(&lan.b, 1000)?;
        serve::<Redis>(lan, &redis::server(), redis::PORT, MANY_KEYS, Some(mode))
    })
}

/// Under a writer, and moved in a mode if one is given: the writer has to connect again.
fn serve<S: Store + 'static>(lan: &Lan, server: &Spawn, port: u16, keys: u64, mode: Option<&str>) -> Result {
    let options = mode.map(|mode| ["--tcp-close", "--mode", mode]);
    let options = options.as_ref().map(<[_; 3]>::as_slice);
    under_writer::<S>(lan, server, port, keys, options, u64::from(mode.is_some()))
}

/// The writer keeps its connection.
fn connected<S: Store + 'static>(lan: &Lan, server: &Spawn, port: u16) -> Result {
    under_writer::<S>(lan, server, port, KEYS, Some(&["--tcp-established"]), 0)
}

fn under_writer<S: Store + 'static>(
    lan: &Lan,
    server: &Spawn,
    port: u16,
    keys: u64,
    options: Option<&[&str]>,
    reconnects: u64,
) -> Result {
    let address = SocketAddr::new(Lan::SERVICE.parse()?, port);
    let job = lan.a.spawn(server)?;
    in_client(lan, "connect", move || {
        wait_for("the server answering", Duration::from_secs(20), || Ok(S::connect(address).ok().map(drop)))
    })??;
    let load = in_client(lan, "fill", move || Load::fill::<S>(address, keys, VALUE_BYTES))??;

    let (stop, writes) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let (stopped, counted) = (Arc::clone(&stop), Arc::clone(&writes));
    let writer = lan.client("writer", move || {
        let mut load = load;
        let activity = load.write_until::<S>(address, &stopped, &counted);
        (load, activity)
    })?;
    // Whatever fails from here on, the writer is told to stop.
    let resets = Resets::watch(lan, port)?;
    let outcome = under_load(lan, job.pid, options, &writes);
    // Whoever closes the writer's connection may leave something of it unread.
    let unbroken = if reconnects == 0 { resets.none(lan) } else { Ok(()) };
    stop.store(true, Ordering::Relaxed);
    let (load, activity) = writer.join().map_err(|_| "the writer panicked")??;
    outcome?;
    unbroken?;
    let wrong = in_client(lan, "verify", move || load.verify::<S>(address))??;
    ensure(wrong.is_empty(), || format!("acknowledged writes are missing: {}", wrong.join("; ")))?;
    ensure(activity.reconnects == reconnects, || format!("{activity:?}"))?;
    println!(
        "    {} writes, longest pause {:.1} ms",
        activity.writes,
        activity.longest_pause.as_secs_f64() * 1000.0
    );
    Ok(())
}

fn under_load(lan: &Lan, pid: i32, options: Option<&[&str]>, writes: &AtomicU64) -> Result {
    more_writes(writes)?;
    if let Some(options) = options {
        lan.share_identity()?;
        let service = lan.serve(&lan.b)?;
        let all = [options, &["--move-ip", Lan::MOVE_IP]].concat();
        let outcome = lan.move_to(&lan.a, &service, pid, &all, MOVE)?.expect_moved()?;
        for field in ["migration_id", "downtime_ms", "rounds", "pages_data", "bytes_wire", "phases"] {
            ensure(!outcome.report[field].is_null(), || {
                format!("the report has no {field}: {}", outcome.report)
            })?;
        }
        println!(
            "    {} rounds, downtime {} ms, {} pages after the resume, of which {} were waited for",
            outcome.report["rounds"].as_array().map_or(0, Vec::len),
            outcome.report["downtime_ms"],
            outcome.report["pages_postcopy"],
            outcome.report["pages_faulted"]
        );
        ensure(
            !options.contains(&"postcopy") || outcome.report["pages_postcopy"].as_u64() > Some(0),
            || format!("nothing followed after the resume: {}", outcome.report),
        )?;
        ensure(lan.b.proc(pid).exists() && !lan.a.proc(pid).exists(), || {
            "it is on the wrong host".to_owned()
        })?;
        ensure(lan.has_service(&lan.b)? && !lan.has_service(&lan.a)?, || {
            "the address did not move".to_owned()
        })?;
    }
    more_writes(writes)
}

fn more_writes(writes: &AtomicU64) -> Result {
    let before = writes.load(Ordering::Relaxed);
    wait_for("more acknowledged writes", Duration::from_secs(60), || {
        Ok((writes.load(Ordering::Relaxed) >= before + SOME_WRITES).then_some(()))
    })?;
    Ok(())
}

fn in_client<T: Send + 'static>(
    lan: &Lan,
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    let thread = lan.client(name, work)?;
    let joined: std::result::Result<T, TestbedError> = thread.join().map_err(|_| "the client panicked")?;
    Ok(joined?)
}
