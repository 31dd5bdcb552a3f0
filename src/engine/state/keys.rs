//! Keyrings of the kernel's key service: those that hold keys of the process are refused.
//!
//! A thread, a process and a session each may have a keyring. The keys in one of a thread or process are its
//! own. A session keyring comes from outside: a login or a service manager makes it, with links to the keyrings
//! of the user and the number of the service's start. That is left behind, as the control group is; at the
//! destination the process gets a new empty session keyring, so that it does not have the keys of our service.
//!
//! Nothing but the process itself knows its keyrings, and merely asking for the session's by its special number
//! gives a process that has none the user's default (`lookup_user_key` in security/keys/process_keys.c). So it is
//! searched for by the name that it has nearly always, and asked for only if neither that nor the default is found.

use nix::errno::Errno;

use super::calls::AttrError;
use crate::engine::reason::Reason;
use crate::engine::remote::{Arg, Batch, InjectError, Outcome, RemoteCalls, Tid};
use crate::proto::image::Creds;

const GET_KEYRING_ID: u64 = 0;
const JOIN_SESSION_KEYRING: u64 = 1;
const CHOWN: u64 = 4;
const DESCRIBE: u64 = 6;
const READ: u64 = 11;
const OF_THREAD: i32 = -1;
const OF_PROCESS: i32 = -2;
const OF_SESSION: i32 = -3;
/// Keys of one keyring that are looked at; more are refused without.
const MAX_KEYS: usize = 32;
/// Bytes of the description of a key; longer ones are cut.
const DESCRIPTION_BYTES: usize = 256;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whose {
    Thread,
    Process,
    Session,
}

/// The question for the keyrings of a thread.
#[derive(Debug)]
pub struct KeysProbe {
    tid: Tid,
    thread: usize,
    process: usize,
    session: usize,
}

impl KeysProbe {
    /// Adds it to a batch that this thread will run.
    pub fn ask(tid: Tid, batch: &mut Batch) -> Self {
        let thread = ask_for(batch, OF_THREAD);
        let process = ask_for(batch, OF_PROCESS);
        let session = search(batch, "_ses");
        Self { tid, thread, process, session }
    }
}

fn ask_for(batch: &mut Batch, special: i32) -> usize {
    batch.call(libc::SYS_keyctl, &[GET_KEYRING_ID.into(), special.into(), 0u64.into()])
}

fn search(batch: &mut Batch, name: &str) -> usize {
    let (kind, name) = (batch.input_c_string(b"keyring"), batch.input_c_string(name.as_bytes()));
    batch.call(libc::SYS_request_key, &[kind, name, 0u64.into(), 0u64.into()])
}

/// Refuses keyrings with keys of the process, whose real user id is `uid`. The outcomes are those of the batches
/// that the probes were in.
///
/// # Errors
/// [`AttrError::Refused`], and if the process cannot be driven.
pub fn check<'a>(
    process: &mut dyn RemoteCalls,
    uid: u32,
    asked: impl Iterator<Item = (&'a KeysProbe, &'a Outcome)>,
) -> Result<(), AttrError> {
    let mut found = Vec::new();
    let mut unknown = Vec::new();
    // A keyring that has expired or is revoked is an error here, and gives no key to anybody.
    for (probe, outcome) in asked {
        for (whose, index) in
            [(Whose::Thread, probe.thread), (Whose::Process, probe.process), (Whose::Session, probe.session)]
        {
            match outcome.ret(index) {
                Ok(ring) => found.push((whose, probe.tid, ring)),
                Err(Errno::ENOKEY) if whose == Whose::Session => unknown.push(probe.tid),
                Err(_) => {}
            }
        }
    }
    let default = format!("_uid_ses.{uid}");
    let unknown: Vec<Tid> = in_each(process, &unknown, |batch| search(batch, &default))?
        .into_iter()
        .filter_map(|(tid, default)| default.is_none().then_some(tid))
        .collect();
    for (tid, ring) in in_each(process, &unknown, |batch| ask_for(batch, OF_SESSION))? {
        found.extend(ring.map(|ring| (Whose::Session, tid, ring)));
    }
    let mut reasons = Vec::new();
    let mut seen = Vec::new();
    for (whose, tid, ring) in found {
        if !seen.contains(&ring) {
            seen.push(ring);
            reasons.extend(look_into(process, tid, whose, ring)?);
        }
    }
    if reasons.is_empty() { Ok(()) } else { Err(AttrError::Refused(reasons)) }
}

/// One call in each of these threads, at the same time, and what it returned if it did not fail.
fn in_each(
    process: &mut dyn RemoteCalls,
    tids: &[Tid],
    call: impl Fn(&mut Batch) -> usize,
) -> Result<Vec<(Tid, Option<u64>)>, InjectError> {
    if tids.is_empty() {
        return Ok(Vec::new());
    }
    let mut work = Vec::with_capacity(tids.len());
    for &tid in tids {
        let mut batch = Batch::new();
        call(&mut batch);
        work.push((tid, batch));
    }
    let outcomes = process.run_in_threads(&work)?;
    Ok(tids.iter().zip(&outcomes).map(|(tid, outcome)| (*tid, outcome.ret(0).ok())).collect())
}

/// What is in this keyring, as a reason if that is the process's own.
fn look_into(
    process: &mut dyn RemoteCalls,
    tid: Tid,
    whose: Whose,
    ring: u64,
) -> Result<Option<Reason>, AttrError> {
    let object = match whose {
        Whose::Thread => format!("keyring of thread {tid}"),
        Whose::Process => "keyring of the process".to_owned(),
        Whose::Session => "keyring of the session".to_owned(),
    };
    let refuse = |why: String| {
        let remedy = "keyctl(1) shows it; unlink its keys before the move";
        Ok(Some(Reason::new(format!("{object} ({ring:#x})"), why, remedy)))
    };
    let mut batch = Batch::new();
    let room = MAX_KEYS * 4;
    let list = batch.output(room);
    let call = batch.call(libc::SYS_keyctl, &[READ.into(), ring.into(), list, room.into()]);
    let outcome = run(process, tid, batch)?;
    let count = match outcome.ret(call) {
        Ok(bytes) => usize::try_from(bytes).unwrap_or(usize::MAX) / 4,
        Err(Errno::ENOKEY | Errno::EKEYREVOKED | Errno::EKEYEXPIRED) => 0,
        Err(errno) => return refuse(format!("cannot be read ({errno})")),
    };
    if count == 0 {
        return Ok(None);
    }
    if whose != Whose::Session || count > MAX_KEYS {
        return refuse(format!("holds {}, which cannot be carried", keys(count)));
    }
    let mut batch = Batch::new();
    let asked: Vec<(usize, Arg)> = outcome
        .data(list, count * 4)
        .chunks_exact(4)
        .map(|key| {
            let key = i32::from_ne_bytes(key.try_into().unwrap_or_default());
            let into = batch.output(DESCRIPTION_BYTES);
            let args = [DESCRIBE.into(), key.into(), into, DESCRIPTION_BYTES.into()];
            (batch.call(libc::SYS_keyctl, &args), into)
        })
        .collect();
    let outcome = run(process, tid, batch)?;
    let own: Vec<String> = asked
        .iter()
        .filter_map(|&(call, into)| match outcome.ret(call) {
            Ok(_) => Some(outcome.data(into, DESCRIPTION_BYTES)),
            // Gone meanwhile, or of no use to anybody.
            Err(Errno::ENOKEY | Errno::EKEYREVOKED | Errno::EKEYEXPIRED) => None,
            Err(_) => Some(&b"a key that it may not see"[..]),
        })
        .filter(|text| !is_from_outside(text))
        .map(|text| String::from_utf8_lossy(text).trim_end_matches('\0').to_owned())
        .collect();
    match own.first() {
        None => Ok(None),
        Some(first) => {
            refuse(format!("holds {}, which cannot be carried, the first: {first}", keys(own.len())))
        }
    }
}

fn keys(count: usize) -> String {
    if count == 1 { "1 key".into() } else { format!("{count} keys") }
}

/// What logins and service managers put into the session keyring of everybody: links to the user's, and the
/// number that a start of a service has. The description is `type;uid;gid;permissions;name`.
fn is_from_outside(description: &[u8]) -> bool {
    let end = description.iter().position(|b| *b == 0).unwrap_or(description.len());
    let mut fields = description[..end].splitn(5, |b| *b == b';');
    match (fields.next(), fields.nth(3)) {
        (Some(b"keyring"), Some(name)) => name.starts_with(b"_uid.") || name.starts_with(b"_uid_ses."),
        (Some(b"user"), Some(name)) => name == b"invocation_id",
        _ => false,
    }
}

fn run(process: &mut dyn RemoteCalls, tid: Tid, batch: Batch) -> Result<Outcome, InjectError> {
    Ok(process.run_in_threads(&[(tid, batch)])?.pop().unwrap_or_default())
}

/// Gives a process, while it has one thread, a session keyring of its own in place of ours.
///
/// # Errors
/// If it cannot be driven, or the kernel does not make one.
pub fn leave_ours(process: &mut dyn RemoteCalls) -> Result<(), InjectError> {
    let mut batch = Batch::new();
    batch.call(libc::SYS_keyctl, &[JOIN_SESSION_KEYRING.into(), 0u64.into()]);
    match process.run(&batch)?.ret(0) {
        // No key service, or not for us: then the process has no use of our keys either.
        Ok(_) | Err(Errno::ENOSYS | Errno::EPERM) => Ok(()),
        Err(errno) => {
            Err(InjectError::Call { what: "making a session keyring".into(), tid: process.pid(), errno })
        }
    }
}

/// Gives the new session keyring to the user of the process; before it gives up its rights.
pub fn restore_calls(creds: &Creds, batch: &mut Batch) {
    if let (Some(uid), Some(gid)) = (creds.uids.first(), creds.gids.first()) {
        // Where there is none, that is all right; if it stays root's, the process can use it all the same.
        let args = [CHOWN.into(), OF_SESSION.into(), (*uid).into(), (*gid).into()];
        batch.call(libc::SYS_keyctl, &args);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_everybody_has_is_from_outside() {
        for text in
            ["keyring;0;65534;1f3f0000;_uid.0", "keyring;7;7;3f;_uid_ses.7\0\0", "user;0;0;3f;invocation_id"]
        {
            assert!(is_from_outside(text.as_bytes()), "{text}");
        }
        for text in ["keyring;0;0;3f;mine", "user;0;0;3f;_uid.0", "logon;0;0;3f;invocation_id", "keyring", ""]
        {
            assert!(!is_from_outside(text.as_bytes()), "{text}");
        }
    }
}
