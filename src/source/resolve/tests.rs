//! On real processes, with a destination that answers what the test says.

use std::process::Command;

use super::*;
use crate::engine::trial::{Killed, until};

/// A destination that answers what the test says, after the test has done something.
struct Peer<F: FnMut() -> Option<Fate>> {
    ask: F,
    /// What becomes of attempts to serve, the last first.
    serves: Vec<bool>,
    confirmed: bool,
}

impl<F: FnMut() -> Option<Fate>> Destination for Peer<F> {
    fn ask(&mut self, _: &Outgoing) -> Option<Fate> {
        (self.ask)()
    }
    fn serve(&mut self, _: &Outgoing) -> bool {
        self.serves.pop().unwrap()
    }
    fn confirm(&mut self, _: &Outgoing) {
        self.confirmed = true;
    }
}

fn peer<F: FnMut() -> Option<Fate>>(ask: F) -> Peer<F> {
    Peer { ask, serves: vec![], confirmed: false }
}

struct Process(Killed);

impl Process {
    /// A process that is stopped like one whose fence has become effective.
    fn stopped() -> Self {
        let process = Self(Killed::sleeper());
        alive::open(process.key().pid, process.key().start_ticks)
            .unwrap()
            .unwrap()
            .signal(Signal::SIGSTOP)
            .unwrap();
        process.wait_for("T");
        process
    }
    fn key(&self) -> ProcessKey {
        let pid = self.0.id();
        ProcessKey { pid, start_ticks: alive::start_ticks(pid).unwrap().unwrap() }
    }
    fn state(&self) -> String {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id())).unwrap();
        status.lines().find_map(|l| l.strip_prefix("State:")).unwrap().trim()[..1].to_owned()
    }
    fn wait_for(&self, state: &str) {
        until(state, || self.state() == state);
    }
}

struct Scene {
    _dir: tempfile::TempDir,
    journal: Journal<Outgoing>,
    process: Process,
    record: Outgoing,
}

fn scene(state: OutgoingState) -> Scene {
    let dir = tempfile::tempdir().unwrap();
    let journal = Journal::open(dir.path()).unwrap();
    let process = Process::stopped();
    let mut owner = Command::new("true").spawn().unwrap();
    let record = Outgoing {
        id: MigrationId::new([7; 16]),
        process: process.key(),
        boot: boot_id().unwrap(),
        owner: ProcessKey { pid: owner.id(), start_ticks: 0 },
        destination: String::new(),
        peer: String::new(),
        state,
        owes: false,
        was_stopped: false,
        masks: vec![],
        addresses: vec![],
        connections: false,
        hooks: vec![],
    };
    owner.wait().unwrap();
    journal.write(&record).unwrap();
    Scene { _dir: dir, journal, process, record }
}

#[test]
fn not_accepted_lifts_the_fence_after_some_silence() {
    let s = scene(OutgoingState::Limbo);
    let mut answers = vec![Some(Fate::NotAccepted), None, None];
    let mut peer = peer(|| answers.pop().unwrap());
    let result = resolve(&s.journal, s.record.id, &mut peer, Patience::Endless).unwrap();
    assert_eq!(result, Some(Resolution::NotMoved));
    s.process.wait_for("S");
    assert!(!peer.confirmed);
    assert_eq!(s.journal.read(s.record.id).unwrap(), None);
}

#[test]
fn accepted_kills_and_confirms() {
    let s = scene(OutgoingState::Limbo);
    let mut peer = peer(|| Some(Fate::Accepted));
    let result = resolve(&s.journal, s.record.id, &mut peer, Patience::Once).unwrap();
    assert_eq!(result, Some(Resolution::Moved));
    s.process.wait_for("Z");
    assert!(peer.confirmed);
    assert_eq!(s.journal.read(s.record.id).unwrap(), None);
}

/// The source was killed while it read connections.
#[test]
fn a_process_goes_on_when_its_connections_are_out_of_repair() {
    let s = scene(OutgoingState::Taking);
    s.journal.write(&Outgoing { connections: true, ..s.record.clone() }).unwrap();
    let mut peer = peer(|| panic!("asked"));
    let result = resolve(&s.journal, s.record.id, &mut peer, Patience::Once).unwrap();
    assert_eq!(result, Some(Resolution::NotMoved));
    s.process.wait_for("S");
    // One that was stopped before stays so.
    let s = scene(OutgoingState::Taking);
    s.journal.write(&Outgoing { connections: true, was_stopped: true, ..s.record.clone() }).unwrap();
    resolve(&s.journal, s.record.id, &mut peer, Patience::Once).unwrap();
    assert_eq!(s.process.state(), "T");
}

#[test]
fn nobody_is_asked_where_the_record_says_it() {
    for (state, end, resolution) in
        [(OutgoingState::Taking, "T", Resolution::NotMoved), (OutgoingState::Moved, "Z", Resolution::Moved)]
    {
        let s = scene(state);
        let mut peer = peer(|| panic!("asked"));
        let result = resolve(&s.journal, s.record.id, &mut peer, Patience::Once).unwrap();
        assert_eq!(result, Some(resolution));
        s.process.wait_for(end);
    }
}

#[test]
fn owed_pages_are_served_before_the_end() {
    let s = scene(OutgoingState::Limbo);
    s.journal.write(&Outgoing { owes: true, ..s.record.clone() }).unwrap();
    let mut asked = 0;
    let mut peer = peer(|| {
        asked += 1;
        Some(Fate::Accepted)
    });
    // Not reached once: what is owed stays, and the record says by whom it is served.
    peer.serves = vec![true, false];
    assert_eq!(resolve(&s.journal, s.record.id, &mut peer, Patience::Once).unwrap(), None);
    assert_eq!(s.process.state(), "T");
    let record = s.journal.read(s.record.id).unwrap().unwrap();
    assert_eq!((record.state, record.owner), (OutgoingState::Serving, own_key().unwrap()));
    let result = resolve(&s.journal, s.record.id, &mut peer, Patience::Once).unwrap();
    assert_eq!((result, peer.confirmed), (Some(Resolution::Moved), true));
    s.process.wait_for("Z");
    assert_eq!(asked, 1, "what was accepted once is not asked again");
    assert_eq!(s.journal.read(s.record.id).unwrap(), None);
}

/// The hooks are told what the command would have told them, while the process is in the state for it.
#[test]
fn hooks_are_told_on_the_way() {
    for (fate, expected) in [
        (Fate::NotAccepted, "network-unlock source T\nfailed source S\n"),
        (Fate::Accepted, "post-resume source Z\n"),
    ] {
        let s = scene(OutgoingState::Limbo);
        let out = s._dir.path().join("out");
        let pid = s.record.process.pid;
        // The signals need a moment to show.
        let settled = "while s=$(cut -d\" \" -f3 /proc/$MIGRATE_PID/stat) && [ $MIGRATE_STAGE$s != network-unlockT ] \
            && [ $MIGRATE_STAGE$s != failedS ] && [ $MIGRATE_STAGE$s != post-resumeZ ]; do :; done";
        let text = format!("{settled}; echo $MIGRATE_STAGE $MIGRATE_SIDE $s >> {}", out.display());
        let hooks = vec![text.parse().unwrap()];
        s.journal.write(&Outgoing { hooks, ..s.record.clone() }).unwrap();
        resolve(&s.journal, s.record.id, &mut peer(|| Some(fate)), Patience::Once).unwrap();
        assert_eq!(std::fs::read_to_string(out).unwrap(), expected, "{pid}");
    }
}

#[test]
fn without_an_answer_everything_stays() {
    let s = scene(OutgoingState::Limbo);
    assert_eq!(resolve(&s.journal, s.record.id, &mut peer(|| None), Patience::Once).unwrap(), None);
    assert_eq!(s.process.state(), "T");
    assert_eq!(s.journal.read(s.record.id).unwrap(), Some(s.record.clone()));
}

#[test]
fn a_process_that_was_stopped_before_stays_so() {
    let s = scene(OutgoingState::Limbo);
    s.journal.write(&Outgoing { was_stopped: true, ..s.record.clone() }).unwrap();
    let result = resolve(&s.journal, s.record.id, &mut peer(|| Some(Fate::NotAccepted)), Patience::Once);
    assert_eq!(result.unwrap(), Some(Resolution::NotMoved));
    assert_eq!(s.process.state(), "T");
}

/// While we ask, another resolver is done and a new migration of the process has begun.
#[test]
fn an_answer_that_comes_too_late_changes_nothing() {
    let s = scene(OutgoingState::Limbo);
    let (journal, id) = (&s.journal, s.record.id);
    let mut peer = peer(|| {
        journal.remove(id).unwrap();
        Some(Fate::NotAccepted)
    });
    assert_eq!(resolve(journal, id, &mut peer, Patience::Once).unwrap(), Some(Resolution::Nothing));
    assert_eq!(s.process.state(), "T", "the new migration's fence still holds");
}

#[test]
fn a_living_source_command_is_left_alone() {
    let s = scene(OutgoingState::Limbo);
    let owner = Process::stopped();
    s.journal.write(&Outgoing { owner: owner.key(), ..s.record.clone() }).unwrap();
    let result = resolve(&s.journal, s.record.id, &mut peer(|| panic!("asked")), Patience::Once);
    assert!(matches!(result, Err(ResolveError::OwnerAlive(pid)) if pid == owner.key().pid));
}

#[test]
fn another_process_with_the_number_is_not_touched() {
    let s = scene(OutgoingState::Moved);
    let process = ProcessKey { start_ticks: s.record.process.start_ticks + 1, ..s.record.process };
    s.journal.write(&Outgoing { process, ..s.record.clone() }).unwrap();
    resolve(&s.journal, s.record.id, &mut peer(|| None), Patience::Once).unwrap();
    assert_eq!(s.process.state(), "T");
}
