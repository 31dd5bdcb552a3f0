//! Control groups that are frozen: nothing can be asked of their processes.

use std::path::{Path, PathBuf};

use crate::engine::reason::Reason;
use crate::engine::remote::Tid;

/// Whether a control group of `pid` is frozen, in either hierarchy.
pub(super) fn frozen(pid: Tid) -> Option<Reason> {
    let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    let group = groups.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        let path = path.trim_start_matches('/');
        if controllers.is_empty() {
            let dir = mounted(&mounts, "cgroup2", None)?.join(path);
            says(&dir.join("cgroup.events"), "frozen 1").then_some(dir)
        } else if controllers.split(',').any(|c| c == "freezer") {
            let dir = mounted(&mounts, "cgroup", Some("freezer"))?.join(path);
            let state = dir.join("freezer.state");
            (says(&state, "FROZEN") || says(&state, "FREEZING")).then_some(dir)
        } else {
            None
        }
    })?;
    let why = format!("is in a frozen control group ({})", group.display());
    Some(Reason::new(format!("pid {pid}"), why, "thaw it"))
}

fn says(file: &Path, line: &str) -> bool {
    std::fs::read_to_string(file).is_ok_and(|text| text.lines().any(|l| l == line))
}

/// Where a hierarchy is mounted: type, and an option of its super block (proc_pid_mountinfo(5)).
fn mounted(mounts: &str, kind: &str, option: Option<&str>) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let place = left.split(' ').nth(4)?;
        let mut fields = right.split(' ');
        let fits = fields.next()? == kind
            && option.is_none_or(|o| fields.nth(1).is_some_and(|all| all.split(',').any(|x| x == o)));
        fits.then(|| PathBuf::from(place))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_of_hierarchies() {
        let mounts = "30 23 0:26 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate\n\
            31 23 0:27 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer\n";
        assert_eq!(mounted(mounts, "cgroup2", None), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(mounted(mounts, "cgroup", Some("freezer")), Some("/sys/fs/cgroup/freezer".into()));
        assert_eq!(mounted(mounts, "cgroup", Some("cpu")), None);
    }
}
