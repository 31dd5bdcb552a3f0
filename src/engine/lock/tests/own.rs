//! The lock by a process's own sockets, without a list of all.

use super::*;
use crate::engine::trial::counted;

/// As a process would say it of these.
fn own(inodes: &HashSet<u64>, pairs: &[Pair]) -> Own {
    let connections = pairs.iter().map(Pair::connection).collect();
    Own { inodes: inodes.clone(), connections, is_all: true }
}

fn sorted(mut list: Vec<Connection>) -> Vec<Connection> {
    list.sort_unstable();
    list
}

/// Locks both ways, and compares. Whether all sockets were listed is told by the number of answers.
fn close(lock: &mut Lock, own: &Own) -> (Locked, bool) {
    let (answers, locked) = counted("recvfrom", || lock.close_on_own(own).unwrap());
    let (of_list, expected) = counted("recvfrom", || lock.close_on_process(&own.inodes).unwrap());
    assert_eq!(sorted(locked.all.clone()), sorted(expected.all));
    assert_eq!(locked.queued, expected.queued);
    (locked, answers >= of_list)
}

#[test]
fn it_locks_the_same_and_lists_only_where_somebody_may_have_come() {
    in_a_namespace(|| {
        for ip in [V4, V6] {
            let listener = TcpListener::bind((ip, 0)).unwrap();
            let (pair, inode) = (Pair::on(&listener), inodes(&[&listener]));
            let mine = &inode | &inodes(&[&pair.server]);
            let pairs = [pair];
            let mut lock = open();
            let of_process = own(&mine, &pairs);
            // Nobody has closed the doors before: somebody may have come since the sockets were looked at.
            let (answers, locked) = counted("recvfrom", || lock.close_on_own(&of_process).unwrap());
            assert_eq!(locked.all.len(), 2);
            assert!(answers > 5, "{answers}");
            lock.release().unwrap();

            lock.close_on_listeners(&mine).unwrap();
            let (locked, listed) = close(&mut lock, &of_process);
            assert_eq!((locked.all.len(), listed), (2, false));
            let [mut pair] = pairs;
            pair.client.write_all(b"?").unwrap();
            pair.server.write_all(b"!").unwrap();
            until_repeated(&pair.client);
            assert!(!has_input(&pair.server) && !has_input(&pair.client));
            let pairs = [pair];

            // A new place.
            let second = TcpListener::bind((ip, 0)).unwrap();
            let with_second = own(&(&mine | &inodes(&[&second])), &pairs);
            let (locked, listed) = close(&mut lock, &with_second);
            assert_eq!((locked.all.len(), listed), (3, true));
            request_is_dropped(&mut lock, second.local_addr().unwrap(), &[]);

            // One that waits, of which the sockets did not know yet.
            let waits = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            lock.close_on_listeners(&mine).unwrap();
            let (locked, listed) = close(&mut lock, &of_process);
            assert!(listed);
            assert_eq!(locked.queued.len(), 1);
            assert_eq!(locked.queued[0].remote, waits.local_addr().ok());
            drop(listener.accept().unwrap());
            // The sockets know better than the list.
            let (locked, listed) = close(&mut lock, &Own { is_all: false, ..of_process.clone() });
            assert_eq!((locked.all.len(), listed), (2, true));
            lock.release().unwrap();
        }
    });
}

/// Where it is known from before that nobody else has the end of many, it is locked as a whole.
#[test]
fn a_crowded_end_is_judged_before() {
    in_a_namespace(|| {
        for ip in [V4, V6] {
            let (listener, mut pairs, mut strange) = crowd(ip);
            let to = listener.local_addr().unwrap();
            let servers: Vec<&dyn AsFd> = pairs.iter().map(|pair| &pair.server as &dyn AsFd).collect();
            let mine = inodes(&servers);
            let of_process = own(&mine, &pairs);
            let mut lock = open();
            let (_, listed) = close(&mut lock, &of_process);
            assert!(listed, "nobody has looked before");
            strange.round_trip();
            lock.release().unwrap();

            lock.look_for_others(&of_process.connections).unwrap();
            let (_, listed) = close(&mut lock, &of_process);
            assert!(!listed);
            strange.round_trip();
            pairs[3].client.write_all(b"?").unwrap();
            until_repeated(&pairs[3].client);
            assert!(!has_input(&pairs[3].server));
            lock.release().unwrap();
            pairs[3].server.read_exact(&mut [0]).unwrap();

            drop(strange);
            lock.look_for_others(&of_process.connections).unwrap();
            let locked = lock.close_on_own(&of_process).unwrap();
            assert_eq!(sorted(locked.all), sorted(of_process.connections));
            // It is not in the list: only the whole end can keep it out.
            let beside = TcpListener::bind((ip, 0)).unwrap();
            request_is_dropped(&mut lock, to, &[beside.local_addr().unwrap()]);
        }
    });
}
