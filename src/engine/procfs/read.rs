//! Files of /proc in few calls. They say that they are empty, so `std::fs::read` begins with 32 bytes and doubles
//! that: eight calls for what takes three, and while a process stands still some sixty files are read. Tables that
//! change while they are read (those of System V) may miss a line at each border between two calls.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// What most files of /proc fit into.
const ROOM_BYTES: usize = 16 << 10;

/// All of a file.
///
/// # Errors
/// As of open(2) and read(2).
pub fn read(path: impl AsRef<Path>) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let mut text = vec![0; ROOM_BYTES];
    let mut len = 0;
    loop {
        if len == text.len() {
            text.resize(2 * len, 0);
        }
        match file.read(text.get_mut(len..).unwrap_or_default()) {
            Ok(0) => break,
            Ok(more) => len += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    text.truncate(len);
    Ok(text)
}

/// The inode of the socket that a link of /proc/PID/fd leads to; `None` if it is none, or gone.
pub fn socket_behind(link: impl AsRef<Path>) -> Option<u64> {
    let link = std::fs::read_link(link).ok()?;
    link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// All of a file that is text; what is not UTF-8 in it is replaced.
///
/// # Errors
/// See [`read`].
pub fn read_text(path: impl AsRef<Path>) -> io::Result<String> {
    Ok(String::from_utf8(read(path)?)
        .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_the_library_reads() {
        for path in ["/proc/self/auxv", "/proc/cmdline", "/proc/sys/kernel/random/boot_id"] {
            assert_eq!(read(path).unwrap(), std::fs::read(path).unwrap(), "{path}");
        }
        let long: Vec<u8> =
            (0..(3u32 << 20) + 1237).map(|i| i.wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &long).unwrap();
        assert!(read(file.path()).unwrap() == long);
        // Longer than the room, and than what one call gives. Its end changes whenever somebody loads a program; the
        // kernel's own symbols, which come before those in brackets, stay.
        let own = |mut text: Vec<u8>| {
            text.truncate(text.iter().position(|byte| *byte == b'[').unwrap_or(text.len()));
            text.truncate(text.iter().rposition(|byte| *byte == b'\n').unwrap_or(0));
            text
        };
        let symbols = own(read("/proc/kallsyms").unwrap());
        assert!(symbols.len() > ROOM_BYTES);
        assert!(symbols == own(std::fs::read("/proc/kallsyms").unwrap()));
        assert_eq!(read("/proc/nothing").unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(read_text("/proc/self/status").unwrap().starts_with("Name:"));
    }
}
