//! A process's memory from outside, in bulk.

use std::fs::File;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;

use super::remote::Tid;
use super::sys::vm::{self, RemoteRange};

/// Bytes of a page on this architecture.
pub const PAGE_BYTES: u64 = 4096;

/// Why memory could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The process is gone.
    #[error("process {0} is gone")]
    Gone(Tid),
    /// Its memory file could not be opened.
    #[error("opening the memory of process {pid}")]
    Open {
        /// The process.
        pid: Tid,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A range that must be there could not be written.
    #[error("writing {len} bytes at {start:#x} of process {pid}")]
    Write {
        /// The process.
        pid: Tid,
        /// Where.
        start: u64,
        /// How many.
        len: usize,
        /// Why.
        #[source]
        errno: Errno,
    },
    /// A range of a stopped process could not be read.
    #[error("reading {len} bytes at {start:#x} of process {pid}")]
    Read {
        /// The process.
        pid: Tid,
        /// Where.
        start: u64,
        /// How many.
        len: u64,
        /// Why.
        #[source]
        errno: Errno,
    },
}

/// One process's memory.
#[derive(Debug)]
pub struct Memory {
    pid: Tid,
    mem: File,
}

impl Memory {
    /// Opens the memory of `pid`.
    ///
    /// # Errors
    /// If it is gone or not ours to read.
    pub fn open(pid: Tid) -> Result<Self, MemoryError> {
        let path = format!("/proc/{pid}/mem");
        let mem = File::options()
            .read(true)
            .write(true)
            .open(path)
            .map_err(|source| MemoryError::Open { pid, source })?;
        Ok(Self { pid, mem })
    }

    /// Reads page runs one after the other into `buffer`, and returns those that could be read. `buffer`
    /// holds their contents, in this order, without gaps. What is missing has been unmapped meanwhile.
    ///
    /// # Errors
    /// If the process is gone.
    pub fn read_runs(
        &self,
        runs: &[RemoteRange],
        buffer: &mut [u8],
    ) -> Result<Vec<RemoteRange>, MemoryError> {
        let mut done: Vec<RemoteRange> = Vec::with_capacity(runs.len());
        let mut left: Vec<RemoteRange> = runs.to_vec();
        let mut filled = 0;
        while !left.is_empty() {
            let mut got = match vm::read(self.pid, &mut buffer[filled..], &left) {
                Ok(n) => n - n % 4096,
                Err(Errno::EFAULT) => 0,
                Err(Errno::ESRCH) => return Err(MemoryError::Gone(self.pid)),
                Err(errno) => {
                    return Err(MemoryError::Read { pid: self.pid, start: left[0].start, len: 0, errno });
                }
            };
            filled += got;
            // Take what was read off the list.
            let mut next = 0;
            while got > 0 {
                let run = &mut left[next];
                let part = got.min(run.len);
                done.push(RemoteRange { start: run.start, len: part });
                run.start += part as u64;
                run.len -= part;
                got -= part;
                if run.len == 0 {
                    next += 1;
                }
            }
            left.drain(..next);
            // The next page refuses a plain read: its protection may forbid it, or it is gone.
            if let Some(run) = left.first_mut() {
                let page = &mut buffer[filled..filled + 4096];
                if self.mem.read_exact_at(page, run.start).is_ok() {
                    done.push(RemoteRange { start: run.start, len: 4096 });
                    filled += 4096;
                }
                run.start += 4096;
                run.len -= 4096;
                if run.len == 0 {
                    left.remove(0);
                }
            }
        }
        Ok(done)
    }

    /// Reads exactly `len` bytes at `start`, whatever the protection.
    ///
    /// # Errors
    /// If they are not there.
    pub fn read_exact(&self, start: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        self.mem.read_exact_at(into, start).map_err(|e| MemoryError::Read {
            pid: self.pid,
            start,
            len: into.len() as u64,
            errno: e.raw_os_error().map_or(Errno::EIO, Errno::from_raw),
        })
    }

    /// Writes `from` to these ranges, one after the other, whatever their protection (private memory).
    ///
    /// # Errors
    /// If a range is not there.
    pub fn write_runs(&self, from: &[u8], to: &[RemoteRange]) -> Result<(), MemoryError> {
        let wanted: usize = to.iter().map(|r| r.len).sum();
        match vm::write(self.pid, &from[..wanted], to) {
            Ok(n) if n == wanted => return Ok(()),
            Err(Errno::ESRCH) => return Err(MemoryError::Gone(self.pid)),
            Ok(_) | Err(_) => {}
        }
        let mut at = 0;
        for run in to {
            self.write_forced(&from[at..at + run.len], run.start)?;
            at += run.len;
        }
        Ok(())
    }

    fn write_forced(&self, bytes: &[u8], start: u64) -> Result<(), MemoryError> {
        self.mem.write_all_at(bytes, start).map_err(|e| MemoryError::Write {
            pid: self.pid,
            start,
            len: bytes.len(),
            errno: e.raw_os_error().map_or(Errno::EIO, Errno::from_raw),
        })
    }
}
