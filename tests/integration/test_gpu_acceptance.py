# SPDX-License-Identifier: Apache-2.0
"""hack/gpu-acceptance and hack/gpu-bundle without a GPU: the driver, NVML and the server are stand-ins."""

import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hack.gpu.features import FEATURES
from tests.conftest import PREFIX, ROOT, VLLM_BIN, wait_for
from tests.fakes import nodes
from tests.fakes.cuda import FakeCuda
from tests.fakes.nvml import FakeNvml

HACK = ROOT / "hack"


@dataclass(slots=True)
class Machine:
    """A machine with one GPU that is not there, and the output of a run of the acceptance test."""

    cuda: FakeCuda
    nvml: FakeNvml
    out: Path

    def run(self, *words: str, timeout: float = 300) -> int:
        before = orphans()
        libraries = [self.cuda.environment["LD_LIBRARY_PATH"], self.nvml.environment["LD_LIBRARY_PATH"]]
        environment = {**os.environ, **self.cuda.environment, **self.nvml.environment}
        environment |= {"LD_LIBRARY_PATH": ":".join(libraries)}
        argv = [str(HACK / "gpu-acceptance"), str(self.out), "--stand-in", "--quick"]
        done = subprocess.run(
            [*argv, "--python", sys.executable, *words],
            env=environment,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode in {0, 1, 75}, done.stderr
        assert self.leftovers() == [], done.stderr
        wait_for(lambda: not orphans() - before, 5)
        return done.returncode

    def leftovers(self) -> list[str]:
        """Return the processes of this machine that are still there."""
        wanted, found = f"FAKE_CUDA={self.cuda.environment['FAKE_CUDA']}".encode(), []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):
                    if wanted in (entry / "environ").read_bytes().split(b"\0"):
                        found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        return found

    @property
    def steps(self) -> dict[str, Any]:
        return dict(json.loads((self.out / "report.json").read_bytes())["steps"])

    @property
    def page(self) -> str:
        return (self.out / "report.md").read_text()


def orphans() -> set[Path]:
    """Return the files of the fake driver whose process is gone."""
    files = {path: path.name.partition("fake-cuda-")[2] for path in Path("/dev/shm").glob("*fake-cuda-*")}
    return {path for path, pid in files.items() if not Path("/proc", pid.partition(".")[0]).exists()}


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    for name in ("cuda", "nvml"):
        (tmp_path / name).mkdir()
    made = Machine(FakeCuda(tmp_path / "cuda"), FakeNvml(tmp_path / "nvml"), tmp_path / "out")
    made.nvml.describe(nodes.H100)
    return made


@pytest.mark.criu
@pytest.mark.timeout(300)
def test_every_step_of_the_acceptance_test_is_done(machine: Machine, tmp_path: Path) -> None:
    """In two calls, each within its limit; the second goes on where the first one ended."""
    places = set(Path("/var/tmp").iterdir())
    work = ["--work", str(tmp_path / "work")]
    began = time.monotonic()
    assert machine.run(*work, "--deadline", "22") == 75, machine.page
    assert time.monotonic() - began < 45
    first = machine.steps
    assert "unfinished" in {step["status"] for step in first.values()}
    assert machine.run(*work) == 0, machine.page
    steps = machine.steps
    skipped = {"with-" + name for name in FEATURES if not name.endswith("-parent")}
    skipped |= {"vllm-start", "vllm-snapshot", "vllm-restore", "vllm-cache", "kill"}
    expected = {name: "skipped" if name in skipped else "done" for name in steps}
    assert {name: step["status"] for name, step in steps.items()} == expected
    kept = [name for name, step in first.items() if step["status"] == "done"]
    assert kept
    assert all(steps[name] == first[name] for name in kept)
    assert steps["machine"]["gpus"][0]["name"] == nodes.H100.gpus[0].name
    assert steps["snapshot"]["cuda_pids"]
    assert len(steps["restore"]["runs"]) == 3
    assert {run["count"] for run in steps["restore"]["runs"]} == {1}
    assert "cuda" in steps["restore"]["runs"][0]["phases"]
    assert len(steps["rollback"]["cases"]) == 10
    assert all(case["answers"] and case["failed"] for case in steps["rollback"]["cases"])
    proof = steps["cache"]["runs"][0]["proof"]
    assert (proof["verdict"], proof["made"]) == ("hit", 0)
    assert proof["used"] == proof["entries"] > 0
    assert [reason["code"] for reason in steps["cache"]["reasons"]] == ["gpu-model"]
    assert set(steps["backends"]["backends"]) == {"driver", "utility"}
    assert all(len(each["runs"]) == 1 for each in steps["backends"]["backends"].values())
    assert "at most 1/10 of the cold start" in machine.page
    assert "stand-ins" in machine.page
    assert str(ROOT) not in machine.page
    assert set(Path("/var/tmp").iterdir()) <= places
    probes = [json.loads(line) for line in (machine.out / "probes.jsonl").read_text().splitlines()]
    assert {each["probe"]: each["answer"] for each in probes} == {
        "node": "driver 580.65.06, 1 GPUs",
        "nvml-only": "an initialized NVML holds no device: nothing to shut down",
        "init-only": "a process that has only called cuInit cannot be locked (3)",
        "caller": probes[3]["answer"],
        "cycle": probes[4]["answer"],
    }
    assert "is answered with 0 after" in probes[3]["answer"]
    assert "no device stayed open" in probes[4]["answer"]
    assert all(each["decides"] for each in probes)
    results = list(machine.out.iterdir())
    assert len(results) <= 8
    assert max(path.stat().st_size for path in results) <= 16 << 20


@pytest.mark.criu
def test_a_missing_backend_is_no_failure_and_a_failed_step_does_not_stop_the_others(machine: Machine) -> None:
    machine.cuda.describe(utility=False, faults=[{"step": "restore", "nth": 2, "code": 2}])
    assert machine.run("--only", "probes", "--only", "backends") == 1
    steps = machine.steps
    assert steps["snapshot"]["status"] == "failed", "its proof has run out of memory"
    assert steps["rollback"] == {
        "status": "skipped",
        "reason": "not requested, or not run yet",
        "seconds": 0.0,
    }
    assert steps["snapshot"]["reason"][:40] in machine.page
    machine.cuda.describe(utility=False)
    assert machine.run("--only", "backends") == 0
    backends = machine.steps["backends"]["backends"]
    assert "cuda-checkpoint is not on PATH" in backends["utility"]["missing"]
    assert backends["driver"]["runs"]


@pytest.mark.criu
def test_a_driver_that_cannot_checkpoint_fails_the_steps_that_need_it(machine: Machine) -> None:
    machine.cuda.describe(faults=[{"step": "checkpoint", "code": 801}])
    assert machine.run("--only", "restore", "--only", "rollback") == 1
    steps = machine.steps
    assert "CUDA_ERROR_NOT_SUPPORTED" in json.dumps(steps["snapshot"]["reason"])
    assert (steps["restore"]["status"], steps["restore"]["reason"]) == ("skipped", "needs snapshot")
    cases = steps["rollback"]["cases"]
    # A step that fails during the rollback, too, is reported, and left to `rekindle doctor --repair`.
    twice = [case for case in cases if "could not be rolled back" in case["message"]]
    assert [case["name"] for case in twice] == ["unlock fails"]
    once = [case for case in cases if case not in twice]
    assert all(case["answers"] for case in once)
    assert not any(case["failed"] for case in once if "NOT_SUPPORTED" in case["message"])


@pytest.mark.criu
def test_a_step_that_hangs_ends_with_its_call_and_has_failed_after_two(
    machine: Machine, tmp_path: Path
) -> None:
    machine.cuda.describe(faults=[{"step": "checkpoint", "hang": True}])
    words = ["--only", "snapshot", "--only", "load", "--deadline", "13", "--work", str(tmp_path / "work")]
    assert machine.run(*words) == 75
    assert "run it again with the same --work" in machine.steps["snapshot"]["reason"]
    assert machine.run(*words) == 1
    assert "not done after" in machine.steps["snapshot"]["reason"]


@pytest.mark.vllm
def test_the_gpu_kernels_compute_the_same_as_torch() -> None:
    """In Triton's interpreter, and without CUDA graphs."""
    program = """
import time, torch
from hack.gpu import decoder
model = decoder.Decoder(0.0001, time.monotonic(), quick=True, device="cpu", size=256)
first = model.answer([1, 2], 4)
assert first == model.answer([1, 2], 4)
assert first != model.answer([1, 3], 4)
state, tokens = torch.tensor([[0.0]]), []
table, layers = model._table, [each.float() for each in model._weights]
def step(token):
    state = table[token]
    for weights in layers:
        change = weights @ state
        state = state + change * torch.sigmoid(change)
        state = state / torch.sqrt((state * state).mean() + 1e-6)
    return int(torch.argmax(layers[0] @ state))
step(1)
token = step(2)
for _ in range(4):
    tokens.append(token)
    token = step(token)
assert tokens == first["tokens"], (tokens, first)
total = 0
for number, weights in enumerate(model._weights):
    words = weights.view(torch.int32).view(-1, min(decoder.CHECKED, weights.numel() // 2)).long()
    total += (number + 1) * int((words * (torch.arange(words.shape[1]) % 251 + 1)).sum())
assert total == first["checksum"]
model._weights[1][0, 0] += 1
assert model.answer([1, 2], 4)["checksum"] != total
assert [model.count(), model.count()] == [1, 2]
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    run_python(program, environment)


@pytest.mark.vllm
def test_the_gpu_kernels_compile_for_a_hopper_gpu(tmp_path: Path) -> None:
    program = """
import triton
from hack.gpu import decoder, kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
def compiled(kernel, types, constants, **options):
    names = kernel.arg_names
    signature = dict(zip(names, types + ["constexpr"] * len(constants)))
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature=signature, constexprs=values)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]
compiled(kernels.fill, ["*bf16", "i32"], {"scale": 0.05, "block": 1024})
compiled(kernels.settle, ["*fp32", "*fp32"], {"size": decoder.WIDTH})
compiled(kernels.checksum, ["*i32", "*i64"], {"block": decoder.CHECKED})
for height, width, warps in decoder.VARIANTS:
    sizes = {"size": decoder.WIDTH, "height": height, "width": width}
    compiled(kernels.project, ["*fp32", "*bf16", "*fp32"], sizes, num_warps=warps)
"""
    run_python(program, {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)})


def run_python(program: str, environment: dict[str, str]) -> None:
    done = subprocess.run(
        [str(VLLM_BIN / "python"), "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.criu
@pytest.mark.timeout(300)
def test_a_bundle_installs_without_a_network(tmp_path: Path, own_machine: tuple[int, int]) -> None:
    bundle, elsewhere, target = tmp_path / "bundle", tmp_path / "elsewhere", tmp_path / "target"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    words = [str(bundle), "--piece-mib", "8", "--python", version]
    environment = {**os.environ, "REKINDLE_PREFIX": str(PREFIX)}
    # Made with one: it downloads wheels.
    make = ["nsenter", f"--net=/proc/self/fd/{own_machine[1]}", str(HACK / "gpu-bundle"), *words]
    subprocess.run(make, env=environment, pass_fds=own_machine, check=True, timeout=250)
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    names = [piece["name"] for piece in manifest["pieces"]]
    assert len(names) > 1
    assert all((bundle / name).stat().st_size <= 8 << 20 for name in names)

    elsewhere.mkdir()
    (bundle / names[-1]).rename(elsewhere / names[-1])
    bare = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(tmp_path)}

    def unpack(*more: str) -> "subprocess.CompletedProcess[str]":
        argv = ["unshare", "--net", sys.executable, "-I", str(bundle / "unpack"), str(target), *more]
        return subprocess.run(argv, env=bare, capture_output=True, text=True, timeout=100, check=False)

    done = unpack()
    assert done.returncode == 1
    assert names[-1] in done.stderr
    assert not target.exists()
    done = unpack(str(elsewhere))
    assert done.returncode == 0, done.stderr
    made = (target / ".complete").stat().st_mtime_ns
    assert unpack(str(elsewhere)).returncode == 0
    assert (target / ".complete").stat().st_mtime_ns == made

    python = target / "source/.venv/bin/python"
    bare |= {"REKINDLE_CRIU": str(target / "criu/bin/criu"), "REKINDLE_HOME": str(tmp_path / "home")}
    doctor = [str(python), "-m", "rekindle", "doctor", "--check", "criu", "--json"]
    done = subprocess.run(doctor, cwd="/", env=bare, capture_output=True, text=True, timeout=60, check=False)
    assert json.loads(done.stdout)["ok"], done.stdout + done.stderr

    first = bundle / names[0]
    first.write_bytes(bytes([first.read_bytes()[0] ^ 1]) + first.read_bytes()[1:])
    (target / ".complete").unlink()
    assert "another sha256 digest" in unpack(str(elsewhere)).stderr
