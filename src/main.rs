//! The `migrate` program: arguments in, results and exit statuses out.
//!
//! Exit status: 0 done; 1 not done, and nothing has changed; 2 usage; 3 the outcome needs a look.

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use migrate::cli::{self, Global, Request, TrustAction};
use migrate::config::SourceConfig;
use migrate::identity::Node;
use migrate::identity::trust::TrustStore;
use migrate::source::OverQuic;
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
        Request::Demo(args) => migrate::demo::run(&args)?,
        Request::Check(_) => {
            bail!("not built yet");
        }
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
