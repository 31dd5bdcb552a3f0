//! The C library's heap.

/// Gives the free memory of the heap back to the kernel (malloc_trim(3), glibc 2.8: of all arenas). It takes
/// longer the more there is: not for the time that a process is stopped.
pub(crate) fn give_back() {
    // SAFETY: it takes no pointer, and locks each arena for itself.
    unsafe { libc::malloc_trim(0) };
}
