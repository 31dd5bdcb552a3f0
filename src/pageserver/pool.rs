//! Buffers that are used again once their contents have left.
//!
//! Fresh memory is slow (the kernel must find and clear it), memory just used is fast. A buffer goes out as
//! [`Bytes`] and the pool keeps a second handle; when the transport has dropped its own, after the peer
//! acknowledged the bytes, the pool's handle is the only one and the memory is taken back.

use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};

/// A pool of buffers of one size.
#[derive(Debug)]
pub(crate) struct Pool {
    buffer_bytes: usize,
    most: usize,
    out: VecDeque<Bytes>,
}

impl Pool {
    /// A pool that remembers up to `most` buffers of `buffer_bytes`.
    pub(crate) fn new(buffer_bytes: usize, most: usize) -> Self {
        Self { buffer_bytes, most, out: VecDeque::with_capacity(most) }
    }

    /// An empty buffer: the one longest out if it is free again, else a new one.
    pub(crate) fn take(&mut self) -> BytesMut {
        match self.out.pop_front().map(Bytes::try_into_mut) {
            Some(Ok(mut free)) if free.capacity() >= self.buffer_bytes => {
                free.clear();
                return free;
            }
            Some(Err(in_use)) => self.out.push_front(in_use),
            Some(Ok(_)) | None => {}
        }
        BytesMut::with_capacity(self.buffer_bytes)
    }

    /// Gives the contents away and remembers the buffer.
    pub(crate) fn send(&mut self, buffer: BytesMut) -> Bytes {
        let bytes = buffer.freeze();
        if self.out.len() < self.most {
            self.out.push_back(bytes.clone());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::BufMut;

    #[test]
    fn a_buffer_comes_back_after_the_last_reader() {
        let mut pool = Pool::new(1000, 4);
        let mut first = pool.take();
        let place = first.as_ptr();
        first.put_slice(b"abc");
        let sent = pool.send(first);
        let tail = sent.slice(1..);
        drop(sent);
        assert_ne!(pool.take().as_ptr(), place, "still being read");
        drop(tail);
        let again = pool.take();
        assert_eq!(again.as_ptr(), place);
        assert!(again.is_empty() && again.capacity() >= 1000);
    }
}
