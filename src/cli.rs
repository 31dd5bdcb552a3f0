//! The command line: what operators type, turned into the types of `config`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{ArgAction, Args, CommandFactory, Parser, Subcommand, ValueEnum};

use crate::config::{
    Allowed, Bandwidth, CheckConfig, DEFAULT_MAX_DOWNTIME, DEFAULT_MAX_ROUNDS, DEFAULT_PORT,
    DEFAULT_STATE_DIR, Destination, FilesOptions, Hook, MAX_HOOKS, Mode, MoveIp, OnTimeout, Remap,
    ServeConfig, SourceConfig, Timeout, parse_duration,
};
use crate::identity::Fingerprint;
use crate::migration::{IdPrefix, MigrationId};
use crate::pageserver::pack::Compression;

/// Move a running process to another machine.
///
/// `migrate --to HOST:PORT PID` moves the process; `migrate serve` accepts it there.
#[derive(Debug, Parser)]
#[command(name = "migrate", version, disable_help_subcommand = true)]
#[command(override_usage = "migrate --to HOST:PORT [OPTIONS] PID\n       migrate [OPTIONS] COMMAND")]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(flatten)]
    moving: MoveArgs,
    #[command(subcommand)]
    command: Option<SubCommand>,
}

/// Options of every command.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// Where this node's identity, its trusted peers and its records are kept
    #[arg(long, global = true, value_name = "DIR", default_value = DEFAULT_STATE_DIR)]
    pub state_dir: PathBuf,
    /// Say more on standard error; repeat for still more
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub verbose: u8,
    /// Print the result as one JSON object, the last line of standard output
    #[arg(long, global = true)]
    pub json: bool,
}

/// Options of a move. All optional here, because commands have none of them.
#[derive(Debug, Args)]
#[command(next_help_heading = "Options of a move")]
struct MoveArgs {
    /// The process to move
    #[arg(value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
    pid: Option<i32>,
    /// The node to move it to, where `migrate serve` runs
    #[arg(long, value_name = "HOST:PORT")]
    to: Option<Destination>,
    /// When the memory travels: before the process runs there, after, or as it pays (auto, the default)
    #[arg(long, value_enum, value_name = "MODE")]
    mode: Option<Mode>,
    /// Copy changed memory in at most so many rounds before the freeze (default 30)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_rounds: Option<u32>,
    /// Freeze once the rest is expected to take no longer than this (default 10ms)
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    max_downtime: Option<Duration>,
    /// How long the process may go on here before --on-timeout applies (default: no limit)
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    timeout: Option<Duration>,
    /// At the end of that time: let it stay (cancel, the default), or freeze it now and send the rest after
    /// the resume (postcopy) or before (force)
    #[arg(long, value_enum, value_name = "WHAT", requires = "timeout")]
    on_timeout: Option<OnTimeout>,
    /// Send no faster than this: 100M is MiB/s, 1Gbit is bits (default: no limit)
    #[arg(long, value_name = "RATE")]
    bandwidth: Option<Bandwidth>,
    /// Compress memory: auto (default, where it pays), none, or lz4
    #[arg(long, value_enum, value_name = "HOW")]
    compress: Option<CompressArg>,
    /// Move live TCP connections along: their peers notice nothing
    #[arg(long)]
    tcp_established: bool,
    /// Close established TCP connections; their peers see a clean end
    #[arg(long, conflicts_with = "tcp_established")]
    tcp_close: bool,
    /// Sockets with the address OLD have NEW at the destination (repeatable)
    #[arg(long, value_name = "OLD=NEW")]
    tcp_remap: Vec<Remap>,
    /// Leave standard streams behind that lead to a terminal, or to a pipe of somebody who stays; an open file that
    /// somebody shares who stays goes on with a position of its own
    #[arg(long)]
    shell_job: bool,
    /// Move this address along with the process (repeatable)
    #[arg(long, value_name = "ADDR/PREFIX@DEV")]
    move_ip: Vec<MoveIp>,
    /// Run CMD by /bin/sh at each stage of the move, which MIGRATE_STAGE names: pre-freeze, network-lock,
    /// network-unlock, post-resume, failed (repeatable)
    #[arg(long, value_name = "CMD")]
    hook: Vec<Hook>,
}

impl MoveArgs {
    /// The first option of a move that was given, for the error message.
    fn given(&self) -> Option<&'static str> {
        [
            (self.pid.is_some(), "PID"),
            (self.to.is_some(), "--to"),
            (self.mode.is_some(), "--mode"),
            (self.max_rounds.is_some(), "--max-rounds"),
            (self.max_downtime.is_some(), "--max-downtime"),
            (self.timeout.is_some(), "--timeout"),
            (self.bandwidth.is_some(), "--bandwidth"),
            (self.compress.is_some(), "--compress"),
            (self.tcp_established, "--tcp-established"),
            (self.tcp_close, "--tcp-close"),
            (!self.tcp_remap.is_empty(), "--tcp-remap"),
            (self.shell_job, "--shell-job"),
            (!self.move_ip.is_empty(), "--move-ip"),
            (!self.hook.is_empty(), "--hook"),
        ]
        .into_iter()
        .find_map(|(given, name)| given.then_some(name))
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum CompressArg {
    Auto,
    None,
    Lz4,
}

#[derive(Debug, Subcommand)]
enum SubCommand {
    /// Accept processes from trusted nodes, and run them here
    Serve {
        /// Address and port to listen on (UDP)
        #[arg(long, value_name = "ADDR:PORT", default_value_t = SocketAddr::from(([0, 0, 0, 0], DEFAULT_PORT)))]
        listen: SocketAddr,
        /// Run CMD by /bin/sh at each stage of a move to here, which MIGRATE_STAGE names: network-unlock,
        /// post-resume, failed (repeatable)
        #[arg(long, value_name = "CMD")]
        hook: Vec<Hook>,
    },
    /// Examine this host's kernel, or whether a process can be moved; nothing is touched
    Check {
        /// The process to examine
        #[arg(value_name = "PID", value_parser = clap::value_parser!(i32).range(1..))]
        pid: Option<i32>,
        /// Ask this node, too, whether it could take the process
        #[arg(long, value_name = "HOST:PORT", requires = "pid")]
        to: Option<Destination>,
        /// As for the move
        #[arg(long, requires = "pid")]
        tcp_established: bool,
        /// As for the move
        #[arg(long, requires = "pid", conflicts_with = "tcp_established")]
        tcp_close: bool,
        /// As for the move
        #[arg(long, requires = "pid")]
        shell_job: bool,
        /// As for the move
        #[arg(long, value_name = "ADDR/PREFIX@DEV", requires = "pid")]
        move_ip: Vec<MoveIp>,
        /// As for the move
        #[arg(long, value_name = "OLD=NEW", requires = "pid")]
        tcp_remap: Vec<Remap>,
        /// As for the move; it is not run
        #[arg(long, value_name = "CMD", requires = "pid")]
        hook: Vec<Hook>,
    },
    /// Find out what became of a migration whose outcome was unknown, and put this side right
    Resume {
        /// The migration, as its report names it
        #[arg(value_name = "ID")]
        id: MigrationId,
    },
    /// Show the migrations of this node, to and from it, and what earlier ones have left unresolved
    Status {
        /// Only this one: its id, or the beginning of it
        #[arg(value_name = "ID")]
        id: Option<IdPrefix>,
    },
    /// Let the process of a running migration stay here, unless it is too late for that
    Cancel {
        /// The migration, or the beginning of its id
        #[arg(value_name = "ID")]
        id: IdPrefix,
    },
    /// Switch a running migration to post-copy: freeze the process now, the rest of its memory follows
    Postcopy {
        /// The migration, or the beginning of its id
        #[arg(value_name = "ID")]
        id: IdPrefix,
    },
    /// Show the fingerprint that other nodes know this one by
    Id,
    /// Manage the nodes that this one trusts
    Trust {
        #[command(subcommand)]
        action: TrustAction,
    },
    /// Move a real workload between two nodes on this machine, and show the report
    Demo(crate::demo::Args),
    /// Part of the program's own machinery.
    #[command(name = "__sentinel", hide = true)]
    Sentinel {
        /// What it is to do, for the code that started it.
        #[arg(allow_hyphen_values = true, trailing_var_arg = true)]
        args: Vec<String>,
    },
    /// Part of the program's own machinery.
    #[command(name = "__guardian", hide = true)]
    Guardian {
        /// Which migration it guards.
        id: MigrationId,
    },
}

/// What to do with the list of trusted nodes.
#[derive(Debug, Clone, Subcommand)]
pub enum TrustAction {
    /// Trust the node with this fingerprint (`migrate id` shows it there)
    Add {
        /// What to call it
        name: String,
        /// Its fingerprint: sha256: and 64 hexadecimal digits
        fingerprint: String,
    },
    /// Show the trusted nodes
    List,
    /// Trust a node no longer
    Remove {
        /// What it is called
        name: String,
    },
}

/// What the operator wants.
#[derive(Debug, Clone)]
pub enum Request {
    /// Move a process.
    Move(SourceConfig),
    /// Accept processes.
    Serve(ServeConfig),
    /// Examine.
    Check(CheckConfig),
    /// Resolve a migration.
    Resume(MigrationId),
    /// Show migrations: all, or one.
    Status(Option<IdPrefix>),
    /// Let the process of a migration stay.
    Cancel(IdPrefix),
    /// Switch a migration to post-copy.
    Postcopy(IdPrefix),
    /// Show the fingerprint.
    Id,
    /// Manage trust.
    Trust(TrustAction),
    /// Show it all on one machine.
    Demo(crate::demo::Args),
    /// Hidden: watches over something for another process of this program.
    Sentinel(Vec<String>),
    /// Hidden: holds the missing pages of a migration.
    Guardian(MigrationId),
}

/// Reads the process's arguments; shows help or a usage error (exit status 2) by itself.
pub fn parse() -> (Global, Request) {
    parse_from(std::env::args_os()).unwrap_or_else(|error| error.exit())
}

/// Reads arguments, the program's name first.
///
/// # Errors
/// clap's: a usage error, or help and version asked for.
pub fn parse_from<I, T>(args: I) -> Result<(Global, Request), clap::Error>
where
    I: IntoIterator<Item = T>,
    T: Into<std::ffi::OsString> + Clone,
{
    let Cli { global, moving, command } = Cli::try_parse_from(args)?;
    let state_dir = global.state_dir.clone();
    if let (Some(_), Some(option)) = (&command, moving.given()) {
        let text = format!("{option} belongs to a move, not to this command");
        return Err(Cli::command().error(ErrorKind::ArgumentConflict, text));
    }
    let request = match command {
        None => Request::Move(source_config(moving, state_dir)?),
        Some(SubCommand::Serve { listen, hook }) => {
            Request::Serve(ServeConfig { state_dir, listen, hooks: few(hook)? })
        }
        Some(SubCommand::Check {
            pid,
            to,
            tcp_established,
            tcp_close,
            shell_job,
            move_ip: move_ips,
            tcp_remap: tcp_remaps,
            hook,
        }) => Request::Check(CheckConfig {
            state_dir,
            pid,
            to,
            allowed: Allowed {
                files: FilesOptions { tcp_established, tcp_close, shell_job, tcp_queued: false },
                move_ips,
                tcp_remaps,
                hooks: few(hook)?,
            },
        }),
        Some(SubCommand::Resume { id }) => Request::Resume(id),
        Some(SubCommand::Status { id }) => Request::Status(id),
        Some(SubCommand::Cancel { id }) => Request::Cancel(id),
        Some(SubCommand::Postcopy { id }) => Request::Postcopy(id),
        Some(SubCommand::Id) => Request::Id,
        Some(SubCommand::Trust { action }) => {
            if let TrustAction::Add { fingerprint, .. } = &action {
                fingerprint
                    .parse::<Fingerprint>()
                    .map_err(|error| Cli::command().error(ErrorKind::ValueValidation, error))?;
            }
            Request::Trust(action)
        }
        Some(SubCommand::Demo(args)) => Request::Demo(args),
        Some(SubCommand::Sentinel { args }) => Request::Sentinel(args),
        Some(SubCommand::Guardian { id }) => Request::Guardian(id),
    };
    Ok((global, request))
}

/// As many hooks as a journal has room for.
fn few(hooks: Vec<Hook>) -> Result<Vec<Hook>, clap::Error> {
    if hooks.len() <= MAX_HOOKS {
        return Ok(hooks);
    }
    let text = format!("--hook can be given {MAX_HOOKS} times");
    Err(Cli::command().error(ErrorKind::TooManyValues, text))
}

fn source_config(args: MoveArgs, state_dir: PathBuf) -> Result<SourceConfig, clap::Error> {
    let MoveArgs { tcp_established, tcp_close, shell_job, .. } = args;
    let missing = |what| Cli::command().error(ErrorKind::MissingRequiredArgument, what);
    let (to, pid) = match (args.to, args.pid) {
        (Some(to), Some(pid)) => (to, pid),
        (None, _) => return Err(missing("a command, or --to HOST:PORT and a PID, must be given")),
        (Some(_), None) => return Err(missing("the PID of the process to move must be given")),
    };
    Ok(SourceConfig {
        state_dir,
        to,
        pid,
        mode: args.mode.unwrap_or_default(),
        max_rounds: args.max_rounds.unwrap_or(DEFAULT_MAX_ROUNDS),
        max_downtime: args.max_downtime.unwrap_or(DEFAULT_MAX_DOWNTIME),
        timeout: args.timeout.map(|after| Timeout { after, then: args.on_timeout.unwrap_or_default() }),
        bandwidth: args.bandwidth,
        compression: match args.compress {
            None | Some(CompressArg::Auto) => Compression::Auto,
            Some(CompressArg::None) => Compression::Off,
            Some(CompressArg::Lz4) => Compression::Lz4,
        },
        allowed: Allowed {
            files: FilesOptions { tcp_established, tcp_close, shell_job, tcp_queued: false },
            move_ips: args.move_ip,
            tcp_remaps: args.tcp_remap,
            hooks: few(args.hook)?,
        },
        progress: std::io::IsTerminal::is_terminal(&std::io::stderr()),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<(Global, Request), clap::Error> {
        parse_from(std::iter::once("migrate").chain(line.split_whitespace()))
    }

    #[test]
    fn clap_finds_nothing_wrong() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_move_with_everything() {
        let (global, request) = parsed(
            "--to node2:7077 --mode precopy --max-rounds 5 --max-downtime 20ms --bandwidth 1Gbit \
             --timeout 90s --on-timeout postcopy \
             --compress none --tcp-close --shell-job --move-ip 10.0.0.5/24@eth0 --move-ip fd00::5/64@eth0 \
             --state-dir /x -vv --json 123",
        )
        .unwrap();
        assert_eq!((global.verbose, global.json), (2, true));
        let Request::Move(config) = request else { panic!("{request:?}") };
        assert_eq!((config.pid, config.max_rounds, config.allowed.move_ips.len()), (123, 5, 2));
        assert_eq!(config.compression, Compression::Off);
        assert_eq!(config.max_downtime, Duration::from_millis(20));
        assert_eq!(config.bandwidth.map(Bandwidth::bytes_per_second), Some(125_000_000));
        let after = Duration::from_secs(90);
        assert_eq!(config.timeout, Some(Timeout { after, then: OnTimeout::Postcopy }));
        assert_eq!(config.mode, Mode::Precopy);
        let files = config.allowed.files;
        assert!(files.tcp_close && files.shell_job && !files.tcp_established);
        assert_eq!(config.state_dir, PathBuf::from("/x"));
    }

    #[test]
    fn global_options_go_on_either_side_of_a_command() {
        for line in ["--state-dir /x -v --json serve", "serve --state-dir /x -v --json"] {
            let (global, request) = parsed(line).unwrap();
            assert!(global.json && global.verbose == 1, "{line}");
            let Request::Serve(config) = request else { panic!("{request:?}") };
            assert_eq!(config.state_dir, PathBuf::from("/x"));
            assert_eq!(config.listen.to_string(), "0.0.0.0:7077");
        }
    }

    #[test]
    fn usage_errors_are_status_2() {
        for line in [
            "",
            "123",
            "--to node2:7077",
            "--to node2 123",
            "--to node2:7077 0",
            "--to node2:7077 -5",
            "--to node2:7077 --mode sideways 1",
            "--to node2:7077 --bandwidth fast 1",
            "--to node2:7077 id",
            "--tcp-close serve",
            "check --to node2:7077",
            "check --tcp-close",
            "--to node2:7077 --timeout 10 1",
            "--to node2:7077 --tcp-close --tcp-established 1",
            "--to node2:7077 --tcp-remap 10.0.0.5 1",
            "--hook true check 1",
            "check --hook true",
            "serve --hook a --hook b --hook c --hook d --hook e --hook f --hook g --hook h --hook i",
            "--to node2:7077 --on-timeout force 1",
            "--to node2:7077 --timeout 10s --on-timeout suspend 1",
            "--timeout 10s status",
            "resume",
            "resume 12",
            "status x",
            "cancel",
            "cancel A0",
            "postcopy",
            "trust",
            "trust add name",
            "trust add name sha256:12",
            "nonsense",
        ] {
            let error = parsed(line).unwrap_err();
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }

    #[test]
    fn the_network_of_a_move() {
        let line = "--to a:1 --tcp-established --tcp-remap 10.0.0.5=10.0.1.5 --hook true --hook false 7";
        let Request::Move(config) = parsed(line).unwrap().1 else { panic!() };
        let Allowed { files, tcp_remaps, hooks, .. } = config.allowed;
        assert!(files.tcp_established && !files.tcp_close);
        assert_eq!((tcp_remaps.len(), hooks.len()), (1, 2));
        let Request::Serve(config) = parsed("serve --hook true").unwrap().1 else { panic!() };
        assert_eq!(config.hooks, ["true".parse().unwrap()]);
        let line = "check 7 --tcp-established --tcp-remap 10.0.0.5=10.0.1.5 --hook true";
        let Request::Check(config) = parsed(line).unwrap().1 else { panic!() };
        let Allowed { files, tcp_remaps, hooks, .. } = config.allowed;
        assert!(files.tcp_established && tcp_remaps.len() == 1 && hooks.len() == 1);
    }

    #[test]
    fn commands() {
        assert!(matches!(parsed("id").unwrap().1, Request::Id));
        assert!(matches!(parsed("demo").unwrap().1, Request::Demo(_)));
        assert!(matches!(parsed("trust list").unwrap().1, Request::Trust(TrustAction::List)));
        let Request::Check(check) = parsed("check 5 --to a:1").unwrap().1 else { panic!() };
        assert_eq!((check.pid, check.to.unwrap().to_string()), (Some(5), "a:1".to_owned()));
        let id = MigrationId::new([7; crate::migration::ID_BYTES]);
        let Request::Resume(parsed_id) = parsed(&format!("resume {id}")).unwrap().1 else { panic!() };
        assert_eq!(parsed_id, id);
        assert!(matches!(parsed("status").unwrap().1, Request::Status(None)));
        assert!(matches!(parsed("status 07").unwrap().1, Request::Status(Some(_))));
        assert!(matches!(parsed("cancel 07").unwrap().1, Request::Cancel(_)));
        assert!(matches!(parsed("postcopy 07").unwrap().1, Request::Postcopy(_)));
        let Request::Move(config) = parsed("--to a:1 --timeout 5s 7").unwrap().1 else { panic!() };
        assert_eq!(config.timeout.map(|timeout| timeout.then), Some(OnTimeout::Cancel));
        assert_eq!(config.mode, Mode::Auto);
        let Request::Sentinel(args) = parsed("__sentinel --fd 3 x").unwrap().1 else { panic!() };
        assert_eq!(args, ["--fd", "3", "x"]);
    }
}
