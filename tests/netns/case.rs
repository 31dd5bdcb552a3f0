//! What a case is, what it may need of the machine, and small helpers all cases use.

use std::error::Error;
use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

use migrate::testbed::Lan;

/// The result of a case, or of a step of one.
pub(crate) type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

/// One behaviour shown.
pub(crate) struct Case {
    /// `group/what`.
    pub(crate) name: String,
    /// What the machine must have.
    pub(crate) needs: Vec<Need>,
    /// Shows it, in hosts made for it.
    pub(crate) run: Box<dyn Fn(&Lan) -> Result>,
}

impl Case {
    /// A case that needs nothing special.
    pub(crate) fn new(name: impl Into<String>, run: impl Fn(&Lan) -> Result + 'static) -> Self {
        Self { name: name.into(), needs: Vec::new(), run: Box::new(run) }
    }

    /// Adds a need.
    pub(crate) fn needs(mut self, need: Need) -> Self {
        self.needs.push(need);
        self
    }
}

/// Something a case needs that a machine may lack.
#[derive(Clone, Copy)]
pub(crate) enum Need {
    /// A program in the search path.
    Program(&'static str),
    /// Threads of the kernel in sight: not in a PID namespace of our own.
    KernelThreads,
    /// A kernel that runs 32-bit programs.
    Programs32Bit,
    /// Huge pages of 2 MiB that nobody uses.
    HugePages(u64),
}

impl Need {
    /// What is missing, if the need is not met.
    pub(crate) fn missing(self) -> Option<String> {
        match self {
            Self::Program(name) => {
                let path = std::env::var_os("PATH").unwrap_or_default();
                let found = std::env::split_paths(&path).any(|directory| directory.join(name).exists());
                (!found).then(|| format!("{name} is not installed"))
            }
            Self::KernelThreads => {
                let comm = std::fs::read_to_string("/proc/2/comm").unwrap_or_default();
                (comm.trim_end() != "kthreadd").then(|| "no thread of the kernel is in sight".to_owned())
            }
            Self::Programs32Bit => {
                let there = std::path::Path::new("/proc/sys/abi/vsyscall32").exists();
                (!there).then(|| "the kernel runs no 32-bit programs".to_owned())
            }
            Self::HugePages(wanted) => {
                let path = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
                let free = std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok());
                let free: u64 = free.unwrap_or(0);
                (free < wanted).then(|| {
                    format!("{wanted} huge pages are needed, {free} are free (sysctl vm.nr_hugepages)")
                })
            }
        }
    }
}

/// An error with a text.
pub(crate) fn fail<T>(what: impl Into<String>) -> Result<T> {
    Err(what.into().into())
}

/// An error unless `holds`.
pub(crate) fn ensure(holds: bool, what: impl FnOnce() -> String) -> Result {
    if holds { Ok(()) } else { fail(what()) }
}

/// The seed of this run: `SEED` from the environment, or the time.
pub(crate) fn seed() -> u64 {
    static SEED: OnceLock<u64> = OnceLock::new();
    *SEED.get_or_init(|| match std::env::var("SEED").map(|text| text.parse()) {
        Ok(Ok(seed)) => seed,
        _ => SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |time| time.as_secs()),
    })
}

/// A small generator of repeatable choices (xorshift64*).
pub(crate) struct Choices(u64);

impl Choices {
    /// Choices that follow from the run's seed and the name of what is chosen.
    pub(crate) fn new(name: &str) -> Self {
        let state = name.bytes().fold(seed() ^ 0x9e37_79b9_7f4a_7c15, |state, byte| {
            (state ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Self(state | 1)
    }

    /// A number below `limit`.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) % limit
    }
}
