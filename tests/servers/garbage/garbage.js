// SPDX-License-Identifier: Apache-2.0
// Does in Node.js what garbage.go does in Go: node --expose-gc garbage.js PORT
const http = require('http');

const SLOTS = 64, ROUNDS = 400;
const held = Array.from({ length: SLOTS }, () => new Uint8Array(0));
const small = new Map();
let seed = 1, bad = 0;

function next(limit) {
  seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
  return (seed >>> 8) % limit;
}

function work() {
  for (let i = 0; i < ROUNDS; i++) {
    const slot = next(SLOTS);
    const old = held[slot];
    for (let at = 0; at < old.length; at++) if (old[at] !== ((slot + at) & 255)) bad++;
    const made = new Uint8Array(next(1 << (8 + next(13))));
    for (let at = 0; at < made.length; at++) {
      if (made[at] !== 0) bad++;
      made[at] = slot + at;
    }
    held[slot] = made;
    small.set(next(5000), `value ${i}`);
  }
  global.gc();
  const bytes = held.reduce((sum, each) => sum + each.length, 0);
  return `{"bytes": ${bytes}, "strings": ${small.size}, "seed": ${seed}, "bad": ${bad}}`;
}

work();
http.createServer((request, response) => {
  switch (request.url) {
    case '/answer': return response.end('{"answer": "!", "asked": "?"}');
    case '/work': return response.end(work());
    default: return response.end();
  }
}).listen(Number(process.argv[2]), '127.0.0.1');
