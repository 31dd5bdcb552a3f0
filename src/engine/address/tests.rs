//! On real devices, in a network namespace that each test makes for its own thread.

use std::process::{Command, Stdio};

use nix::sched::{CloneFlags, unshare};

use super::*;
use crate::engine::trial::{Killed, PATIENCE, until_asleep};

/// A namespace with `a` and `b`, the ends of one cable, both up, `10.9.0.1/24` and `2001:db8::1/64` on `a`.
/// The children of `ip` inherit it from this thread.
fn in_a_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        ip("link add name a type veth peer name b");
        for device in ["lo", "a", "b"] {
            ip(&format!("link set dev {device} up"));
        }
        ip("address add 10.9.0.1/24 dev a");
        ip("address add 2001:db8::1/64 dev a nodad");
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn ip(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn specs(texts: &[&str]) -> Vec<MoveIp> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

#[test]
fn texts() {
    for good in ["192.0.2.7/24@eth0", "2001:db8::7/64@br-lan.4", "10.0.0.1/32@lo"] {
        assert_eq!(good.parse::<MoveIp>().unwrap().to_string(), good);
    }
    for bad in [
        "",
        "192.0.2.7",
        "192.0.2.7/24",
        "192.0.2.7/33@eth0",
        "::1/129@lo",
        "192.0.2.7/24@",
        "192.0.2.7/24@a/b",
        "192.0.2.7/24@..",
        "192.0.2.7/24@sixteen-letters-",
        "x/24@lo",
        "0.0.0.0/0@lo",
        "224.0.0.1/4@lo",
        "192.0.2.7/+9@a b",
    ] {
        assert_eq!(bad.parse::<MoveIp>(), Err(BadMoveIp), "{bad}");
    }
}

#[test]
fn taken_and_given_back_as_it_was() {
    in_a_namespace(|| {
        ip("address add 10.9.1.2/28 broadcast 10.9.1.9 dev a label a:x scope link metric 77");
        ip("address add 10.9.2.2 peer 10.9.2.9/32 dev a noprefixroute");
        ip("address add 2001:db8:1::2/64 dev a noprefixroute nodad");
        let before = ip("-o address show dev a");
        let moved = specs(&["10.9.1.2/28@a", "10.9.2.2/32@a", "2001:db8:1::2/64@a"]);
        assert_eq!(check_source(&moved).unwrap(), vec![]);
        let mut set = AddressSet::at_source(&moved).unwrap();
        set.remove().unwrap();
        let without = ip("-o address show dev a");
        assert!(
            !without.contains("10.9.1.2")
                && !without.contains("10.9.2.2")
                && !without.contains("2001:db8:1::2")
        );
        assert!(without.contains("10.9.0.1"));

        // As after a crash: another process, with nothing but the record.
        let records =
            serde_json::from_str::<Vec<Address>>(&serde_json::to_string(&set.records()).unwrap()).unwrap();
        AddressSet::of(&records).unwrap().add().unwrap();
        assert_eq!(sorted(&ip("-o address show dev a")), sorted(&before));
        set.add().expect("those that are there already are fine");
    });
}

/// The kernel lists addresses in the order in which they were added.
fn sorted(lines: &str) -> Vec<&str> {
    let mut lines: Vec<_> = lines.lines().collect();
    lines.sort_unstable();
    lines
}

#[test]
fn reasons_of_the_source_all_at_once() {
    in_a_namespace(|| {
        let wrong = specs(&[
            "10.9.0.1/24@none",
            "10.9.0.9/24@a",
            "10.9.0.1/16@a",
            "2001:db8::1/64@b",
            "10.9.0.9/24@b",
        ]);
        let reasons = check_source(&wrong).unwrap();
        let why: Vec<_> = reasons.iter().map(|r| r.why.as_str()).collect();
        assert_eq!(
            why,
            [
                "is given twice",
                "is given twice",
                "there is no device none on this host",
                "a does not have this address",
                "its prefix on a is /24",
                "b does not have this address",
                "b does not have this address",
            ]
        );
        assert!(matches!(AddressSet::at_source(&wrong), Err(AddressError::Refused(r)) if r == reasons));
    });
}

#[test]
fn what_would_be_lost_with_an_address_is_a_reason() {
    in_a_namespace(|| {
        let primary = specs(&["10.9.0.1/24@a"]);
        assert_eq!(check_source(&primary).unwrap(), vec![], "an address without anything that depends on it");

        ip("route add default via 10.9.0.254");
        assert_eq!(
            check_source(&primary).unwrap()[0].why,
            "it is the only address of a: its routes would be lost"
        );
        ip("address add 10.9.0.2/24 dev a");
        set_promotion(false);
        let why = check_source(&primary).unwrap()[0].why.clone();
        assert_eq!(why, "10.9.0.2 would be removed with it, being secondary in its network");
        set_promotion(true);
        assert_eq!(check_source(&primary).unwrap(), vec![]);
        ip("route add 10.77.0.0/16 via 10.9.0.254 src 10.9.0.1");
        assert_eq!(check_source(&primary).unwrap()[0].why, "a route has it as its source and would be lost");

        let secondary = specs(&["10.9.0.2/24@a"]);
        let before = (sorted(&ip("route show")).join("\n"), ip("-o address show dev a"));
        let mut set = AddressSet::at_source(&secondary).unwrap();
        set.remove().unwrap();
        set.add().unwrap();
        assert_eq!((sorted(&ip("route show")).join("\n"), ip("-o address show dev a")), before);
    });
}

/// The file belongs to the namespace of the thread that opens it.
fn set_promotion(on: bool) {
    for name in ["all", "a"] {
        let path = format!("/proc/sys/net/ipv4/conf/{name}/promote_secondaries");
        std::fs::write(path, if on { "1" } else { "0" }).unwrap();
    }
}

#[test]
fn a_failed_removal_leaves_everything() {
    in_a_namespace(|| {
        ip("address add 10.9.1.2/28 dev a");
        ip("address add 10.9.2.2/28 dev a");
        let mut set = AddressSet::at_source(&specs(&["10.9.1.2/28@a", "10.9.2.2/28@a"])).unwrap();
        ip("address del 10.9.2.2/28 dev a");
        let before = ip("-o address show dev a");
        assert!(matches!(set.remove(), Err(AddressError::Sys { errno: Errno::EADDRNOTAVAIL, .. })));
        assert_eq!(sorted(&ip("-o address show dev a")), sorted(&before));
    });
}

#[test]
fn the_destination_wants_a_device_and_no_address() {
    in_a_namespace(|| {
        assert_eq!(check_destination(&specs(&["10.9.5.5/24@b", "2001:db8:5::5/64@a"])).unwrap(), vec![]);
        let reasons = check_destination(&specs(&["10.9.5.5/24@none", "10.9.0.1/24@b"])).unwrap();
        assert_eq!(reasons[0].why, "there is no device none on this host");
        assert_eq!(
            reasons[1].why, "the destination has this address already",
            "on another device, but there"
        );
    });
}

#[test]
fn addresses_that_are_not_here() {
    in_a_namespace(|| {
        let ips = |texts: &[&str]| texts.iter().map(|t| t.parse().unwrap()).collect::<Vec<IpAddr>>();
        let all = ips(&["10.9.0.1", "10.9.0.7", "127.3.3.3", "2001:db8::1", "2001:db8::7", "::1"]);
        assert_eq!(absent_here(&all).unwrap(), ips(&["10.9.0.7", "2001:db8::7"]));
    });
}

/// `b` has an old idea of who has the addresses; adding them on `a` must correct it.
#[test]
fn neighbours_learn_the_new_holder() {
    in_a_namespace(|| {
        // A namespace of its own for `b`, or the kernel would deliver everything locally.
        let mut command = Command::new("unshare");
        let quiet = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let other = Killed::spawn(quiet.args(["--net", "sleep", "1000"]));
        until_asleep(other.id());
        let pid = other.id().to_string();
        ip(&format!("link set dev b netns {pid}"));
        let there = |command: &str| {
            let mut all = vec!["-t", &pid, "-n", "ip"];
            all.extend(command.split(' '));
            let output = Command::new("nsenter").args(&all).output().unwrap();
            assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8(output.stdout).unwrap()
        };
        there("link set dev b up");
        there("address add 10.9.0.50/24 dev b");
        there("address add 2001:db8::50/64 dev b nodad");
        let stale = "02:00:00:00:00:99";
        there(&format!("neighbour replace 10.9.0.7 lladdr {stale} nud stale dev b"));
        there(&format!("neighbour replace 2001:db8::7 lladdr {stale} nud stale dev b"));

        let addresses: Vec<_> =
            specs(&["10.9.0.7/24@a", "2001:db8::7/64@a"]).into_iter().map(Address::new).collect();
        AddressSet::of(&addresses).unwrap().add().unwrap();
        let mac = ip("-o link show dev a").split("link/ether ").nth(1).unwrap()[..17].to_owned();
        let deadline = std::time::Instant::now() + PATIENCE;
        for address in ["10.9.0.7", "2001:db8::7"] {
            loop {
                let entry = there(&format!("neighbour show {address} dev b"));
                if entry.contains(&mac) {
                    break;
                }
                assert!(std::time::Instant::now() < deadline, "{address}: {entry}");
            }
        }
    });
}
