//! Whether process ids are free here.

use std::collections::HashMap;

use super::procfs::{self, parse_stat};
use super::reason::Reason;
use super::remote::Tid;

/// Which of these ids are in use here, as a process, thread, process group or session: a process or
/// thread with such an id cannot be made (clone3 with `set_tid`).
pub fn check_pids_free(pids: &[Tid]) -> Vec<Reason> {
    let max: Tid = std::fs::read_to_string("/proc/sys/kernel/pid_max")
        .ok()
        .and_then(|t| t.trim().parse().ok())
        .unwrap_or(Tid::MAX);
    let groups = groups_in_use();
    let mut reasons = Vec::new();
    for &pid in pids {
        let object = format!("pid {pid}");
        let remedy = "run this side in a PID namespace of its own, or try again later";
        if pid <= 0 || pid >= max {
            let why = format!("is beyond what this machine gives out (kernel.pid_max is {max})");
            reasons.push(Reason::new(object, why, "raise the sysctl kernel.pid_max"));
        } else if let Some(name) = name_of(pid) {
            reasons.push(Reason::new(object, format!("is in use here ({name})"), remedy));
        } else if let Some((what, member)) = groups.get(&pid) {
            let why = format!("is in use here as the {what} of process {member}");
            reasons.push(Reason::new(object, why, remedy));
        }
    }
    reasons
}

/// The name of the process or thread with this id. Threads are not listed in /proc, but are found there.
fn name_of(pid: Tid) -> Option<String> {
    let comm = procfs::read(format!("/proc/{pid}/comm")).ok()?;
    Some(String::from_utf8_lossy(&comm).trim_end().to_owned())
}

/// Groups and sessions, each with one of its members: they keep their id when their leader is gone.
fn groups_in_use() -> HashMap<Tid, (&'static str, Tid)> {
    let mut all = HashMap::new();
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    for pid in entries.filter_map(|e| e.file_name().to_str()?.parse::<Tid>().ok()) {
        let text = procfs::read(format!("/proc/{pid}/stat")).unwrap_or_default();
        if let Ok(stat) = parse_stat(&text) {
            all.entry(stat.pgrp).or_insert(("process group", pid));
            all.entry(stat.session).or_insert(("session", pid));
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::trial::{Killed, KilledPid};
    use std::io::{BufRead, BufReader};

    #[test]
    fn processes_threads_groups_and_sessions_are_in_use() {
        // A session whose leader is gone: its id lives on in the member.
        let code = "import os,sys,signal,time\nif os.fork()==0:\n  os.setsid()\n  s=os.getpid()\n  \
            if os.fork()==0:\n    while os.getppid()==s: time.sleep(0.001)\n    print(s,os.getpid(),flush=True)\n    signal.pause()\n  os._exit(0)\n\
            os.wait()";
        let mut python = std::process::Command::new("python3");
        let piped = python.args(["-c", code]).stdout(std::process::Stdio::piped());
        let mut child = Killed::spawn(piped.stderr(std::process::Stdio::null()));
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        child.wait().unwrap();
        let ids: Vec<Tid> = line.split_ascii_whitespace().map(|w| w.parse().unwrap()).collect();
        let session = ids[0];
        let _member = KilledPid(ids[1]);
        let ours = Tid::try_from(std::process::id()).unwrap();
        let thread = std::thread::spawn(|| {
            let tid = nix::unistd::gettid().as_raw();
            (tid, check_pids_free(&[tid]))
        });
        let (_, of_thread) = thread.join().unwrap();
        let reasons = check_pids_free(&[ours, session, Tid::MAX, 0]);
        assert_eq!(of_thread.len(), 1);
        assert_eq!(reasons.len(), 4, "{reasons:?}");
        assert!(reasons[1].why.contains("of process"), "{reasons:?}");
        assert!(reasons[2].why.contains("pid_max"));
    }

    #[test]
    fn an_id_that_nobody_has_is_free() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = Tid::try_from(child.id()).unwrap();
        child.wait().unwrap();
        assert_eq!(check_pids_free(&[pid]), []);
    }
}
