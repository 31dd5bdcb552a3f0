//! What a restarted service finds in its journal: processes that are its own, and what was left to do.

use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::driver::Arrival;
use super::guardian::Guard;
use super::machine::DestMachine;
use super::protocol::{Action, Event, LinkId, Message, Tell};
use super::serve::{Entry, Service};
use super::wire::{Extras, to_control};
use crate::engine::address::AddressSet;
use crate::engine::alive;
use crate::engine::fence;
use crate::engine::hook::{self, Hooks, Stage};
use crate::engine::procfs;
use crate::engine::reason::{Reason, chain};
use crate::engine::remote::Tid;
use crate::engine::state::files;
use crate::engine::sys::pidfd::PidFd;
use crate::journal::{self, Incoming, IncomingState, Journal, JournalError};
use crate::migration::ProcessKey;
use crate::operator::About;
use crate::operator::protocol::Phase;
use crate::transport::{Link, LinkSender};

/// The one question that is being answered.
const ASKER: LinkId = LinkId(1);

/// Goes through the records of an earlier service: completes what was accepted, forgets the rest. For each
/// process of ours a thread answers the source's questions until it confirms, and one that misses pages is
/// gone on with, if a guardian holds them.
///
/// # Errors
/// If the journal cannot be read at all.
pub(super) fn recover(service: &Arc<Service>) -> Result<(), JournalError> {
    let (state_dir, registry, board) = (&service.config.state_dir, &service.registry, &service.board);
    let journal = Journal::<Incoming>::open(state_dir)?;
    let (records, unreadable) = journal.list()?;
    for error in unreadable {
        tracing::error!(error = &error as &dyn std::error::Error, "skipping a record");
    }
    let boot = journal::boot_id()?;
    for record in records {
        if record.boot != boot {
            // The process went with its boot, and its guardian, but for a socket.
            journal.remove(record.id)?;
            let _ = Guard::find(state_dir, record.id);
            continue;
        }
        let accepted = record.state == IncomingState::Accepted;
        let (pid, start) = (record.process.pid, record.process.start_ticks);
        // Until it was accepted it may be half-way gone with the old service: it is stopped for a moment to
        // see. Afterwards not: a thread that waits in the kernel for a missing page cannot be stopped.
        let looked = if accepted { alive::open(pid, start) } else { alive::open_untraced(pid, start) };
        let process = match looked {
            Ok(process) => process,
            Err(error) => {
                tracing::error!(id = %record.id, error = &error as &dyn std::error::Error, "not recovered");
                continue;
            }
        };
        let guardian = match Guard::find(state_dir, record.id) {
            Ok(guardian) => guardian,
            Err(error) => {
                tracing::error!(id = %record.id, error = &error as &dyn std::error::Error, "no guardian");
                None
            }
        };
        match guardian {
            Some((guard, kept)) if record.misses && process.is_some() => {
                match service.take_over(&record, guard, &kept) {
                    Ok(()) => continue,
                    Err(guard) => {
                        // While the guardian still keeps them waiting.
                        kill_family(&record);
                        guard.dismiss();
                    }
                }
            }
            Some((guard, _)) => guard.dismiss(),
            None => {}
        }
        let (machine, actions) = DestMachine::recovered(record.process, accepted, process.is_some());
        let mut recovered = Recovered {
            record,
            process,
            machine,
            journal: Journal::open(state_dir)?,
            asker: None,
            hooks: service.hooks.clone(),
            listen: service.config.listen,
            link: None,
        };
        if recovered.perform(actions) {
            continue;
        }
        let (inbox, asks) = channel();
        let id = recovered.record.id;
        let entry = Entry { inbox, peer: recovered.record.peer.clone() };
        registry.lock().unwrap_or_else(PoisonError::into_inner).insert(id, entry);
        let posting = board.post(About::of(&recovered.record), Arc::default());
        posting.phase(Phase::Complete);
        let registry = registry.clone();
        let thread = std::thread::Builder::new().name("dest-recovered".into()).spawn(move || {
            recovered.answer(&asks);
            drop(posting);
            registry.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        });
        if let Err(error) = thread {
            tracing::error!(%id, %error, "no thread to answer for a recovered process");
        }
    }
    Ok(())
}

struct Recovered {
    record: Incoming,
    process: Option<PidFd>,
    machine: DestMachine,
    journal: Journal<Incoming>,
    asker: Option<LinkSender>,
    /// The operator's, and what they are told of this service.
    hooks: Hooks,
    listen: SocketAddr,
    /// A connection that was handed over to us is ours to keep.
    link: Option<Link>,
}

impl Recovered {
    fn answer(&mut self, asks: &Receiver<Arrival>) {
        while let Ok(arrival) = asks.recv() {
            let message = match arrival {
                Arrival::Ask(ask) => {
                    self.asker = Some(ask.answer);
                    ask.message
                }
                Arrival::Resume(link) => {
                    self.asker = Some(link.sender());
                    self.link = Some(*link);
                    Message::Resume
                }
            };
            match self.machine.handle(Duration::ZERO, Event::Message(ASKER, message)) {
                Ok(actions) => {
                    if self.perform(actions) {
                        return;
                    }
                }
                Err(error) => tracing::error!(%error, "a defect of the driver"),
            }
        }
    }

    /// True if nothing is left to do.
    fn perform(&mut self, actions: Vec<Action>) -> bool {
        for action in actions {
            match action {
                Action::RecordAccepted => {
                    self.record.state = IncomingState::Accepted;
                    if let Err(error) = self.journal.write(&self.record) {
                        tracing::error!(error = &error as &dyn std::error::Error, "recording");
                    }
                }
                Action::AddAddresses => {
                    let added = AddressSet::of(&self.record.addresses).and_then(|mut set| set.add());
                    if let Err(error) = added {
                        tracing::error!(error = &error as &dyn std::error::Error, "adding addresses");
                    }
                    self.hooks.tell(Stage::NetworkUnlock, &self.about());
                    wake_connections(self.record.process);
                }
                Action::Resume(_) if self.record.misses => self.kill(),
                Action::Resume(right) => {
                    lower_fence(right.process(), self.record.was_stopped, &self.record.masks);
                    drop(self.hooks.begin(Stage::PostResume, &self.about()));
                }
                Action::Forget => {
                    if let Err(error) = self.journal.remove(self.record.id) {
                        tracing::error!(error = &error as &dyn std::error::Error, "forgetting");
                    }
                }
                Action::KillLost => self.kill(),
                Action::Send(_, tell) => {
                    // Without whoever held its userfaultfd it may have read zeros.
                    let tell = match tell {
                        Tell::Resumed if self.record.misses => {
                            let why =
                                "the service there ended while pages were missing, and nobody held them";
                            Tell::Lost(vec![Reason::new(format!("pid {}", self.record.process.pid), why, "")])
                        }
                        Tell::Resumed => Tell::Drained,
                        tell => tell,
                    };
                    let message = to_control(&tell, self.record.id, Extras::default());
                    let _ = self.asker.as_ref().map(|l| l.send_control(&message));
                }
                Action::Finish(_) => return true,
                _ => {}
            }
        }
        false
    }

    fn about(&self) -> hook::About {
        hook::About {
            id: self.record.id.to_string(),
            pid: self.record.process.pid,
            side: "destination",
            destination: self.listen.to_string(),
        }
    }

    fn kill(&self) {
        if self.process.is_some() {
            kill_family(&self.record);
        }
    }
}

/// Ends a process that misses pages, and all that it has started: its children miss them as well.
fn kill_family(record: &Incoming) {
    let mut family = vec![record.process.pid];
    loop {
        let before = family.len();
        for (pid, parent) in parents() {
            if family.contains(&parent) && !family.contains(&pid) {
                family.push(pid);
            }
        }
        // The parent first: it has no more children then.
        for pid in &family {
            if let Ok(raw) = i32::try_from(*pid)
                && let Err(errno) = kill(Pid::from_raw(raw), Signal::SIGKILL)
                && errno != Errno::ESRCH
            {
                tracing::error!(pid, %errno, "ending a process that misses pages");
            }
        }
        if family.len() == before {
            return;
        }
    }
}

/// All processes, and whose children they are.
fn parents() -> Vec<(u32, u32)> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let stat = procfs::parse_stat(&std::fs::read(entry.path().join("stat")).ok()?).ok()?;
            Some((pid, u32::try_from(stat.ppid).ok()?))
        })
        .collect()
}

/// The old service died before the connections were live.
pub(super) fn wake_connections(process: ProcessKey) {
    let Ok(pid) = i32::try_from(process.pid) else { return };
    if !matches!(alive::open(process.pid, process.start_ticks), Ok(Some(_))) {
        return;
    }
    match files::wake_connections(pid) {
        Ok(0) => {}
        Ok(resets) => tracing::error!(pid, resets, "connections would have missed bytes: they were reset"),
        Err(error) => tracing::error!(pid, error = &error as &dyn std::error::Error, "waking connections"),
    }
}

/// The old service died between acceptance and resume: the fence still holds the process, or is half lifted.
pub(super) fn lower_fence(process: ProcessKey, was_stopped: bool, masks: &[(Tid, u64)]) {
    let failed = |error: &dyn std::error::Error| {
        tracing::error!(pid = process.pid, error = chain(error), "lowering the fence");
    };
    let open = match alive::open(process.pid, process.start_ticks) {
        Ok(Some(open)) => open,
        Ok(None) => return,
        Err(error) => return failed(&error),
    };
    if let Err(error) = fence::restore_masks(masks) {
        failed(&error);
    }
    if was_stopped || !fence::is_up(process.pid) || fence::another_stop_waits(process.pid) {
        return;
    }
    if let Err(errno) = open.signal(Signal::SIGCONT) {
        failed(&errno);
    }
}
