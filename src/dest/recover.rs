//! What a restarted service finds in its journal: processes that are its own, and what was left to do.

use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use nix::sys::signal::Signal;

use super::driver::Arrival;
use super::machine::DestMachine;
use super::protocol::{Action, Event, LinkId, Message, Tell};
use super::serve::{Entry, Registry};
use super::wire::{Extras, to_control};
use crate::engine::address::AddressSet;
use crate::engine::alive;
use crate::engine::fence;
use crate::engine::procfs;
use crate::engine::reason::Reason;
use crate::engine::sys::pidfd::PidFd;
use crate::journal::{self, Incoming, IncomingState, Journal, JournalError};
use crate::operator::protocol::{Phase, Side};
use crate::operator::{About, Board, client};
use crate::transport::{Link, LinkSender};

/// The one question that is being answered.
const ASKER: LinkId = LinkId(1);

/// Goes through the records of an earlier service: completes what was accepted, forgets the rest. For each
/// process of ours a thread answers the source's questions until it confirms.
///
/// # Errors
/// If the journal cannot be read at all.
pub(super) fn recover(state_dir: &Path, registry: &Registry, board: &Arc<Board>) -> Result<(), JournalError> {
    let journal = Journal::<Incoming>::open(state_dir)?;
    let (records, unreadable) = journal.list()?;
    for error in unreadable {
        tracing::error!(error = &error as &dyn std::error::Error, "skipping a record");
    }
    let boot = journal::boot_id()?;
    for record in records {
        if record.boot != boot {
            // The process went with its boot.
            journal.remove(record.id)?;
            continue;
        }
        let process = match alive::open_untraced(record.process.pid, record.process.start_ticks) {
            Ok(process) => process,
            Err(error) => {
                tracing::error!(id = %record.id, error = &error as &dyn std::error::Error, "not recovered");
                continue;
            }
        };
        let accepted = record.state == IncomingState::Accepted;
        let (machine, actions) = DestMachine::recovered(record.process, accepted, process.is_some());
        let mut recovered = Recovered {
            record,
            process,
            machine,
            journal: Journal::open(state_dir)?,
            asker: None,
            link: None,
        };
        if recovered.perform(actions) {
            continue;
        }
        let (inbox, asks) = channel();
        let id = recovered.record.id;
        let entry = Entry { inbox, peer: recovered.record.peer.clone() };
        registry.lock().unwrap_or_else(PoisonError::into_inner).insert(id, entry);
        let posting = board.post(recovered.about(), Arc::default());
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
    /// A connection that was handed over to us is ours to keep.
    link: Option<Link>,
}

impl Recovered {
    fn about(&self) -> About {
        let Incoming { id, process, peer, .. } = &self.record;
        About {
            id: *id,
            side: Side::Destination,
            pid: i32::try_from(process.pid).unwrap_or(0),
            command: client::command_of(process.pid),
            peer: peer.clone(),
        }
    }

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
                }
                Action::Resume(_) if self.record.misses => self.kill(),
                Action::Resume(_) => self.lower_fence(),
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

    fn kill(&self) {
        if let Some(process) = &self.process
            && let Err(errno) = process.signal(Signal::SIGKILL)
        {
            tracing::error!(pid = self.record.process.pid, %errno, "ending a process that misses pages");
        }
    }

    /// The old service died between acceptance and resume: the fence still holds the process.
    fn lower_fence(&self) {
        let Some(process) = &self.process else { return };
        let stat = std::fs::read(format!("/proc/{}/stat", self.record.process.pid)).unwrap_or_default();
        let stopped = procfs::parse_stat(&stat).is_ok_and(|s| s.state == b'T');
        if stopped
            && !self.record.was_stopped
            && !fence::another_stop_waits(self.record.process.pid)
            && let Err(errno) = process.signal(Signal::SIGCONT)
        {
            tracing::error!(pid = self.record.process.pid, %errno, "lowering the fence");
        }
    }
}
