//! The kernel's description of itself (BTF): the numbers of its functions, by which a program calls them, and where
//! its structures have their members.

/// `BTF_MAGIC`, and the kinds that are of interest.
const MAGIC: u16 = 0xeb9f;
const INTEGER: u32 = 1;
const POINTER: u32 = 2;
const ARRAY: u32 = 3;
const STRUCTURE: u32 = 4;
const UNION: u32 = 5;
const ENUMERATION: u32 = 6;
const FUNCTION: u32 = 12;
const WIDE_ENUMERATION: u32 = 19;
/// Another name, or a qualifier, of another type.
const SAME: [u32; 5] = [8, 9, 10, 11, 18];
/// Name, kind and count, size or type.
const ENTRY_BYTES: usize = 12;
const MEMBER_BYTES: usize = 12;
/// Names of names, and structures without a name within others.
const DEEPEST: usize = 16;

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn size(bytes: &[u8], at: usize) -> Option<usize> {
    word(bytes, at).map(|word| word as usize)
}

/// All that is described.
#[derive(Debug)]
pub(in crate::engine) struct Btf<'a> {
    types: &'a [u8],
    names: &'a [u8],
    /// Where the types are, by number; the first is none.
    places: Vec<u32>,
}

/// A type: its number, kind, how many parts it has, and the word which is its size or another type.
#[derive(Debug, Clone, Copy)]
struct Type {
    at: usize,
    kind: u32,
    count: usize,
    /// Places of members tell the length of bit fields.
    has_lengths: bool,
    word: u32,
}

/// Where a member is within its structure, in bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::engine) struct Field {
    pub(in crate::engine) start: usize,
    pub(in crate::engine) len: usize,
}

impl Field {
    /// The bytes that it is in.
    pub(in crate::engine) fn bytes_in(self, bytes: &[u8]) -> &[u8] {
        bytes.get(self.start / 8..(self.start + self.len).div_ceil(8)).unwrap_or_default()
    }

    /// What it is as a number; 0 where it is not.
    pub(in crate::engine) fn value_in(self, bytes: &[u8]) -> u64 {
        let mut whole = [0; 8];
        whole.iter_mut().zip(self.bytes_in(bytes)).for_each(|(to, from)| *to = *from);
        let mask = u64::MAX >> 64usize.saturating_sub(self.len).min(63);
        u64::from_le_bytes(whole) >> (self.start % 8) & mask
    }
}

impl<'a> Btf<'a> {
    /// `None` if it is not what we know.
    pub(in crate::engine) fn parse(btf: &'a [u8]) -> Option<Self> {
        if u16::from_ne_bytes(*btf.first_chunk()?) != MAGIC {
            return None;
        }
        // struct btf_header: magic, version, flags, its length; where types and names begin, and how long they are.
        let header = size(btf, 4)?;
        let section = |at: usize| {
            let start = header.checked_add(size(btf, at)?)?;
            btf.get(start..start.checked_add(size(btf, at + 4)?)?)
        };
        let (types, names) = (section(8)?, section(16)?);
        let mut all = Self { types, names, places: vec![u32::MAX] };
        let mut at = 0;
        while at < types.len() {
            let one = all.at(at)?;
            all.places.push(u32::try_from(at).ok()?);
            at += ENTRY_BYTES + rest(one.kind, one.count)?;
        }
        Some(all)
    }

    fn at(&self, at: usize) -> Option<Type> {
        let info = word(self.types, at.checked_add(4)?)?;
        let (kind, count) = (info >> 24 & 31, (info & 0xffff) as usize);
        Some(Type { at, kind, count, has_lengths: info >> 31 != 0, word: word(self.types, at + 8)? })
    }

    /// The type that is meant, by its number.
    fn meant(&self, number: u32) -> Option<Type> {
        let mut number = number;
        for _ in 0..DEEPEST {
            let found = self.at(*self.places.get(number as usize)? as usize)?;
            if !SAME.contains(&found.kind) {
                return Some(found);
            }
            number = found.word;
        }
        None
    }

    /// Whether what begins at this place is called so.
    fn is_called(&self, at: usize, name: &str) -> bool {
        let found = size(self.types, at).and_then(|start| self.names.get(start..));
        let after = found.and_then(|found| found.strip_prefix(name.as_bytes()));
        after.and_then(|after| after.first()) == Some(&0)
    }

    /// The number of the first type of this kind that is called so and `is_it`.
    fn find(&self, kind: u32, name: &str) -> Option<(u32, Type)> {
        (0..).zip(&self.places).skip(1).find_map(|(number, place)| {
            let found = self.at(*place as usize)?;
            (found.kind == kind && self.is_called(found.at, name)).then_some((number, found))
        })
    }

    /// The number of the function `name`; `None` if there is none.
    pub(in crate::engine) fn function(&self, name: &str) -> Option<u32> {
        self.find(FUNCTION, name).map(|(number, _)| number)
    }

    /// A structure, or a union.
    pub(in crate::engine) fn structure(&self, name: &str) -> Option<Structure<'_, 'a>> {
        let found = self.find(STRUCTURE, name).or_else(|| self.find(UNION, name))?;
        Some(Structure { btf: self, this: found.1 })
    }

    /// Bytes of a type.
    fn bytes(&self, number: u32) -> Option<usize> {
        let mut times = 1usize;
        let mut number = number;
        for _ in 0..DEEPEST {
            let found = self.meant(number)?;
            let one = match found.kind {
                INTEGER | STRUCTURE | UNION | ENUMERATION | WIDE_ENUMERATION => found.word as usize,
                POINTER => 8,
                ARRAY => {
                    number = word(self.types, found.at + ENTRY_BYTES)?;
                    times = times.checked_mul(size(self.types, found.at + ENTRY_BYTES + 8)?)?;
                    continue;
                }
                _ => return None,
            };
            return one.checked_mul(times);
        }
        None
    }

    /// A member of a structure, also if it is within one that has no name: where it begins, its length if it is a bit
    /// field, and its type.
    fn member(&self, of: Type, name: &str, depth: usize) -> Option<(usize, usize, u32)> {
        if ![STRUCTURE, UNION].contains(&of.kind) || depth > DEEPEST {
            return None;
        }
        (0..of.count).find_map(|i| {
            let at = of.at + ENTRY_BYTES + i * MEMBER_BYTES;
            let (kind, place) = (word(self.types, at + 4)?, size(self.types, at + 8)?);
            let (start, len) = if of.has_lengths { (place & 0xff_ffff, place >> 24) } else { (place, 0) };
            if !name.is_empty() && self.is_called(at, name) {
                return Some((start, len, kind));
            }
            let within = self.is_called(at, "").then(|| self.meant(kind)).flatten()?;
            let (more, len, kind) = self.member(within, name, depth + 1)?;
            Some((start.checked_add(more)?, len, kind))
        })
    }
}

/// A structure among all that is described.
#[derive(Debug)]
pub(in crate::engine) struct Structure<'b, 'a> {
    btf: &'b Btf<'a>,
    this: Type,
}

impl Structure<'_, '_> {
    /// How long it is.
    pub(in crate::engine) fn bytes(&self) -> usize {
        self.this.word as usize
    }

    /// A member, or one of a member: `rx_opt.mss_clamp`. Pointers are not followed.
    pub(in crate::engine) fn field(&self, path: &str) -> Option<Field> {
        let (mut of, mut from) = (self.this, 0usize);
        let mut names = path.split('.').peekable();
        while let Some(name) = names.next() {
            let (start, len, kind) = self.btf.member(of, name, 0)?;
            from = from.checked_add(start)?;
            if names.peek().is_none() {
                let whole = || self.btf.bytes(kind)?.checked_mul(8);
                return Some(Field { start: from, len: if len == 0 { whole()? } else { len } });
            }
            of = self.btf.meant(kind)?;
        }
        None
    }
}

/// What follows an entry.
fn rest(kind: u32, count: usize) -> Option<usize> {
    Some(match kind {
        // Pointers, forward declarations, other names, qualifiers, functions, floats, tags of types.
        2 | 7..=12 | 16 | 18 => 0,
        // Integers, variables, tags of declarations.
        1 | 14 | 17 => 4,
        // Arrays.
        3 => 12,
        // Structures, unions, sections, enumerations of 64 bits.
        4 | 5 | 15 | 19 => 12 * count,
        // Enumerations, prototypes.
        6 | 13 => 8 * count,
        _ => return None,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NAMES: &[u8] = b"\0assign\0assign_all\0outer\0low\0high\0inner\0row\0last\0alias\0";

    fn called(name: &str) -> u32 {
        let sought = format!("\0{name}\0");
        let at = NAMES.windows(sought.len()).position(|some| some == sought.as_bytes()).unwrap();
        u32::try_from(at + 1).unwrap()
    }

    /// An integer of four bytes (1), another name of it (2), an array of three of these (3); a structure with that array
    /// (4), a union without a name that has it (5); a structure with two bit fields and the union (6); two functions.
    fn sample() -> Vec<u8> {
        let entries = [
            vec![0, INTEGER << 24, 4, 32],
            vec![called("alias"), 8 << 24, 1],
            vec![0, ARRAY << 24, 0, 2, 2, 3],
            vec![0, STRUCTURE << 24 | 2, 16, called("row"), 3, 0, called("last"), 2, 96],
            vec![0, UNION << 24 | 1, 16, called("inner"), 4, 0],
            vec![
                called("outer"),
                1 << 31 | STRUCTURE << 24 | 3,
                24,
                called("low"),
                1,
                3 << 24,
                called("high"),
                2,
                5 << 24 | 3,
                0,
                5,
                64,
            ],
            vec![called("assign_all"), FUNCTION << 24, 0],
            vec![called("assign"), FUNCTION << 24, 0],
        ];
        let types: Vec<u8> = entries.concat().iter().flat_map(|word: &u32| word.to_ne_bytes()).collect();
        let mut btf = MAGIC.to_ne_bytes().to_vec();
        btf.extend([1, 0]);
        for word in [24, 0, types.len(), types.len(), NAMES.len()] {
            btf.extend(u32::try_from(word).unwrap().to_ne_bytes());
        }
        [btf, types, NAMES.to_vec()].concat()
    }

    #[test]
    fn functions_are_counted_among_all_that_is_described() {
        let bytes = sample();
        let btf = Btf::parse(&bytes).unwrap();
        assert_eq!(btf.function("assign_all"), Some(7));
        assert_eq!(btf.function("assign"), Some(8));
        assert_eq!(btf.function("assig"), None);
    }

    #[test]
    fn members_are_found_where_they_are() {
        let bytes = sample();
        let btf = Btf::parse(&bytes).unwrap();
        let outer = btf.structure("outer").unwrap();
        let at = |path| outer.field(path).map(|field| (field.start, field.len));
        assert_eq!(at("low"), Some((0, 3)));
        assert_eq!(at("high"), Some((3, 5)));
        assert_eq!(at("inner"), Some((64, 128)));
        assert_eq!(at("inner.row"), Some((64, 96)));
        assert_eq!(at("inner.last"), Some((160, 32)));
        assert!([at("row"), at("low.last"), at("inner."), at("")].iter().all(Option::is_none));
        assert!(btf.structure("assign").is_none());
    }

    proptest! {
        #[test]
        fn no_bytes_panic(at in 0..280usize, byte in any::<u8>(), end in 0..330usize) {
            let mut bytes = sample();
            if let Some(place) = bytes.get_mut(at) {
                *place = byte;
            }
            if let Some(btf) = Btf::parse(bytes.get(..end).unwrap_or(&bytes)) {
                let _ = btf.function("assign");
                let _ = btf.structure("outer").map(|outer| outer.field("inner.last"));
            }
        }
    }
}
