#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Unpack a bundle of hack/gpu-bundle and install it, without a network.

    unpack TARGET [DIR…]        look for pieces beside this file, then in the directories

Run it with the Python (3.11 or newer) that has torch and Triton; the server will run with it, too. If TARGET
holds the same bundle already, nothing is done. An interrupted run starts again.

    TARGET/gpu-acceptance       the command; takes the options of hack/gpu-acceptance
    TARGET/source/.venv         rekindle's environment, isolated from the machine's packages
    TARGET/server               the server's environment above the machine's, if the bundle has wheels for it
"""

import hashlib
import io
import json
import shlex
import shutil
import site
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from typing import Any

SCHEMA = "rekindle.gpu-bundle/1"
_SECONDS = 900


def main(words: list[str]) -> None:
    if not words:
        raise SystemExit(__doc__)
    here, target = Path(__file__).resolve().parent, Path(words[0]).resolve()
    content = (here / "manifest.json").read_bytes()
    manifest = json.loads(content)
    if manifest["schema"] != SCHEMA:
        raise SystemExit(f"unpack: unknown schema {manifest['schema']}")
    mark, stamp = target / ".complete", f"{hashlib.sha256(content).hexdigest()} {sys.executable}\n"
    if not (mark.exists() and mark.read_text() == stamp):
        paths = [find(piece, [here, *map(Path, words[1:])]) for piece in manifest["pieces"]]
        if target.exists():
            if not (target / ".bundle").exists() and any(target.iterdir()):
                raise SystemExit(f"unpack: {target} exists and is not an unpacked bundle")
            shutil.rmtree(target)
        target.mkdir(parents=True)
        (target / ".bundle").touch()
        joined = io.BufferedReader(Joined(paths))
        with joined, tarfile.open(fileobj=joined, mode="r|gz") as archive:
            # Early releases of 3.11 have no filters. The manifest vouches for the bytes.
            archive.extraction_filter = getattr(tarfile, "data_filter", None)
            archive.extractall(target)  # noqa: S202
        install(target)
        mark.write_text(stamp)
    print(f"{target}/gpu-acceptance OUT")


def find(piece: dict[str, str], directories: list[Path]) -> Path:
    """Return the path of a piece with the digest of the manifest."""
    for directory in directories:
        path = directory / piece["name"]
        if path.exists():
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == piece["sha256"]:
                    return path
            print(f"unpack: {path} has another sha256 digest", file=sys.stderr)
    raise SystemExit(f"unpack: no {piece['name']} with the sha256 digest {piece['sha256']}")


class Joined(io.RawIOBase):
    """Several files as one stream."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = list(paths)
        self._file: io.FileIO | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self._file or self._paths:
            self._file = self._file or io.FileIO(self._paths.pop(0))
            if count := self._file.readinto(buffer):
                return count
            self._file.close()
            self._file = None
        return 0


def install(target: Path) -> None:
    """Create rekindle's environment, the server's, and the command that starts the test."""
    source, wheels = target / "source", target / "wheels"
    with open(source / "pyproject.toml", "rb") as file:
        needed = tomllib.load(file)["project"]["dependencies"]
    python = environment(source / ".venv")
    pip(python, wheels, wheels, *needed)
    packages = directory_of_packages(python)
    (packages / "rekindle-source.pth").write_text(f"{source}\n")
    server = Path(sys.executable)
    if (target / "server-wheels").exists():
        server = environment(target / "server", "--system-site-packages")
        # If the machine's Python is in an environment itself, one above it would not see its packages.
        theirs = [path for path in site.getsitepackages() if Path(path).is_dir()]
        lines = [f"import site; site.addsitedir({path!r})\n" for path in theirs]
        (directory_of_packages(server) / "machine.pth").write_text("".join(lines))
        pip(
            server,
            wheels,
            target / "server-wheels",
            "--no-deps",
            *map(str, (target / "server-wheels").iterdir()),
        )
    start = target / "gpu-acceptance"
    start.write_text(
        "#!/bin/sh\n"
        f"export REKINDLE_CRIU={shlex.quote(str(target / 'criu/bin/criu'))}\n"
        f"export SERVER_PYTHON=${{SERVER_PYTHON:-{shlex.quote(str(server))}}}\n"
        f'exec {shlex.quote(str(source / "hack/gpu-acceptance"))} "$@"\n'
    )
    start.chmod(0o755)
    call(str(start), "--help")


def environment(directory: Path, *options: str) -> Path:
    # Debian's Python may have no ensurepip; pip is in the bundle.
    call(sys.executable, "-m", "venv", "--without-pip", *options, str(directory))
    return directory / "bin/python"


def pip(python: Path, wheels: Path, found: Path, *words: str) -> None:
    """Run pip from its wheel in the bundle, without an index."""
    (wheel,) = wheels.glob("pip-*.whl")
    options = ["--isolated", "--disable-pip-version-check", "--no-cache-dir"]
    call(str(python), f"{wheel}/pip", *options, "install", "--no-index", "--find-links", str(found), *words)


def directory_of_packages(python: Path) -> Path:
    return Path(call(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())


def call(*argv: str) -> str:
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_SECONDS,
        check=False,
    )
    if done.returncode:
        raise SystemExit(
            f"unpack: {shlex.join(argv)} exited with status {done.returncode}:\n{done.stdout[-3000:]}"
        )
    return done.stdout


if __name__ == "__main__":
    main(sys.argv[1:])
