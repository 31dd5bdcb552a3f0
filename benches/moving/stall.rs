//! The longest wait of a client whose connection moves along, by the number of connections.

use std::net::TcpStream;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use migrate::testbed::{Lan, Service};
use nix::sys::resource::{Resource, setrlimit};

use crate::client::{self, Seen};
use crate::grounds::{Grounds, Moved};
use crate::table::{self, median, words};

const MIB: usize = 64;
/// Connections that only wait, beside the one that is used.
const IDLE: [usize; 3] = [0, 200, 2000];
/// Moves of each number; the first is not counted.
const MOVES: usize = 12;
/// Phases whose cost grows with the number of connections; those of the destination are inside `apply` and `commit`.
const PHASES: [&str; 9] =
    ["freeze", "addresses", "lock", "scan", "pages", "capture", "dest_build", "dest_restore", "dest_accept"];

pub(crate) fn run(lan: &Lan, services: &[Service; 2]) -> Result<()> {
    println!(
        "## Stall of a client with a live connection, ms (medians; SET and PING in turn, every 0.25 ms)\n"
    );
    setrlimit(Resource::RLIMIT_NOFILE, 8192, 8192)?;
    let (mut rows, mut details, mut alone) = (Vec::new(), Vec::new(), 0.0);
    for idle in IDLE {
        let mut grounds = Grounds::start(lan, services, MIB)?;
        let address = crate::grounds::address()?;
        let dial =
            move || (0..idle).map(|_| TcpStream::connect(address)).collect::<std::io::Result<Vec<_>>>();
        let held = lan.client("idle", dial)?.join().map_err(|_| anyhow!("the clients panicked"))??;
        let held = held.context("connecting")?;
        let seen = Seen::new();
        let client = grounds.client(client::pauses, &seen)?;
        let mut moved = Vec::new();
        let mut stalls = Vec::new();
        let result = (0..MOVES).try_for_each(|turn| -> Result<()> {
            std::thread::sleep(Duration::from_millis(400));
            let _ = seen.take_gaps();
            let one = grounds.shift_connected(&[])?;
            std::thread::sleep(Duration::from_millis(300));
            let [broken, stall] = seen.take_gaps();
            anyhow::ensure!(broken.is_none(), "the connection broke");
            if turn > 0 {
                stalls.push(stall.context("no answer at all")?.whole.as_secs_f64() * 1e3);
                moved.push(one);
            }
            Ok(())
        });
        seen.stop.store(true, Ordering::Relaxed);
        client.join().map_err(|_| anyhow!("the client panicked"))???;
        result?;
        drop(held);
        let of = |value: &dyn Fn(&Moved) -> f64| median(&mut moved.iter().map(value).collect::<Vec<_>>());
        let stall = median(&mut stalls);
        if idle == 0 {
            alone = stall;
        }
        let each =
            if idle == 0 { String::new() } else { format!("{:.1}", (stall - alone) * 1e3 / idle as f64) };
        let worst = stalls.iter().copied().fold(0.0, f64::max);
        let number = (idle + 1).to_string();
        rows.push(vec![
            number.clone(),
            moved.len().to_string(),
            format!("{stall:.1}"),
            format!("{worst:.1}"),
            format!("{:.1}", of(&|m| m.number("downtime_ms"))),
            each,
        ]);
        let phases = PHASES.iter().map(|phase| format!("{:.2}", of(&|m: &Moved| m.phase(phase))));
        details.push(std::iter::once(number).chain(phases).collect());
    }
    table::print(&words(&["connections", "moves", "stall", "worst", "report", "us for each more"]), &rows);
    println!("Phases of the downtime, ms\n");
    table::print(&words(&[&["connections"], &PHASES[..]].concat()), &details);
    Ok(())
}
