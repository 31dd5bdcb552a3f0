//! The grounds themselves: hosts and the network between them.

use std::time::{Duration, Instant};

use migrate::testbed::{Lan, Spawn};

use crate::case::{Case, Result, ensure};

pub(crate) fn cases() -> Vec<Case> {
    vec![Case::new("grounds/hosts", hosts), Case::new("grounds/cut", cut)]
}

/// What `a` starts has PIDs that `b` has not, and each sees only its own processes.
fn hosts(lan: &Lan) -> Result {
    let job = lan.a.spawn(&Spawn::new(["sleep", "1000"]))?;
    ensure(job.pid >= i32::try_from(Lan::FIRST_PID)?, || format!("PID {} on a", job.pid))?;
    ensure(lan.a.proc(job.pid).exists(), || "not seen on a".to_owned())?;
    ensure(!lan.b.proc(job.pid).exists(), || "seen on b".to_owned())?;
    let descriptors = std::fs::read_dir(lan.a.proc(job.pid).join("fd"))?.count();
    ensure(descriptors == 3, || format!("{descriptors} descriptors: some are inherited"))?;
    lan.a.kill(job.pid)?;
    let exit = lan.a.wait_exit(job.pid, Duration::from_secs(5))?;
    ensure(exit.signal == Some(libc::SIGKILL), || format!("{exit:?}"))?;
    ensure(lan.a.processes()?.is_empty(), || format!("{:?}", lan.a.processes()))?;
    Ok(())
}

/// A cut link carries nothing; a healed one does again.
fn cut(lan: &Lan) -> Result {
    ensure(reaches(lan)?, || "the link does not carry".to_owned())?;
    lan.cut(&lan.b)?;
    ensure(!reaches(lan)?, || "the cut link carries".to_owned())?;
    lan.heal(&lan.b)?;
    let end = Instant::now() + Duration::from_secs(10);
    while !reaches(lan)? {
        ensure(Instant::now() < end, || "the healed link does not carry".to_owned())?;
    }
    Ok(())
}

/// Whether the clients' place reaches host `b`: a refused connection is an answer.
fn reaches(lan: &Lan) -> Result<bool> {
    let attempt = lan.client("reach", || {
        let address = std::net::SocketAddr::new(Lan::B.parse().expect("an address"), 9);
        std::net::TcpStream::connect_timeout(&address, Duration::from_millis(300))
    })?;
    let answer = attempt.join().map_err(|_| "the client panicked")??;
    Ok(answer.is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused))
}
