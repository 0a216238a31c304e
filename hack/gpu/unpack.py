#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Unpacks a bundle of hack/gpu-bundle and installs it, without a network.

    unpack TARGET [DIR…]        pieces that are not beside this file are looked for in the directories

To be run by the Python that has torch and Triton, 3.11 or newer: the server will be, too. Nothing is done if
the same bundle is installed in TARGET already; an interrupted run is begun anew.

    TARGET/gpu-acceptance       the acceptance; takes what hack/gpu-acceptance takes
    TARGET/source/.venv         rekindle's own environment, which sees nothing of the machine's
    TARGET/server               only if the bundle brings wheels for it: an environment above the machine's
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
        raise SystemExit(f"unpack: {manifest['schema']} is not known here")
    mark, stamp = target / ".complete", f"{hashlib.sha256(content).hexdigest()} {sys.executable}\n"
    if not (mark.exists() and mark.read_text() == stamp):
        paths = [find(piece, [here, *map(Path, words[1:])]) for piece in manifest["pieces"]]
        if target.exists():
            if not (target / ".bundle").exists() and any(target.iterdir()):
                raise SystemExit(f"unpack: {target} is there, and holds something else")
            shutil.rmtree(target)
        target.mkdir(parents=True)
        (target / ".bundle").touch()
        joined = io.BufferedReader(Joined(paths))
        with joined, tarfile.open(fileobj=joined, mode="r|gz") as archive:
            # Older Pythons have no filters. The bytes are those of the manifest.
            archive.extraction_filter = getattr(tarfile, "data_filter", None)
            archive.extractall(target)  # noqa: S202
        install(target)
        mark.write_text(stamp)
    print(f"{target}/gpu-acceptance OUT")


def find(piece: dict[str, str], directories: list[Path]) -> Path:
    """Where a piece lies; its bytes are those that the manifest tells of."""
    for directory in directories:
        path = directory / piece["name"]
        if path.exists():
            with open(path, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == piece["sha256"]:
                    return path
            print(f"unpack: {path} has another sha256 sum", file=sys.stderr)
    raise SystemExit(f"unpack: there is no {piece['name']} with the sha256 sum {piece['sha256']}")


class Joined(io.RawIOBase):
    """Files one after the other, to be read as one."""

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
    """rekindle's environment, the server's, and what starts the acceptance."""
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
        # The machine's Python may be in an environment itself, which one above it would pass over.
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
    # Debian has Python without ensurepip; pip comes along.
    call(sys.executable, "-m", "venv", "--without-pip", *options, str(directory))
    return directory / "bin/python"


def pip(python: Path, wheels: Path, found: Path, *words: str) -> None:
    """Runs the pip of the bundle, from its wheel, without any index."""
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
        raise SystemExit(f"unpack: {shlex.join(argv)} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    return done.stdout


if __name__ == "__main__":
    main(sys.argv[1:])
