// A Node program with a large graph of objects that is changed and verified all the time, so that V8 moves
// them: each knows by a seed what it must hold, and by name what it leads to. `node --expose-gc graph.js`.
// Prints `ready`; SIGUSR1 asks for `ok N`.
'use strict';
const fs = require('fs');
const crypto = require('crypto');

const NODES = 60000;
const EDGES = 3;

function die(what) {
  fs.writeSync(1, `FAIL ${what}\n`);
  process.exit(1);
}

let state = 12345;
function choose(below) {
  state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
  return state % below;
}

class Node {
  constructor(number, seed) {
    this.number = number;
    this.seed = seed;
    this.text = Node.text(number, seed);
    this.floats = new Float64Array(8).fill(seed / 3);
    this.map = new Map([['seed', seed], [number, this]]);
    this.edges = [];
    this.names = [];
  }
  static text(number, seed) {
    return `node ${number} with ${seed} ` + String.fromCharCode(97 + (seed % 26)).repeat(seed % 100);
  }
  leadTo(nodes) {
    this.edges = nodes;
    this.names = nodes.map((node) => `${node.number}:${node.seed}`);
  }
  verify() {
    if (this.text !== Node.text(this.number, this.seed)) die(`node ${this.number}: ${this.text}`);
    if (!this.floats.every((value) => value === this.seed / 3)) die(`node ${this.number}: ${this.floats}`);
    if (this.map.get('seed') !== this.seed || this.map.get(this.number) !== this) die(`map of ${this.number}`);
    this.edges.forEach((node, i) => {
      if (this.names[i] !== `${node.number}:${node.seed}`) die(`edge ${i} of ${this.number}: ${this.names[i]}`);
    });
  }
}

let asked = false;
process.on('SIGUSR1', () => { asked = true; });

const nodes = [];
for (let i = 0; i < NODES; i++) nodes.push(new Node(i, choose(1 << 30)));
const some = (count) => Array.from({ length: count }, () => nodes[choose(NODES)]);
for (const node of nodes) node.leadTo(some(EDGES));

// Large buffers outside of the heap, with a checksum each; the pool of threads hashes some of them.
const buffers = Array.from({ length: 16 }, (_, i) => Buffer.alloc(256 * 1024, i + 1));
const digest = (bytes) => crypto.createHash('sha256').update(bytes).digest('hex');
const sums = buffers.map(digest);
let steps = 0;
let hashed = 0;

function hashInThePool() {
  crypto.pbkdf2('secret', 'salt', 200, 32, 'sha256', (error, key) => {
    if (error || key.toString('hex') !== wanted) die(`the pool of threads: ${error}`);
    hashed++;
    hashInThePool();
  });
}
const wanted = crypto.pbkdf2Sync('secret', 'salt', 200, 32, 'sha256').toString('hex');
hashInThePool();

function work() {
  for (let i = 0; i < 300; i++) {
    const at = choose(NODES);
    nodes[at].verify();
    const fresh = new Node(at, choose(1 << 30));
    fresh.leadTo(some(EDGES));
    nodes[at].leadTo([]); // what others lead to keeps nothing else alive
    nodes[at] = fresh;
    nodes[choose(NODES)].leadTo([fresh, ...some(EDGES - 1)]);
    steps++;
  }
  const one = choose(buffers.length);
  buffers[one].fill(choose(256), choose(200000), 200000);
  sums[one] = digest(buffers[one]);
  if (asked) {
    asked = false;
    nodes.forEach((node) => node.verify());
    buffers.forEach((bytes, i) => { if (digest(bytes) !== sums[i]) die(`buffer ${i}`); });
    globalThis.gc();
    nodes.forEach((node) => node.verify());
    if (hashed === 0) die('the pool of threads stands still');
    fs.writeSync(1, `ok ${steps}\n`);
  }
  setTimeout(work, 1);
}
fs.writeSync(1, 'ready\n');
work();
