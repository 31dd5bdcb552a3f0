"""A Python program with a large graph of objects that is changed and verified all the time.

Each node knows what it must hold by a seed of its own, and its edges lead to nodes whose number it has
written down. Objects are made and given up continually, in cycles, so that the collector has work.
`graph.py`. Prints `ready`; SIGUSR1 asks for `ok N`.
"""

import gc
import os
import random
import signal
import sys
import zlib

NODES = 60_000
EDGES = 3

asked = False


def die(what):
    os.write(1, f"FAIL {what}\n".encode())
    os._exit(1)


class Node:
    def __init__(self, number, seed):
        self.number = number
        self.seed = seed
        self.text = self.wanted_text()
        self.sums = {"crc": zlib.crc32(self.text.encode()), "list": [seed + i for i in range(6)]}
        self.edges = []
        self.names = ()
        # A cycle: only the collector frees this.
        self.itself = self

    def wanted_text(self):
        return f"node {self.number} with {self.seed:x} " + chr(97 + self.seed % 26) * (self.seed % 150)

    def lead_to(self, nodes):
        self.edges = nodes
        self.names = tuple((node.number, node.seed) for node in nodes)

    def verify(self):
        if self.text != self.wanted_text() or self.itself is not self:
            die(f"node {self.number}: {self.text!r}")
        if self.sums["crc"] != zlib.crc32(self.text.encode()):
            die(f"node {self.number}: its checksum")
        if self.sums["list"] != [self.seed + i for i in range(6)]:
            die(f"node {self.number}: its list {self.sums['list']}")
        if self.names != tuple((node.number, node.seed) for node in self.edges):
            die(f"node {self.number}: its edges {self.names}")


def on_ask(_signal, _frame):
    global asked
    asked = True


def main():
    global asked
    signal.signal(signal.SIGUSR1, on_ask)
    choose = random.Random(1)
    nodes = [Node(i, choose.getrandbits(40)) for i in range(NODES)]
    for node in nodes:
        node.lead_to([nodes[choose.randrange(NODES)] for _ in range(EDGES)])
    steps = 0
    print("ready", flush=True)
    while True:
        for _ in range(200):
            at = choose.randrange(NODES)
            nodes[at].verify()
            # What others lead to stays alive there, but keeps nothing else alive.
            nodes[at].lead_to([])
            fresh = Node(at, choose.getrandbits(40))
            fresh.lead_to([nodes[choose.randrange(NODES)] for _ in range(EDGES)])
            nodes[at] = fresh
            other = nodes[choose.randrange(NODES)]
            other.lead_to([fresh] + [nodes[choose.randrange(NODES)] for _ in range(EDGES - 1)])
            steps += 1
        if asked:
            asked = False
            gc.collect()
            for node in nodes:
                node.verify()
            print(f"ok {steps}", flush=True)


try:
    main()
except BaseException as error:
    die(repr(error))
    sys.exit(1)
