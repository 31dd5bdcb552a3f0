//! Plain clients: one connection each, which they never make anew, one exchange after the other. They know
//! what every answer must be.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use migrate::testbed::{Lan, TestbedError, wait_for};

use crate::case::Result;

/// No client waits longer than this for anything: it has lost its connection then.
const PATIENCE: Duration = Duration::from_secs(30);
/// Exchanges that count as getting on.
const SOME: u64 = 20;

/// Clients at work.
#[derive(Default)]
pub(crate) struct Plain {
    stop: Arc<AtomicBool>,
    clients: Vec<Client>,
}

struct Client {
    name: String,
    done: Arc<Done>,
    thread: JoinHandle<std::result::Result<io::Result<()>, TestbedError>>,
}

#[derive(Default)]
struct Done {
    exchanges: AtomicU64,
    longest_us: AtomicU64,
}

impl Plain {
    /// Connects, makes a session of the connection with `open`, and lets `exchange` work on it, with the
    /// number of the exchange, until [`Plain::finish`].
    pub(crate) fn add<S>(
        &mut self,
        lan: &Lan,
        name: impl Into<String>,
        address: SocketAddr,
        open: impl FnOnce(TcpStream) -> io::Result<S> + Send + 'static,
        exchange: impl Fn(&mut S, u64) -> io::Result<()> + Send + 'static,
    ) -> Result {
        let (stop, done) = (Arc::clone(&self.stop), Arc::<Done>::default());
        let counted = Arc::clone(&done);
        let work = move || {
            let stream = TcpStream::connect(address)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_write_timeout(Some(PATIENCE))?;
            stream.set_nodelay(true)?;
            let mut session = open(stream)?;
            let mut number = 0;
            while !stop.load(Ordering::Relaxed) {
                let begin = Instant::now();
                exchange(&mut session, number)?;
                let micros = u64::try_from(begin.elapsed().as_micros()).unwrap_or(u64::MAX);
                counted.longest_us.fetch_max(micros, Ordering::Relaxed);
                number += 1;
                counted.exchanges.store(number, Ordering::Relaxed);
            }
            Ok(())
        };
        let name = name.into();
        self.clients.push(Client { thread: lan.client(&name, work)?, name, done });
        Ok(())
    }

    /// All of them get answers.
    pub(crate) fn get_on(&self) -> Result {
        let now = |client: &Client| client.done.exchanges.load(Ordering::Relaxed);
        for client in &self.clients {
            let before = now(client);
            let what = format!("answers for {}", client.name);
            // One that has ended has failed; what it says comes from `finish`.
            wait_for(&what, PATIENCE, || {
                Ok((now(client) >= before + SOME || client.thread.is_finished()).then_some(()))
            })?;
        }
        Ok(())
    }

    /// Ends them; an error if one has failed, or else the longest that an exchange took.
    pub(crate) fn finish(self) -> Result<Duration> {
        self.stop.store(true, Ordering::Relaxed);
        let mut longest = 0;
        for client in self.clients {
            let ended = client.thread.join().map_err(|_| format!("{} panicked", client.name))??;
            ended.map_err(|error| format!("{}: {error}", client.name))?;
            longest = longest.max(client.done.longest_us.load(Ordering::Relaxed));
        }
        Ok(Duration::from_micros(longest))
    }
}

/// The bytes of an exchange.
pub(crate) fn pattern(number: u64, bytes: usize) -> Vec<u8> {
    let byte = |at: u64| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40).to_le_bytes()[0];
    (number.wrapping_mul(257)..).take(bytes).map(byte).collect()
}

/// Sends something, and gets the same back.
pub(crate) fn echo(session: &mut (impl Read + Write), number: u64) -> io::Result<()> {
    let sent = pattern(number, usize::try_from(number % 7).unwrap_or(0) * 3000 + 1);
    session.write_all(&sent)?;
    session.flush()?;
    let mut got = vec![0; sent.len()];
    session.read_exact(&mut got)?;
    same(&sent, &got)
}

/// An error unless these are the same bytes.
pub(crate) fn same(wanted: &[u8], got: &[u8]) -> io::Result<()> {
    match wanted.iter().zip(got).position(|(a, b)| a != b) {
        None if wanted.len() == got.len() => Ok(()),
        at => Err(io::Error::other(format!("wrong at {at:?}, {} of {} bytes", got.len(), wanted.len()))),
    }
}
