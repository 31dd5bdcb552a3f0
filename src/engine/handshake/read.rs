//! Out of the kernel: nothing but its own structures has the sequence numbers of a handshake. A program (a BPF iterator)
//! goes through the sockets of the network namespace, and copies those that are requests. Where their members are, the
//! kernel's description of itself tells (BTF).

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::OnceLock;

use nix::errno::Errno;

use crate::engine::address;
use crate::engine::bpf::btf::{Btf, Field};
use crate::engine::bpf::program::{EXIT, IF_EQUAL, LOAD_DOUBLE, MOVE, Program, SET, STORE_DOUBLE};
use crate::engine::bpf::{KERNEL, LICENCE};
use crate::engine::queued::{SCALING, SELECTIVE, TIMESTAMPS};
use crate::engine::sys::bpf::{self, Array};
use crate::engine::sys::tcp::WINDOW_BYTES;
use crate::proto::files::{Handshake, TcpConnection};

/// Calls of the kernel (`BPF_FUNC_*`).
const KTIME_GET_NS: i32 = 5;
const PROBE_READ_KERNEL: i32 = 113;
const SEQ_WRITE: i32 = 127;
const SKC_TO_TCP_REQUEST_SOCK: i32 = 139;
/// Where struct bpf_iter__tcp has what, by the kernel's rules for such structures.
const META: i16 = 0;
const SOCKET: i16 = 8;
/// Before the copy: the time.
const HEAD_BYTES: usize = 8;
/// Structures are no larger, and there are not more of them: a host in which more handshakes go on is under attack.
const LARGEST: usize = 4096;
const MOST_BYTES: usize = 64 << 20;
const PIECE_BYTES: usize = 32 << 10;

/// Why handshakes cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The kernel refused.
    #[error("{step}")]
    Sys {
        /// What was being done.
        step: &'static str,
        /// The kernel's answer.
        #[source]
        errno: Errno,
    },
    /// The kernel's description of itself cannot be read.
    #[error("reading {KERNEL}")]
    Kernel(#[source] std::io::Error),
    /// The kernel is too old, or too new.
    #[error("the kernel is not one that we know")]
    Unknown,
    /// The pass over the sockets broke off.
    #[error("looking at the sockets of the host")]
    Read(#[source] std::io::Error),
}

fn step(step: &'static str) -> impl Fn(Errno) -> ReadError {
    move |errno| ReadError::Sys { step, errno }
}

/// Where the kernel has what of a request.
#[derive(Debug)]
struct Layout {
    /// The whole structure.
    bytes: usize,
    /// The number of the function that describes the program's arguments, and where they lead on.
    function: u32,
    meta_to_seq: i16,
    family: Field,
    local_v4: Field,
    remote_v4: Field,
    local_v6: Option<Field>,
    remote_v6: Option<Field>,
    local_port: Field,
    remote_port: Field,
    device: Field,
    offered: Field,
    segment_limit: Field,
    peer_clock: Field,
    send_scale: Field,
    receive_scale: Field,
    has_timestamps: Field,
    has_selective: Field,
    has_scales: Field,
    peer_first: Field,
    our_first: Field,
    clock_offset: Field,
    /// What is not taken along, where it is set: clocks of microseconds, signed segments, a
    /// first segment that is kept, IP options. (What a kernel is built without it
    /// need not set, so nothing else is asked. Fast open makes connections at once, and what listens for Multipath TCP does
    /// not move.)
    special: Vec<Field>,
}

impl Layout {
    fn of(btf: &[u8]) -> Option<Self> {
        let btf = Btf::parse(btf)?;
        let request = btf.structure("request_sock")?;
        let inet = btf.structure("inet_request_sock")?;
        let tcp = btf.structure("tcp_request_sock")?;
        let special = ["req_usec_ts", "used_tcp_ao"].map(|name| tcp.field(name));
        let kept = [request.field("saved_syn"), inet.field("ireq_opt"), inet.field("pktopts")];
        let special = special.into_iter().chain(kept).flatten().collect();
        let seq = btf.structure("bpf_iter_meta")?.field("seq")?;
        Some(Self {
            bytes: Some(tcp.bytes()).filter(|bytes| *bytes <= LARGEST)?,
            function: btf.function("bpf_iter_tcp")?,
            meta_to_seq: i16::try_from(seq.start / 8).ok()?,
            family: request.field("__req_common.skc_family")?,
            local_v4: request.field("__req_common.skc_rcv_saddr")?,
            remote_v4: request.field("__req_common.skc_daddr")?,
            local_v6: request.field("__req_common.skc_v6_rcv_saddr"),
            remote_v6: request.field("__req_common.skc_v6_daddr"),
            local_port: request.field("__req_common.skc_num")?,
            remote_port: request.field("__req_common.skc_dport")?,
            device: request.field("__req_common.skc_bound_dev_if")?,
            offered: request.field("__req_common.skc_rcv_wnd")?,
            segment_limit: request.field("mss")?,
            peer_clock: request.field("ts_recent")?,
            send_scale: inet.field("snd_wscale")?,
            receive_scale: inet.field("rcv_wscale")?,
            has_timestamps: inet.field("tstamp_ok")?,
            has_selective: inet.field("sack_ok")?,
            has_scales: inet.field("wscale_ok")?,
            peer_first: tcp.field("rcv_isn")?,
            our_first: tcp.field("snt_isn")?,
            clock_offset: tcp.field("ts_off")?,
            special,
        })
    }

    /// The layout stays the same as long as the kernel runs.
    fn of_this_kernel() -> Result<&'static Self, ReadError> {
        static LAYOUT: OnceLock<Option<Layout>> = OnceLock::new();
        if let Some(layout) = LAYOUT.get() {
            return layout.as_ref().ok_or(ReadError::Unknown);
        }
        let btf = std::fs::read(KERNEL).map_err(ReadError::Kernel)?;
        LAYOUT.get_or_init(|| Self::of(&btf)).as_ref().ok_or(ReadError::Unknown)
    }

    fn record_bytes(&self) -> usize {
        HEAD_BYTES + self.bytes.next_multiple_of(8)
    }

    /// Of one record; `None` if there is more to it than is carried.
    fn handshake(&self, record: &[u8]) -> Option<Handshake> {
        let (time, request) = record.split_first_chunk()?;
        let value = |field: Field| field.value_in(request);
        // Members have as many bits as what is made of them.
        let word = |field: Field| u32::try_from(value(field)).ok();
        if self.special.iter().any(|field| value(*field) != 0) || value(self.device) != 0 {
            return None;
        }
        let (local, remote) = match i32::try_from(value(self.family)).ok()? {
            libc::AF_INET => (self.local_v4, self.remote_v4),
            libc::AF_INET6 => (self.local_v6?, self.remote_v6?),
            _ => return None,
        };
        let options =
            [(TIMESTAMPS, self.has_timestamps), (SELECTIVE, self.has_selective), (SCALING, self.has_scales)];
        let negotiated = options.iter().filter(|(_, field)| value(*field) != 0).map(|(bit, _)| bit).sum();
        let scale = |field| if value(self.has_scales) == 0 { Some(0) } else { word(field) };
        // The clock of time stamps: milliseconds, of which the wire has 32 bits.
        let now = u32::try_from(u64::from_ne_bytes(*time) / 1_000_000 % (1 << 32)).ok()?;
        let port = |port: u64| u16::try_from(port).ok();
        Some(Handshake {
            connection: Some(TcpConnection {
                family: i32::try_from(value(self.family)).ok()?,
                local: local.bytes_in(request).to_vec(),
                local_port: port(value(self.local_port))?.into(),
                remote: remote.bytes_in(request).to_vec(),
                remote_port: u16::from_be(port(value(self.remote_port))?).into(),
                receive_sequence: word(self.peer_first)?.wrapping_add(1),
                send_sequence: word(self.our_first)?.wrapping_add(1),
                negotiated,
                send_scale: scale(self.send_scale)?,
                receive_scale: scale(self.receive_scale)?,
                segment_limit: word(self.segment_limit)?,
                timestamp: now.wrapping_add(word(self.clock_offset)?),
                window: vec![0; WINDOW_BYTES],
                ..TcpConnection::default()
            }),
            peer_clock: word(self.peer_clock)?,
            receive_window: word(self.offered)?,
        })
        .filter(|one| one.connection.as_ref().and_then(crate::engine::lock::connection_of).is_some())
        .filter(|one| !one.connection.as_ref().is_some_and(is_of_link))
    }
}

/// An address that belongs to a device.
fn is_of_link(connection: &TcpConnection) -> bool {
    [&connection.local, &connection.remote].into_iter().any(
        |bytes| matches!(address::ip_of(bytes), Some(std::net::IpAddr::V6(ip)) if ip.is_unicast_link_local()),
    )
}

/// Ready to look.
#[derive(Debug)]
pub struct Reader {
    layout: &'static Layout,
    link: OwnedFd,
}

impl Reader {
    /// Makes ready, which takes milliseconds, and longer the first time.
    ///
    /// # Errors
    /// If the kernel cannot do it, or we may not.
    pub fn prepare() -> Result<Self, ReadError> {
        let layout = Layout::of_this_kernel()?;
        let bytes = u32::try_from(layout.record_bytes()).map_err(|_| ReadError::Unknown)?;
        let record = Array::create(bytes, 1).map_err(step("making an array for a BPF program"))?;
        let instructions = instructions(layout, record.number()).ok_or(ReadError::Unknown)?;
        let program = bpf::load_iterator(&instructions, LICENCE, layout.function)
            .map_err(step("loading a BPF program"))?;
        let link = bpf::iterate_here(program.as_fd()).map_err(step("pointing a BPF program at sockets"))?;
        Ok(Self { layout, link })
    }

    /// All of the network namespace that this thread is in, but for those that cannot be taken along.
    ///
    /// # Errors
    /// If the kernel breaks off.
    pub fn look(&self) -> Result<Vec<Handshake>, ReadError> {
        let pass = bpf::iterator(self.link.as_fd()).map_err(step("beginning a pass of a BPF program"))?;
        let (mut pass, mut bytes, mut piece) = (File::from(pass), Vec::new(), vec![0; PIECE_BYTES]);
        while bytes.len() < MOST_BYTES {
            let len = pass.read(&mut piece).map_err(ReadError::Read)?;
            if len == 0 {
                break;
            }
            bytes.extend_from_slice(piece.get(..len).unwrap_or_default());
        }
        let records = bytes.chunks_exact(self.layout.record_bytes());
        Ok(records.filter_map(|record| self.layout.handshake(record)).collect())
    }
}

/// The instructions. `record` is the descriptor of an array with room for one record.
fn instructions(layout: &Layout, record: i32) -> Option<Vec<u8>> {
    let number = |value: usize| i32::try_from(value).ok();
    let mut p = Program::new();
    // 6 is what we are called with, 8 the request, 9 the record.
    p.push(MOVE, 6, 1, 0, 0);
    p.push(LOAD_DOUBLE, 1, 6, SOCKET, 0);
    p.jump(IF_EQUAL, 1, 0, Out);
    p.call(SKC_TO_TCP_REQUEST_SOCK);
    p.jump(IF_EQUAL, 0, 0, Out);
    p.push(MOVE, 8, 0, 0, 0);
    p.load_value(9, record);
    p.call(KTIME_GET_NS);
    p.push(STORE_DOUBLE, 9, 0, 0, 0);
    p.push(MOVE, 1, 9, 0, 0);
    p.push(crate::engine::bpf::program::ADD, 1, 0, 0, number(HEAD_BYTES)?);
    p.push(SET, 2, 0, 0, number(layout.bytes)?);
    p.push(MOVE, 3, 8, 0, 0);
    p.call(PROBE_READ_KERNEL);
    p.push(LOAD_DOUBLE, 1, 6, META, 0);
    p.push(LOAD_DOUBLE, 1, 1, layout.meta_to_seq, 0);
    p.push(MOVE, 2, 9, 0, 0);
    p.push(SET, 3, 0, 0, number(layout.record_bytes())?);
    p.call(SEQ_WRITE);
    p.here(Out);
    p.push(SET, 0, 0, 0, 0);
    p.push(EXIT, 0, 0, 0, 0);
    Some(p.finish())
}

/// The one place that is jumped to.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Out;
