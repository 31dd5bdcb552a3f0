//! The lock's table in the words of nf_tables: chains, sets, rules, elements as netlink messages.
//!
//! One table of family inet, for IPv4 and IPv6 alike. For each of them five sets: connections, local ends of which
//! all connections are meant, places that listen, ports that listen everywhere, and connections that hear nothing but
//! may speak. The rules never change; locking is adding to the sets, which costs the kernel little.

use std::collections::{BTreeMap, HashSet};
use std::net::SocketAddr;

use super::{Connection, OUR_MARK, OUR_MARK_BITS};
use crate::engine::address::octets;
use crate::engine::sys::netlink::{Body, push_attribute, push_nested};

/// `NFNL_MSG_BATCH_BEGIN`, `NFNL_MSG_BATCH_END`.
pub(super) const BATCH: (u16, u16) = (16, 17);

/// Messages of nf_tables: the subsystem's number and their own.
const SUBSYSTEM: u16 = 10;
const NEW_TABLE: u16 = SUBSYSTEM << 8;
const DELETE_TABLE: u16 = SUBSYSTEM << 8 | 2;
const NEW_CHAIN: u16 = SUBSYSTEM << 8 | 3;
const NEW_RULE: u16 = SUBSYSTEM << 8 | 6;
const NEW_SET: u16 = SUBSYSTEM << 8 | 9;
const NEW_ELEMENTS: u16 = SUBSYSTEM << 8 | 12;
const DELETE_ELEMENTS: u16 = SUBSYSTEM << 8 | 14;

const FAMILY_INET: u8 = 1;
const NLM_F_CREATE: u16 = 0x400;
const NLM_F_EXCL: u16 = 0x200;
/// After the rules that are there.
const NLM_F_APPEND: u16 = 0x800;
/// `NFT_TABLE_F_OWNER`: only this socket may change the table, and it goes with the socket.
const OWNED: u32 = 2;

const ACCEPT: u32 = 1;
const DROP: u32 = 0;
/// `NFT_REG_VERDICT`, and the first of the registers of 4 bytes.
const VERDICT: u32 = 0;
const REGISTER: u32 = 8;

/// Elements in one message: the length of what holds them has 16 bits, and each takes 52 bytes at most.
const ELEMENTS_PER_MESSAGE: usize = 1000;

/// One message: kind, flags, body.
pub(super) type Message = (u16, u16, Body);

/// Where a chain is called, how early, and whether it sees what comes in.
struct Hook {
    name: &'static str,
    number: u32,
    priority: i32,
    incoming: bool,
}

const HOOKS: [Hook; 3] = [
    // Before the route is known: while the address is with nobody here, nothing is forwarded either.
    Hook { name: "prerouting", number: 0, priority: -300, incoming: true },
    // Last of all: where the destination was rewritten (NAT), this is as the socket sees it.
    Hook { name: "input", number: 1, priority: i32::MAX, incoming: true },
    // First of all, for the same reason.
    Hook { name: "output", number: 3, priority: i32::MIN, incoming: false },
];

/// What IPv4 and IPv6 differ in.
struct Version {
    /// `NFPROTO_*`.
    number: u8,
    address_bytes: u32,
    /// Where the header has the two addresses.
    source: u32,
    destination: u32,
    /// Names of the sets.
    connections: &'static str,
    hearing: &'static str,
    ends: &'static str,
    places: &'static str,
    ports: &'static str,
}

const V4: Version = Version {
    number: 2,
    address_bytes: 4,
    source: 12,
    destination: 16,
    connections: "connections4",
    hearing: "hearing4",
    ends: "ends4",
    places: "listening4",
    ports: "ports4",
};
const V6: Version = Version {
    number: 10,
    address_bytes: 16,
    source: 8,
    destination: 24,
    connections: "connections6",
    hearing: "hearing6",
    ends: "ends6",
    places: "listening6",
    ports: "ports6",
};

/// Bodies of the messages that frame a batch.
pub(super) fn batch_frame() -> Body {
    let [high, low] = SUBSYSTEM.to_be_bytes();
    vec![0, 0, high, low]
}

fn body() -> Body {
    vec![FAMILY_INET, 0, 0, 0]
}

fn push_name(out: &mut Vec<u8>, kind: u16, name: &str) {
    push_attribute(out, kind, &[name.as_bytes(), b"\0"].concat());
}

fn push_number(out: &mut Vec<u8>, kind: u16, number: u32) {
    push_attribute(out, kind, &number.to_be_bytes());
}

/// All that makes the table `name`, with nothing locked yet.
pub(super) fn create(name: &str) -> Vec<Message> {
    let mut table = body();
    push_name(&mut table, 1, name);
    push_number(&mut table, 2, OWNED);
    let mut messages = vec![(NEW_TABLE, NLM_F_CREATE | NLM_F_EXCL, table)];
    let mut id = 0;
    for version in [V4, V6] {
        for (set, key_bytes) in [
            (version.connections, 2 * (version.address_bytes + 4)),
            (version.hearing, 2 * (version.address_bytes + 4)),
            (version.ends, version.address_bytes + 4),
            (version.places, version.address_bytes + 4),
            (version.ports, 4),
        ] {
            id += 1;
            messages.push((NEW_SET, NLM_F_CREATE, new_set(name, set, key_bytes, id)));
        }
    }
    for hook in &HOOKS {
        messages.push((NEW_CHAIN, NLM_F_CREATE, new_chain(name, hook)));
        if hook.incoming {
            messages.push(new_rule(name, hook, ours()));
        }
        for version in [V4, V6] {
            let set = version.connections;
            let mut rules = vec![connections(&version, hook.incoming, set), ends(&version, hook.incoming)];
            if hook.incoming {
                rules.push(connections(&version, true, version.hearing));
                rules.push(listening(&version, true));
                rules.push(listening(&version, false));
            }
            messages.extend(rules.into_iter().map(|rule| new_rule(name, hook, rule)));
        }
    }
    messages
}

fn new_rule(table: &str, hook: &Hook, rule: Rule) -> Message {
    let mut message = body();
    push_name(&mut message, 1, table);
    push_name(&mut message, 2, hook.name);
    push_nested(&mut message, 4, |out| out.extend(rule.0));
    (NEW_RULE, NLM_F_CREATE | NLM_F_APPEND, message)
}

/// Removes the table with all there is in it.
pub(super) fn remove(name: &str) -> Vec<Message> {
    let mut table = body();
    push_name(&mut table, 1, name);
    vec![(DELETE_TABLE, 0, table)]
}

fn new_set(table: &str, name: &str, key_bytes: u32, id: u32) -> Body {
    let mut message = body();
    push_name(&mut message, 1, table);
    push_name(&mut message, 2, name);
    push_number(&mut message, 5, key_bytes);
    push_number(&mut message, 10, id);
    message
}

fn new_chain(table: &str, hook: &Hook) -> Body {
    let mut message = body();
    push_name(&mut message, 1, table);
    push_name(&mut message, 3, hook.name);
    push_nested(&mut message, 4, |out| {
        push_number(out, 1, hook.number);
        push_attribute(out, 2, &hook.priority.to_be_bytes());
    });
    push_number(&mut message, 5, ACCEPT);
    push_name(&mut message, 7, "filter");
    message
}

/// What we put in ourselves passes.
fn ours() -> Rule {
    const MARK: u32 = 3;
    Rule(Vec::new())
        .meta(MARK)
        .mask(REGISTER, &OUR_MARK_BITS.to_ne_bytes())
        .equals(REGISTER, &OUR_MARK.to_ne_bytes())
        .verdict(ACCEPT)
}

/// Packets of the connections in a set. The key is the local end, then the remote one.
fn connections(version: &Version, incoming: bool, set: &str) -> Rule {
    let (local, remote) = if incoming {
        ((version.destination, DESTINATION_PORT), (version.source, SOURCE_PORT))
    } else {
        ((version.source, SOURCE_PORT), (version.destination, DESTINATION_PORT))
    };
    let words = version.address_bytes / 4;
    Rule::for_tcp(version)
        .load(NETWORK_HEADER, local.0, version.address_bytes, REGISTER)
        .load(TRANSPORT_HEADER, local.1, PORT_BYTES, REGISTER + words)
        .load(NETWORK_HEADER, remote.0, version.address_bytes, REGISTER + words + 1)
        .load(TRANSPORT_HEADER, remote.1, PORT_BYTES, REGISTER + 2 * words + 1)
        .found_in(set)
        .verdict(DROP)
}

/// Packets of all connections that have a local end.
fn ends(version: &Version, incoming: bool) -> Rule {
    let local =
        if incoming { (version.destination, DESTINATION_PORT) } else { (version.source, SOURCE_PORT) };
    Rule::for_tcp(version)
        .load(NETWORK_HEADER, local.0, version.address_bytes, REGISTER)
        .load(TRANSPORT_HEADER, local.1, PORT_BYTES, REGISTER + version.address_bytes / 4)
        .found_in(version.ends)
        .verdict(DROP)
}

/// Requests for new connections (SYN without ACK).
fn listening(version: &Version, at_address: bool) -> Rule {
    let rule = Rule::for_tcp(version)
        .load(TRANSPORT_HEADER, TCP_FLAGS, 1, REGISTER)
        .mask(REGISTER, &[SYN | ACK])
        .equals(REGISTER, &[SYN]);
    if !at_address {
        return rule
            .load(TRANSPORT_HEADER, DESTINATION_PORT, PORT_BYTES, REGISTER)
            .found_in(version.ports)
            .verdict(DROP);
    }
    rule.load(NETWORK_HEADER, version.destination, version.address_bytes, REGISTER)
        .load(TRANSPORT_HEADER, DESTINATION_PORT, PORT_BYTES, REGISTER + version.address_bytes / 4)
        .found_in(version.places)
        .verdict(DROP)
}

const NETWORK_HEADER: u32 = 1;
const TRANSPORT_HEADER: u32 = 2;
const SOURCE_PORT: u32 = 0;
const DESTINATION_PORT: u32 = 2;
const PORT_BYTES: u32 = 2;
/// Where the TCP header has its flags, and two of them.
const TCP_FLAGS: u32 = 13;
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;

/// The expressions of a rule, each a step that goes on or ends the rule.
struct Rule(Vec<u8>);

impl Rule {
    /// Goes on with TCP over this version of IP.
    fn for_tcp(version: &Version) -> Self {
        const PROTOCOL_FAMILY: u32 = 15;
        const TRANSPORT_PROTOCOL: u32 = 16;
        const TCP: u8 = 6;
        Self(Vec::new())
            .meta(PROTOCOL_FAMILY)
            .equals(REGISTER, &[version.number])
            .meta(TRANSPORT_PROTOCOL)
            .equals(REGISTER, &[TCP])
    }

    fn step(mut self, name: &str, fill: impl FnOnce(&mut Vec<u8>)) -> Self {
        push_nested(&mut self.0, 1, |out| {
            push_name(out, 1, name);
            push_nested(out, 2, fill);
        });
        self
    }

    fn meta(self, key: u32) -> Self {
        self.step("meta", |out| {
            push_number(out, 1, REGISTER);
            push_number(out, 2, key);
        })
    }

    fn load(self, header: u32, offset: u32, bytes: u32, register: u32) -> Self {
        self.step("payload", |out| {
            for (kind, number) in [(1, register), (2, header), (3, offset), (4, bytes)] {
                push_number(out, kind, number);
            }
        })
    }

    fn mask<const BYTES: usize>(self, register: u32, mask: &[u8; BYTES]) -> Self {
        self.step("bitwise", |out| {
            for (kind, number) in [(1, register), (2, register), (3, u32::try_from(BYTES).unwrap_or(0))] {
                push_number(out, kind, number);
            }
            push_nested(out, 4, |out| push_attribute(out, 1, mask));
            push_nested(out, 5, |out| push_attribute(out, 1, &[0; BYTES]));
        })
    }

    fn equals(self, register: u32, value: &[u8]) -> Self {
        const EQUAL: u32 = 0;
        self.step("cmp", |out| {
            push_number(out, 1, register);
            push_number(out, 2, EQUAL);
            push_nested(out, 3, |out| push_attribute(out, 1, value));
        })
    }

    fn found_in(self, set: &str) -> Self {
        self.step("lookup", |out| {
            push_name(out, 1, set);
            push_number(out, 2, REGISTER);
        })
    }

    fn verdict(self, verdict: u32) -> Self {
        self.step("immediate", |out| {
            push_number(out, 1, VERDICT);
            push_nested(out, 2, |out| push_nested(out, 2, |out| push_number(out, 1, verdict)));
        })
    }
}

/// Adds these connections to the sets of table `name`; by their local end, if that is in `whole`.
pub(super) fn add(name: &str, connections: &[Connection], whole: &HashSet<SocketAddr>) -> Vec<Message> {
    let mut sets: BTreeMap<&str, Vec<Vec<u8>>> = BTreeMap::new();
    for local in whole {
        let version = if local.is_ipv4() { V4 } else { V6 };
        sets.entry(version.ends).or_default().push(end(*local));
    }
    for connection in connections {
        if connection.remote.is_some() && whole.contains(&connection.local) {
            continue;
        }
        let version = if connection.local.is_ipv4() { V4 } else { V6 };
        let (set, key) = match connection.remote {
            Some(remote) => (version.connections, [end(connection.local), end(remote)].concat()),
            None if connection.local.ip().is_unspecified() => (version.ports, port(connection.local)),
            None => (version.places, end(connection.local)),
        };
        sets.entry(set).or_default().push(key);
    }
    elements(name, sets)
}

/// Lets the connections among these hear nothing, but speak; nobody begins a new one where they listen.
pub(super) fn deafen(name: &str, connections: &[Connection]) -> Vec<Message> {
    let mut sets: BTreeMap<&str, Vec<Vec<u8>>> = BTreeMap::new();
    let (listening, open): (Vec<Connection>, Vec<Connection>) =
        connections.iter().partition(|connection| connection.remote.is_none());
    for connection in open {
        let version = if connection.local.is_ipv4() { V4 } else { V6 };
        let key = [Some(connection.local), connection.remote].into_iter().flatten().flat_map(end).collect();
        sets.entry(version.hearing).or_default().push(key);
    }
    let mut messages = add(name, &listening, &HashSet::new());
    messages.extend(elements(name, sets));
    messages
}

fn elements(name: &str, sets: BTreeMap<&str, Vec<Vec<u8>>>) -> Vec<Message> {
    let mut messages = Vec::new();
    for (set, keys) in sets {
        for keys in keys.chunks(ELEMENTS_PER_MESSAGE) {
            let mut message = elements_of(name, set);
            push_nested(&mut message, 3, |out| {
                for key in keys {
                    // An element, its key, the value of that.
                    push_nested(out, 1, |out| push_nested(out, 1, |out| push_attribute(out, 1, key)));
                }
            });
            messages.push((NEW_ELEMENTS, NLM_F_CREATE, message));
        }
    }
    messages
}

/// Empties all sets of table `name`.
pub(super) fn clear(name: &str) -> Vec<Message> {
    let sets = [V4, V6].into_iter().flat_map(|v| [v.connections, v.hearing, v.ends, v.places, v.ports]);
    sets.map(|set| (DELETE_ELEMENTS, 0, elements_of(name, set))).collect()
}

fn elements_of(table: &str, set: &str) -> Body {
    let mut message = body();
    push_name(&mut message, 1, table);
    push_name(&mut message, 2, set);
    message
}

/// Address and port as the registers have them: the port takes 4 bytes.
fn end(end: SocketAddr) -> Vec<u8> {
    let mut key = octets(end.ip());
    key.extend(port(end));
    key
}

fn port(end: SocketAddr) -> Vec<u8> {
    let [high, low] = end.port().to_be_bytes();
    vec![high, low, 0, 0]
}
