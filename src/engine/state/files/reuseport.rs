//! Programs that choose among the sockets of one address and port (`SO_ATTACH_REUSEPORT_EBPF`). No socket tells that
//! it has one, but the kernel lists the programs that there are: one that could be it is enough to refuse. (One of
//! `SO_ATTACH_REUSEPORT_CBPF` is on no list, and acts on packets alone.)

use std::collections::HashMap;

use libc::SOL_SOCKET;

use super::{Stop, scan::Table};
use crate::engine::reason::Reason;
use crate::engine::sys::bpf;
use crate::proto::files::SocketOption;
use crate::proto::files::description::Kind;

/// Kinds of program that may be attached so: `BPF_PROG_TYPE_SOCKET_FILTER` and `BPF_PROG_TYPE_SK_REUSEPORT`.
const CHOOSING: [u32; 2] = [1, 21];

/// What makes sockets one group: protocol, address and port.
type Group<'a> = (i32, &'a [u8], u32);

/// One reason for each group of several sockets, if there is a program that may choose among them.
pub(super) fn reasons(table: &Table, kinds: &[Result<Kind, Stop>]) -> Vec<Reason> {
    let mut groups: HashMap<Group<'_>, Vec<i32>> = HashMap::new();
    for (description, kind) in kinds.iter().enumerate() {
        if let (Ok(kind), Some(open)) = (kind, table.open(description))
            && let Some(group) = group_of(kind)
        {
            groups.entry(group).or_default().push(open.number);
        }
    }
    groups.retain(|_, numbers| numbers.len() > 1);
    if groups.is_empty() {
        return Vec::new();
    }
    let programs = programs();
    if programs.is_empty() {
        return Vec::new();
    }
    let ids: Vec<String> = programs.iter().map(ToString::to_string).collect();
    let ids = ids.join(", ");
    let reason = |((_, _, port), numbers): (Group<'_>, Vec<i32>)| {
        let first = numbers.iter().min().copied().unwrap_or(-1);
        let count = numbers.len();
        let why = format!(
            "is one of {count} sockets of port {port}, and a program may choose among the sockets of its port (BPF \
             program {ids}), which cannot be carried"
        );
        (first, Reason::new(format!("fd {first}"), why, ""))
    };
    let mut reasons: Vec<(i32, Reason)> = groups.into_iter().map(reason).collect();
    reasons.sort_by_key(|(first, _)| *first);
    reasons.into_iter().map(|(_, reason)| reason).collect()
}

fn group_of(kind: &Kind) -> Option<Group<'_>> {
    let shares = |options: &[SocketOption]| {
        let option = options.iter().find(|o| (o.level, o.name) == (SOL_SOCKET, libc::SO_REUSEPORT));
        option.is_some_and(|o| o.value.iter().any(|byte| *byte != 0))
    };
    match kind {
        Kind::Tcp(image) if image.listening && shares(&image.options) => {
            Some((libc::IPPROTO_TCP, &image.address, image.port))
        }
        Kind::IpSocket(image) if shares(&image.options) => {
            let local = image.local.as_ref().filter(|local| local.port != 0)?;
            Some((image.protocol, &local.address, local.port))
        }
        _ => None,
    }
}

/// Those that could be attached to a group of sockets. Without the right to know, none: nor has the program that
/// attached it then, most likely.
fn programs() -> Vec<u32> {
    let mut found = Vec::new();
    let mut last = 0;
    while let Ok(Some(id)) = bpf::next_program(last) {
        // One that is unloaded meanwhile is none.
        if bpf::program_kind(id).is_ok_and(|kind| CHOOSING.contains(&kind)) {
            found.push(id);
        }
        last = id;
    }
    found
}
