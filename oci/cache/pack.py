# SPDX-License-Identifier: Apache-2.0
"""Pack kernel caches into layers, with an inventory of what is in them."""

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from msgspec import Struct, field, structs

from oci import media_types
from oci.cache.inventory import (
    ENTRIES_LIMIT,
    FIELD,
    METADATA_LIMIT_BYTES,
    ROOTS_LIMIT,
    Entry,
    Inventory,
    Metadata,
    StoredRoot,
    Target,
    bounded,
    depends_on,
    entry_key,
)
from oci.cache.mcv import Survey
from oci.cache.names import Names
from oci.cache.secret_search import SEARCHED_BYTES, refuse_secrets
from oci.descriptor import Descriptor, platform_of
from rekindle import __version__
from rekindle.digest import Digest
from rekindle.engine.caches import CacheKind, CacheRoot, is_left_out
from rekindle.errors import IntegrityError, UsageError
from rekindle.fields import JSON

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from oci.cache.gzip_tar import GzipTar
    from oci.layout import Layout


_CONFIG_LIMIT_BYTES = (4 << 20) - (256 << 10)  # containers/image reads 4 MiB
_READ_BYTES = 1 << 20


class _Member(Struct, frozen=True, kw_only=True):
    path: PurePosixPath  # within the root
    status: os.stat_result


class _Planned(Struct, frozen=True, kw_only=True):
    root: CacheRoot
    prefix: str
    members: Sequence[_Member]


class _Gathering(Struct):
    """An entry of the inventory while its files are read."""

    files: int = 0
    bytes: int = 0
    metadata: Metadata = field(default_factory=Metadata)
    hasher: "hashlib._Hash" = field(default_factory=hashlib.sha256)


def pack(
    roots: Sequence[CacheRoot],
    layout: "Layout",
    *,
    created: str,
    architecture: str = "",
    targets: Sequence[Target] = (),
    versions: Mapping[str, str] | None = None,
    workers: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> Descriptor:
    """Write caches as an image into a layout; return the descriptor of its manifest, which has no tag yet.

    Equal trees with equal times and modes give equal bytes. `targets` is the hardware of caches that do not
    tell; `versions` are those of the packages that made them, where known; `architecture` is that of the
    machine, as `uname -m` prints it, if it is not this one. `say` is called with what is left out. Takes
    about 20 MiB of memory, whatever the size.

    Raises UsageError if there is nothing to pack, SecretError if a cache holds a credential, IntegrityError
    if a file changes while it is packed.
    """
    from concurrent.futures import ThreadPoolExecutor

    planned = _plan(roots, say)
    if not planned:
        raise UsageError("there is no kernel cache to pack")
    if len(planned) > ROOTS_LIMIT:
        raise UsageError(f"{len(planned)} kernel caches are more than an image can hold ({ROOTS_LIMIT})")
    workers = workers or len(os.sched_getaffinity(0))
    machine = architecture or os.uname().machine
    read_by_mcv = planned[-1].prefix.count("/") == 0
    survey = Survey(kind=planned[-1].root.kind) if read_by_mcv else None
    layers: list[Descriptor] = []
    diff_ids: list[Digest] = []
    stored: list[StoredRoot] = []
    with ThreadPoolExecutor(workers) as pool:
        for number, each in enumerate(planned):
            last = survey if number == len(planned) - 1 else None
            known = {
                name: versions[name] for name in depends_on(each.root.kind) if versions and name in versions
            }
            layer, diff_id, root = _write_layer(each, number, layout, pool, workers, last, machine, known)
            layers.append(layer)
            diff_ids.append(diff_id)
            stored.append(root)
    inventory = Inventory(made_by=f"rekindle {__version__}", roots=_shortened(stored))
    platform = platform_of(architecture or os.uname().machine)
    labels: dict[str, str] = {}
    if survey is not None:
        extra = sum(root.bytes for root in stored if root.prefix.startswith(survey.top + "/"))
        kernels = [target for target in inventory.targets if target.backend != "cpu"]
        labels = survey.labels(stored, kernels or list(targets), extra)
    config = layout.put(
        _config(created, platform, labels, diff_ids, stored, inventory), media_types.IMAGE_CONFIG
    )
    named = structs.replace(config, annotations={media_types.TITLE: "config.json"})
    manifest = {
        "schemaVersion": 2,
        "mediaType": media_types.MANIFEST,
        "config": named.to_json(),
        "layers": [layer.to_json() for layer in layers],
        "annotations": {"org.opencontainers.image.created": created},
    }
    descriptor = layout.put(json.dumps(manifest, indent=1).encode(), media_types.MANIFEST)
    return structs.replace(
        descriptor, annotations={media_types.ROLE: media_types.CACHE_ROLE}, platform=platform
    )


def _plan(roots: Sequence[CacheRoot], say: Callable[[str], None]) -> list[_Planned]:
    """Choose the place of each cache. The one that MCV reads is last: older MCVs read the last layer only."""
    found = [(root, members) for root in roots if (members := list(_members(root, say)))]
    found = [(root, members) for root, members in found if any(_is_file(member) for member in members)]
    # A server that compiled nothing leaves only model infos, which are of no use to MCV.
    kinds = [root.kind for root, members in found if root.kind is not CacheKind.VLLM or _compiled(members)]
    read = next((kind for kind in (CacheKind.VLLM, CacheKind.TRITON) if kind in kinds), None)
    first = next(
        (
            number
            for number, (root, members) in enumerate(found)
            if root.kind is read and (read is not CacheKind.VLLM or _compiled(members))
        ),
        -1,
    )
    base = "io.vllm.cache" if read is CacheKind.VLLM else "io.rekindle.cache"
    # The names at the top of vLLM's own cache are taken.
    taken = {str(member.path) for member in found[first][1]} if read is CacheKind.VLLM else set()
    planned: list[_Planned] = []
    for number, (root, members) in enumerate(found):
        if number == first:
            continue
        count = 2 if root.kind == read else 1
        while (name := root.kind if count == 1 else f"{root.kind}-{count}") in taken:
            count += 1
        taken.add(name)
        planned.append(_Planned(root=root, prefix=f"{base}/{name}", members=members))
    if read is not None:
        planned.append(_Planned(root=found[first][0], prefix=f"io.{read}.cache", members=found[first][1]))
    return planned


def _compiled(members: Sequence[_Member]) -> bool:
    return any(member.path.parts[0] == "torch_compile_cache" for member in members)


def _members(root: CacheRoot, say: Callable[[str], None]) -> Iterator[_Member]:
    """Yield the directories and files of a cache: directories before their content, names sorted by bytes."""
    names = Names()
    queue = [PurePosixPath()]
    while queue:
        path = queue.pop()
        status = (root.path / path).lstat() if path.parts else root.path.stat()
        if path.parts:
            if is_left_out(root.kind, path):
                continue
            is_directory = stat.S_ISDIR(status.st_mode)
            if not is_directory and not stat.S_ISREG(status.st_mode):
                say(f"left out of the {root.kind} cache: {path} is neither a file nor a directory")
                continue
            if reason := names.problem(path):
                say(f"left out of the {root.kind} cache: {path} {reason}")
                continue
            yield _Member(path=path, status=status)
            if not is_directory:
                continue
        with os.scandir(root.path / path) as entries:
            inner = sorted((os.fsencode(entry.name) for entry in entries), reverse=True)
        queue += [path / os.fsdecode(name) for name in inner]


def _is_file(member: _Member) -> bool:
    return stat.S_ISREG(member.status.st_mode)


def _write_layer(
    planned: _Planned,
    number: int,
    layout: "Layout",
    pool: "Executor",
    workers: int,
    survey: Survey | None,
    machine: str,
    versions: Mapping[str, str],
) -> tuple[Descriptor, Digest, StoredRoot]:
    from oci.cache.gzip_tar import GzipTar

    root = planned.root
    gathered: dict[str, _Gathering] = {}
    with layout.staging() as (staged, blob):
        tar = GzipTar(staged.write, pool, workers=workers)
        prefix = PurePosixPath(planned.prefix)
        for parent in (*reversed(prefix.parents[:-1]), prefix):
            tar.add_directory(parent, mode=0o755, mtime_ns=0)
        for member in planned.members:
            if _is_file(member):
                entry = gathered.setdefault(entry_key(root.kind, member.path), _Gathering())
                _add_file(tar, root, prefix, member, entry, survey)
                entry.metadata.look_at_name(root.kind, member.path, root.recorded, machine)
            else:
                status = member.status
                tar.add_directory(prefix / member.path, mode=status.st_mode, mtime_ns=status.st_mtime_ns)
        if survey is not None:
            content = survey.manifest()
            path = PurePosixPath(survey.manifest_path)
            tar.add_directory(path.parent, mode=0o755, mtime_ns=0)
            tar.begin_file(path, size=len(content), mode=0o644, mtime_ns=0)
            tar.add_content(content)
            tar.end_file(len(content))
        digest, diff_id = tar.finish()
        blob(digest)
    stored = StoredRoot(
        kind=root.kind,
        recorded=root.recorded,
        prefix=planned.prefix,
        layer=number,
        files=sum(entry.files for entry in gathered.values()),
        bytes=sum(entry.bytes for entry in gathered.values()),
        entries=[_entry(key, entry, versions) for key, entry in sorted(gathered.items())],
    )
    layer = Descriptor(
        media_type=media_types.TAR_GZIP_LAYER,
        digest=digest,
        size=tar.size,
        annotations={media_types.TITLE: f"{stored.name}.tar.gz"},
    )
    return layer, diff_id, stored


def _entry(key: str, gathered: _Gathering, versions: Mapping[str, str]) -> Entry:
    return Entry(
        key=key,
        targets=sorted(gathered.metadata.targets)[:ROOTS_LIMIT],
        versions=dict(sorted({**versions, **gathered.metadata.versions}.items())),
        files=gathered.files,
        bytes=gathered.bytes,
        digest=Digest.of_hash(gathered.hasher),
    )


def _add_file(
    tar: "GzipTar",
    root: CacheRoot,
    prefix: PurePosixPath,
    member: _Member,
    entry: _Gathering,
    survey: Survey | None,
) -> None:
    path = member.path
    fd = os.open(root.path / path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb", buffering=0) as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise IntegrityError(f"{root.path / path} changed while it was packed")
        size = status.st_size
        begin = _read(file.readinto, min(size, SEARCHED_BYTES))
        refuse_secrets(path, begin)
        is_json = path.suffix == ".json" and size <= METADATA_LIMIT_BYTES
        if is_json:
            entry.metadata.look_at_json(path, begin)
        if survey is not None:
            survey.look_at(path, size, begin if is_json else None)
        tar.begin_file(prefix / path, size=size, mode=status.st_mode, mtime_ns=status.st_mtime_ns)
        entry.files += 1
        entry.bytes += size
        entry.hasher.update(f"{path}\0{size}\0".encode())
        left = size
        content = begin
        while True:
            left -= len(content)
            entry.hasher.update(content)
            tar.add_content(content)
            if left <= 0:
                break
            content = _read(file.readinto, min(left, _READ_BYTES))
            if not content:
                raise IntegrityError(f"{root.path / path} changed while it was packed")
        tar.end_file(size)


def _read(readinto: Callable[[memoryview], int | None], size: int) -> bytes:
    """Return `size` bytes, or fewer at the end of the file."""
    buffer = bytearray(size)
    view = memoryview(buffer)
    count = 0
    while count < size and (got := readinto(view[count:])):
        count += got
    return bytes(view[:count])


def _shortened(roots: Sequence[StoredRoot]) -> list[StoredRoot]:
    at_most = ENTRIES_LIMIT // len(roots)
    return [structs.replace(root, entries=bounded(root.entries, at_most)) for root in roots]


def _config(
    created: str,
    platform: Mapping[str, str],
    labels: Mapping[str, str],
    diff_ids: Sequence[Digest],
    roots: Sequence[StoredRoot],
    inventory: Inventory,
) -> bytes:
    """Return the image's config (image specification 1.1). Readers ignore fields they do not know."""
    document: dict[str, JSON] = {
        "created": created,
        **platform,
        "config": {"Labels": dict(sorted(labels.items()))},
        "rootfs": {"type": "layers", "diff_ids": list(diff_ids)},
        "history": [
            {"created": created, "created_by": f"rekindle: the {root.kind} cache of {root.recorded}"}
            for root in roots
        ],
        FIELD: inventory.to_json(),
    }
    content = json.dumps(document, separators=(",", ":")).encode()
    if len(content) > _CONFIG_LIMIT_BYTES:
        fewer = [structs.replace(root, entries=bounded(root.entries, 1)) for root in roots]
        document[FIELD] = structs.replace(inventory, roots=fewer).to_json()
        content = json.dumps(document, separators=(",", ":")).encode()
    return content
