//! The outgoing side, behind `migrate --to HOST:PORT PID`.
//!
//! [`run`] examines the process and asks the destination to examine the plan ([`plan`]); only if nobody has
//! anything against it is the process touched. Then [`machine`] decides and `driver` performs.

mod ask;
mod check;
mod driver;
mod hooks;
mod leftovers;
mod looks;
pub mod machine;
mod orphans;
mod outcome;
mod owed;
mod pace;
pub mod plan;
pub mod policy;
pub mod postcopy;
pub mod precopy;
pub mod protocol;
pub mod resolve;
pub mod sentinel;
mod serving;
mod wire;

pub use ask::OverQuic;
pub use check::{Verdict, check};

use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};
use ring::rand::{SecureRandom, SystemRandom};

use crate::config::SourceConfig;
use crate::engine::alive;
use crate::engine::hook::Hooks;
use crate::engine::kernel::{Host, HostError};
use crate::engine::own_files;
use crate::engine::reason::{Reason, chain};
use crate::engine::state::files::Lasting;
use crate::identity::{IdentityError, Node};
use crate::journal::JournalError;
use crate::migration::{MigrationId, ProcessKey};
use crate::operator::protocol::Side;
use crate::operator::{self, About, Board, Listener, Orders};
use crate::report::{Outcome, Report};
use crate::transport::{self, Incoming, Link, Settings};
use crate::wire::{Body, Control};

use looks::Looks;

/// How long the destination may take to examine a plan that is refused here already.
const CHECK_PATIENCE: Duration = Duration::from_secs(30);

/// Why not even an examination was possible.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// Our key or the trusted peers.
    #[error("this node's identity")]
    Identity(#[from] IdentityError),
    /// What this host has.
    #[error("examining this host")]
    Host(#[from] HostError),
    /// What earlier migrations have left.
    #[error("looking for unresolved migrations")]
    Journal(#[source] JournalError),
    /// There is no thread to run hooks on.
    #[error("preparing to run hooks")]
    Hooks(#[source] std::io::Error),
    /// The kernel gave no random bytes.
    #[error("making a migration id")]
    Random,
}

/// Moves a process, or says why not. The report tells which.
///
/// # Errors
/// [`SourceError`] before anything was even looked at.
pub fn run(config: &SourceConfig) -> Result<Report, SourceError> {
    own_files::make_room();
    let orders = watch_signals();
    let started = Instant::now();
    let hooks = Hooks::start(&config.allowed.hooks).map_err(SourceError::Hooks)?;
    let node = Arc::new(Node::open(&config.state_dir)?);
    let host = Host::probe()?;
    let board = Arc::new(Board::default());
    // Dropped after the posting has ended: an order that waits for that is still answered.
    let _listener = Listener::start(&config.state_dir, board.clone());
    let mut looks = Looks::default();
    loop {
        let attempt = Attempt { config, started, orders: &orders, hooks: &hooks, node: &node, host: &host };
        let mut report = match attempt.make(&board)? {
            End::Refused(report) if !looks.stand(&report.reasons) && !orders.cancelled() => {
                tracing::info!(reasons = report.reasons.len(), "refused: looking again, it may have passed");
                continue;
            }
            End::Refused(report) | End::Final(report) => report,
        };
        report.total = started.elapsed();
        if report.outcome == Outcome::Moved {
            tracing::info!(pid = config.pid, "moved");
        }
        return Ok(report);
    }
}

/// What all attempts of one command have in common.
struct Attempt<'a> {
    config: &'a SourceConfig,
    started: Instant,
    orders: &'a Arc<Orders>,
    hooks: &'a Hooks,
    node: &'a Arc<Node>,
    host: &'a Host,
}

/// How an attempt ended.
enum End {
    /// The preflight of either side has found something that may pass by itself; the process was not touched.
    Refused(Report),
    /// Anything else.
    Final(Report),
}

impl Attempt<'_> {
    fn make(&self, board: &Arc<Board>) -> Result<End, SourceError> {
        let config = self.config;
        let id = new_id()?;
        let mut report = Report::new(id.to_string(), config.pid, config.to.to_string());
        let about = About {
            id,
            side: Side::Source,
            pid: config.pid,
            command: operator::client::command_of(config.pid.unsigned_abs()),
            peer: config.to.to_string(),
        };
        let posting = board.post(about, self.orders.clone());
        let settings =
            Settings { bandwidth: config.bandwidth.map(|b| b.bytes_per_second()), ..Settings::default() };
        let hello = crate::hello::hello();

        // The process and the destination are looked at at the same time.
        let dial = {
            let (node, to, hello, settings) =
                (self.node.clone(), config.to.clone(), hello.clone(), settings.clone());
            std::thread::spawn(move || connect(node, &to, hello, settings))
        };
        let start_ticks = || alive::start_ticks(config.pid.unsigned_abs()).ok().flatten();
        let process =
            start_ticks().map(|start_ticks| ProcessKey { pid: config.pid.unsigned_abs(), start_ticks });
        let leftovers = leftovers::clear(&config.state_dir, process).map_err(SourceError::Journal)?;
        let mut plan = plan::survey(id, config.pid, &config.allowed, self.host);
        plan.reasons.extend(leftovers);
        let link = dial.join().unwrap_or_else(|_| Err(Reason::new("destination", "cannot be reached", "")));
        report.memory_bytes = plan.begin.memory_bytes;
        report.notes = std::mem::take(&mut plan.notes);
        let key = start_ticks();
        let mut link = match link {
            Ok(link) => Some(link),
            Err(reason) => {
                plan.reasons.push(reason);
                None
            }
        };
        if !plan.reasons.is_empty() || key.is_none() || link.is_none() {
            // Whatever the destination has against it is to be known in the same go.
            plan.begin.check_only = true;
            if let Some(link) = link.as_mut()
                && let Answer::Against(reasons) = ask(link, plan.begin)
            {
                plan.reasons.extend(reasons);
            }
            if plan.reasons.is_empty() {
                plan.reasons.push(Reason::new(format!("pid {}", config.pid), "has ended", ""));
            }
            report.reasons = plan.reasons;
            posting.end(operator::End::NotMoved);
            // Nobody wants to wait twice for a destination that does not answer.
            return Ok(if link.is_some() && key.is_some() {
                End::Refused(report)
            } else {
                End::Final(report)
            });
        }
        let process = ProcessKey { pid: config.pid.unsigned_abs(), start_ticks: key.unwrap_or(0) };
        let driver = driver::Driver {
            config,
            id,
            process,
            node: self.node.clone(),
            hello,
            settings,
            begin: plan.begin,
            link,
            posting,
            began: self.started,
            report,
            scanned: plan.scanned,
            lasting: Lasting::new(plan.sockets),
            hooks: self.hooks.clone(),
            state: driver::Held::default(),
        };
        let (report, refused) = driver.run();
        Ok(if refused { End::Refused(report) } else { End::Final(report) })
    }
}

fn connect(
    node: Arc<Node>,
    to: &crate::config::Destination,
    hello: crate::wire::Hello,
    settings: Settings,
) -> Result<Link, Reason> {
    let object = format!("destination {to}");
    let addrs = to
        .resolve()
        .map_err(|e| Reason::new(object.clone(), format!("has no address: {e}"), "check the name"))?;
    transport::connect(node, addrs, hello, settings).map_err(|e| Reason::new(object, chain(&e), ""))
}

/// What a destination says of a plan.
enum Answer {
    Consent,
    Against(Vec<Reason>),
    Silence,
}

/// Asks the destination what it has against a plan that will not be carried out.
fn ask(link: &mut Link, begin: crate::proto::control::Begin) -> Answer {
    let request = Control { message: Some(Body::Begin(begin)) };
    if let Err(error) = link.send_control(&request) {
        return Answer::Against(vec![Reason::new("destination", chain(&error), "")]);
    }
    match link.recv_timeout(CHECK_PATIENCE) {
        Some(Incoming::Control(answer)) => match answer.message {
            Some(Body::Refused(refused)) => {
                Answer::Against(refused.reasons.into_iter().map(Into::into).collect())
            }
            Some(Body::Ready(_)) => Answer::Consent,
            _ => Answer::Silence,
        },
        Some(Incoming::Lost(error)) => Answer::Against(vec![Reason::new("destination", chain(&error), "")]),
        _ => Answer::Silence,
    }
}

fn new_id() -> Result<MigrationId, SourceError> {
    let mut bytes = [0; crate::migration::ID_BYTES];
    SystemRandom::new().fill(&mut bytes).map_err(|_| SourceError::Random)?;
    Ok(MigrationId::new(bytes))
}

/// SIGINT and SIGTERM cancel the migration; a thread of its own waits for them. To be called before any
/// other thread exists.
fn watch_signals() -> Arc<Orders> {
    let orders = Arc::new(Orders::default());
    let mut set = SigSet::empty();
    set.add(Signal::SIGINT);
    set.add(Signal::SIGTERM);
    set.add(Signal::SIGHUP);
    if let Err(errno) = set.thread_block() {
        tracing::warn!(%errno, "signals will end the command instead of cancelling the migration");
        return orders;
    }
    let told = orders.clone();
    let watch = move || {
        while let Ok(signal) = set.wait() {
            eprintln!("migrate: {signal}: cancelling");
            told.cancel();
        }
    };
    if let Err(error) = std::thread::Builder::new().name("signals".into()).spawn(watch) {
        tracing::warn!(%error, "signals are not watched");
    }
    orders
}
