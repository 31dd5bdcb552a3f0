//! The open file descriptions at the destination, as descriptors of ours.

use std::fs::OpenOptions;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use super::capture::boot_id;
use super::tcp::{AheadSockets, Silent, SilentConnections};
use super::unix_names::UnixNames;
use super::{
    RestoreFilesError, Trouble, errno_of, eventfd, ip_socket, memfd, netlink, path, pipe, signalfd, tcp,
    timerfd, unix, unix_single,
};
use crate::engine::clocks::Shift;
use crate::engine::many;
use crate::engine::state::objects::Objects;
use crate::engine::sys::fds;
use crate::proto::files::description::Kind;
use crate::proto::files::{Description, Files, TcpConnection};

/// Most descriptors of a process: the kernel's default for `fs.nr_open`.
const MAX_FDS: u32 = 1 << 20;

/// Descriptions that exist here, ready to be installed.
#[derive(Debug)]
pub struct Built {
    pub(super) files: Files,
    /// One per description; those that only the process can make are still missing.
    pub(super) made: Vec<Option<Arc<OwnedFd>>>,
    silent: SilentConnections,
    /// Datagrams that were not read yet and are not in the new sockets, as if the network had lost them.
    pub lost_datagrams: u64,
    /// Connections whose sockets were made ahead.
    pub made_ahead: usize,
    /// Names of unix sockets, to be published when the process is about to run.
    pub names: UnixNames,
}

/// What the making of sockets leaves behind beside descriptors.
#[derive(Default)]
struct Extras {
    lost_datagrams: u64,
    names: UnixNames,
}

impl Built {
    /// The connections, to be woken once the process is ours.
    pub fn take_connections(&mut self) -> SilentConnections {
        std::mem::take(&mut self.silent)
    }

    /// The first descriptor that leads to a description: for error messages.
    pub(super) fn number_of(&self, description: usize) -> u32 {
        number_of(&self.files, description)
    }
}

fn number_of(files: &Files, description: usize) -> u32 {
    files.fds.iter().find(|f| f.description as usize == description).map_or(u32::MAX, |f| f.number)
}

/// Makes the descriptions. Listening sockets are bound but do not listen before [`super::install()`].
/// Standard streams that were left behind lead to `stdio_log`, or to /dev/null. The clocks of the process
/// will read `shift` more than ours; `objects` is the shared memory it has. Of the sockets in `ahead` those are used
/// that are what they should be.
///
/// # Errors
/// If something cannot be made as it was, or the description is not valid.
pub fn build(
    files: &Files,
    stdio_log: Option<&Path>,
    shift: &Shift,
    objects: &Objects,
    ahead: AheadSockets,
) -> Result<Built, RestoreFilesError> {
    validate(files)?;
    let same_kernel = !files.boot_id.is_empty() && files.boot_id == boot_id();
    let mut pipes = Vec::with_capacity(files.pipes.len());
    for (index, image) in files.pipes.iter().enumerate() {
        let is_end = |d: &Description| matches!(&d.kind, Some(Kind::PipeEnd(e)) if e.pipe as usize == index);
        let number = files.descriptions.iter().position(is_end).map_or(u32::MAX, |d| number_of(files, d));
        let (read, write) = pipe::make(image).map_err(|t| t.for_fd(number))?;
        pipes.push([Some(read), Some(write)]);
    }
    let mut made = Vec::with_capacity(files.descriptions.len());
    let mut extras = Extras::default();
    for (index, description) in files.descriptions.iter().enumerate() {
        let fd = make(description, same_kernel, shift, stdio_log, &mut pipes, objects, &mut extras)
            .map_err(|t| t.for_fd(number_of(files, index)))?;
        made.push(fd);
    }
    let Extras { lost_datagrams, names } = extras;
    unix_single::complete(files, &made, &names)?;
    if lost_datagrams > 0 {
        tracing::warn!(lost_datagrams, "unread datagrams were lost on the way");
    }
    let mut made: Vec<_> = made.into_iter().map(|fd| fd.map(Arc::new)).collect();
    let (silent, made_ahead) = connect(files, &mut made, ahead)?;
    Ok(Built { files: outline(files), made, silent, lost_datagrams, made_ahead, names })
}

/// The connections, in TCP_REPAIR. Last: there they bind beside a socket that will listen on their port,
/// which the other way round is refused.
fn connect(
    files: &Files,
    made: &mut [Option<Arc<OwnedFd>>],
    mut ahead: AheadSockets,
) -> Result<(SilentConnections, usize), RestoreFilesError> {
    ahead.begin();
    let mut wanted = Vec::with_capacity(files.descriptions.len());
    for (index, description) in files.descriptions.iter().enumerate() {
        if let Some(Kind::TcpConnection(image)) = &description.kind {
            let recipe =
                ahead.recipe_of(image, &files.option_sets).map_err(|t| t.for_fd(number_of(files, index)))?;
            let early = ahead.take(image, &recipe);
            wanted.push((index, description, image, recipe, early));
        }
    }
    // Some may have the ends of what is made now.
    ahead.drop_rest();
    let connections = many::map(&wanted, |(index, description, image, recipe, early)| {
        let flags = description.flags.cast_signed();
        let early = early.as_ref().and_then(|early| early.give(image, flags));
        let was_early = early.is_some();
        let connection = early.map_or_else(|| Silent::make(image, flags, recipe), Ok);
        let finished =
            connection.and_then(|silent| finish(&silent.socket(), description).map(|()| (silent, was_early)));
        finished.map_err(|t| t.for_fd(number_of(files, *index)))
    });
    let (mut all, mut made_ahead) = (Vec::with_capacity(connections.len()), 0);
    for ((index, ..), connection) in wanted.iter().zip(connections) {
        let (silent, was_early) = connection?;
        made_ahead += usize::from(was_early);
        if let Some(slot) = made.get_mut(*index) {
            *slot = Some(silent.socket());
        }
        all.push(silent);
    }
    tracing::debug!(made_ahead, of = all.len(), "connections are there");
    Ok((SilentConnections::new(all), made_ahead))
}

/// The description without what only the making of connections needs, which may be much.
fn outline(files: &Files) -> Files {
    let outlined = |d: &Description| match d.kind {
        Some(Kind::TcpConnection(_)) => {
            let kind = Some(Kind::TcpConnection(TcpConnection::default()));
            Description { flags: d.flags, owned: d.owned, signal: d.signal, kind }
        }
        _ => d.clone(),
    };
    Files {
        fds: files.fds.clone(),
        descriptions: files.descriptions.iter().map(outlined).collect(),
        pipes: files.pipes.clone(),
        pairs: files.pairs.clone(),
        boot_id: files.boot_id.clone(),
        ..Files::default()
    }
}

fn validate(files: &Files) -> Result<(), RestoreFilesError> {
    let invalid = RestoreFilesError::Invalid;
    let ascending = files.fds.windows(2).all(|w| matches!(w, [a, b] if a.number < b.number));
    if !ascending || files.fds.last().is_some_and(|f| f.number >= MAX_FDS) {
        return Err(invalid("descriptor numbers"));
    }
    if files.fds.iter().any(|f| f.description as usize >= files.descriptions.len()) {
        return Err(invalid("a descriptor without a description"));
    }
    for description in &files.descriptions {
        if description.signal > 64 || i32::try_from(description.flags).is_err() {
            return Err(invalid("a description's flags or signal"));
        }
        let known = match &description.kind {
            None => return Err(invalid("a description of an unknown kind")),
            Some(Kind::UnixEnd(end)) => (end.pair as usize) < files.pairs.len() && end.end < 2,
            Some(Kind::Epoll(epoll)) => epoll
                .watches
                .iter()
                .all(|w| (w.description as usize) < files.descriptions.len() && w.number < MAX_FDS),
            Some(_) => true,
        };
        if !known {
            return Err(invalid("a reference to what is not there"));
        }
    }
    for pair in &files.pairs {
        unix::validate(pair).map_err(|t| t.for_fd(u32::MAX))?;
    }
    Ok(())
}

fn make(
    description: &Description,
    same_kernel: bool,
    shift: &Shift,
    stdio_log: Option<&Path>,
    pipes: &mut [[Option<OwnedFd>; 2]],
    objects: &Objects,
    extras: &mut Extras,
) -> Result<Option<OwnedFd>, Trouble> {
    let flags = description.flags.cast_signed();
    let fd = match description.kind.as_ref().ok_or(Trouble::Invalid("a description of an unknown kind"))? {
        Kind::Path(image) => path::make(image, flags, same_kernel)?,
        Kind::Memfd(image) => memfd::make(image, flags, objects)?,
        Kind::PipeEnd(end) => {
            let end = pipes.get_mut(end.pipe as usize).and_then(|p| p.get_mut(usize::from(end.write)));
            // Reopened ends share a pipe; they were refused at the source.
            end.and_then(Option::take).ok_or(Trouble::Invalid("a pipe's end"))?
        }
        Kind::Eventfd(image) => eventfd::make(image)?,
        Kind::Timerfd(image) => timerfd::make(image, same_kernel, shift)?,
        Kind::Signalfd(image) => signalfd::make(image)?,
        Kind::Epoll(_) => fds::epoll().map_err(Trouble::step("making an epoll"))?,
        Kind::Tcp(image) => tcp::make(image)?,
        Kind::TcpClosed(image) => tcp::make_closed(image)?,
        Kind::IpSocket(image) => {
            let (fd, lost) = ip_socket::make(image)?;
            extras.lost_datagrams += u64::from(lost);
            fd
        }
        Kind::Netlink(image) => netlink::make(image)?,
        Kind::UnixSingle(image) => unix_single::make(image, &mut extras.names)?,
        // Made elsewhere.
        Kind::UnixEnd(_) | Kind::TcpConnection(_) => return Ok(None),
        Kind::LeftBehind(left) => return leave(left.input, stdio_log).map(Some),
    };
    finish(&fd, description)?;
    Ok(Some(fd))
}

/// Sets flags and signal, and sees that they took. O_ASYNC needs its owner first, which the process sets.
pub(super) fn finish(fd: &OwnedFd, description: &Description) -> Result<(), Trouble> {
    let wanted = description.flags.cast_signed() & !libc::O_ASYNC;
    // A connection was made with them.
    let is_made_so = matches!(description.kind, Some(Kind::TcpConnection(_)))
        && wanted & !libc::O_NONBLOCK == libc::O_RDWR;
    let flags = || fds::status_flags(fd.as_fd()).map_err(Trouble::step("reading flags"));
    if !is_made_so && flags()? != wanted {
        fds::set_status_flags(fd.as_fd(), wanted).map_err(Trouble::step("setting flags"))?;
        let now = flags()?;
        if now != wanted {
            return Err(Trouble::Differs(format!("flags (now {now:#o}, were {wanted:#o})")));
        }
    }
    if description.signal != 0 {
        fds::set_signal(fd.as_fd(), description.signal.cast_signed())
            .map_err(Trouble::step("setting F_SETSIG"))?;
    }
    Ok(())
}

fn leave(input: bool, stdio_log: Option<&Path>) -> Result<OwnedFd, Trouble> {
    let opened = match stdio_log {
        Some(log) if !input => OpenOptions::new().append(true).create(true).mode(0o600).open(log),
        _ => OpenOptions::new().read(true).write(true).open("/dev/null"),
    };
    let step = "opening what a left-behind stream leads to";
    opened.map(OwnedFd::from).map_err(|e| Trouble::Step(step, errno_of(&e)))
}
