# SPDX-License-Identifier: Apache-2.0
"""Read an untrusted gzip-compressed tar archive: strictly, streamed, and hashed while it is read.

Only what a cache needs is accepted: regular files and directories with POSIX pax headers. Refused are links,
devices, sparse files, GNU's long names, global headers, a second gzip member, and bytes after the end.
"""

import hashlib
import re
import tarfile
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from msgspec import Struct

from oci.descriptor import Blobs, Descriptor, open_verified
from rekindle.digest import Digest
from rekindle.errors import FormatError, IntegrityError

if TYPE_CHECKING:
    from concurrent.futures import Executor, Future

_READ_BYTES = 256 << 10
_INFLATED_BYTES = 1 << 20
_BLOCK_BYTES = 512
_PAX_LIMIT_BYTES = 64 << 10
_SIZE_LIMIT_BYTES = 1 << 43
# The keys that pax headers may have. Owners and extended attributes, such as SELinux's label, are ignored.
_PAX_IGNORED = b"SCHILY.xattr."
_PAX_KEYS = {b"path", b"size", b"mtime", b"atime", b"ctime", b"uid", b"gid", b"uname", b"gname"}
_PAX_LENGTH = re.compile(rb"([1-9][0-9]{0,5}) ")
_PAX_TIME = re.compile(rb"([0-9]{1,11})(?:\.([0-9]{1,9})[0-9]*)?")
_PAX_SIZE = re.compile(rb"[0-9]{1,14}")


class Member(Struct, frozen=True, kw_only=True):
    """A file or directory of an archive. The name is unchanged, but for the final slash of a directory."""

    name: str
    is_directory: bool
    size: int
    mode: int
    mtime_ns: int


class LayerReader:
    """The archive in a layer. The content of a file must be read before the next member.

    With a pool, the next piece is received, hashed and inflated while the caller handles the current one.
    """

    def __init__(
        self, blobs: Blobs, layer: Descriptor, *, limit_bytes: int, pool: "Executor | None" = None
    ) -> None:
        self._layer = layer
        self._pool = pool
        self._ahead: Future[bytes] | None = None
        self._stream = open_verified(blobs, layer, kind="layer")
        self._raw = hashlib.sha256()
        self._raw_left = limit_bytes
        self._inflater = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
        self._input = b""
        self._ready = memoryview(b"")
        self._buffer = memoryview(bytearray(_READ_BYTES))

    def close(self) -> None:
        """Wait for the piece that is being read, and close the stream."""
        self._settle()
        self._stream.close()

    def members(self) -> Iterator[Member]:
        """Yield the members. Raises FormatError if the archive is malformed."""
        while any(block := self._exactly(_BLOCK_BYTES)):
            pax: dict[bytes, bytes] = {}
            info = _header(block)
            if info.type == tarfile.XHDTYPE:
                if not 0 < info.size <= _PAX_LIMIT_BYTES:
                    raise FormatError("the layer has a pax header of an invalid size")
                pax = _pax(self._exactly(info.size))
                self._skip_padding(info.size)
                info = _header(self._exactly(_BLOCK_BYTES))
            yield _member(info, pax)
        if any(self._exactly(_BLOCK_BYTES)):
            raise FormatError("the layer's archive does not end with two zero blocks")
        while len(rest := self._some(_INFLATED_BYTES)):
            if any(rest):
                raise FormatError("the layer has bytes after the end of its archive")

    def content(self, size: int) -> Iterator[memoryview]:
        """Yield the content of the file that `members` yielded last, in pieces. Must be read to the end."""
        left = size
        while left:
            piece = self._some(left)
            if not piece:
                raise FormatError("the layer ends in the middle of a file")
            left -= len(piece)
            yield piece
        self._skip_padding(size)

    def finish(self, diff_id: Digest) -> None:
        """Finish after the last member. Raises IntegrityError unless all bytes match their digests."""
        self._settle()
        if not self._inflater.eof:
            raise FormatError("the layer's gzip stream has no end")
        if self._inflater.unused_data or self._input or self._stream.left:
            raise FormatError("the layer has bytes after its gzip stream")
        self._stream.finish()
        if Digest.of_hash(self._raw) != diff_id:
            raise IntegrityError(f"the content of layer {self._layer.digest} does not match its diff_id")

    def verdict(self, error: FormatError) -> FormatError:
        """Return the error for a malformed layer.

        Raises IntegrityError instead if its bytes do not match its digest, which is the usual reason and can
        be told only after reading all of them.
        """
        self._settle()
        self._stream.finish()
        return error

    def _skip_padding(self, size: int) -> None:
        if any(self._exactly(-size % _BLOCK_BYTES)):
            raise FormatError("the layer has bytes between its files")

    def _exactly(self, size: int) -> bytes:
        out = bytearray()
        while len(out) < size:
            piece = self._some(size - len(out))
            if not piece:
                raise FormatError("the layer's archive ends too early")
            out += piece
        return bytes(out)

    def _some(self, at_most: int) -> memoryview:
        """Return some bytes of the archive; none at its end."""
        if not self._ready:
            self._inflate()
        piece, self._ready = self._ready[:at_most], self._ready[at_most:]
        return piece

    def _inflate(self) -> None:
        ahead, self._ahead = self._ahead, None
        piece = ahead.result() if ahead is not None else self._next_piece()
        if piece and self._pool is not None:
            self._ahead = self._pool.submit(self._next_piece)
        self._ready = memoryview(piece)

    def _settle(self) -> None:
        """Wait until no other thread uses the stream."""
        if self._ahead is not None:
            self._ahead.cancel()
            if not self._ahead.cancelled():
                self._ahead.exception()
            self._ahead = None

    def _next_piece(self) -> bytes:
        """Return up to 1 MiB of the archive; nothing at its end."""
        while not self._inflater.eof:
            if not self._input:
                count = self._stream.readinto(self._buffer)
                if not count:
                    raise FormatError("the layer's gzip stream ends too early")
                self._input = bytes(self._buffer[:count])
            try:
                out = self._inflater.decompress(self._input, _INFLATED_BYTES)
            except zlib.error as error:
                raise FormatError("the layer is not gzip-compressed", cause=str(error)) from None
            self._input = self._inflater.unconsumed_tail
            self._raw_left -= len(out)
            if self._raw_left < 0:
                raise FormatError(
                    f"layer {self._layer.digest} expands beyond the limits",
                    hint="if that is right, raise `expansion_ratio` in [limits] of the configuration",
                )
            if out:
                self._raw.update(out)
                return out
        return b""


def _header(block: bytes) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise FormatError("the layer has a malformed tar header", cause=str(error)) from None


def _pax(content: bytes) -> dict[bytes, bytes]:
    """Parse the records of a pax header, each of the form `LENGTH KEY=VALUE` and a line feed."""
    out: dict[bytes, bytes] = {}
    while content:
        match = _PAX_LENGTH.match(content)
        length = int(match[1]) if match else 0
        record = content[:length]
        if not match or len(record) != length or not record.endswith(b"\n") or length <= match.end():
            raise FormatError("the layer has a malformed pax header")
        key, equals, value = record[match.end() : -1].partition(b"=")
        known = key in _PAX_KEYS or key.startswith(_PAX_IGNORED)
        if not equals or not known or key in out:
            raise FormatError("the layer has an unsupported pax header", cause=f"{key!r:.80}")
        out[key] = value
        content = content[length:]
    return out


def _member(info: tarfile.TarInfo, pax: dict[bytes, bytes]) -> Member:
    is_directory = info.type == tarfile.DIRTYPE
    if not is_directory and info.type not in {tarfile.REGTYPE, tarfile.AREGTYPE}:
        raise FormatError(
            "the layer has a member that is neither a file nor a directory",
            cause=f"{info.name!r:.120} is of type {info.type!r}",
        )
    name, size, mtime_ns = info.name, info.size, int(info.mtime) * 1_000_000_000
    if b"path" in pax:
        try:
            name = pax[b"path"].decode()
        except ValueError as error:
            raise FormatError("the layer has a name that is not UTF-8", cause=str(error)) from None
        if is_directory:
            name = name.removesuffix("/")
    if b"size" in pax:
        if not _PAX_SIZE.fullmatch(pax[b"size"]):
            raise FormatError("the layer has a malformed pax header")
        size = int(pax[b"size"])
    if b"mtime" in pax:
        if not (time := _PAX_TIME.fullmatch(pax[b"mtime"])):
            raise FormatError("the layer has a malformed pax header", cause=f"{pax[b'mtime']!r:.80}")
        mtime_ns = int(time[1]) * 1_000_000_000 + int((time[2] or b"").ljust(9, b"0"))
    if not 0 <= size <= _SIZE_LIMIT_BYTES or (is_directory and size) or info.linkname:
        raise FormatError("the layer has an invalid tar header", cause=f"{name!r:.120}")
    return Member(
        name=name,
        is_directory=is_directory,
        size=size,
        mode=info.mode & 0o755,  # other users must not change what a server will run
        mtime_ns=min(max(mtime_ns, 0), 1 << 62),
    )
