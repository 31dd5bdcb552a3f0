//! Work on many things by all processors at once: a server has connections by the thousand, and its process stands
//! still while each of them is read, or made.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// Fewer are not worth a thread, which takes as long to start as some of them to be done.
const WORTH_A_THREAD: usize = 128;
/// Taken by a thread at a time, so that one which is held up holds up little.
const AT_A_TIME: usize = 16;
/// More would only wait for each other: for the tables of the kernel that all of them use.
const MOST_THREADS: usize = 8;

/// What `act` makes of each of `items`, in their order. It may be called by several threads at once, which have the
/// namespaces of the calling one.
pub fn map<T: Sync, R: Send>(items: &[T], act: impl Fn(&T) -> R + Sync) -> Vec<R> {
    shared_out(items, (WORTH_A_THREAD, AT_A_TIME), act)
}

/// The same for items that are work for a while each.
pub fn map_large<T: Sync, R: Send>(items: &[T], act: impl Fn(&T) -> R + Sync) -> Vec<R> {
    shared_out(items, (2, 1), act)
}

/// Drops each of `items`, which takes a while, too.
pub fn drop_all<T: Send>(items: Vec<T>) {
    let slots: Vec<_> = items.into_iter().map(|item| Mutex::new(Some(item))).collect();
    map(&slots, |slot| drop(slot.lock().unwrap_or_else(PoisonError::into_inner).take()));
}

fn shared_out<T: Sync, R: Send>(
    items: &[T],
    (worth_a_thread, at_a_time): (usize, usize),
    act: impl Fn(&T) -> R + Sync,
) -> Vec<R> {
    let most = (items.len() / worth_a_thread).min(MOST_THREADS);
    // To ask takes a tenth of a millisecond: it reads files of control groups.
    let processors = || std::thread::available_parallelism().map_or(1, usize::from);
    let threads = if most < 2 { 1 } else { processors().min(most) };
    if threads < 2 {
        return items.iter().map(act).collect();
    }
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        loop {
            let at = next.fetch_add(at_a_time, Ordering::Relaxed);
            let Some(rest) = items.get(at..).filter(|rest| !rest.is_empty()) else { return done };
            let some = rest.get(..at_a_time).unwrap_or(rest);
            done.push((at, some.iter().map(&act).collect::<Vec<R>>()));
        }
    };
    let mut done = std::thread::scope(|scope| {
        let start = || std::thread::Builder::new().name("many".into()).spawn_scoped(scope, work).ok();
        let others: Vec<_> = (1..threads).filter_map(|_| start()).collect();
        let mut done = work();
        for other in others {
            match other.join() {
                Ok(some) => done.extend(some),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        done
    });
    done.sort_unstable_by_key(|(at, _)| *at);
    done.into_iter().flat_map(|(_, some)| some).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_of_them_in_their_order() {
        for count in [0, 1, 15, 16, 17, 127, 128, 1000, 4099] {
            let items: Vec<usize> = (0..count).collect();
            let doubled: Vec<usize> = items.iter().map(|i| 2 * i).collect();
            assert_eq!(map(&items, |i| 2 * i), doubled);
        }
    }

    #[test]
    fn several_threads_do_it_where_there_are_processors() {
        if std::thread::available_parallelism().map_or(1, usize::from) < 2 {
            return;
        }
        // Each waits for another one: a single thread would wait for ever.
        let met = std::sync::Barrier::new(2);
        let first = AtomicUsize::new(0);
        map(&[(); 2 * WORTH_A_THREAD], |()| {
            if first.fetch_add(1, Ordering::Relaxed) < 2 {
                met.wait();
            }
        });
    }
}
