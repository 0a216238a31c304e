// SPDX-License-Identifier: Apache-2.0
// A server in Node.js: alone, or `cluster` with two workers that share the port.
const cluster = require('cluster');
const http = require('http');

const [port, kind] = process.argv.slice(2);
if (kind === 'cluster' && cluster.isPrimary) {
  cluster.fork();
  cluster.fork();
} else {
  http
    .createServer((request, response) => {
      response.setHeader('Content-Type', 'application/json');
      response.end(JSON.stringify(request.url === '/answer' ? { answer: 42 } : { ok: true, pid: process.pid }));
    })
    .listen(Number(port), '127.0.0.1');
}
