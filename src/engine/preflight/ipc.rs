//! System V message queues and semaphore sets, which belong to the namespace and stay behind.
//!
//! They have no descriptors: that a process knows one shows only where it was the last to use it. Then it will most
//! likely use it again, and must not find nothing there, or what belongs to somebody else.

use super::undo::{self, SLACK_SECONDS, Set};
use crate::engine::procfs::{self, Stat};
use crate::engine::reason::Reason;
use crate::engine::remote::Tid;
use crate::engine::sys::sem;

const QUEUES: &str = "/proc/sysvipc/msg";

/// A line of the table of queues: who sent and received last, and when, in seconds of the time of day.
#[derive(Debug, PartialEq, Eq)]
struct Queue {
    id: i32,
    last: [(Tid, i64); 2],
}

/// The queues and sets that the process was the last to use.
pub(super) fn used(pid: Tid, stat: &Stat) -> Vec<Reason> {
    // Without a table the kernel has none.
    let table = procfs::read_text(QUEUES).unwrap_or_default();
    let queues: Vec<Queue> = table.lines().skip(1).filter_map(parse).collect();
    let sets = undo::sets();
    if queues.is_empty() && sets.is_empty() {
        return Vec::new();
    }
    // A PID may have had another process before.
    let Some(began) = undo::began(stat) else { return Vec::new() };
    let since = |when: i64| when != 0 && when >= began - SLACK_SECONDS;
    let own_queue = |q: &&Queue| q.last.iter().any(|(by, when)| *by == pid && since(*when));
    let own_set = |set: &&Set| {
        since(set.operated) && set.indices().any(|index| sem::last_process(set.id, index) == Ok(pid))
    };
    let queues = queues.iter().filter(own_queue).map(|q| format!("System V message queue {}", q.id));
    let sets = sets.iter().filter(own_set).map(|set| format!("System V semaphore set {}", set.id));
    let reason = |object| {
        let why = format!("was last used by process {pid}, and cannot be carried yet");
        Reason::new(object, why, "ipcs -q -s shows it; what nobody needs can be removed by ipcrm")
    };
    queues.chain(sets).map(reason).collect()
}

fn parse(line: &str) -> Option<Queue> {
    // key msqid perms cbytes qnum lspid lrpid uid gid cuid cgid stime rtime ctime
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    let [_, id, _, _, _, sender, receiver, _, _, _, _, sent, received, _] = fields[..] else { return None };
    let last = [(sender.parse().ok()?, sent.parse().ok()?), (receiver.parse().ok()?, received.parse().ok()?)];
    Some(Queue { id: id.parse().ok()?, last })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_a_line_of_the_table() {
        let line = "  0  3  600  5  1  77  0  0  0  0  0  1700000000  0  1699999999";
        assert_eq!(parse(line), Some(Queue { id: 3, last: [(77, 1_700_000_000), (0, 0)] }));
        assert_eq!(parse("key msqid perms"), None);
    }
}
