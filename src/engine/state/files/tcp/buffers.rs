//! The buffers of a connection: how large they are, and what its windows say.

use std::ffi::c_int;
use std::os::fd::BorrowedFd;

use libc::SOL_SOCKET;

use super::super::Trouble;
use super::connection::SEGMENT_BYTES;
use super::recipe::Recipe;
use super::table::SO_BUF_LOCK;
use crate::engine::sys::socket;
use crate::proto::files::TcpConnection;

/// What a queue may use beyond its bytes while it is filled: the size is set right afterwards.
const ROOM_BYTES: usize = 256 << 10;
/// What the kernel gives a new connection to send from, about: it grows by itself.
const USUAL_SEND_BUFFER: u32 = 128 << 10;

/// Where `struct tcp_repair_window` has the window of the peer.
const SEND_WINDOW: usize = 4;
/// Where it has the receive window, and what that counts from.
const WINDOW: usize = 12;
const WINDOW_START: usize = 16;
/// The bit of the receive buffer in `SO_BUF_LOCK`.
const RECEIVE_LOCKED: c_int = 2;

/// Whether a new connection has buffers like these anyway, and nothing to put into them.
pub(super) fn has_usual_buffers(image: &TcpConnection, recipe: &Recipe) -> bool {
    let empty = image.received.is_empty() && image.sent.is_empty() && image.unsent.is_empty();
    empty
        && recipe.locked == 0
        && image.receive_buffer == recipe.receive_buffer.cast_unsigned()
        && image.send_buffer <= USUAL_SEND_BUFFER
}

/// Whether a buffer is being filled, or has what it will have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Room {
    /// As much as it takes to fill it: pages that were full at the source need not be so here.
    ToFill,
    /// What it had.
    AsBefore,
}

/// Sizes both buffers, and leaves to the kernel what was left to it: setting a size makes it the program's.
pub(super) fn set_buffers(
    fd: BorrowedFd<'_>,
    image: &TcpConnection,
    room: Room,
    recipe: &Recipe,
) -> Result<(), Trouble> {
    set_send_buffer(fd, image, room)?;
    set_receive_buffer(fd, image, room, recipe)?;
    lock_buffers(fd, recipe)
}

/// Sizes the send buffer.
pub(super) fn set_send_buffer(fd: BorrowedFd<'_>, image: &TcpConnection, room: Room) -> Result<(), Trouble> {
    let queued = image.sent.len() + image.unsent.len();
    let needed = if room == Room::ToFill && queued > 0 { queued * 4 + ROOM_BYTES } else { 0 };
    set_buffer(fd, libc::SO_SNDBUFFORCE, image.send_buffer, needed)
}

/// Sizes the receive buffer. What the peer was allowed to send must find room, also in small segments: a
/// kernel that runs out of it takes the allowance back, and then drops what the peer acknowledges together
/// with what it has sent. If the process meanwhile waits to write, neither side gets on any more. Only a
/// size that the program has chosen itself stays exactly what it was.
fn set_receive_buffer(
    fd: BorrowedFd<'_>,
    image: &TcpConnection,
    room: Room,
    recipe: &Recipe,
) -> Result<(), Trouble> {
    let queued = image.received.len();
    let needed = match room {
        Room::ToFill if queued > 0 => queued * 4 + ROOM_BYTES,
        Room::AsBefore if recipe.locked & RECEIVE_LOCKED == 0 => {
            // Not without bound: it would grow from move to move.
            (queued + queued / 8 + 2 * allowed(image) as usize + SEGMENT_BYTES).min(2 * recipe.largest_buffer)
        }
        _ => 0,
    };
    set_buffer(fd, libc::SO_RCVBUFFORCE, image.receive_buffer, needed)
}

/// How much the peer may send beyond what has come.
fn allowed(image: &TcpConnection) -> u32 {
    let end = window_word(image, WINDOW_START).wrapping_add(window_word(image, WINDOW));
    // Beyond the largest window there is: nonsense of a peer.
    Some(end.wrapping_sub(come(image))).filter(|left| *left < 1 << 30).unwrap_or(0)
}

fn window_word(image: &TcpConnection, at: usize) -> u32 {
    image.window.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_ne_bytes(*b))
}

/// Whether nobody waits to be told anything: all that was sent has come, all that has come was acknowledged, and
/// the peer takes more.
pub(super) fn is_quiet(image: &TcpConnection) -> bool {
    let owes = image.write_ended || !image.sent.is_empty() || !image.unsent.is_empty();
    !owes && window_word(image, WINDOW_START) == come(image) && window_word(image, SEND_WINDOW) > 0
}

/// The number of the next byte that the peer will send.
fn come(image: &TcpConnection) -> u32 {
    image.receive_sequence.wrapping_add(u32::try_from(image.received.len()).unwrap_or(0))
}

fn set_buffer(fd: BorrowedFd<'_>, force: c_int, size: u32, needed: usize) -> Result<(), Trouble> {
    let most = c_int::MAX - 1;
    let size = c_int::try_from(size).unwrap_or(most).max(c_int::try_from(needed).unwrap_or(most));
    // The kernel doubles what it is given.
    socket::set_int_option(fd, SOL_SOCKET, force, size / 2 + size % 2)
        .map_err(Trouble::step("sizing a TCP connection's buffer"))
}

/// Whether the program or the kernel sizes the buffers: setting them makes it the program.
pub(super) fn lock_buffers(fd: BorrowedFd<'_>, recipe: &Recipe) -> Result<(), Trouble> {
    socket::set_int_option(fd, SOL_SOCKET, SO_BUF_LOCK, recipe.locked)
        .map_err(Trouble::step("locking a TCP connection's buffers"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_something_to_say() {
        let mut window = vec![0; 20];
        window[SEND_WINDOW..][..4].copy_from_slice(&500u32.to_ne_bytes());
        window[WINDOW_START..][..4].copy_from_slice(&1003u32.to_ne_bytes());
        let quiet = TcpConnection {
            receive_sequence: 1000,
            received: vec![1, 2, 3],
            window: window.clone(),
            ..TcpConnection::default()
        };
        assert!(is_quiet(&quiet));
        let full = [&window[..SEND_WINDOW], &[0; 4], &window[8..]].concat();
        for loud in [
            TcpConnection { sent: vec![1], ..quiet.clone() },
            TcpConnection { unsent: vec![1], ..quiet.clone() },
            TcpConnection { write_ended: true, ..quiet.clone() },
            // Not acknowledged yet.
            TcpConnection { received: vec![1, 2, 3, 4], ..quiet.clone() },
            // The peer takes nothing.
            TcpConnection { window: full, ..quiet.clone() },
            TcpConnection { window: Vec::new(), ..quiet.clone() },
        ] {
            assert!(!is_quiet(&loud), "{loud:?}");
        }
    }
}
