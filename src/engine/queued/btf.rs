//! The kernel's description of itself (BTF): the number of one of its functions, by which a program calls it.

/// `BTF_MAGIC`, and the kind of a function.
const MAGIC: u16 = 0xeb9f;
const FUNCTION: u32 = 12;
/// Name, kind and count, size or type.
const ENTRY_BYTES: usize = 12;

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn size(bytes: &[u8], at: usize) -> Option<usize> {
    word(bytes, at).map(|word| word as usize)
}

/// The number of the function `name`; `None` if there is none, or `btf` is not what we know.
pub(super) fn function(btf: &[u8], name: &str) -> Option<u32> {
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
    let mut number = 1;
    let mut at = 0;
    while at < types.len() {
        let info = word(types, at + 4)?;
        let (kind, count) = (info >> 24 & 31, (info & 0xffff) as usize);
        let is_it = || {
            let found = names.get(size(types, at)?..)?;
            Some(found.strip_prefix(name.as_bytes())?.first() == Some(&0))
        };
        if kind == FUNCTION && is_it() == Some(true) {
            return Some(number);
        }
        at += ENTRY_BYTES + rest(kind, count)?;
        number += 1;
    }
    None
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

    /// With one structure of two members before the function.
    fn sample() -> Vec<u8> {
        let names = b"\0assign\0assign_all\0";
        let mut types = Vec::new();
        for words in [[0, 4 << 24 | 2, 8], [0; 3], [0; 3], [8, FUNCTION << 24, 0], [1, FUNCTION << 24, 0]] {
            types.extend(words.iter().flat_map(|word: &u32| word.to_ne_bytes()));
        }
        let mut btf = MAGIC.to_ne_bytes().to_vec();
        btf.extend([1, 0]);
        for word in [24, 0, types.len(), types.len(), names.len()] {
            btf.extend(u32::try_from(word).unwrap().to_ne_bytes());
        }
        [btf, types, names.to_vec()].concat()
    }

    #[test]
    fn functions_are_counted_among_all_that_is_described() {
        assert_eq!(function(&sample(), "assign_all"), Some(2));
        assert_eq!(function(&sample(), "assign"), Some(3));
        assert_eq!(function(&sample(), "assig"), None);
    }

    proptest! {
        #[test]
        fn no_bytes_panic(at in 0..80usize, byte in any::<u8>(), end in 0..120usize) {
            let mut btf = sample();
            if let Some(place) = btf.get_mut(at) {
                *place = byte;
            }
            let _ = function(btf.get(..end).unwrap_or(&btf), "assign");
        }
    }
}
