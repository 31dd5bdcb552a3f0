//! What the program says while it works: log set-up.
//!
//! Standard output belongs to results; the log goes to standard error. Levels: error, the asked action
//! failed; warn, it goes on but somebody should look; info, rare changes of state; debug, steps; trace,
//! single objects.

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::LevelFilter;

/// Environment variable with a filter in the syntax of `tracing_subscriber`, instead of `-v`.
const FILTER_VARIABLE: &str = "MIGRATE_LOG";

/// Sets up the log of the process. `verbosity` counts `-v`; a filter in `MIGRATE_LOG` comes before it.
pub fn init(verbosity: u8) {
    let level = match verbosity {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    // The libraries below us log at length; `-v` is about this program.
    let ours = || EnvFilter::new(format!("warn,migrate={level}"));
    let (filter, bad) = match std::env::var(FILTER_VARIABLE) {
        Ok(text) => match EnvFilter::builder().with_default_directive(LevelFilter::WARN.into()).parse(text) {
            Ok(filter) => (filter, None),
            Err(error) => (ours(), Some(error)),
        },
        Err(_) => (ours(), None),
    };
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()));
    // A second call, as tests make it, leaves the first log in place.
    let _ = log.try_init();
    if let Some(error) = bad {
        tracing::warn!(%error, "{FILTER_VARIABLE} is not a filter and is ignored");
    }
}
