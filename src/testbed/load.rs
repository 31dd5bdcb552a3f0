//! Load on a key-value server, by a client that reconnects and remembers every acknowledged write.

use std::io::{self, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long a connection may take to come about before it is tried again.
const CONNECT: Duration = Duration::from_millis(250);
/// How long the server may take to be reached by those who do not go on trying anyway.
const REACHED: Duration = Duration::from_secs(20);
/// How long an answer may take before the connection is given up: longer than a busy machine stands still.
const ANSWER: Duration = Duration::from_secs(30);
/// Between two attempts to reach the server.
const AGAIN: Duration = Duration::from_millis(10);
/// Requests in flight while filling and verifying.
const BATCH: u64 = 500;

/// A server's protocol, pipelined: requests queue up until [`Store::flush`], answers come in their order.
pub trait Store: Sized {
    /// Speaks over this connection.
    fn over(wire: Wire) -> Self;
    /// The connection.
    fn wire(&mut self) -> &mut Wire;
    /// Queues a write.
    fn set(&mut self, key: &str, value: &[u8]);
    /// Reads the answer to a write.
    ///
    /// # Errors
    /// The connection broke, or the server did not say that it has the value.
    fn set_done(&mut self) -> io::Result<()>;
    /// Queues a read.
    fn get(&mut self, key: &str);
    /// Reads the answer to a read.
    ///
    /// # Errors
    /// The connection broke, or the answer is none.
    fn got(&mut self) -> io::Result<Option<Vec<u8>>>;

    /// Connects.
    ///
    /// # Errors
    /// Nobody answers in time, or answers with a refusal.
    fn connect(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(&address, CONNECT)?;
        stream.set_read_timeout(Some(ANSWER))?;
        stream.set_write_timeout(Some(ANSWER))?;
        stream.set_nodelay(true)?;
        let output = stream.try_clone()?;
        Ok(Self::over(Wire { input: BufReader::new(stream), output, queued: Vec::new() }))
    }

    /// Sends what is queued.
    ///
    /// # Errors
    /// The connection broke.
    fn flush(&mut self) -> io::Result<()> {
        let wire = self.wire();
        wire.output.write_all(&wire.queued)?;
        wire.queued.clear();
        Ok(())
    }
}

/// A connection with its queue of requests.
#[derive(Debug)]
pub struct Wire {
    /// Where answers come from.
    pub input: BufReader<TcpStream>,
    output: TcpStream,
    /// Requests not yet sent.
    pub queued: Vec<u8>,
}

/// What was written: for each key the number of its last acknowledged value.
#[derive(Debug, Clone)]
pub struct Load {
    acknowledged: Vec<u64>,
    value_bytes: usize,
}

/// What a writer saw.
#[derive(Debug, Clone, Copy, Default)]
pub struct Activity {
    /// Acknowledged writes.
    pub writes: u64,
    /// Connections that had to be made anew.
    pub reconnects: u64,
    /// The longest time without an acknowledged write.
    pub longest_pause: Duration,
}

impl Load {
    /// Fills an empty server.
    ///
    /// # Errors
    /// The server is not reached, or refuses a write.
    pub fn fill<S: Store>(address: SocketAddr, keys: u64, value_bytes: usize) -> io::Result<Self> {
        let count = usize::try_from(keys).map_err(io::Error::other)?;
        let load = Self { acknowledged: vec![1; count], value_bytes };
        let mut store: S = reach(address)?;
        for first in (0..keys).step_by(500) {
            let last = (first + BATCH).min(keys);
            (first..last).for_each(|key| store.set(&name(key), &load.value(key, 1)));
            store.flush()?;
            (first..last).try_for_each(|_| store.set_done())?;
        }
        Ok(load)
    }

    /// Writes one key after the other until told to stop, through all breaks of the connection. `writes`
    /// counts along, for those who watch.
    pub fn write_until<S: Store>(
        &mut self,
        address: SocketAddr,
        stop: &AtomicBool,
        writes: &AtomicU64,
    ) -> Activity {
        let mut activity = Activity::default();
        let mut last = Instant::now();
        let mut store: Option<S> = None;
        let mut turn: u64 = 0;
        let keys = u64::try_from(self.acknowledged.len()).unwrap_or(u64::MAX).max(1);
        while !stop.load(Ordering::Relaxed) {
            let Some(connected) = store.as_mut() else {
                store = S::connect(address).ok();
                activity.reconnects += u64::from(store.is_some());
                continue;
            };
            // A stride that is coprime to most sizes spreads the writes over the memory.
            let key = turn.wrapping_mul(7919) % keys;
            let Some(slot) = usize::try_from(key).ok().and_then(|key| self.acknowledged.get(key)) else {
                break;
            };
            // A number once sent is never used again: an answer that was lost leaves either in the server,
            // and the same key is written again with a later one.
            let number = slot + 1 + activity.reconnects;
            connected.set(&name(key), &self.value(key, number));
            match connected.flush().and_then(|()| connected.set_done()) {
                Ok(()) => {
                    if let Some(slot) =
                        usize::try_from(key).ok().and_then(|key| self.acknowledged.get_mut(key))
                    {
                        *slot = number;
                    }
                    turn += 1;
                    activity.writes += 1;
                    writes.store(activity.writes, Ordering::Relaxed);
                    activity.longest_pause = activity.longest_pause.max(last.elapsed());
                    last = Instant::now();
                }
                Err(_) => store = None,
            }
        }
        // A server that never came back is the longest pause of all.
        activity.longest_pause = activity.longest_pause.max(last.elapsed());
        activity.reconnects = activity.reconnects.saturating_sub(1);
        activity
    }

    /// Reads every key and returns what is wrong, at most ten of them.
    ///
    /// # Errors
    /// The server is not reached.
    pub fn verify<S: Store>(&self, address: SocketAddr) -> io::Result<Vec<String>> {
        let keys = u64::try_from(self.acknowledged.len()).map_err(io::Error::other)?;
        let mut store: S = reach(address)?;
        let mut wrong = Vec::new();
        for first in (0..keys).step_by(500) {
            let last = (first + BATCH).min(keys);
            (first..last).for_each(|key| store.get(&name(key)));
            store.flush()?;
            for key in first..last {
                let number = usize::try_from(key).ok().and_then(|key| self.acknowledged.get(key)).copied();
                let wanted = self.value(key, number.unwrap_or_default());
                let found = store.got()?;
                if found.as_deref() != Some(&wanted[..]) && wrong.len() < 10 {
                    let found = found.map(|bytes| String::from_utf8_lossy(&bytes).chars().take(40).collect());
                    let found: String = found.unwrap_or_else(|| "nothing".to_owned());
                    wrong.push(format!("{}: {found}, acknowledged was number {number:?}", name(key)));
                }
            }
        }
        Ok(wrong)
    }

    /// How many keys there are.
    pub fn keys(&self) -> usize {
        self.acknowledged.len()
    }

    fn value(&self, key: u64, number: u64) -> Vec<u8> {
        let head = format!("{key}:{number}:");
        let mut value = head.into_bytes();
        // Half of it does not compress, as real values.
        let mut state = key ^ number.rotate_left(32) ^ 0x9e37_79b9_7f4a_7c15;
        while value.len() < self.value_bytes {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let letter = u8::try_from(state >> 59).unwrap_or(0);
            value.push(if value.len() % 2 == 0 { b'A' + letter % 26 } else { b'.' });
        }
        value
    }
}

/// Connects, in several attempts if need be.
fn reach<S: Store>(address: SocketAddr) -> io::Result<S> {
    let end = Instant::now() + REACHED;
    loop {
        match S::connect(address) {
            Err(_) if Instant::now() < end => std::thread::sleep(AGAIN),
            result => return result,
        }
    }
}

fn name(key: u64) -> String {
    format!("key:{key:08}")
}
