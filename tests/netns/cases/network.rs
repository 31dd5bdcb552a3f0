//! Peers that are not trusted, and networks that are not good.

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use migrate::testbed::{Host, Lan, STATE};

use crate::case::{Case, Choices, Result, ensure};
use crate::relay::{Relay, Weather};
use crate::workload::Workload;

const MOVE: Duration = Duration::from_secs(180);

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("network/untrusted_source", |lan| untrusted(lan, true)),
        Case::new("network/untrusted_destination", |lan| untrusted(lan, false)),
        Case::new("network/garbage", garbage),
        Case::new("network/loss_repetition_delay", |lan| {
            through(lan, Weather { lost: 20, repeated: 20, delay: Duration::from_millis(2), reorders: true })
        }),
        Case::new("network/slow_link", slow),
    ]
}

/// Only one side accepts the other: nothing is moved, the text names the fingerprint and the command, and
/// once that command is run the move works.
fn untrusted(lan: &Lan, source_is_unknown: bool) -> Result {
    let mut workload = Workload::start(&lan.a, "counter", &[])?;
    let (of_a, of_b) = (fingerprint(lan, &lan.a)?, fingerprint(lan, &lan.b)?);
    if source_is_unknown {
        trust(lan, &lan.a, "b", &of_b)?;
    } else {
        trust(lan, &lan.b, "a", &of_a)?;
    }
    let service = lan.serve(&lan.b)?;
    let before = lan.b.processes()?;
    let outcome = lan.move_to(&lan.a, &service, workload.pid(), &[], MOVE)?;
    let text = format!("{:?} {}\n{}", outcome.exit, outcome.report, outcome.stderr);
    ensure(outcome.exit.code == Some(1), || format!("not refused: {text}"))?;
    ensure(text.contains("trust"), || format!("the text does not say what to do: {text}"))?;
    let unknown = if source_is_unknown { &of_a } else { &of_b };
    let said = format!("{text}{}", lan.b.stderr(&service.job));
    ensure(said.contains(unknown.as_str()), || format!("the fingerprint {unknown} is not named: {said}"))?;
    workload.check_going_on(&lan.a)?;
    ensure(lan.b.processes()? == before, || format!("left: {:?}", lan.b.processes()))?;

    if source_is_unknown {
        trust(lan, &lan.b, "a", &of_a)?;
    } else {
        trust(lan, &lan.a, "b", &of_b)?;
    }
    lan.move_to(&lan.a, &service, workload.pid(), &[], MOVE)?.expect_moved()?;
    workload.check_going_on(&lan.b)
}

/// The last word that `migrate id` prints.
fn fingerprint(lan: &Lan, host: &Host) -> Result<String> {
    let text = lan.identity(host)?;
    Ok(text.split_whitespace().last().ok_or("migrate id prints nothing")?.to_owned())
}

fn trust(lan: &Lan, host: &Host, name: &str, fingerprint: &str) -> Result {
    let outcome =
        lan.run(host, &["trust", "add", name, fingerprint, "--state-dir", STATE], Duration::from_secs(20))?;
    ensure(outcome.exit.code == Some(0), || format!("{:?} {}", outcome.exit, outcome.stderr))
}

/// Datagrams of chance to the service, before and during a move.
fn garbage(lan: &Lan) -> Result {
    let mut workload = Workload::start(&lan.a, "counter", &[])?;
    lan.share_identity()?;
    let service = lan.serve(&lan.b)?;
    let to: SocketAddr = service.address.parse()?;
    let sending = lan.client("garbage", move || -> std::io::Result<()> {
        let mut choices = Choices::new("garbage");
        let socket = UdpSocket::bind((Lan::CLIENT, 0))?;
        for _ in 0..20_000 {
            let length = usize::try_from(choices.below(1400)).unwrap_or(0);
            let bytes: Vec<u8> = (0..length).map(|_| u8::try_from(choices.below(256)).unwrap_or(0)).collect();
            // A refused datagram is an answer too.
            let _ = socket.send_to(&bytes, to);
        }
        Ok(())
    })?;
    lan.move_to(&lan.a, &service, workload.pid(), &[], MOVE)?.expect_moved()?;
    sending.join().map_err(|_| "the sender panicked")???;
    workload.check_going_on(&lan.b)?;
    ensure(lan.b.exit_of(service.job.pid).is_none(), || "the service has ended".to_owned())
}

fn through(lan: &Lan, weather: Weather) -> Result {
    let mut workload = Workload::start(&lan.a, "writer", &["2", "32", "/run/shared/writer", "2"])?;
    lan.share_identity()?;
    lan.serve(&lan.b)?;
    let relay = Relay::start(lan, weather)?;
    let job = lan.start_move(&lan.a, &relay.address, workload.pid(), &[])?;
    lan.finish_move(&lan.a, &job, MOVE)?.expect_moved().map_err(|error| {
        format!(
            "{error}\nthe writer ended {:?}, it wrote: {}",
            lan.a.exit_of(workload.pid()),
            lan.a.stdout(&workload.job)
        )
    })?;
    workload.check_going_on(&lan.b)
}

/// 200 Mbit/s: slower than the writer, so that the rounds do not converge.
fn slow(lan: &Lan) -> Result {
    let mut workload = Workload::start(&lan.a, "writer", &["4", "64", "/run/shared/writer", "8"])?;
    lan.share_identity()?;
    let service = lan.serve(&lan.b)?;
    lan.limit_rate(&lan.a, 200)?;
    lan.move_to(&lan.a, &service, workload.pid(), &[], MOVE)?.expect_moved().map_err(|error| {
        format!(
            "{error}\nthe writer ended {:?}, it wrote: {}",
            lan.a.exit_of(workload.pid()),
            lan.a.stdout(&workload.job)
        )
    })?;
    workload.check_going_on(&lan.b)
}
