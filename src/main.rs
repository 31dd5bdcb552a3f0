//! The `migrate` program: arguments in, results and exit statuses out.
//!
//! Exit status: 0 done; 1 not done, and nothing has changed; 2 usage; 3 the outcome needs a look.

use std::process::ExitCode;

use anyhow::{Context, Result};
use migrate::cli::{self, Global, Request, TrustAction};
use migrate::config::{CheckConfig, SourceConfig};
use migrate::identity::Node;
use migrate::identity::trust::TrustStore;
use migrate::journal::{Journal, Outgoing};
use migrate::migration::{IdPrefix, MigrationId};
use migrate::operator::client::{self, Command, Ordered};
use migrate::operator::protocol::Verdict;
use migrate::operator::table::Table;
use migrate::source::OverQuic;
use migrate::source::resolve::{Patience, Resolution, resolve};
use migrate::source::sentinel::run_sentinel;
use migrate::telemetry;
use serde_json::json;

fn main() -> ExitCode {
    let (global, request) = cli::parse();
    telemetry::init(global.verbose);
    match run(&global, request) {
        Ok(status) => status,
        Err(error) => {
            eprintln!("migrate: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(global: &Global, request: Request) -> Result<ExitCode> {
    match request {
        Request::Id => id(global)?,
        Request::Trust(action) => trust(global, action)?,
        Request::Move(config) => return migrate_process(global, &config),
        Request::Serve(config) => migrate::dest::serve(config).context("serving")?,
        Request::Sentinel(args) => sentinel(global, &args)?,
        Request::Guardian(id) => migrate::dest::guardian::run(&global.state_dir, id)?,
        Request::Demo(args) => migrate::demo::run(&args)?,
        Request::Check(config) => return check(global, &config),
        Request::Resume(id) => return resume(global, id),
        Request::Status(which) => status(global, which.as_ref())?,
        Request::Cancel(which) => return order(global, &which, Command::Cancel),
        Request::Postcopy(which) => return order(global, &which, Command::Postcopy),
    }
    Ok(ExitCode::SUCCESS)
}

fn migrate_process(global: &Global, config: &SourceConfig) -> Result<ExitCode> {
    let report = migrate::source::run(config)?;
    if global.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{report}");
    }
    Ok(ExitCode::from(report.exit_status()))
}

/// The exit status of an outcome that needs a look.
const UNKNOWN: u8 = 3;

fn check(global: &Global, config: &CheckConfig) -> Result<ExitCode> {
    let Some(pid) = config.pid else { return Ok(check_host(global)) };
    let verdict = migrate::source::check(config, pid)?;
    if global.json {
        println!("{}", serde_json::to_string(&verdict)?);
    } else {
        verdict.reasons.iter().for_each(|reason| println!("{reason}"));
        verdict.notes.iter().for_each(|note| println!("note: {note}"));
        match (verdict.reasons.is_empty(), &config.to) {
            (true, Some(to)) => println!("pid {pid} can be moved to {to}."),
            (true, None) => println!("Nothing here stands against moving pid {pid}."),
            (false, _) => println!("pid {pid} cannot be moved."),
        }
    }
    Ok(if verdict.reasons.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn check_host(global: &Global) -> ExitCode {
    let features = migrate::engine::features::features();
    let good = features.iter().all(|feature| feature.available || !feature.required);
    if global.json {
        println!("{}", json!({ "good": good, "features": features }));
    } else {
        features.iter().for_each(|feature| println!("{feature}"));
        let all = features.iter().all(|feature| feature.available);
        println!(
            "{}",
            match (good, all) {
                (true, true) => "Looks good.",
                (true, false) => "Looks good. Processes that need what is missing are refused.",
                (false, _) => "Nothing can be moved from or to this host.",
            }
        );
    }
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn resume(global: &Global, id: MigrationId) -> Result<ExitCode> {
    let journal = Journal::<Outgoing>::open(&global.state_dir)?;
    let mut destination = OverQuic::new(global.state_dir.clone());
    let (word, text) = match resolve(&journal, id, &mut destination, Patience::Once) {
        Ok(Some(Resolution::Moved)) => ("moved", "the destination has the process".to_owned()),
        Ok(Some(Resolution::NotMoved)) => ("not_moved", "the process runs here as before".to_owned()),
        Ok(Some(Resolution::Nothing)) => ("nothing", "there is nothing (left) to resolve here".to_owned()),
        Ok(None) => {
            ("unknown", "the destination cannot be asked: the process stays here, stopped".to_owned())
        }
        Err(error) => ("unknown", format!("{:#}", anyhow::Error::new(error))),
    };
    if global.json {
        println!("{}", json!({ "migration_id": id.to_string(), "outcome": word, "text": text }));
    } else {
        println!("migration {id}: {text}");
    }
    Ok(if word == "unknown" { ExitCode::from(UNKNOWN) } else { ExitCode::SUCCESS })
}

fn status(global: &Global, which: Option<&IdPrefix>) -> Result<()> {
    let known = client::status(&global.state_dir, which)?;
    known.troubles.iter().for_each(|trouble| eprintln!("migrate: {trouble}"));
    if global.json {
        println!("{}", json!({ "migrations": known.migrations }));
    } else {
        print!("{}", Table(&known.migrations));
    }
    Ok(())
}

fn order(global: &Global, which: &IdPrefix, command: Command) -> Result<ExitCode> {
    let Ordered { id, verdict } = client::order(&global.state_dir, which, command)?;
    let (word, text) = match &verdict {
        Verdict::Cancelled => ("cancelled", "the process runs here as before"),
        Verdict::Switched => ("switched", "the process is frozen, the rest of its memory follows"),
        Verdict::TooLate(why) => ("too_late", why.as_str()),
        Verdict::Refused(why) => ("refused", why.as_str()),
        Verdict::Unknown => ("unknown", "there is no such migration (any more)"),
    };
    if global.json {
        println!("{}", json!({ "migration_id": id.to_string(), "outcome": word, "text": text }));
    } else {
        println!("migration {id}: {}: {text}", word.replace('_', " "));
    }
    let followed = matches!(verdict, Verdict::Cancelled | Verdict::Switched);
    Ok(if followed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn sentinel(global: &Global, args: &[String]) -> Result<()> {
    let id = args.first().context("which migration?")?.parse().context("the migration's id")?;
    let mut destination = OverQuic::new(global.state_dir.clone());
    run_sentinel(&global.state_dir, id, &mut destination)?;
    Ok(())
}

fn id(global: &Global) -> Result<()> {
    let node = Node::open(&global.state_dir).context("this node's identity")?;
    let fingerprint = node.fingerprint().to_string();
    if global.json {
        println!("{}", json!({ "fingerprint": fingerprint }));
    } else {
        println!("{fingerprint}");
    }
    Ok(())
}

fn trust(global: &Global, action: TrustAction) -> Result<()> {
    let store = TrustStore::new(&global.state_dir, None);
    match action {
        TrustAction::Add { name, fingerprint } => store.add(&name, fingerprint.parse()?)?,
        TrustAction::Remove { name } => store.remove(&name)?,
        TrustAction::List => {
            let peers = store.list()?;
            if global.json {
                let peers: Vec<_> = peers
                    .iter()
                    .map(|peer| json!({ "name": peer.name, "fingerprint": peer.fingerprint.to_string() }))
                    .collect();
                println!("{}", json!(peers));
            } else {
                for peer in peers {
                    println!("{} {}", peer.name, peer.fingerprint);
                }
            }
        }
    }
    Ok(())
}
