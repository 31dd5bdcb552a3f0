//! Which parts of the kernel's structures are read, and where they are then.

use crate::engine::bpf::btf::{self, Btf};

/// What is read of an open file that is a TCP socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Flags,
    Owner,
    Signal,
    Inode,
    Family,
    State,
    RemoteV4,
    LocalV4,
    RemotePort,
    LocalPort,
    RemoteV6,
    LocalV6,
    ErrorsQueued,
    Received,
    Backlog,
    ReceiveBuffer,
    Error,
    SendBuffer,
    Shutdown,
    Kind,
    UpperLayer,
    LargestWindow,
    ClockOffset,
    SendWindow,
    InRepair,
    InMicroseconds,
    Copied,
    WindowUpdate,
    Urgent,
    Written,
    Congestion,
    Expected,
    Next,
    Unacknowledged,
    Clamp,
    ReceiveWindow,
    Timestamps,
    Scaled,
    Selective,
    SendScale,
    ReceiveScale,
    SegmentLimit,
    Acknowledged,
    FirstDataTaken,
    ChildOfFastOpen,
    Multipath,
    Unaccepted,
    HalfOpen,
    Keys,
}

/// How many there are.
const COUNT: usize = Part::Keys as usize + 1;

/// What a part is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Of {
    File,
    Inode,
    Socket,
}

use Of::{File, Socket};

/// A part, what it is of, structure and member, and whether it must be there.
type Known = (Part, Of, &'static str, &'static str, bool);

/// What is copied of a TCP socket. All structures of a socket have the same beginning.
const PARTS: &[Known] = &[
    (Part::Flags, File, "file", "f_flags", true),
    // A pointer in newer kernels, which is empty unless the process has asked for signals; the whole of it in older ones.
    (Part::Owner, File, "file", "f_owner", true),
    (Part::Inode, Of::Inode, "inode", "i_ino", true),
    (Part::Family, Socket, "sock", "__sk_common.skc_family", true),
    (Part::State, Socket, "sock", "__sk_common.skc_state", true),
    (Part::RemoteV4, Socket, "sock", "__sk_common.skc_daddr", true),
    (Part::LocalV4, Socket, "sock", "__sk_common.skc_rcv_saddr", true),
    (Part::RemotePort, Socket, "sock", "__sk_common.skc_dport", true),
    (Part::LocalPort, Socket, "inet_sock", "inet_sport", true),
    (Part::RemoteV6, Socket, "sock", "__sk_common.skc_v6_daddr", false),
    (Part::LocalV6, Socket, "sock", "__sk_common.skc_v6_rcv_saddr", false),
    (Part::ErrorsQueued, Socket, "sock", "sk_error_queue.qlen", true),
    (Part::Received, Socket, "sock", "sk_receive_queue.qlen", true),
    (Part::Backlog, Socket, "sock", "sk_backlog.len", true),
    (Part::ReceiveBuffer, Socket, "sock", "sk_rcvbuf", true),
    (Part::Error, Socket, "sock", "sk_err", true),
    (Part::SendBuffer, Socket, "sock", "sk_sndbuf", true),
    (Part::Shutdown, Socket, "sock", "sk_shutdown", true),
    (Part::Kind, Socket, "sock", "sk_type", true),
    (Part::UpperLayer, Socket, "inet_connection_sock", "icsk_ulp_ops", true),
    (Part::LargestWindow, Socket, "tcp_sock", "max_window", true),
    (Part::ClockOffset, Socket, "tcp_sock", "tsoffset", true),
    (Part::SendWindow, Socket, "tcp_sock", "snd_wnd", true),
    (Part::InRepair, Socket, "tcp_sock", "repair", true),
    (Part::InMicroseconds, Socket, "tcp_sock", "tcp_usec_ts", false),
    (Part::Copied, Socket, "tcp_sock", "copied_seq", true),
    (Part::WindowUpdate, Socket, "tcp_sock", "snd_wl1", true),
    (Part::Urgent, Socket, "tcp_sock", "urg_data", true),
    (Part::Written, Socket, "tcp_sock", "write_seq", true),
    (Part::Congestion, Socket, "tcp_sock", "ecn_flags", true),
    (Part::Expected, Socket, "tcp_sock", "rcv_nxt", true),
    (Part::Next, Socket, "tcp_sock", "snd_nxt", true),
    (Part::Unacknowledged, Socket, "tcp_sock", "snd_una", true),
    (Part::Clamp, Socket, "tcp_sock", "window_clamp", true),
    (Part::ReceiveWindow, Socket, "tcp_sock", "rcv_wnd", true),
    (Part::Timestamps, Socket, "tcp_sock", "rx_opt.tstamp_ok", true),
    (Part::Scaled, Socket, "tcp_sock", "rx_opt.wscale_ok", true),
    (Part::Selective, Socket, "tcp_sock", "rx_opt.sack_ok", true),
    (Part::SendScale, Socket, "tcp_sock", "rx_opt.snd_wscale", true),
    (Part::ReceiveScale, Socket, "tcp_sock", "rx_opt.rcv_wscale", true),
    (Part::SegmentLimit, Socket, "tcp_sock", "rx_opt.mss_clamp", true),
    (Part::Acknowledged, Socket, "tcp_sock", "rcv_wup", true),
    (Part::FirstDataTaken, Socket, "tcp_sock", "syn_data_acked", true),
    (Part::ChildOfFastOpen, Socket, "tcp_sock", "syn_fastopen_child", false),
    (Part::Multipath, Socket, "tcp_sock", "is_mptcp", false),
    // Without this nobody would know whether segments are signed.
    (Part::Keys, Socket, "tcp_sock", "md5sig_info", true),
];

/// Those of them that are copied where only sockets are named, and what else is then: how many wait where one listens,
/// for whoever accepts them and for the end of their handshakes.
const NAMED: &[Part] = &[
    Part::Inode,
    Part::Family,
    Part::State,
    Part::Kind,
    Part::RemoteV4,
    Part::LocalV4,
    Part::RemotePort,
    Part::LocalPort,
    Part::RemoteV6,
    Part::LocalV6,
];
const WAITING: &[Known] = &[
    (Part::Unaccepted, Socket, "sock", "sk_ack_backlog", false),
    (Part::HalfOpen, Socket, "inet_connection_sock", "icsk_accept_queue.qlen.counter", false),
];

/// Older kernels: whom a file signals, and by what.
const OWNER_WITHIN: [(Part, &str); 2] = [(Part::Owner, "f_owner.pid"), (Part::Signal, "f_owner.signum")];
/// What is farther apart is copied by itself.
const GAP: usize = 64;
/// The structures are no larger.
const LARGEST: usize = 1 << 14;
/// Before what is copied: the time, or whether it is a socket of TCP; and the number of the descriptor.
pub(super) const HEAD_BYTES: usize = 16;
pub(super) const NUMBER_TO: usize = 8;

/// What is copied: so many bytes of something to this place in the record.
#[derive(Debug, Clone, Copy)]
pub(super) struct Range {
    pub(super) of: Of,
    pub(super) from: usize,
    pub(super) len: usize,
    pub(super) to: usize,
}

/// Where the kernel has what, and where it is in a record.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) ranges: Vec<Range>,
    /// What was copied of the socket. A record of a connection has it twice, and ends so: see [`super`].
    pub(super) socket: std::ops::Range<usize>,
    /// The whole record.
    pub(super) bytes: usize,
    /// The number of the function that describes the program's arguments, and where they lead on.
    pub(super) function: u32,
    pub(super) file_to_inode: i16,
    pub(super) socket_to_sock: i16,
    pub(super) meta_to_seq: i16,
    /// Where each part is in the record, in bits.
    places: [Option<btf::Field>; COUNT],
}

/// Numbers, and addresses of IPv6.
fn is_known(field: btf::Field) -> bool {
    field.len == 128 && field.start.is_multiple_of(8) || field.len > 0 && field.start % 8 + field.len <= 64
}

/// The two kinds of records.
#[derive(Debug)]
pub(super) struct Layouts {
    pub(super) connections: Layout,
    pub(super) names: Layout,
}

impl Layouts {
    /// `None` if this kernel is not one that we know.
    pub(super) fn of(btf: &[u8]) -> Option<Self> {
        let btf = Btf::parse(btf)?;
        // Older kernels would walk through the files of all processes.
        btf.structure("bpf_iter_link_info")?.field("task.pid_fd")?;
        let named = PARTS.iter().filter(|(part, ..)| NAMED.contains(part)).chain(WAITING);
        let mut connections = Layout::of(&btf, PARTS.iter())?;
        connections.bytes += connections.socket.len();
        Some(Self { connections, names: Layout::of(&btf, named)? })
    }
}

impl Layout {
    fn of(btf: &Btf<'_>, parts: impl Iterator<Item = &'static Known>) -> Option<Self> {
        let pointer = |of: &str, path: &str| {
            let field = btf.structure(of)?.field(path)?;
            (field.len == 64 && field.start.is_multiple_of(8)).then(|| i16::try_from(field.start / 8).ok())?
        };
        let mut fields = Vec::new();
        let mut structure = None;
        for &(part, of, name, path, needed) in parts {
            if structure.as_ref().is_none_or(|(last, _)| *last != name) {
                structure = Some((name, btf.structure(name)?));
            }
            let (_, found) = structure.as_ref()?;
            let field = found.field(path);
            if part == Part::Owner && field.is_some_and(|field| field.len > 64) {
                for (part, path) in OWNER_WITHIN {
                    fields.push((part, of, found.field(path)?));
                }
                continue;
            }
            match field {
                Some(field) => fields.push((part, of, field)),
                None if needed => return None,
                None => {}
            }
        }
        let mut layout = Self {
            ranges: Vec::new(),
            socket: 0..0,
            bytes: HEAD_BYTES,
            function: btf.function("bpf_iter_task_file")?,
            file_to_inode: pointer("file", "f_inode")?,
            socket_to_sock: pointer("socket", "sk")?,
            meta_to_seq: pointer("bpf_iter_meta", "seq")?,
            places: [None; COUNT],
        };
        for of in [File, Of::Inode, Socket] {
            let start = layout.bytes;
            layout.place(of, &fields)?;
            layout.socket = start..layout.bytes;
        }
        Some(layout)
    }

    /// Puts the parts of one thing into the record.
    fn place(&mut self, of: Of, fields: &[(Part, Of, btf::Field)]) -> Option<()> {
        let mut of_it: Vec<_> = fields.iter().filter(|(_, other, _)| *other == of).collect();
        of_it.sort_unstable_by_key(|(_, _, field)| field.start);
        let mut last: Option<Range> = None;
        for (part, _, field) in of_it {
            let (start, end) = (field.start / 8, field.start.checked_add(field.len)?.div_ceil(8));
            if end > LARGEST || !is_known(*field) {
                return None;
            }
            let range = match last.filter(|range| start <= range.from + range.len + GAP) {
                Some(range) => Range { len: range.len.max(end - range.from), ..range },
                None => {
                    self.ranges.extend(last);
                    let to = last.map_or(self.bytes, |last| (last.to + last.len).next_multiple_of(8));
                    Range { of, from: start, len: end - start, to }
                }
            };
            let at = btf::Field { start: range.to * 8 + field.start - range.from * 8, len: field.len };
            *self.places.get_mut(*part as usize)? = Some(at);
            last = Some(range);
        }
        self.ranges.extend(last);
        self.bytes = last.map_or(self.bytes, |last| (last.to + last.len).next_multiple_of(8));
        Some(())
    }

    /// What is to be copied for this part alone.
    pub(super) fn range_of(&self, part: Part) -> Option<Range> {
        let at = self.place_of(part)?;
        let (to, end) = (at.start / 8, (at.start + at.len).div_ceil(8));
        let within = self.ranges.iter().find(|range| range.to <= to && end <= range.to + range.len)?;
        Some(Range { from: within.from + to - within.to, len: end - to, to, ..*within })
    }

    /// Whether this kernel has such a part.
    pub(super) fn has(&self, part: Part) -> bool {
        self.place_of(part).is_some()
    }

    /// The bytes of a part in a record; none if the kernel does not have it.
    pub(super) fn bytes_of<'a>(&self, record: &'a [u8], part: Part) -> &'a [u8] {
        self.place_of(part).map_or(&[], |at| at.bytes_in(record))
    }

    /// The value of a part that is a number; 0 if the kernel does not have it.
    pub(super) fn value_of(&self, record: &[u8], part: Part) -> u64 {
        self.place_of(part).map_or(0, |at| at.value_in(record))
    }

    fn place_of(&self, part: Part) -> Option<btf::Field> {
        self.places.get(part as usize).copied().flatten()
    }
}
