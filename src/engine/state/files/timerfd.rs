//! timerfd: clock, setting, what is left, and expirations not read yet.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use super::scan::Open;
use super::{Stop, Trouble, errno_of};
use crate::engine::clocks::Shift;
use crate::engine::procfs;
use crate::engine::sys::fds;
use crate::proto::files::TimerFd;

const NS: i64 = 1_000_000_000;
const ABSOLUTE: i32 = libc::TFD_TIMER_ABSTIME;

/// `shift` is how much more the process's clocks read than ours, whose timerfd it is for this moment.
pub(super) fn capture(open: &Open, shift: &Shift) -> Result<TimerFd, Stop> {
    let failed = Stop::failed;
    // Asking for the time first makes the kernel count overdue periods into the ticks.
    let spec = fds::timerfd_gettime(open.fd()).map_err(failed("reading a timerfd"))?;
    let info = procfs::read_text(format!("/proc/self/fdinfo/{}", open.ours.as_raw_fd()))
        .map_err(|e| Stop::Failed { step: "reading fdinfo of a timerfd", errno: errno_of(&e) })?;
    let field = |name: &str| info.lines().find_map(|l| Some(l.strip_prefix(name)?.strip_prefix(':')?.trim()));
    let clock = field("clockid").and_then(|s| s.parse::<i32>().ok());
    let ticks = field("ticks").and_then(|s| s.parse::<u64>().ok());
    let settime_flags = field("settime flags").and_then(|s| u32::from_str_radix(s, 8).ok());
    let (Some(clock), Some(ticks), Some(settime_flags)) = (clock, ticks, settime_flags) else {
        return Err(Stop::refuse("is a timerfd, and this kernel does not tell its setting"));
    };
    let now = fds::clock_ns(clock).map_err(failed("reading the clock of a timerfd"))?;
    let ns = |t: libc::timespec| t.tv_sec.saturating_mul(NS).saturating_add(t.tv_nsec);
    let remaining_ns = ns(spec.it_value);
    Ok(TimerFd {
        clock,
        settime_flags,
        ticks,
        interval_ns: u64::try_from(ns(spec.it_interval)).unwrap_or(0),
        // Zero is what a disarmed timer shows; an armed one shows at least a nanosecond.
        armed: remaining_ns != 0,
        remaining_ns,
        deadline_ns: now.saturating_add(remaining_ns).saturating_add(shift.of(clock)),
    })
}

/// Makes a timerfd. It goes off at the same instant of the process's clock, which reads `shift` more than
/// ours; only where the time of day may differ, and the time was to pass whatever the day, after the time
/// that was left.
pub(super) fn make(image: &TimerFd, same_kernel: bool, shift: &Shift) -> Result<OwnedFd, Trouble> {
    let fd = fds::timerfd(image.clock).map_err(Trouble::step("making a timerfd"))?;
    let flags = i32::try_from(image.settime_flags).map_err(|_| Trouble::Invalid("timerfd flags"))?;
    let interval = i64::try_from(image.interval_ns).map_err(|_| Trouble::Invalid("timerfd interval"))?;
    let now = fds::clock_ns(image.clock).map_err(Trouble::step("reading a timerfd's clock"))?;
    let of_day = matches!(image.clock, libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_ALARM);
    let absolute = flags & ABSOLUTE != 0;
    let mut deadline = match of_day && !absolute && !same_kernel {
        true => now.saturating_add(image.remaining_ns),
        false => image.deadline_ns.saturating_sub(shift.of(image.clock)),
    };
    let mut ticks = image.ticks;
    if image.armed && ticks > 0 && interval > 0 && deadline <= now {
        // Periods that passed on the way are added here: were the timer to go off before its old ticks are
        // set, they would overwrite the new one.
        let periods = now.saturating_sub(deadline) / interval + 1;
        ticks = ticks.saturating_add(u64::try_from(periods).unwrap_or(0));
        deadline = deadline.saturating_add(periods.saturating_mul(interval));
    }
    if image.armed || flags != 0 {
        let value = match (image.armed, absolute) {
            (false, _) => 0,
            (true, true) => deadline.max(1),
            (true, false) => deadline.saturating_sub(now).max(1),
        };
        let time = |ns: i64| libc::timespec { tv_sec: ns.div_euclid(NS), tv_nsec: ns.rem_euclid(NS) };
        let spec = libc::itimerspec { it_interval: time(interval), it_value: time(value) };
        fds::timerfd_settime(fd.as_fd(), flags, &spec).map_err(Trouble::step("setting a timerfd"))?;
    }
    if ticks > 0 {
        fds::timerfd_set_ticks(fd.as_fd(), ticks).map_err(Trouble::step("setting a timerfd's ticks"))?;
    }
    Ok(fd)
}
