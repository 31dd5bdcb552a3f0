//! The grid of live connections: each state of the moved end, with each of its queues, windows and options,
//! under each fault of the network around the move. One process has them all; what comes to it and from it
//! is made and checked segment by segment, by the test itself. The move waits for the test where a fault
//! belongs to an instant: by hooks. Each cell must tell the same story each time.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::PathBuf;
use std::sync::Mutex;
use std::thread::ScopedJoinHandle;
use std::time::Duration;

use migrate::testbed::{Host, Job, Lan, SHARED, Service, wait_for};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use crate::case::{Case, Result, ensure, fail};
use crate::grid::gates::{Gates, Part};
use crate::grid::peer::Outcome;
use crate::grid::script::{Look, PORT, Round, play};
use crate::grid::table::{Cell, State, cells};
use crate::grid::wire::{Running, Side, Version};
use crate::workload::Workload;

const MOVE: Duration = Duration::from_secs(60);
const PATIENCE: Duration = Duration::from_secs(30);
/// The grid is moved so often.
const ROUNDS: u16 = 3;
/// What a restored socket looks like to a source shows on the way back.
const THERE_AND_BACK: u16 = 2;
const OPTIONS: [&str; 3] = ["--tcp-established", "--mode", "precopy"];
/// The stages at which the move waits for us, and the directory where it says so.
const STAGES: [&str; 2] = ["network-lock", "network-unlock"];
const DIRECTORY: &str = "gates";
/// The stack of a thread that plays a cell.
const STACK: usize = 256 << 10;

pub(crate) fn cases() -> Vec<Case> {
    let name = |state: State| format!("grid/{}", format!("{state:?}").to_lowercase());
    let of = |state: State| cells().into_iter().filter(move |cell| cell.state == state).collect::<Vec<_>>();
    let states = [
        State::Established,
        State::CloseWait,
        State::FinWait1,
        State::FinWait2,
        State::Closing,
        State::LastAck,
        State::TimeWait,
        State::SynSent,
    ];
    let mut cases: Vec<Case> = states
        .into_iter()
        .map(|state| {
            Case::new(name(state), move |lan| rounds(lan, &of(state), 1, Address::Moves, Family::V4))
        })
        .collect();
    let mut whole = |name: &str, times, address, family| {
        let run = move |lan: &Lan| rounds(lan, &cells(), times, address, family);
        cases.push(Case::new(format!("grid/{name}"), run));
    };
    whole("all_with_the_address_on_both", 1, Address::OnBoth, Family::V4);
    whole("all_3_times_alike", ROUNDS, Address::Moves, Family::V4);
    whole("all_ipv6", THERE_AND_BACK, Address::Moves, Family::V6);
    whole("all_ipv6_with_the_address_on_both", 1, Address::OnBoth, Family::V6);
    whole("all_v4_mapped", THERE_AND_BACK, Address::Moves, Family::Mapped);
    cases
}

/// What the connections are, to the process and on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    V4,
    V6,
    /// Sockets of IPv6 whose clients speak IPv4.
    Mapped,
}

impl Family {
    fn version(self) -> Version {
        if self == Self::V6 { Version::V6 } else { Version::V4 }
    }

    /// Of its sockets, for the workload; and where the kernel lists them.
    fn sockets(self) -> (&'static str, &'static str) {
        if self == Self::V4 { ("4", "/proc/net/tcp") } else { ("6", "/proc/net/tcp6") }
    }
}

/// Where the address of the connections is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Address {
    /// It goes with the process: between the hosts nobody has it.
    Moves,
    /// On both hosts all the time, as where a balancer decides: only the lock keeps them quiet.
    OnBoth,
}

/// Moves a process with all these connections to and fro, each time with new ones.
fn rounds(lan: &Lan, cells: &[Cell], rounds: u16, address: Address, family: Family) -> Result {
    let gates = Doors::new(lan)?;
    let wire = Running::with(lan, family.version(), address == Address::OnBoth)?;
    let workload = Workload::start(&lan.a, "tcp_grid", &[&PORT.to_string(), family.sockets().0])?;
    lan.share_identity()?;
    let services = [gates.serve(lan, &lan.a)?, gates.serve(lan, &lan.b)?];
    let (mut here, mut from, mut first) = (&lan.a, Side::A, Vec::new());
    let mut seen = 0;
    for round in 0..rounds {
        let grounds = Grounds {
            lan,
            wire: &wire,
            doors: &gates,
            job: &workload.job,
            here,
            from,
            round,
            address,
            family,
        };
        let service = &services[from.other() as usize];
        let stories = grounds
            .round(cells, service, &mut seen)
            .map_err(|error| format!("time {}: {error}", round + 1))?;
        if round == 0 {
            first = stories;
        } else if let Some(at) = (0..cells.len()).find(|at| stories[*at] != first[*at]) {
            let name = cells[at].name();
            return fail(format!("{name}:\n  at first {:?}\n  now {:?}", first[at], stories[at]));
        }
        (here, from) = (lan.other(here), from.other());
    }
    if std::env::var_os("STORIES").is_some() {
        for (cell, story) in cells.iter().zip(&first) {
            println!("    {}: {}", cell.name(), story.join(", "));
        }
    }
    let steps: usize = first.iter().map(Vec::len).sum();
    println!("    {} connections, {steps} steps, {rounds} times", cells.len());
    Ok(())
}

/// What a round needs.
struct Grounds<'a> {
    lan: &'a Lan,
    wire: &'a Running,
    doors: &'a Doors,
    job: &'a Job,
    here: &'a Host,
    from: Side,
    round: u16,
    address: Address,
    family: Family,
}

impl Grounds<'_> {
    /// Makes the connections, moves them, ends them; what each of them has to tell.
    fn round(&self, cells: &[Cell], service: &Service, seen: &mut usize) -> Result<Vec<Vec<String>>> {
        let (gates, looks, totals) = (Gates::default(), Mutex::default(), Mutex::default());
        self.wire.allow(&[self.from]);
        let common =
            Round { wire: self.wire, gates: &gates, from: self.from, looks: &looks, totals: &totals };
        let results = std::thread::scope(|scope| -> Result<_> {
            let mut threads = Vec::new();
            for (index, cell) in cells.iter().enumerate() {
                let index = u16::try_from(index)?;
                let (common, number) = (&common, u32::from(self.round) * 10_000 + u32::from(index));
                let port = 2000 + self.round * 4000 + 2 * index;
                let thread = std::thread::Builder::new().stack_size(STACK);
                threads
                    .push(thread.spawn_scoped(scope, move || play(common, *cell, number, port, port + 1))?);
            }
            let moved = self.play_move(&gates, cells.len(), service, &looks, seen);
            gates.end();
            let ended = |thread: ScopedJoinHandle<'_, Outcome<Vec<String>>>| {
                thread.join().unwrap_or_else(|_| Err("panicked".to_owned()))
            };
            let results: Vec<_> = threads.into_iter().map(ended).collect();
            let mut wrong = self.wire.complaints();
            wrong.extend(cells.iter().zip(&results).filter_map(|(cell, result)| {
                let error = result.as_ref().err().filter(|error| !error.starts_with("the move failed"))?;
                Some(format!("{}: {error}", cell.name()))
            }));
            let count = wrong.len();
            wrong.truncate(30);
            wrong.extend((count > 30).then(|| format!("and {} more", count - 30)));
            wrong.extend(moved.err().map(|error| error.to_string()));
            ensure(wrong.is_empty(), || wrong.join("\n    "))?;
            Ok(results)
        })?;
        self.compare_totals(&totals.into_inner()?)?;
        Ok(results.into_iter().map(std::result::Result::unwrap_or_default).collect())
    }

    /// The move, from the side of those who are moved.
    fn play_move(
        &self,
        gates: &Gates,
        count: usize,
        service: &Service,
        looks: &Mutex<Vec<Look>>,
        seen: &mut usize,
    ) -> Result {
        let (here, there) = (self.here, self.lan.other(self.here));
        gates.all(Part::Ordered, count, MOVE)?;
        self.await_orders(count * usize::from(self.round + 1), seen)?;
        gates.open(Part::Before);
        gates.all(Part::Before, count, MOVE)?;
        self.await_looks(&looks.lock().unwrap())?;
        let mut options = [&OPTIONS[..], &["--hook", &self.doors.hook]].concat();
        if self.address == Address::Moves {
            options.extend(["--move-ip", self.family.version().move_ip()]);
        }
        let job = self.lan.start_move(here, &service.address, self.job.pid, &options)?;
        self.doors.await_move(here, &job, "source", STAGES[0])?;
        self.wire.settle()?;
        self.wire.allow(&[]);
        gates.open(Part::AtSource);
        gates.all(Part::AtSource, count, PATIENCE)?;
        self.doors.open("source", STAGES[0])?;
        self.doors.await_move(here, &job, "destination", STAGES[1])?;
        gates.open(Part::AtDestination);
        gates.all(Part::AtDestination, count, PATIENCE)?;
        self.wire.settle()?;
        self.wire.allow(&[self.from.other()]);
        self.doors.open("destination", STAGES[1])?;
        gates.open(Part::Live);
        self.lan.finish_move(here, &job, MOVE)?.expect_moved()?;
        gates.all(Part::Live, count, MOVE)?;
        there.signal(self.job.pid, libc::SIGUSR2)?;
        *seen = there.wait_line(self.job, "went ", *seen, PATIENCE)?.1;
        gates.open(Part::On);
        gates.all(Part::On, count, MOVE)?;
        Ok(())
    }

    /// Waits until the process has carried out so many orders.
    fn await_orders(&self, count: usize, seen: &mut usize) -> Result {
        let wanted = format!("ok {count} ");
        Ok(wait_for(&format!("{count} orders carried out"), PATIENCE, || {
            self.here.signal(self.job.pid, libc::SIGUSR1)?;
            let (line, end) = self.here.wait_line(self.job, "ok ", *seen, PATIENCE)?;
            *seen = end;
            Ok(line.starts_with(&wanted).then_some(()))
        })?)
    }

    /// Waits until the kernel has each connection as its cell wants it.
    fn await_looks(&self, looks: &[Look]) -> Result {
        let all = || -> migrate::testbed::Result<Vec<Look>> {
            let text = self.here.net(&["cat", self.family.sockets().1])?;
            Ok(text.lines().skip(1).filter_map(look).collect())
        };
        let mut wrong = String::new();
        let waited = wait_for("all connections as they are wanted", PATIENCE, || {
            let all = all()?;
            let missing = looks.iter().find(|look| !all.contains(look));
            wrong = missing.map_or_else(String::new, |look| {
                let found = all.iter().find(|found| found.port == look.port);
                format!("{look:?}, but there is {found:?}")
            });
            Ok(missing.is_none().then_some(()))
        });
        Ok(waited.map_err(|error| format!("{error}: {wrong}"))?)
    }

    /// The process has read and written what its peers have written and read.
    fn compare_totals(&self, totals: &[(u32, u64, u64)]) -> Result {
        let there = self.lan.other(self.here);
        let first = u32::from(self.round) * 10_000;
        let mut wanted = totals.to_vec();
        wanted.sort_unstable();
        let told = wait_for("the end of all connections", PATIENCE, || {
            let mut told: Vec<(u32, u64, u64)> = there.stdout(self.job).lines().filter_map(total).collect();
            told.retain(|(number, ..)| *number >= first);
            told.sort_unstable();
            Ok((told.len() >= wanted.len()).then_some(told))
        })?;
        ensure(told == wanted, || {
            let wrong = wanted.iter().zip(&told).find(|(wanted, told)| wanted != told);
            format!("cell, read, written: wanted and told {wrong:?}")
        })
    }
}

/// A line `end CELL READ WRITTEN`.
fn total(line: &str) -> Option<(u32, u64, u64)> {
    let mut words = line.strip_prefix("end ")?.split(' ');
    Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?, words.next()?.parse().ok()?))
}

/// A line of `/proc/net/tcp` or `/proc/net/tcp6`.
fn look(line: &str) -> Option<Look> {
    let mut words = line.split_whitespace().skip(2);
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let port = hex(words.next()?.split_once(':')?.1)?;
    let state = hex(words.next()?)?;
    let (unacknowledged, unread) = words.next()?.split_once(':')?;
    Some(Look {
        port: port.try_into().ok()?,
        state: state.try_into().ok()?,
        unread: hex(unread)?,
        unacknowledged: hex(unacknowledged)?,
    })
}

/// Where a move waits for us: its hooks say that they are there, and wait for a line.
struct Doors {
    directory: PathBuf,
    hook: String,
    lines: Vec<(String, File)>,
}

impl Doors {
    fn new(lan: &Lan) -> Result<Self> {
        let directory = lan.middle.outside(format!("{SHARED}/{DIRECTORY}"));
        std::fs::create_dir(&directory)?;
        let door = format!("{SHARED}/{DIRECTORY}/$MIGRATE_SIDE-$MIGRATE_STAGE");
        let hook = format!("if [ -p {door} ]; then touch {door}.here; read go < {door}; fi");
        let mut lines = Vec::new();
        for (side, stage) in ["source", "destination"].into_iter().zip(STAGES) {
            let name = format!("{side}-{stage}");
            let path = directory.join(&name);
            mkfifo(&path, Mode::S_IRWXU)?;
            // Open for both: so that neither end waits for the other.
            lines.push((name, OpenOptions::new().read(true).write(true).open(&path)?));
        }
        Ok(Self { directory, hook, lines })
    }

    fn serve(&self, lan: &Lan, host: &Host) -> Result<Service> {
        Ok(lan.serve_with(host, &["--hook", &self.hook])?)
    }

    /// Waits until the move stands at a door.
    fn await_move(&self, here: &Host, job: &Job, side: &str, stage: &str) -> Result {
        let sign = self.directory.join(format!("{side}-{stage}.here"));
        let mut over = false;
        wait_for(&format!("the move at {side} {stage}"), MOVE, || {
            over = here.exit_of(job.pid).is_some();
            Ok((over || std::fs::remove_file(&sign).is_ok()).then_some(()))
        })?;
        ensure(!over, || format!("the move ended before {stage}: {}\n{}", here.stdout(job), here.stderr(job)))
    }

    /// Lets the move go on.
    fn open(&self, side: &str, stage: &str) -> Result {
        let name = format!("{side}-{stage}");
        let line = self.lines.iter().find(|(known, _)| *known == name);
        let mut line = &line.ok_or("no such door")?.1;
        Ok(line.write_all(b"\n")?)
    }
}
