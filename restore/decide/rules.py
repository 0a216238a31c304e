# SPDX-License-Identifier: Apache-2.0
"""The rules by which nodes are compared: what a difference in each field means, and for which rung.

Every rule has a code, is hard (it forbids the rung) or soft (it is told), and a policy may make it the other
unless it is fixed. docs/matching.md is generated from here by hack/docs/matching_page.py.
"""

import dataclasses
import traceback
from collections.abc import Mapping
from dataclasses import dataclass

from rekindle.errors import RekindleError, UsageError
from rekindle.report import Reason, Rung
from restore.decide.difference import Difference
from restore.signals import DeadlinePassed


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What a field's difference means: `why`, where that is said (`source`), and what to do (`advice`)."""

    rung: Rung
    hard: bool
    why: str
    source: str
    advice: str
    fixed: bool = False


_RESTORE_API = "CUDA driver API, cuCheckpointProcessRestore"
_CUDA_PLUGIN = "CRIU, plugins/cuda/README.md"

RULES: Mapping[str, Rule] = {
    "architecture": Rule(
        rung=Rung.PROCESS,
        hard=True,
        fixed=True,
        why="A process is machine code and registers, and CRIU writes them in a form of each architecture.",
        source="CRIU, images/core.proto (march)",
        advice="make a snapshot on this architecture",
    ),
    "page-size": Rule(
        rung=Rung.PROCESS,
        hard=True,
        fixed=True,
        why="CRIU counts memory in pages of the kernel that it dumped under.",
        source="CRIU, images/pagemap.proto (nr_pages)",
        advice="boot a kernel with pages of the recorded size",
    ),
    "cpu-feature": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="Libraries choose their code by the features that they find when they start, and never look "
        "again: an instruction that is missing here kills the process. More features than recorded do no "
        "harm.",
        source="glibc's indirect functions; oneDNN developer guide, CPU dispatcher control; CRIU wiki, "
        "Cpuinfo",
        advice="make the snapshot on the oldest processor of the fleet, or another for this kind of node",
    ),
    "cpu-vendor": Rule(
        rung=Rung.PROCESS,
        hard=False,
        why="The features decide. But what a library has tuned to one processor's caches, it goes on using "
        "on the other.",
        source="oneDNN developer guide, CPU dispatcher control",
        advice="expect the speed of code that was chosen for the other processor",
    ),
    "xsave": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="Every thread's registers are saved in the form of XSAVE, and a state that is in use and is not "
        "enabled here cannot be loaded. Which were in use is not recorded, so all of them count.",
        source="Intel SDM volume 1, chapter 13 (XRSTOR); criu(8), --cpu-cap fpu",
        advice="make the snapshot on a processor without that state, or with it disabled",
    ),
    "capabilities": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="CRIU gives the process the capabilities that it had, and can give none that it lacks itself; it "
        "does not end then, but hangs.",
        source="CRIU, criu/pie/restorer.c: restore_creds; seen here",
        advice="give this container the recorded capabilities, or make the snapshot with fewer",
    ),
    "kernel": Rule(
        rung=Rung.PROCESS,
        hard=False,
        why="Newer kernels keep what older ones promised to processes.",
        source="Linux, Documentation/ABI/README: system calls never change and are always there",
        advice="nothing is to be done",
    ),
    "kernel-older": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="The process goes on to use what it found when it started, and an older kernel may lack that. "
        "So may CRIU. The first two numbers of the version count.",
        source="asked once and remembered: libuv, uv__kernel_version; asyncio, can_use_pidfd",
        advice="update this node's kernel, or make the snapshot on the oldest kernel of the fleet",
    ),
    "libc": Rule(
        rung=Rung.PROCESS,
        hard=False,
        why="What the process has of it is a mapped file, which is compared by itself.",
        source="the rule rootfs-file",
        advice="nothing is to be done if no file differs",
    ),
    "rootfs-file": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="CRIU maps the node's files again, and the process goes on in the middle of them. A file is the "
        "same if its size is, and its time, or else its build id or sha256; of one above 256 MiB without a "
        "build id, the size alone counts. One that the kernel cache brings is no lack.",
        source="criu(8), --file-validation; checkpoint-restore/criu#1049",
        advice="start from the container image that the snapshot was made in",
    ),
    "model-file": Rule(
        rung=Rung.PROCESS,
        hard=False,
        why="The restored process has its weights in memory.",
        source="docs/operations.md, what a server in a cell sees",
        advice="fetch the model: lower rungs need it",
    ),
    "model-reloaded": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="The server was saved without its weights, and reads them again from the model's files. Before "
        "it does, their digests are compared, too.",
        source="rekindle snapshot --weights reload; vLLM, sleep mode at level 2",
        advice="fetch the recorded revision of the model to the recorded place",
    ),
    "command": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="The process goes on as it was started: what the command says otherwise now, it would never "
        "learn. Its address may differ, since rekindle publishes that, and so may the path of its program.",
        source="docs/adr/0008-ladder.md",
        advice="make a snapshot with this command",
    ),
    "privileges": Rule(
        rung=Rung.PROCESS,
        hard=True,
        fixed=True,
        why="A cell needs CAP_SYS_ADMIN, CAP_NET_ADMIN and CAP_SYS_TIME. CRIU needs CAP_SYS_CHROOT and "
        "CAP_SETPCAP besides, and gives every process the capabilities back that it had.",
        source="namespaces(7), time_namespaces(7); checkpoint-restore/criu#684; tried one by one",
        advice="run as root with these, and with all that the server had when it was snapshotted; `rekindle "
        "doctor` tells more",
    ),
    "criu": Rule(
        rung=Rung.PROCESS,
        hard=True,
        fixed=True,
        why="CRIU restores the process. Whether it works with this kernel is tried with a small process, "
        "since its version does not tell.",
        source="docs/measurements.md, CRIU",
        advice="hack/get-criu installs one that works, or set REKINDLE_CRIU",
    ),
    "criu-version": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="A newer CRIU is meant to read what an older one wrote. An older one may misread what a newer "
        "one did: by crit 4.1.1, the page maps of 4.2 are empty. The first two numbers count.",
        source="checkpoint-restore/criu#2128, #2847",
        advice="install the recorded version of CRIU or a newer one",
    ),
    "gpu-probe": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="NVML did not start, or not for every GPU: nobody knows what is there.",
        source="NVML API reference, nvmlInit_v2",
        advice="mend the driver: does nvidia-smi work?",
    ),
    "gpu-unsupported": Rule(
        rung=Rung.PROCESS,
        hard=True,
        fixed=True,
        why="Only the state of NVIDIA's GPUs is saved; of CRIU's plugin for AMD's, no use is made.",
        source="CRIU, plugins/amdgpu",
        advice="use the kernel cache",
    ),
    "gpu-count": Rule(
        rung=Rung.PROCESS,
        hard=True,
        fixed=True,
        why="Every checkpointed GPU needs one to come back to. Are there more here, they must be as many as "
        "the recorded node had: else nobody says which are meant.",
        source=f"{_RESTORE_API}: the map must name every checkpointed GPU; {_CUDA_PLUGIN}: the same count",
        advice="give the server as many GPUs as it had",
    ),
    "gpu-model": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="Loaded kernels, allocations and graphs are those of one chip. Name and compute capability are "
        "compared.",
        source=f"{_RESTORE_API}: the same chip type",
        advice="restore on the recorded model, or make a snapshot for this one",
    ),
    "gpu-memory": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="What was allocated must fit again.",
        source=f"{_RESTORE_API}: enough memory",
        advice="restore on a GPU with as much memory",
    ),
    "gpu-uuid": Rule(
        rung=Rung.PROCESS,
        hard=False,
        why="Other GPUs of the same kind take the places of the recorded ones, by a device map.",
        source=f"{_RESTORE_API}: pairs of UUIDs, since CUDA 13.0, which is driver 580",
        advice="nothing is to be done",
    ),
    "gpu-ecc": Rule(
        rung=Rung.PROCESS,
        hard=False,
        why="On GPUs with GDDR memory it takes a part of it, which is compared by itself. It does not "
        "change what is in it.",
        source="NVML API reference, nvmlDeviceGetEccMode",
        advice="set it alike on all nodes: nvidia-smi -e, and a reboot",
    ),
    "gpu-topology": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="NCCL chose its ways by the links between the GPUs when it started. Of one GPU, no link is "
        "compared.",
        source="NCCL user guide, NCCL_P2P_LEVEL and NCCL_TOPO_FILE",
        advice="restore on a node whose GPUs are linked alike",
    ),
    "driver": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="What the driver keeps of its own in a process is read by the driver here, and nobody promises "
        "that another branch understands it.",
        source="cuda-checkpoint, README: all of it is in the driver",
        advice="install the recorded branch of the driver, or make a snapshot for this one",
    ),
    "driver-version": Rule(
        rung=Rung.PROCESS,
        hard=False,
        why="The branch is the same. The part of the driver that the process has mapped, "
        "libcuda.so.VERSION, is compared as a file.",
        source="the rule rootfs-file; NVIDIA/cuda-checkpoint#21",
        advice="nothing is to be done if no file differs",
    ),
    "mig": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="CUDA checkpointing does not support MIG.",
        source=f"{_CUDA_PLUGIN}; NVIDIA/cuda-checkpoint#42",
        advice="turn MIG off on nodes for restored processes: nvidia-smi -mig 0",
    ),
    "mps": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="CUDA checkpointing does not support MPS.",
        source=_CUDA_PLUGIN,
        advice="end the MPS daemon on nodes for restored processes",
    ),
    "cuda": Rule(
        rung=Rung.PROCESS,
        hard=True,
        fixed=True,
        why="CUDA state is restored by the driver: through its own interface (570 or newer), or by "
        "cuda-checkpoint (555 or newer).",
        source="CUDA driver API, CUDA Checkpointing; cuda-checkpoint, README",
        advice="install a driver of branch 580 or newer; `rekindle doctor` tells more",
    ),
    "no-cache": Rule(
        rung=Rung.CACHE,
        hard=True,
        fixed=True,
        why="The image holds no kernel cache.",
        source="the image's index: docs/format.md",
        advice="make the snapshot without --no-cache",
    ),
    "cache-architecture": Rule(
        rung=Rung.CACHE,
        hard=True,
        fixed=True,
        why="Caches hold code for the processor, too: what launches kernels, and C++ kernels.",
        source="Triton, runtime/build.py; Inductor, cpp_builder.py",
        advice="make a cache on this architecture",
    ),
    "cache-target": Rule(
        rung=Rung.CACHE,
        hard=True,
        why="A kernel is compiled for one chip and one width of its warps; another chip never looks it up. "
        "Graphs of vLLM and Inductor say nowhere what they are for: that is the GPUs that the process held.",
        source="Triton, runtime/cache.py (get_cache_key) and the hash of its backends",
        advice="make a cache for this GPU: `rekindle pack-cache` after a start",
    ),
    "cache-cpu-feature": Rule(
        rung=Rung.CACHE,
        hard=True,
        why="C++ kernels are compiled for the very processor, and their key has `-march=native` in it as it "
        "stands: another processor may find them, and fail. A cache with such kernels is left alone whole.",
        source="Inductor, cpp_builder.py and CppCodeCache in codecache.py",
        advice="make a cache on a processor like this one",
    ),
    "cache-version": Rule(
        rung=Rung.CACHE,
        hard=True,
        why="What compiles is part of the key, by its version or by a hash of its files: another never "
        "looks it up. What is not installed here is not compared.",
        source="Triton, triton_key; Inductor, torch_key; vLLM, VllmConfig.compute_hash",
        advice="make a cache with the versions that are installed here",
    ),
    "cache-environment": Rule(
        rung=Rung.CACHE,
        hard=False,
        fixed=True,
        why="vLLM hashes nearly all of its variables and its configuration into the key of its cache, "
        "compilers some of theirs. It is told when the cache is put in place; whether the cache was hit, "
        "the report says.",
        source="vLLM, envs.compile_factors; Triton, get_cache_key",
        advice="start with the recorded value if the cache is not hit",
    ),
    "no-command": Rule(
        rung=Rung.COLD,
        hard=True,
        fixed=True,
        why="A lower rung starts a command. A recorded one in which a secret was left out cannot be "
        "started, and without an image there is none.",
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


def reason_for(found: Difference) -> Reason:
    """Return what a difference means by its rule."""
    rule = RULES[found.code]
    return Reason(
        rung=rule.rung,
        code=found.code,
        field=found.field,
        recorded=found.recorded,
        here=found.here,
        hard=rule.hard,
        advice=rule.advice,
    )


_CODES = {"restore": "restore-failed", "oracle": "oracle-mismatch"}


def failure(rung: Rung, where: str, error: BaseException) -> Reason:
    """The reason that a try which failed leaves. A bug of ours costs the rung, not the service; it is not
    hidden, either."""
    advice = f"--{rung}-deadline S allows more"
    match error:
        case DeadlinePassed():
            code, told = "deadline", f"{where} was not done after {error.seconds:.1f} s"
        case RekindleError():
            code = _CODES.get(error.code, error.code)
            told = f"{error.message} ({error.cause})" if error.cause else error.message
            advice = f"see {error.log}" if error.log else error.hint
        case _:
            traceback.print_exception(error)
            code, told, advice = "bug", repr(error), "report it, with what stands on the standard error"
    return Reason(rung=rung, code=code, field=where, recorded="", here=told, hard=True, advice=advice)
