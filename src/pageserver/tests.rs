//! Pages to frames and back, and frames that are none.

use std::collections::BTreeMap;
use std::convert::Infallible;

use bytes::{Bytes, BytesMut};
use proptest::prelude::*;

use super::frame::{self, Frame, FrameError, HEADER_BYTES, Header, Kind, MAX_PAGE_NUMBER, PAGE_BYTES};
use super::pack::{Compression, PackError, PackStats, Packer};
use super::unpack::{Content, Unpacker};

/// What a destination's memory looks like: contents, or zeros, present or not.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Page {
    Data(Vec<u8>),
    Zero { present: bool },
    Void,
}

type Memory = BTreeMap<u64, Page>;

fn place(wire: &[Bytes]) -> Memory {
    let mut memory = Memory::new();
    let mut unpacker = Unpacker::default();
    for chunk in wire {
        let mut chunk = chunk.clone();
        while !chunk.is_empty() {
            let frame = Frame::decode(&mut chunk).unwrap();
            let run = |addr: u64, pages: u32| (0..u64::from(pages)).map(move |i| addr + (i << 12));
            match unpacker.unpack(&frame).unwrap() {
                Content::Data(pages) => {
                    for (addr, bytes) in pages.runs() {
                        for (index, page) in bytes.chunks(PAGE_BYTES).enumerate() {
                            memory.insert(addr + ((index as u64) << 12), Page::Data(page.to_vec()));
                        }
                    }
                }
                Content::Zero { addr, pages, present } => {
                    memory.extend(run(addr, pages).map(|a| (a, Page::Zero { present })));
                }
                Content::Drop { addr, pages } => memory.extend(run(addr, pages).map(|a| (a, Page::Void))),
                other => panic!("{other:?}"),
            }
        }
    }
    memory
}

fn pack(packer: &mut Packer, addrs: &[u64], contents: &[u8]) -> Vec<Bytes> {
    let mut wire = Vec::new();
    let mut sink = |bytes| {
        wire.push(bytes);
        Ok::<_, Infallible>(())
    };
    packer.pack(3, addrs, contents, &mut sink).unwrap();
    packer.flush(&mut sink).unwrap();
    wire
}

/// A page that is zero, compressible, zero but for its last byte, or noise.
fn page(kind: u8, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut noise = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_ne_bytes()
    };
    match kind {
        0 => vec![0; PAGE_BYTES],
        1 => noise().repeat(PAGE_BYTES / 8),
        2 => {
            let mut page = vec![0; PAGE_BYTES];
            page[PAGE_BYTES - 1] = 1;
            page
        }
        _ => (0..PAGE_BYTES / 8).flat_map(|_| noise()).collect(),
    }
}

fn compression() -> impl Strategy<Value = Compression> {
    prop_oneof![Just(Compression::Auto), Just(Compression::Off), Just(Compression::Lz4)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn memory_comes_out_as_it_went_in(
        pages in proptest::collection::btree_map(
            // Close together, so that runs form, and far, so that page tables do.
            prop_oneof![0u64..40, 1000u64..1400, (1u64 << 30)..(1 << 30) + 200_000, Just(MAX_PAGE_NUMBER - 1)],
            (0u8..4, any::<u64>()),
            0..120,
        ),
        compression in compression(),
        present in any::<bool>(),
    ) {
        let addrs: Vec<u64> = pages.keys().map(|number| number << 12).collect();
        let contents: Vec<u8> = pages.values().flat_map(|(kind, seed)| page(*kind, *seed)).collect();
        let mut packer = Packer::new(compression, present);
        let wire = pack(&mut packer, &addrs, &contents);
        let want: Memory = pages.iter().map(|(number, (kind, seed))| {
            let contents = if *kind == 0 { Page::Zero { present } } else { Page::Data(page(*kind, *seed)) };
            (number << 12, contents)
        }).collect();
        prop_assert_eq!(place(&wire), want);
        let zeros = pages.values().filter(|(kind, _)| *kind == 0).count() as u64;
        let data = pages.len() as u64 - zeros;
        let bytes_wire = wire.iter().map(|bytes| bytes.len() as u64).sum();
        let stats = PackStats { pages_data: data, pages_zero: zeros, bytes_raw: data * 4096, bytes_wire };
        prop_assert_eq!(packer.stats(), stats);
    }

    #[test]
    fn no_header_panics_or_asks_for_too_much(bytes in any::<[u8; HEADER_BYTES]>(), kind in 0u8..9, codec in 0u8..4) {
        let mut bytes = bytes;
        (bytes[0], bytes[1]) = (kind, codec);
        if let Ok(header) = Header::decode(&bytes) {
            prop_assert!(header.payload_bytes() <= frame::MAX_STATE_BYTES);
        }
    }

    #[test]
    fn no_payload_panics(
        header in any::<[u8; HEADER_BYTES]>(),
        codec in 1u8..3, table in any::<bool>(), pages in 1u16..17, len in 0usize..300,
        noise in proptest::collection::vec(any::<u8>(), 300),
    ) {
        let mut head = header;
        (head[0], head[1]) = (1, codec);
        head[2..4].copy_from_slice(&(if table { pages } else { 0 }).to_le_bytes());
        head[8..12].copy_from_slice(&u32::from(pages).to_le_bytes());
        head[12..16].copy_from_slice(&u32::try_from(len).unwrap().to_le_bytes());
        (head[22], head[23]) = (0, 0);
        head[24..32].fill(0);
        let mut bytes = Bytes::from([&head[..], &noise[..len]].concat());
        if let Ok(frame) = Frame::decode(&mut bytes) {
            prop_assert!(Unpacker::default().unpack(&frame).is_err(), "a checksum by chance");
        }
    }
}

/// One frame of each kind and form.
fn samples() -> Vec<Bytes> {
    let mut all =
        vec![frame::layout(1, b"layout").unwrap(), frame::state(1, b"state").unwrap(), frame::round_end(1)];
    for (kind, compression) in [(1, Compression::Lz4), (3, Compression::Off)] {
        for addrs in [[0x1000, 0x2000], [0x1000, 0x9000]] {
            let contents = [page(kind, 5), page(kind, 6)].concat();
            all.extend(pack(&mut Packer::new(compression, false), &addrs, &contents));
        }
    }
    let mut packer = Packer::new(Compression::Off, true);
    let mut sink = |bytes| {
        all.push(bytes);
        Ok::<_, Infallible>(())
    };
    packer.zero_run(1, 0x1000, 7, true, &mut sink).unwrap();
    packer.flush(&mut sink).unwrap();
    packer.drop_run(1, 0x1000, 7, &mut sink).unwrap();
    packer.flush(&mut sink).unwrap();
    all
}

#[test]
fn every_truncation_is_an_error() {
    for sample in samples() {
        for end in 0..sample.len() {
            assert!(Frame::decode(&mut sample.slice(..end)).is_err(), "{end} of {sample:?}");
        }
        let mut whole = sample.clone();
        let frame = Frame::decode(&mut whole).unwrap();
        Unpacker::default().unpack(&frame).unwrap();
        assert!(whole.is_empty());
    }
}

#[test]
fn no_flipped_bit_puts_contents_in_a_wrong_place() {
    for sample in samples() {
        let step = (sample.len() / 300).max(1);
        let round = 4..8;
        for at in (0..HEADER_BYTES).chain((HEADER_BYTES..sample.len()).step_by(step)) {
            // The round is not under the checksum.
            if round.contains(&at) {
                continue;
            }
            for bit in 0..8 {
                let mut bytes = BytesMut::from(&sample[..]);
                bytes[at] ^= 1 << bit;
                let bytes = bytes.freeze();
                let Ok(frame) = Frame::decode(&mut bytes.clone()) else { continue };
                // LZ4 can say the same in two ways; then it is the same.
                if let Ok(Content::Data(_)) = Unpacker::default().unpack(&frame) {
                    assert_eq!(
                        place(&[bytes]),
                        place(std::slice::from_ref(&sample)),
                        "byte {at} bit {bit} of {sample:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn headers_are_held_to_their_limits() {
    let head = |change: &dyn Fn(&mut [u8])| {
        let mut bytes: [u8; HEADER_BYTES] = samples()[5][..HEADER_BYTES].try_into().unwrap();
        change(&mut bytes);
        Header::decode(&bytes)
    };
    assert!(matches!(head(&|_| ()), Ok(h) if h.kind() == Kind::Data));
    assert_eq!(head(&|b| b[0] = 0), Err(FrameError::Kind(0)));
    assert_eq!(head(&|b| b[0] = 9), Err(FrameError::Kind(9)));
    assert!(matches!(head(&|b| b[1] = 0), Err(FrameError::Codec { .. })));
    assert!(matches!(head(&|b| b[8] = 17), Err(FrameError::Field { field: "page count", .. })));
    assert!(matches!(head(&|b| b[8] = 0), Err(FrameError::Field { field: "page count", .. })));
    assert!(matches!(head(&|b| b[2] = 1), Err(FrameError::Field { field: "table length", .. })));
    assert!(matches!(head(&|b| b[23] = 1), Err(FrameError::Field { field: "first page", .. })));
    assert!(matches!(head(&|b| b[24] = 1), Err(FrameError::Field { field: "flags", .. })));
    assert!(matches!(head(&|b| b[15] = 1), Err(FrameError::TooLong { .. })));
    assert!(matches!(head(&|b| b[12..16].fill(0)), Err(FrameError::Length { .. })));
}

#[test]
fn a_long_state_is_refused_before_it_is_sent() {
    let long = vec![0; frame::MAX_STATE_BYTES + 1];
    assert!(matches!(frame::state(1, &long), Err(FrameError::TooLong { .. })));
    assert!(frame::state(1, &long[1..]).is_ok());
    assert!(matches!(frame::ahead(1, &long[..=frame::MAX_AHEAD_BYTES]), Err(FrameError::TooLong { .. })));
    assert!(frame::ahead(1, &long[..frame::MAX_AHEAD_BYTES]).is_ok());
}

#[test]
fn what_does_not_fit_together_is_not_packed() {
    let mut packer = Packer::new(Compression::Auto, true);
    let mut sink = |_| Ok::<_, Infallible>(());
    let pages = vec![1; 2 * PAGE_BYTES];
    let mut pack = |addrs: &[u64], contents: &[u8]| packer.pack(1, addrs, contents, &mut sink);
    assert!(matches!(pack(&[0x1000], &pages), Err(PackError::Shape { .. })));
    assert!(matches!(pack(&[0x1000, 0x2000], &pages[1..]), Err(PackError::Shape { .. })));
    assert!(matches!(pack(&[0x1000, 0x2001], &pages), Err(PackError::Address { addr: 0x2001 })));
    assert!(matches!(pack(&[0x1000, u64::MAX << 12], &pages), Err(PackError::Address { .. })));
    assert!(matches!(packer.drop_run(1, 0x1000, 0, &mut sink), Err(PackError::Address { .. })));
}

/// Prints what one core packs and unpacks; `cargo test --release pack_rate -- --nocapture --ignored`.
#[test]
#[ignore = "a measurement"]
fn pack_rate() {
    for (name, kind) in [("noise", 3), ("repeating words", 1), ("zeros", 0)] {
        let contents: Vec<u8> = (1..=64).flat_map(|seed| page(kind, seed * 77)).collect();
        let mut packer = Packer::new(Compression::Auto, true);
        let mut unpacker = Unpacker::default();
        let mut wire: Vec<Bytes> = Vec::new();
        let (mut packing, mut unpacking) = (0.0, 0.0);
        for chunk in 0u64..4096 {
            let addrs: Vec<u64> = (0..64).map(|page| (chunk * 64 + page) << 12).collect();
            let start = std::time::Instant::now();
            let mut sink = |bytes| {
                wire.push(bytes);
                Ok::<_, Infallible>(())
            };
            packer.pack(1, &addrs, &contents, &mut sink).unwrap();
            packing += start.elapsed().as_secs_f64();
            let start = std::time::Instant::now();
            for mut bytes in wire.drain(..) {
                while !bytes.is_empty() {
                    let frame = Frame::decode(&mut bytes).unwrap();
                    unpacker.unpack(&frame).unwrap();
                }
            }
            unpacking += start.elapsed().as_secs_f64();
        }
        println!("{name}: pack {:.2} GiB/s, unpack {:.2} GiB/s", 1.0 / packing, 1.0 / unpacking);
    }
}
