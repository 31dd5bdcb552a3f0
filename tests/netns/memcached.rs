//! memcached: how it is started on a host, and its text protocol as far as the load needs it.

use std::io;

use migrate::testbed::Spawn;
use migrate::testbed::load::{Store, Wire};
use migrate::testbed::redis::{body, line, unexpected};

/// The port of the server.
pub(crate) const PORT: u16 = 11211;

/// memcached with room for all keys of the test, so that it never evicts one.
pub(crate) fn server() -> Spawn {
    let port = PORT.to_string();
    Spawn::new(["memcached", "-u", "nobody", "-l", "0.0.0.0", "-p", &port, "-U", "0", "-m", "512", "-t", "4"])
}

/// A connection to memcached.
pub(crate) struct Memcached(Wire);

impl Store for Memcached {
    fn over(wire: Wire) -> Self {
        Self(wire)
    }

    fn wire(&mut self) -> &mut Wire {
        &mut self.0
    }

    fn set(&mut self, key: &str, value: &[u8]) {
        let queue = &mut self.0.queued;
        queue.extend_from_slice(format!("set {key} 0 0 {}\r\n", value.len()).as_bytes());
        queue.extend_from_slice(value);
        queue.extend_from_slice(b"\r\n");
    }

    fn set_done(&mut self) -> io::Result<()> {
        let line = line(&mut self.0)?;
        if line == "STORED" { Ok(()) } else { Err(unexpected(&line)) }
    }

    fn get(&mut self, key: &str) {
        self.0.queued.extend_from_slice(format!("get {key}\r\n").as_bytes());
    }

    fn got(&mut self) -> io::Result<Option<Vec<u8>>> {
        let head = line(&mut self.0)?;
        if head == "END" {
            return Ok(None);
        }
        let length =
            head.rsplit(' ').next().and_then(|text| text.parse().ok()).ok_or_else(|| unexpected(&head))?;
        let value = body(&mut self.0, length)?;
        let end = line(&mut self.0)?;
        if end == "END" { Ok(Some(value)) } else { Err(unexpected(&end)) }
    }
}
