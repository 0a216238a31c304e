# SPDX-License-Identifier: Apache-2.0
"""Virtual environments, with as much in them as the search for packages looks at."""

from pathlib import Path


def executable(path: Path, content: str = "\x7fELF") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    path.chmod(0o755)
    return path


def install(directory: Path, *names: str) -> Path:
    """Distributions, as far as they are looked at."""
    for name in names:
        (directory / f"{name}.dist-info").mkdir(parents=True)
    return directory


def python_at(prefix: Path, version: str = "3.11") -> Path:
    """An interpreter as distributions have it: links, up to one that says its version."""
    executable(prefix / "bin" / f"python{version}")
    for name, target in [("python3", f"python{version}"), ("python", "python3")]:
        (prefix / "bin" / name).symlink_to(target)
    return prefix / "bin" / "python"


def site(prefix: Path, version: str = "3.11") -> Path:
    return prefix / "lib" / f"python{version}" / "site-packages"


def venv_at(prefix: Path, base: Path, *, system: bool | None = False, extra: str = "") -> Path:
    """A virtual environment whose interpreter is a link to that of `base`."""
    (prefix / "bin").mkdir(parents=True)
    python = prefix / "bin" / "python"
    python.symlink_to(base / "bin" / "python3.11")
    include = "" if system is None else f"include-system-site-packages = {str(system).lower()}\n"
    (prefix / "pyvenv.cfg").write_text(f"home = {base / 'bin'}\n{include}{extra}")
    return python
