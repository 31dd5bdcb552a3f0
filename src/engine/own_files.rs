//! Room for descriptors of our own: one for each socket of the process goes through us.

use std::fs::File;

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Descriptors that there is room for from the beginning.
const ROOM: u64 = 65_536;

/// Raises our limit of open files as far as it goes (a login's is often 1,024), and has the kernel make its table
/// of our descriptors large at once: when it grows later, and we have threads, each doubling waits until all
/// processors have passed a quiet state (`expand_fdtable` in fs/file.c, Linux 6.18), some 10 ms, and that would be
/// while the process is frozen.
///
/// To be called before threads are started. Where it cannot be done, large processes take longer, or fail by name.
pub fn make_room() {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return };
    if soft < hard && setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_err() {
        tracing::warn!(soft, hard, "the limit of open files stays");
    }
    let highest = i32::try_from(ROOM.min(hard).saturating_sub(1)).unwrap_or(0);
    if let Ok(file) = File::open("/dev/null")
        && let Ok(number) = fcntl(&file, FcntlArg::F_DUPFD_CLOEXEC(highest))
    {
        let _ = nix::unistd::close(number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_made() {
        make_room();
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        assert_eq!(soft, hard);
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let size = status.lines().find_map(|line| line.strip_prefix("FDSize:")).unwrap();
        assert!(size.trim().parse::<u64>().unwrap() >= ROOM.min(hard), "{size}");
    }
}
