//! The clients: one that measures pauses, one that measures throughput.
//!
//! Both speak redis's protocol over plain sockets. A broken connection is made anew by attempts that are
//! started every millisecond without giving the earlier ones up, so that what is measured is when the
//! service is back, not the client's own patience.

use std::io::{self, Read, Write};
use std::net::{SocketAddrV4, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, connect, getsockopt, socket, sockopt};

use crate::data::{Data, request};
use crate::table::percentile;

/// Time from one request of the pausing client to the next; every second one is a SET.
const PACE: Duration = Duration::from_micros(250);
/// An answer that takes longer is a broken connection.
const PATIENCE: Duration = Duration::from_secs(10);
/// Requests in a batch of the throughput client.
const PIPELINE: usize = 64;
/// How often the writer sends what is due.
const TICK: Duration = Duration::from_millis(2);

/// A time between two answers, and what it was made of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Gap {
    pub(crate) whole: Duration,
    /// From the last answer until the connection was seen to be closed.
    pub(crate) until_closed: Duration,
    /// From there until a new connection was established.
    pub(crate) until_connected: Duration,
    /// When the answer came that ended it.
    pub(crate) ended: Instant,
}

/// What a client tells while it runs.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) stop: AtomicBool,
    /// The longest gap in which the connection broke, and the longest of all others.
    longest: Mutex<[Option<Gap>; 2]>,
    answers: Mutex<Vec<(Instant, usize)>>,
    /// How long single answers took, and when they came.
    waits: Mutex<Vec<(Instant, Duration)>>,
}

impl Seen {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            stop: AtomicBool::new(false),
            longest: Mutex::default(),
            answers: Mutex::default(),
            waits: Mutex::default(),
        })
    }

    /// The longest gap since the last call in which the connection broke, and the longest of the others.
    pub(crate) fn take_gaps(&self) -> [Option<Gap>; 2] {
        std::mem::take(&mut *self.longest.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Answers per second between two instants.
    pub(crate) fn rate(&self, from: Instant, to: Instant) -> f64 {
        let answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        let count: usize = answers.iter().filter(|(at, _)| *at >= from && *at < to).map(|(_, n)| n).sum();
        count as f64 / (to - from).as_secs_f64().max(1e-6)
    }

    /// This percentile of how long single answers took, of those that came between two instants, in ms.
    pub(crate) fn wait_ms(&self, percent: usize, from: Instant, to: Instant) -> f64 {
        let waits = self.waits.lock().unwrap_or_else(PoisonError::into_inner);
        let within = waits.iter().filter(|(at, _)| *at > from && *at <= to);
        percentile(&mut within.map(|(_, wait)| wait.as_secs_f64() * 1e3).collect::<Vec<_>>(), percent)
    }

    fn note(&self, gap: Gap) {
        let mut longest = self.longest.lock().unwrap_or_else(PoisonError::into_inner);
        let longest = &mut longest[usize::from(gap.until_closed.is_zero())];
        if longest.is_none_or(|known| known.whole < gap.whole) {
            *longest = Some(gap);
        }
    }
}

/// Writes and asks in turn, at an even pace, and notes the longest gap, until told to stop.
pub(crate) fn pauses(address: SocketAddrV4, data: &Data, seen: &Seen) -> io::Result<()> {
    watch(address, seen, |turn, request| match turn % 2 {
        0 => data.set(data.hot_key(turn / 2), turn as u64, request),
        _ => self::request(&[b"PING"], request),
    })
}

/// Looks for keys all over the memory and writes nothing; redis notes no use of a key that is only looked for.
pub(crate) fn looks(address: SocketAddrV4, data: &Data, seen: &Seen) -> io::Result<()> {
    let mut noise = Noise::new(1);
    watch(address, seen, |_, request| {
        self::request(&[b"EXISTS", &data.key(noise.below(data.keys()))], request);
    })
}

/// Writes keys all over the memory, so many a second, in batches, until told to stop.
pub(crate) fn writes(address: SocketAddrV4, data: &Data, seen: &Seen, per_second: usize) -> io::Result<()> {
    let mut stream = reconnect(address)?;
    let mut noise = Noise::new(2);
    let mut batch = Vec::new();
    let (mut due, mut owed) = (Instant::now(), 0.0);
    while !seen.stop.load(Ordering::Relaxed) {
        batch.clear();
        owed += per_second as f64 * TICK.as_secs_f64();
        let count = owed as usize;
        owed -= count as f64;
        for _ in 0..count {
            data.set(noise.below(data.keys()), noise.next(), &mut batch);
        }
        match ask(&mut stream, &batch, count) {
            Ok(()) => {
                let mut answers = seen.answers.lock().unwrap_or_else(PoisonError::into_inner);
                answers.push((Instant::now(), count));
            }
            Err(_) => stream = reconnect(address)?,
        }
        // What was not written during a gap is not caught up with.
        due = (due + TICK).max(Instant::now() - 5 * TICK);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    Ok(())
}

/// Numbers without order.
struct Noise(u64);

impl Noise {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 >> 11
    }

    fn below(&mut self, end: usize) -> usize {
        self.next() as usize % end.max(1)
    }
}

/// One request at a time, at an even pace; notes each wait and the longest gaps.
fn watch(address: SocketAddrV4, seen: &Seen, mut ask_for: impl FnMut(usize, &mut Vec<u8>)) -> io::Result<()> {
    let mut stream = reconnect(address)?;
    let mut last = Instant::now();
    let (mut closed, mut connected) = (None, None);
    let mut turn = 0;
    let mut request = Vec::new();
    while !seen.stop.load(Ordering::Relaxed) {
        request.clear();
        ask_for(turn, &mut request);
        let asked = Instant::now();
        match ask(&mut stream, &request, 1) {
            Ok(()) => {
                let now = Instant::now();
                seen.waits.lock().unwrap_or_else(PoisonError::into_inner).push((now, now - asked));
                let (closed, connected) = (closed.take(), connected.take());
                seen.note(Gap {
                    whole: now - last,
                    until_closed: closed.map_or(Duration::ZERO, |at| at - last),
                    until_connected: closed.zip(connected).map_or(Duration::ZERO, |(from, to)| to - from),
                    ended: now,
                });
                last = now;
                turn += 1;
                std::thread::sleep(PACE.saturating_sub(Duration::from_micros(60)));
            }
            Err(_) => {
                closed = closed.or(Some(Instant::now()));
                stream = reconnect(address)?;
                connected = Some(Instant::now());
            }
        }
    }
    Ok(())
}

/// Asks as fast as answers come, with [`PIPELINE`] requests in flight at least, half EXISTS and half SET: the
/// next batch is under way while one is answered, so that the server need not wait for us.
pub(crate) fn throughput(address: SocketAddrV4, data: &Data, seen: &Seen) -> io::Result<()> {
    let mut stream = reconnect(address)?;
    let (mut turn, mut ahead) = (0, 0);
    let mut batch = Vec::new();
    while !seen.stop.load(Ordering::Relaxed) {
        batch.clear();
        for n in 0..PIPELINE {
            if n % 2 == 0 {
                data.set(data.hot_key(turn), turn as u64, &mut batch);
            } else {
                request(&[b"EXISTS", &data.key(data.hot_key(turn))], &mut batch);
            }
            turn += 1;
        }
        let answered = std::mem::replace(&mut ahead, PIPELINE);
        if ask(&mut stream, &batch, answered).is_err() {
            (stream, ahead) = (reconnect(address)?, 0);
            continue;
        }
        let mut answers = seen.answers.lock().unwrap_or_else(PoisonError::into_inner);
        answers.push((Instant::now(), answered));
    }
    Ok(())
}

/// Sends, and waits for `answers` lines; nothing that we ask is answered with more than one line.
fn ask(stream: &mut TcpStream, request: &[u8], answers: usize) -> io::Result<()> {
    stream.write_all(request)?;
    let mut buffer = [0; 4096];
    let mut missing = answers;
    while missing > 0 {
        let count = stream.read(&mut buffer)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if buffer[..count].contains(&b'-') {
            return Err(io::Error::other(String::from_utf8_lossy(&buffer[..count]).into_owned()));
        }
        missing = missing.saturating_sub(buffer[..count].iter().filter(|byte| **byte == b'\n').count());
    }
    Ok(())
}

/// A new connection by the first of several attempts that comes through.
pub(crate) fn reconnect(address: SocketAddrV4) -> io::Result<TcpStream> {
    let until = Instant::now() + PATIENCE;
    let mut attempts: Vec<OwnedFd> = Vec::new();
    while Instant::now() < until {
        if attempts.len() < 200 {
            attempts.extend(attempt(address)?);
        }
        let mut polled: Vec<PollFd> =
            attempts.iter().map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLOUT)).collect();
        poll(&mut polled, PollTimeout::from(1_u8))?;
        let ready: Vec<bool> = polled.iter().map(|fd| fd.any() == Some(true)).collect();
        let mut still = Vec::with_capacity(attempts.len());
        let mut done = None;
        for (fd, ready) in attempts.into_iter().zip(ready) {
            match ready {
                false => still.push(fd),
                true if done.is_none() && getsockopt(&fd, sockopt::SocketError) == Ok(0) => done = Some(fd),
                true => {}
            }
        }
        if let Some(fd) = done {
            let stream = TcpStream::from(fd);
            stream.set_nonblocking(false)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            return Ok(stream);
        }
        attempts = still;
    }
    Err(io::ErrorKind::TimedOut.into())
}

fn attempt(address: SocketAddrV4) -> io::Result<Option<OwnedFd>> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let fd = socket(AddressFamily::Inet, SockType::Stream, flags, None)?;
    match connect(fd.as_raw_fd(), &SockaddrIn::from(address)) {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(Some(fd)),
        // No way there for the moment.
        Err(_) => Ok(None),
    }
}
