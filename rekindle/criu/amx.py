# SPDX-License-Identifier: Apache-2.0
"""Give restored processes the permission to use AMX tiles, which CRIU does not restore.

A process must ask the OS kernel before its first tile instruction (arch_prctl(ARCH_REQ_XCOMP_PERM)). The
permission is inherited by fork, cleared by exec and unknown to CRIU 4.2.1: after a restore the first
tile instruction kills the task with SIGILL. We preload a shared object into CRIU whose initializer asks for
the permission, so that the tasks that CRIU forks inherit it.

The object is written here, byte by byte, since a node that restores need not have a compiler. It is handed to
CRIU as a descriptor: the dynamic loader splits LD_PRELOAD at blanks and colons, which paths may contain.
"""

import os
import struct
from pathlib import Path

from rekindle.errors import CapabilityError

_ASK = bytes.fromhex(
    "f30f1efa"  # endbr64
    "b89e000000"  # mov eax, 158: arch_prctl
    "bf23100000"  # mov edi, 0x1023: ARCH_REQ_XCOMP_PERM
    "be12000000"  # mov esi, 18: XFEATURE_XTILE_DATA
    "0f05"  # syscall
    "c3"  # ret
)
_PAGE_BYTES = 4096
_HEADER_BYTES, _SEGMENT_BYTES, _SYMBOL_BYTES = 64, 56, 24
_PT_LOAD, _PT_DYNAMIC, _PT_GNU_STACK = 1, 2, 0x6474E551
_EXECUTE, _WRITE, _READ = 1, 2, 4
_DT_HASH, _DT_STRTAB, _DT_SYMTAB, _DT_STRSZ, _DT_SYMENT, _DT_INIT = 4, 5, 6, 10, 11, 12
_MFD_NOEXEC_SEAL = 8  # linux/memfd.h, since 6.3; where vm.memfd_noexec is 2, none is made without it


def present() -> bool:
    """Tell whether this processor has AMX and the OS kernel lets processes use it."""
    return "amx_tile" in Path("/proc/cpuinfo").read_text().split()


def open_object() -> int:
    """Return a descriptor of the shared object, for LD_PRELOAD=/proc/self/fd/N.

    Raises CapabilityError if the OS kernel makes no file in memory.
    """
    try:
        try:
            fd = os.memfd_create("rekindle-amx", os.MFD_CLOEXEC | _MFD_NOEXEC_SEAL)
        except OSError:
            fd = os.memfd_create("rekindle-amx", os.MFD_CLOEXEC)
    except OSError as error:
        raise CapabilityError("cannot make the object that asks for AMX", cause=str(error)) from error
    os.write(fd, shared_object())
    return fd


def shared_object() -> bytes:
    """Return an ELF shared object for x86-64 whose initializer asks for AMX's permission.

    It needs no library, exports nothing and has no section. The one page of the file is mapped twice: to be
    run, and to be written, since loaders write addresses into the dynamic section (glibc before 2.35).
    """
    code = _HEADER_BYTES + 4 * _SEGMENT_BYTES
    table = code + len(_ASK) + -len(_ASK) % 8
    names = struct.pack("<4I", 1, 1, 0, 0)  # a hash table with one empty bucket, for the symbol 0
    symbols = table + len(names)
    dynamic = symbols + _SYMBOL_BYTES + 8
    entries = {
        _DT_HASH: table,
        _DT_STRTAB: symbols + _SYMBOL_BYTES,
        _DT_SYMTAB: symbols,
        _DT_STRSZ: 1,
        _DT_SYMENT: _SYMBOL_BYTES,
        _DT_INIT: code,
        0: 0,
    }
    size = dynamic + 16 * len(entries)
    segments = [
        (_PT_LOAD, _READ | _EXECUTE, 0, 0, size, _PAGE_BYTES),
        (_PT_LOAD, _READ | _WRITE, 0, _PAGE_BYTES, size, _PAGE_BYTES),
        (_PT_DYNAMIC, _READ | _WRITE, dynamic, _PAGE_BYTES + dynamic, 16 * len(entries), 8),
        (_PT_GNU_STACK, _READ | _WRITE, 0, 0, 0, 16),
    ]
    header = b"\x7fELF\2\1\1".ljust(16, b"\0") + struct.pack(  # 64 bits, little-endian, version 1
        "<HHIQQQIHHHHHH",
        *(3, 62, 1, 0),  # ET_DYN, EM_X86_64, version 1, no entry
        *(_HEADER_BYTES, 0, 0),
        *(_HEADER_BYTES, _SEGMENT_BYTES, len(segments), 0, 0, 0),
    )
    content = bytearray(size)
    content[:_HEADER_BYTES] = header
    for number, (kind, flags, offset, address, length, align) in enumerate(segments):
        struct.pack_into(
            "<IIQQQQQQ",
            content,
            _HEADER_BYTES + number * _SEGMENT_BYTES,
            *(kind, flags, offset, address, address, length, length, align),
        )
    content[code : code + len(_ASK)] = _ASK
    content[table : table + len(names)] = names
    for number, entry in enumerate(entries.items()):
        struct.pack_into("<QQ", content, dynamic + 16 * number, *entry)
    return bytes(content)
