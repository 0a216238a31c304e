# SPDX-License-Identifier: Apache-2.0
"""A program that may not make some system calls: `filtered.py unshare,bpf PROGRAM WORDS…`."""

import ctypes
import errno
import os
import platform
import struct
import sys

NUMBERS = {
    "x86_64": {
        "unshare": 272,
        "keyctl": 250,
        "kexec_load": 246,
        "open_by_handle_at": 304,
        "bpf": 321,
        "userfaultfd": 323,
    },
    "aarch64": {
        "unshare": 97,
        "keyctl": 219,
        "kexec_load": 104,
        "open_by_handle_at": 265,
        "bpf": 280,
        "userfaultfd": 282,
    },
}[platform.machine()]
PR_SET_SECCOMP, MODE_FILTER = 22, 2
LOAD, JUMP_IF_EQUAL, RETURN, ALLOW, ERROR = 0x20, 0x15, 0x06, 0x7FFF0000, 0x00050000


def main() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    instructions = [(LOAD, 0, 0, 0)]
    for name in sys.argv[1].split(","):
        instructions += [(JUMP_IF_EQUAL, 0, 1, NUMBERS[name]), (RETURN, 0, 0, ERROR | errno.EPERM)]
    instructions.append((RETURN, 0, 0, ALLOW))
    program = b"".join(struct.pack("HBBI", *instruction) for instruction in instructions)
    code = ctypes.create_string_buffer(program)
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    assert libc.prctl(PR_SET_SECCOMP, MODE_FILTER, header, 0, 0) == 0
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
