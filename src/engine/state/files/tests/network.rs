//! A network of two hosts for one test: the thread of the test, and all it starts, is the server's.

use std::fs::File;
use std::net::IpAddr;
use std::process::Command;

use nix::sched::{CloneFlags, setns, unshare};

use crate::engine::trial::Killed;

/// The server's address that moves, and the client's.
pub(super) const SERVICE: [&str; 2] = ["10.9.0.5", "fd09::5"];
pub(super) const CLIENT: [&str; 2] = ["10.9.0.9", "fd09::9"];

pub(super) struct Network {
    client: File,
    /// A process that names the client's network to `ip`.
    _holder: Killed,
}

/// Runs a test in a thread that is in the server's network.
pub(super) fn with_network(test: impl FnOnce(&Network) + Send) {
    std::thread::scope(|scope| {
        let result = scope.spawn(|| test(&Network::new())).join();
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    });
}

impl Network {
    fn new() -> Self {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let client = File::open("/proc/thread-self/ns/net").unwrap();
        let holder = Killed::sleeper();
        let pid = holder.id().to_string();
        ip("link set lo up");
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        ip("link set lo up");
        ip(&format!("link add s0 type veth peer name c0 netns {pid}"));
        let network = Self { client, _holder: holder };
        ip("address add 10.9.0.1/24 dev s0");
        ip("address add fd09::1/64 dev s0 nodad");
        ip("link set s0 up");
        network.in_client(|| {
            ip("address add 10.9.0.9/24 dev c0");
            ip("address add fd09::9/64 dev c0 nodad");
            ip("link set c0 up");
        });
        network.add_service();
        network
    }

    pub(super) fn add_service(&self) {
        ip("address add 10.9.0.5/32 dev s0");
        ip("address add fd09::5/128 dev s0 nodad");
    }

    pub(super) fn remove_service(&self) {
        ip("address del 10.9.0.5/32 dev s0");
        ip("address del fd09::5/128 dev s0");
    }

    /// Nothing comes through, in either direction, and nobody is told.
    pub(super) fn cut(&self) {
        run("tc qdisc replace dev s0 root blackhole");
        self.in_client(|| run("tc qdisc replace dev c0 root blackhole"));
    }

    pub(super) fn heal(&self) {
        run("tc qdisc delete dev s0 root");
        self.in_client(|| run("tc qdisc delete dev c0 root"));
    }

    /// Runs something in the client's network. Sockets that it makes stay there.
    pub(super) fn in_client<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let work = || {
                setns(&self.client, CloneFlags::CLONE_NEWNET).unwrap();
                work()
            };
            scope.spawn(work).join().unwrap()
        })
    }

    pub(super) fn service(&self, family: usize) -> IpAddr {
        SERVICE[family].parse().unwrap()
    }
}

pub(super) fn ip(words: &str) {
    run(&format!("ip {words}"));
}

fn run(line: &str) {
    let (program, words) = line.split_once(' ').unwrap();
    let output = Command::new(program).args(words.split(' ')).output().unwrap();
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
}
