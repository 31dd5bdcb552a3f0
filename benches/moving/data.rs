//! What redis holds, and its requests.

use std::io::{self, Read, Write};
use std::net::SocketAddrV4;

use crate::client;

/// Bytes of a value.
const VALUE_BYTES: usize = 1000;
/// What a key of such a value takes in redis's memory, about.
const KEY_COST: usize = 1120;
/// Keys that are written again and again; each has pages of its own.
const HOT_KEYS: usize = 1000;
/// Requests in flight while filling.
const BATCH: usize = 500;

/// So many keys, with values of which LZ4 saves about a half.
#[derive(Debug, Clone)]
pub(crate) struct Data {
    keys: usize,
    noise: Vec<u8>,
}

impl Data {
    /// Keys that take about `mib` MiB in redis.
    pub(crate) fn new(mib: usize) -> Self {
        let mut state: u64 = 0x9e37_79b9_7f4a_7c15;
        let noise = (0..1 << 20).map(|at| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            // Runs of text between runs of noise.
            if at % 64 < 32 { b'A' + state.to_le_bytes()[0] % 26 } else { b'.' }
        });
        Self { keys: (mib << 20) / KEY_COST, noise: noise.collect() }
    }

    /// How many keys there are.
    pub(crate) fn keys(&self) -> usize {
        self.keys
    }

    /// The number of the nth hot key; they are spread over all keys.
    pub(crate) fn hot_key(&self, turn: usize) -> usize {
        (turn % HOT_KEYS) * (self.keys / HOT_KEYS)
    }

    /// A key as redis knows it.
    pub(crate) fn key(&self, number: usize) -> Vec<u8> {
        format!("key:{number:08}").into_bytes()
    }

    /// Adds a SET to a request.
    pub(crate) fn set(&self, number: usize, version: u64, into: &mut Vec<u8>) {
        let at = (number * 769 + usize::try_from(version % 997).unwrap_or(0) * 331)
            % (self.noise.len() - VALUE_BYTES);
        request(&[b"SET", &self.key(number), &self.noise[at..at + VALUE_BYTES]], into);
    }

    /// Fills an empty server.
    pub(crate) fn fill(&self, address: SocketAddrV4) -> io::Result<()> {
        let mut stream = client::reconnect(address)?;
        let (mut queue, mut answers) = (Vec::new(), vec![0; BATCH * 5]);
        let mut number = 0;
        while number < self.keys {
            let end = (number + BATCH).min(self.keys);
            queue.clear();
            (number..end).for_each(|key| self.set(key, 0, &mut queue));
            stream.write_all(&queue)?;
            let answers = &mut answers[..(end - number) * 5];
            stream.read_exact(answers)?;
            if !answers.chunks(5).all(|answer| answer == b"+OK\r\n") {
                return Err(io::Error::other("redis refused a value"));
            }
            number = end;
        }
        Ok(())
    }
}

/// Adds a request to others.
pub(crate) fn request(words: &[&[u8]], into: &mut Vec<u8>) {
    into.extend_from_slice(format!("*{}\r\n", words.len()).as_bytes());
    for word in words {
        into.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
        into.extend_from_slice(word);
        into.extend_from_slice(b"\r\n");
    }
}
