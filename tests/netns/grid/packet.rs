//! TCP segments over IPv4 or IPv6 over Ethernet, as bytes and as what they mean.

use std::net::IpAddr;

pub(crate) const FIN: u8 = 1;
pub(crate) const SYN: u8 = 2;
pub(crate) const RST: u8 = 4;
pub(crate) const PSH: u8 = 8;
pub(crate) const ACK: u8 = 16;

const ETHERNET: usize = 14;
const IPV4: usize = 20;
const IPV6: usize = 40;
const TCP: usize = 20;
/// What a frame says that it holds, and what a packet says.
const HOLDS_IPV4: [u8; 2] = [0x08, 0];
const HOLDS_IPV6: [u8; 2] = [0x86, 0xdd];
const HOLDS_TCP: u8 = 6;
const HOPS: u8 = 64;

/// One segment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) from: u16,
    pub(crate) to: u16,
    pub(crate) seq: u32,
    pub(crate) ack: u32,
    pub(crate) flags: u8,
    pub(crate) window: u16,
    pub(crate) options: Options,
    pub(crate) payload: Vec<u8>,
}

/// The options of a segment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Options {
    pub(crate) mss: Option<u16>,
    pub(crate) scale: Option<u8>,
    pub(crate) selective: bool,
    pub(crate) blocks: Vec<(u32, u32)>,
    /// Our clock, and the peer's that we have heard last.
    pub(crate) stamps: Option<(u32, u32)>,
    /// The kind of one that nobody has agreed on.
    pub(crate) strange: Option<u8>,
}

/// Where a frame comes from, or goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) mac: [u8; 6],
    pub(crate) ip: IpAddr,
}

impl Segment {
    pub(crate) fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// Reads a frame; `None` if it is anything but TCP over IP.
    pub(crate) fn parse(frame: &[u8]) -> Option<Self> {
        let ip = frame.get(ETHERNET..)?;
        let (holds, header, total) = match *frame[12..].first_chunk()? {
            HOLDS_IPV4 => (ip.get(9)?, usize::from(ip.first()? & 15) * 4, half(ip, 2)?.into()),
            HOLDS_IPV6 => (ip.get(6)?, IPV6, IPV6 + usize::from(half(ip, 4)?)),
            _ => return None,
        };
        if *holds != HOLDS_TCP {
            return None;
        }
        // Short frames are padded.
        let tcp = ip.get(header..total)?;
        let data = usize::from(tcp.get(12)? >> 4) * 4;
        Some(Self {
            from: half(tcp, 0)?,
            to: half(tcp, 2)?,
            seq: word(tcp, 4)?,
            ack: word(tcp, 8)?,
            flags: *tcp.get(13)?,
            window: half(tcp, 14)?,
            options: Options::parse(tcp.get(TCP..data)?)?,
            payload: tcp.get(data..)?.to_vec(),
        })
    }

    /// The frame with this segment in it.
    pub(crate) fn frame(&self, from: Place, to: Place) -> Vec<u8> {
        let options = self.options.bytes();
        let length = u16::try_from(TCP + options.len() + self.payload.len()).unwrap();
        let mut tcp = Vec::with_capacity(length.into());
        tcp.extend(self.from.to_be_bytes());
        tcp.extend(self.to.to_be_bytes());
        tcp.extend(self.seq.to_be_bytes());
        tcp.extend(self.ack.to_be_bytes());
        tcp.push(u8::try_from((TCP + options.len()) / 4).unwrap() << 4);
        tcp.push(self.flags);
        tcp.extend(self.window.to_be_bytes());
        tcp.extend([0; 4]);
        tcp.extend(options);
        tcp.extend(&self.payload);
        // The two pseudo-headers have the same sum but for the addresses.
        let mut pseudo = [octets(from.ip), octets(to.ip)].concat();
        pseudo.extend([0, HOLDS_TCP]);
        pseudo.extend(length.to_be_bytes());
        pseudo.extend(&tcp);
        tcp[16..18].copy_from_slice(&checksum(&pseudo).to_be_bytes());
        let (holds, ip) = if from.ip.is_ipv4() {
            (HOLDS_IPV4, ipv4(length, from.ip, to.ip))
        } else {
            (HOLDS_IPV6, ipv6(length, from.ip, to.ip))
        };
        [&to.mac[..], &from.mac, &holds, &ip, &tcp].concat()
    }
}

/// A header for so many bytes of TCP.
fn ipv4(length: u16, from: IpAddr, to: IpAddr) -> Vec<u8> {
    let total = length + u16::try_from(IPV4).unwrap();
    let mut ip = vec![0x45, 0];
    ip.extend(total.to_be_bytes());
    // No number, not to be fragmented, and the checksum.
    ip.extend([0, 0, 0x40, 0, HOPS, HOLDS_TCP, 0, 0]);
    ip.extend(octets(from));
    ip.extend(octets(to));
    let sum = checksum(&ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    ip
}

/// The same, without class and label.
fn ipv6(length: u16, from: IpAddr, to: IpAddr) -> Vec<u8> {
    let mut ip = vec![0x60, 0, 0, 0];
    ip.extend(length.to_be_bytes());
    ip.extend([HOLDS_TCP, HOPS]);
    ip.extend(octets(from));
    ip.extend(octets(to));
    ip
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

impl Options {
    fn parse(mut bytes: &[u8]) -> Option<Self> {
        let mut options = Self::default();
        while let Some((&kind, rest)) = bytes.split_first() {
            match kind {
                0 => break,
                1 => bytes = rest,
                _ => {
                    let length = usize::from(*rest.first()?);
                    let value = bytes.get(2..length)?;
                    bytes = bytes.get(length..)?;
                    match kind {
                        2 => options.mss = Some(half(value, 0)?),
                        3 => options.scale = Some(*value.first()?),
                        4 => options.selective = true,
                        5 => {
                            for block in value.chunks_exact(8) {
                                options.blocks.push((word(block, 0)?, word(block, 4)?));
                            }
                        }
                        8 => options.stamps = Some((word(value, 0)?, word(value, 4)?)),
                        _ => options.strange = Some(kind),
                    }
                }
            }
        }
        Some(options)
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        if let Some(mss) = self.mss {
            bytes.extend([2, 4]);
            bytes.extend(mss.to_be_bytes());
        }
        if let Some(scale) = self.scale {
            bytes.extend([1, 3, 3, scale]);
        }
        if self.selective {
            bytes.extend([1, 1, 4, 2]);
        }
        if let Some((ours, heard)) = self.stamps {
            bytes.extend([1, 1, 8, 10]);
            bytes.extend(ours.to_be_bytes());
            bytes.extend(heard.to_be_bytes());
        }
        if !self.blocks.is_empty() {
            bytes.extend([1, 1, 5, u8::try_from(2 + 8 * self.blocks.len()).unwrap()]);
            for (from, to) in &self.blocks {
                bytes.extend(from.to_be_bytes());
                bytes.extend(to.to_be_bytes());
            }
        }
        bytes
    }
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|b| u16::from_be_bytes(*b))
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|b| u32::from_be_bytes(*b))
}

/// The Internet checksum.
fn checksum(bytes: &[u8]) -> u16 {
    let pairs =
        bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)])));
    let mut sum: u32 = pairs.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}
