//! redis: how it is started on a host, and its protocol as far as the load needs it.

use std::io::{self, BufRead, Read};

use super::Spawn;
use super::load::{Store, Wire};

/// The port of the server.
pub const PORT: u16 = 6379;
/// An answer longer than this is no answer to what we asked.
const LONGEST: usize = 1 << 20;

/// redis-server on the service address, its data in memory only.
pub fn server() -> Spawn {
    let port = PORT.to_string();
    Spawn::new(["redis-server", "--port", &port, "--bind", "0.0.0.0", "--protected-mode", "no"]).args([
        "--save",
        "",
        "--appendonly",
        "no",
        "--daemonize",
        "no",
        "--dir",
        super::SHARED,
    ])
}

/// A connection to redis.
#[derive(Debug)]
pub struct Redis(Wire);

impl Redis {
    fn request(&mut self, words: &[&[u8]]) {
        let queue = &mut self.0.queued;
        queue.extend_from_slice(format!("*{}\r\n", words.len()).as_bytes());
        for word in words {
            queue.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
            queue.extend_from_slice(word);
            queue.extend_from_slice(b"\r\n");
        }
    }
}

impl Store for Redis {
    fn over(wire: Wire) -> Self {
        Self(wire)
    }

    fn wire(&mut self) -> &mut Wire {
        &mut self.0
    }

    fn set(&mut self, key: &str, value: &[u8]) {
        self.request(&[b"SET", key.as_bytes(), value]);
    }

    fn set_done(&mut self) -> io::Result<()> {
        let line = line(&mut self.0)?;
        if line == "+OK" { Ok(()) } else { Err(unexpected(&line)) }
    }

    fn get(&mut self, key: &str) {
        self.request(&[b"GET", key.as_bytes()]);
    }

    fn got(&mut self) -> io::Result<Option<Vec<u8>>> {
        let line = line(&mut self.0)?;
        if line == "$-1" {
            return Ok(None);
        }
        let length: usize =
            line.strip_prefix('$').and_then(|text| text.parse().ok()).ok_or_else(|| unexpected(&line))?;
        body(&mut self.0, length).map(Some)
    }
}

/// Reads a line of a text protocol, without its end.
///
/// # Errors
/// The connection broke.
pub fn line(wire: &mut Wire) -> io::Result<String> {
    let mut line = String::new();
    if wire.input.read_line(&mut line)? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    line.truncate(line.trim_end().len());
    Ok(line)
}

/// Reads a value of a given length and the line end behind it.
///
/// # Errors
/// The connection broke, or the length is absurd.
pub fn body(wire: &mut Wire, length: usize) -> io::Result<Vec<u8>> {
    if length > LONGEST {
        return Err(unexpected(&format!("{length} bytes")));
    }
    let mut value = vec![0; length + 2];
    wire.input.read_exact(&mut value)?;
    value.truncate(length);
    Ok(value)
}

/// An answer that is none.
pub fn unexpected(answer: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the server answered {answer:?}"))
}
