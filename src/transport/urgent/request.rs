//! The request for pages: 16 bytes.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::pageserver::frame::{MAX_PAGE_NUMBER, PAGE_BYTES};

/// Most pages of one request.
pub const MAX_REQUEST_PAGES: u32 = 16;
/// Bytes of a request.
pub(super) const REQUEST_BYTES: usize = 16;

/// A request that no node sends.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a request for {pages} pages at {address:#x} (reserved: {reserved})")]
pub struct RequestError {
    address: u64,
    pages: u32,
    reserved: u32,
}

/// Pages that follow one another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request {
    address: u64,
    pages: u32,
}

impl Request {
    /// Takes a request off the front of what was received; `None` until it is whole.
    pub(super) fn take(bytes: &mut BytesMut) -> Result<Option<Self>, RequestError> {
        if bytes.len() < REQUEST_BYTES {
            return Ok(None);
        }
        let (address, pages, reserved) = (bytes.get_u64_le(), bytes.get_u32_le(), bytes.get_u32_le());
        let aligned = address.is_multiple_of(PAGE_BYTES as u64);
        let number = address / PAGE_BYTES as u64;
        let inside = number < MAX_PAGE_NUMBER && number + u64::from(pages) <= MAX_PAGE_NUMBER;
        if aligned && inside && (1..=MAX_REQUEST_PAGES).contains(&pages) && reserved == 0 {
            Ok(Some(Self { address, pages }))
        } else {
            Err(RequestError { address, pages, reserved })
        }
    }

    /// The addresses of its pages.
    pub(super) fn addresses(self) -> impl Iterator<Item = u64> {
        (0..u64::from(self.pages)).map(move |page| self.address + page * PAGE_BYTES as u64)
    }
}

/// Requests for pages, in this order; neighbours share one.
pub(super) fn encode(pages: &[u64]) -> Bytes {
    let mut out = BytesMut::with_capacity(pages.len() * REQUEST_BYTES);
    let mut rest = pages.iter().copied().peekable();
    while let Some(address) = rest.next() {
        let mut count = 1;
        while count < MAX_REQUEST_PAGES
            && rest.next_if_eq(&address.wrapping_add(u64::from(count) * PAGE_BYTES as u64)).is_some()
        {
            count += 1;
        }
        out.put_u64_le(address);
        out.put_u32_le(count);
        out.put_u32_le(0);
    }
    out.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pages(mut bytes: BytesMut) -> Vec<u64> {
        let mut pages = Vec::new();
        while let Some(request) = Request::take(&mut bytes).unwrap() {
            pages.extend(request.addresses());
        }
        assert!(bytes.is_empty());
        pages
    }

    #[test]
    fn neighbours_share_a_request_and_the_order_stays() {
        let asked: Vec<u64> = (100..120).chain([7, 8, 200]).map(|page| page * 4096).collect();
        let bytes = BytesMut::from(encode(&asked));
        assert_eq!(bytes.len(), 4 * REQUEST_BYTES, "16 + 4 + 2 + 1");
        assert_eq!(pages(bytes), asked);
    }

    #[test]
    fn what_no_node_sends_is_refused() {
        let end = MAX_PAGE_NUMBER * 4096;
        let odd = [(4096, 0, 0), (4096, 17, 0), (4096, 1, 1), (4097, 1, 0), (end, 1, 0), (end - 4096, 2, 0)];
        for (address, pages, reserved) in odd {
            let mut bytes = BytesMut::new();
            bytes.put_u64_le(address);
            bytes.put_u32_le(pages);
            bytes.put_u32_le(reserved);
            assert_eq!(Request::take(&mut bytes), Err(RequestError { address, pages, reserved }));
        }
        assert_eq!(Request::take(&mut BytesMut::from(&[0; 15][..])), Ok(None));
    }

    proptest! {
        #[test]
        fn any_pages_come_back(numbers in proptest::collection::vec(0..MAX_PAGE_NUMBER, 0..64)) {
            let asked: Vec<u64> = numbers.iter().map(|number| number * 4096).collect();
            prop_assert_eq!(pages(BytesMut::from(encode(&asked))), asked);
        }
    }
}
