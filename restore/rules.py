# SPDX-License-Identifier: Apache-2.0
"""The rules by which nodes are compared: what a difference in each field means, and for which rung.

Every rule has a code, is hard (it forbids the rung) or soft (it is told), and a policy may make it the other
unless it is fixed. docs/matching.md is generated from here by hack/matching_page.py.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from rekindle.errors import UsageError
from rekindle.report import Reason, Rung


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What a field's difference means: `why`, where that is said (`source`), and what to do (`advice`)."""

    rung: Rung
    hard: bool
    why: str
    source: str
    advice: str
    fixed: bool = False


_CUDA_DOCS = "NVIDIA cuda-checkpoint, README"
_CRIU_DOCS = "CRIU wiki, CPU and file checks"
_OURS = "measured: docs/measurements.md"

RULES: Mapping[str, Rule] = {
    "architecture": Rule(
        rung=Rung.PROCESS,
        hard=True,
        fixed=True,
        why="A process is machine code and registers.",
        source="ELF and kernel ABI",
        advice="make a snapshot on this architecture",
    ),
    "page-size": Rule(
        rung=Rung.PROCESS,
        hard=True,
        fixed=True,
        why="CRIU writes and maps memory in pages.",
        source=_CRIU_DOCS,
        advice="boot a kernel with pages of the recorded size",
    ),
    "cpu-feature": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="Libraries choose their code by the features that they find when they start, and never look "
        "again: an instruction that is missing here kills the process. More features than recorded do no "
        "harm.",
        source="glibc's indirect functions; oneDNN's and MKL's dispatch",
        advice="make the snapshot on the oldest processor of the fleet, or another for this kind of node",
    ),
    "cpu-vendor": Rule(
        rung=Rung.PROCESS,
        hard=False,
        why="The features decide; but what a library tuned to one vendor it goes on using.",
        source="oneDNN's and MKL's dispatch",
        advice="expect the speed of code that was chosen for the other processor",
    ),
    "xsave": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="The registers of every thread are saved in the form of XSAVE: a state that this processor lacks "
        "cannot be loaded.",
        source="Intel SDM volume 1, chapter 13; CRIU's cpuinfo check",
        advice="make the snapshot on a processor without that state, or with it disabled",
    ),
    "kernel": Rule(
        rung=Rung.PROCESS,
        hard=False,
        why="Newer kernels keep what older ones promised to processes.",
        source="Linux's rule of a stable user space interface",
        advice="nothing is to be done",
    ),
    "kernel-older": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="The process may use what it found when it started and what an older kernel lacks.",
        source="system calls are tried once and remembered: glibc, uvloop, Python",
        advice="update this node's kernel, or make the snapshot on the oldest of the fleet",
    ),
    "libc": Rule(
        rung=Rung.PROCESS,
        hard=False,
        why="What the process has of it is a mapped file, which is compared by itself.",
        source="rule rootfs-file",
        advice="nothing is to be done if no file differs",
    ),
    "rootfs-file": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="CRIU maps the node's files again, and the process goes on in the middle of them. A file is "
        "the same by size and by time, or by build id, or by sha256. One that the kernel cache brings is no "
        "lack.",
        source=_CRIU_DOCS + " (--file-validation)",
        advice="start from the container image that the snapshot was made in",
    ),
    "model-file": Rule(
        rung=Rung.PROCESS,
        hard=False,
        why="The restored process has its weights in memory.",
        source=_OURS,
        advice="fetch the model: lower rungs need it",
    ),
    "model-reloaded": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="The server was saved without its weights, and reads them again from the model's files. Before "
        "it does, their digests are compared, too.",
        source="rekindle snapshot --weights reload",
        advice="fetch the recorded revision of the model to the recorded place",
    ),
    "command": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="The process goes on as it was started: what the command says otherwise now, it would never "
        "learn. Its address may differ, since rekindle publishes that.",
        source="docs/operations.md",
        advice="make a snapshot with this command",
    ),
    "privileges": Rule(
        rung=Rung.PROCESS,
        hard=True,
        fixed=True,
        why="Cells and CRIU need root, CAP_SYS_ADMIN and mounts.",
        source="namespaces(7), capabilities(7)",
        advice="run as root with CAP_SYS_ADMIN, CAP_SYS_PTRACE and CAP_CHECKPOINT_RESTORE; "
        "`rekindle doctor` tells more",
    ),
    "criu": Rule(
        rung=Rung.PROCESS,
        hard=True,
        fixed=True,
        why="CRIU restores the process. It is tried with a small one, since its version says little.",
        source=_OURS,
        advice="hack/get-criu installs one that works, or set REKINDLE_CRIU",
    ),
    "criu-version": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="An older CRIU does not know what a newer one wrote.",
        source="CRIU reads images of its own version and before",
        advice="install the recorded version of CRIU or a newer one",
    ),
    "gpu-probe": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="Without NVML nobody knows what GPUs there are.",
        source="NVML API reference, nvmlInit",
        advice="mend the driver: does nvidia-smi work?",
    ),
    "gpu-unsupported": Rule(
        rung=Rung.PROCESS,
        hard=True,
        fixed=True,
        why="The state of this kind of GPU cannot be checkpointed by us.",
        source=_CUDA_DOCS,
        advice="use the kernel cache",
    ),
    "gpu-count": Rule(
        rung=Rung.PROCESS,
        hard=True,
        fixed=True,
        why="Every checkpointed GPU needs one to come back to.",
        source=_CUDA_DOCS + " (--device-map)",
        advice="give the server as many GPUs as it had",
    ),
    "gpu-model": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="Loaded kernels, allocations and graphs are those of one chip.",
        source=_CUDA_DOCS + ": the same chip type",
        advice="restore on the recorded model, or make a snapshot for this one",
    ),
    "gpu-memory": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="What was allocated must fit again.",
        source=_CUDA_DOCS,
        advice="restore on a GPU with as much memory",
    ),
    "gpu-uuid": Rule(
        rung=Rung.PROCESS,
        hard=False,
        why="Other GPUs of the same kind take the places of the recorded ones, by a device map.",
        source=_CUDA_DOCS + " (--device-map, driver 580 and newer)",
        advice="nothing is to be done",
    ),
    "gpu-ecc": Rule(
        rung=Rung.PROCESS,
        hard=False,
        why="It changes how much memory there is and how fast, not what is in it.",
        source="NVML API reference, nvmlDeviceGetEccMode",
        advice="set it alike on all nodes: nvidia-smi -e",
    ),
    "gpu-topology": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="NCCL chose its transports by the links between the GPUs when it started.",
        source="NCCL user guide, environment and topology detection",
        advice="restore on a node whose GPUs are linked alike",
    ),
    "driver": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="The driver's own state in the process is that of its branch.",
        source=_CUDA_DOCS + ": no migration between driver versions is promised",
        advice="install the recorded branch of the driver, or make a snapshot for this one",
    ),
    "driver-version": Rule(
        rung=Rung.PROCESS,
        hard=False,
        why="Within a branch the user-space part that the process has mapped is compared as a file.",
        source="rule rootfs-file",
        advice="nothing is to be done if no file differs",
    ),
    "mig": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="CUDA checkpointing does not support MIG.",
        source=_CUDA_DOCS,
        advice="turn MIG off on nodes for restored processes: nvidia-smi -mig 0",
    ),
    "mps": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="CUDA checkpointing does not support MPS.",
        source=_CUDA_DOCS,
        advice="end the MPS daemon on nodes for restored processes",
    ),
    "cuda": Rule(
        rung=Rung.PROCESS,
        hard=True,
        fixed=True,
        why="CUDA state is restored by the driver, through cuda-checkpoint or its own interface.",
        source=_CUDA_DOCS,
        advice="install a driver of branch 580 or newer, with cuda-checkpoint",
    ),
    "no-cache": Rule(
        rung=Rung.CACHE,
        hard=True,
        fixed=True,
        why="The image holds no kernel cache.",
        source="the image's index",
        advice="make the snapshot without --no-cache",
    ),
    "cache-architecture": Rule(
        rung=Rung.CACHE,
        hard=True,
        fixed=True,
        why="Caches hold host code, too: launchers and C++ kernels.",
        source="Triton's backends/*/driver.py; Inductor's cpp_builder.py",
        advice="make a cache on this architecture",
    ),
    "cache-target": Rule(
        rung=Rung.CACHE,
        hard=True,
        why="A kernel is compiled for one compute capability and warp size; others never look it up.",
        source="Triton's cache key; facts in docs/cache-image.md",
        advice="make a cache for this GPU: `rekindle pack-cache` after a start",
    ),
    "cache-cpu-feature": Rule(
        rung=Rung.CACHE,
        hard=True,
        why="C++ kernels are compiled for the very processor, and not all of that is in their key.",
        source="Inductor's cpp_builder.py: -march=native",
        advice="make a cache on a processor like this one",
    ),
    "cache-version": Rule(
        rung=Rung.CACHE,
        hard=True,
        why="The versions of what compiles are part of every key: another never looks it up.",
        source="the cache keys of Triton, Inductor, vLLM: docs/cache-image.md",
        advice="make a cache with the versions that are installed here",
    ),
    "cache-environment": Rule(
        rung=Rung.CACHE,
        hard=False,
        why="vLLM hashes its environment and its options into the key of its cache.",
        source="vLLM's envs.py, compile_factors",
        advice="start with the recorded value if the cache is not hit",
    ),
    "no-command": Rule(
        rung=Rung.COLD,
        hard=True,
        fixed=True,
        why="A lower rung starts a command; one in which a secret was left out cannot be replayed.",
        source="docs/secrets.md",
        advice="name the command: rekindle restore IMAGE -- COMMAND…",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Strictness:
    """What a policy says of rules: the codes that it makes soft, and those that it makes hard.

    Raises UsageError for a code that there is none, or that cannot be changed.
    """

    soft: frozenset[str] = frozenset()
    hard: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for code in sorted(self.soft | self.hard):
            if code not in RULES:
                raise UsageError(
                    f"the policy's [match] names {code!r}, and there is no such rule",
                    hint="docs/matching.md lists them",
                )
            if RULES[code].fixed:
                raise UsageError(f"the policy cannot change {code}", cause=RULES[code].why)
        if both := sorted(self.soft & self.hard):
            raise UsageError(f"the policy's [match] makes {both[0]} soft and hard")

    def of(self, reason: Reason) -> Reason:
        """The reason as the policy will have it."""
        hard = (reason.hard or reason.code in self.hard) and reason.code not in self.soft
        return reason if hard == reason.hard else dataclasses.replace(reason, hard=hard, by_policy=True)


def reason_for(code: str, name: str, recorded: object, here: object) -> Reason:
    """A reason as its rule makes it."""
    rule = RULES[code]
    return Reason(
        rung=rule.rung,
        code=code,
        field=name,
        recorded=str(recorded),
        here=str(here),
        hard=rule.hard,
        advice=rule.advice,
    )
