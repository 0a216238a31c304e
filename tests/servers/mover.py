# SPDX-License-Identifier: Apache-2.0
"""A server that moves memory elsewhere, and gives it back there: `mover.py PORT`.

GET  /health
POST /answer   the oracle's question
GET  /move     moves an area of memory to another place (mremap, MREMAP_FIXED)
GET  /drop     drops a page of it (MADV_DONTNEED); answers what is there then, and what is beside it
"""

import ctypes
import http.server
import json
import mmap
import sys

PAGE = mmap.PAGESIZE
BYTES = 256 * PAGE
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

at = libc.mmap(0x2000_0000_0000, BYTES, 3, 0x32, -1, 0)
ctypes.memset(at, ord("x"), BYTES)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        global at
        answer: dict[str, object] = {"answer": "!", "asked": "?"}
        if self.path == "/move":
            at = libc.mremap(at, BYTES, BYTES, 3, 0x3000_0000_0000)
            answer = {"at": at}
        elif self.path == "/drop":
            failed = libc.madvise(at, PAGE, mmap.MADV_DONTNEED)
            shown = [ctypes.string_at(where, 1).hex() for where in (at, at + PAGE)]
            answer = {"failed": failed, "shown": shown}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815

    def log_message(self, *arguments: object) -> None:
        pass


http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
