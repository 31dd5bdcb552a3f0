//! What a system call costs that a stopped process runs for us.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Result;
use migrate::engine::freeze::Frozen;
use migrate::engine::remote::{Batch, RemoteCalls};

use crate::table::median;

const TIMES: usize = 300;

/// Microseconds per call in batches of these sizes, by a sleeping process.
pub(crate) fn measure(sizes: &[usize]) -> Result<Vec<f64>> {
    let mut sleeper = Sleeper(Command::new("sleep").arg("100").stdin(Stdio::null()).spawn()?);
    let mut frozen = Frozen::freeze(i32::try_from(sleeper.0.id())?, Duration::from_secs(2))?;
    let mut costs = Vec::new();
    for &size in sizes {
        let mut batch = Batch::new();
        for _ in 0..size {
            batch.call(libc::SYS_getppid, &[]);
        }
        let mut times = Vec::new();
        for _ in 0..TIMES {
            let start = Instant::now();
            frozen.run_all_ok("asking for the parent", &batch)?;
            times.push(start.elapsed().as_secs_f64() * 1e6 / size as f64);
        }
        costs.push(median(&mut times));
    }
    frozen.thaw()?;
    sleeper.0.kill()?;
    Ok(costs)
}

struct Sleeper(Child);

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
