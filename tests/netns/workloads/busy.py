"""A Python program with 8 threads, each busy with one kind of thing, that verifies itself.

`busy.py FILE`. Prints `ready`, then checks all the time; SIGUSR1 asks for `ok N`. Any error is a line
`FAIL ...` and exit status 1.
"""

import hashlib
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback

# How much longer than asked a wait may take: the machine is shared, and a move takes its time.
LATE = 20.0

counts = [0] * 8
alarms = 0
asked = False
started = threading.Barrier(9)


def die(what):
    os.write(1, f"FAIL {what}\n".encode())
    os._exit(1)


def check(holds, what):
    if not holds:
        die(what)


def forever(number, step):
    """Runs `step` again and again; what it raises is a failure of the program."""

    def run():
        try:
            step()
            started.wait()
            while True:
                step()
                counts[number] += 1
        except BaseException:
            die(f"thread {number}: {traceback.format_exc()!r}")

    return run


def hashing():
    """A chain of hashes against the same chain computed from its start."""
    state = {"digest": b"start", "length": 0}

    def step():
        state["digest"] = hashlib.sha256(state["digest"]).digest()
        state["length"] += 1
        if state["length"] % 500 == 0:
            digest = b"start"
            for _ in range(state["length"]):
                digest = hashlib.sha256(digest).digest()
            check(digest == state["digest"], "the chain of hashes broke")
            if state["length"] >= 5000:
                state.update(digest=b"start", length=0)

    return step


def appending(path):
    """Appends records to a file and reads it all back now and then; the file begins anew at times."""
    file = open(path, "w+b", buffering=0)
    state = {"records": 0}

    def record(number):
        return struct.pack("<Q", number) * 8

    def step():
        file.write(record(state["records"]))
        state["records"] += 1
        check(file.tell() == 64 * state["records"], f"the file's position is {file.tell()}")
        if state["records"] % 200 == 0:
            with open(path, "rb") as other:
                content = other.read()
            check(content == b"".join(map(record, range(state["records"]))), "the file's content")
        if state["records"] == 2000:
            file.seek(0)
            file.truncate()
            state["records"] = 0
        time.sleep(0.001)

    return step


def sleeping():
    def step():
        for seconds in (0.001, 0.05, 0.5):
            before = time.monotonic()
            time.sleep(seconds)
            took = time.monotonic() - before
            check(seconds <= took < seconds + LATE, f"slept {took} s instead of {seconds}")

    return step


def timers():
    def step():
        fired = threading.Event()
        before = time.monotonic()
        timer = threading.Timer(0.2, fired.set)
        timer.start()
        check(fired.wait(LATE), "a threading.Timer did not fire")
        took = time.monotonic() - before
        check(took >= 0.2, f"a threading.Timer of 0.2 s fired after {took}")
        timer.join()

    return step


def piping():
    """Bytes stay in the pipe between steps: a move finds it half full."""
    reading, writing = os.pipe()
    state = {"written": 0, "read": 0}

    def step():
        while state["written"] - state["read"] < 5000:
            os.write(writing, struct.pack("<Q", state["written"]))
            state["written"] += 1
        for _ in range(100):
            (number,) = struct.unpack("<Q", os.read(reading, 8))
            check(number == state["read"], f"the pipe gave {number} instead of {state['read']}")
            state["read"] += 1
        time.sleep(0.001)

    return step


def pairing():
    """Messages wait in both directions of a socketpair, one of whose ends is non-blocking."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    right.setblocking(False)
    state = {"sent": 0, "received": 0}

    def message(number):
        return b"%d " % number * (number % 50 + 1)

    def step():
        while state["sent"] - state["received"] < 40:
            left.send(message(state["sent"]))
            right.send(message(state["sent"]))
            state["sent"] += 1
        wanted = message(state["received"])
        check(left.recv(65536) == wanted, "the socketpair, left")
        check(right.recv(65536) == wanted, "the socketpair, right")
        state["received"] += 1
        time.sleep(0.001)

    return step


def polling():
    """epoll over a pipe that is never ready and one that is ready every other time."""
    quiet, _keep = os.pipe()
    reading, writing = os.pipe()
    poller = select.epoll()
    poller.register(quiet, select.EPOLLIN)
    poller.register(reading, select.EPOLLIN)

    def step():
        check(_keep > 2, "unused")
        before = time.monotonic()
        check(poller.poll(0.3) == [], "epoll saw what is not there")
        took = time.monotonic() - before
        check(0.299 <= took < 0.3 + LATE, f"epoll waited {took} s instead of 0.3")
        os.write(writing, b"x")
        check(poller.poll(LATE) == [(reading, select.EPOLLIN)], "epoll did not see the pipe")
        check(os.read(reading, 8) == b"x", "the pipe of epoll")

    return step


def talking():
    """A condition variable between this thread and one it waits for."""
    condition = threading.Condition()
    state = {"turn": 0}

    def partner():
        for _ in range(50):
            with condition:
                check(condition.wait_for(lambda: state["turn"] % 2 == 1, LATE), "no turn came")
                state["turn"] += 1
                condition.notify()

    def step():
        other = threading.Thread(target=partner)
        other.start()
        for _ in range(50):
            with condition:
                state["turn"] += 1
                condition.notify()
                check(condition.wait_for(lambda: state["turn"] % 2 == 0, LATE), "no turn came back")
            time.sleep(0.001)
        other.join()

    return step


def on_alarm(_signal, _frame):
    global alarms
    alarms += 1


def on_ask(_signal, _frame):
    global asked
    asked = True


def main():
    global asked
    signal.signal(signal.SIGALRM, on_alarm)
    signal.signal(signal.SIGUSR1, on_ask)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    kinds = [hashing(), appending(sys.argv[1]), sleeping(), timers(), piping(), pairing(), polling(), talking()]
    for number, step in enumerate(kinds):
        threading.Thread(target=forever(number, step), daemon=True).start()
    started.wait()
    environment, last, last_alarms = dict(os.environ), [0] * 8, 0
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
        if not asked:
            continue
        asked = False
        # All of them must get on from here.
        before, before_alarms, end = list(counts), alarms, time.monotonic() + LATE
        while not (all(now > then for now, then in zip(counts, before)) and alarms > before_alarms):
            check(time.monotonic() < end, f"a thread stands still: {before} {counts}, alarms {alarms}")
            time.sleep(0.01)
        check(dict(os.environ) == environment, "the environment")
        check(all(now >= then for now, then in zip(before, last)), "a count went back")
        check(before_alarms >= last_alarms, "the count of alarms went back")
        last, last_alarms = before, before_alarms
        print(f"ok {sum(counts)}", flush=True)


main()
