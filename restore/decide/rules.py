# SPDX-License-Identifier: Apache-2.0
"""The rules for comparing nodes: what a difference in each field means, and for which rung.

Every rule has a code and is hard (it forbids its rung) or soft (it is only reported). A policy may change
that, unless the rule is fixed. hack/docs/matching_page.py generates docs/matching.md from this module.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase

from msgspec import Struct, structs

from rekindle.errors import RekindleError, UsageError
from rekindle.report import Reason, Rung
from restore.decide.credential_rules import CREDENTIAL_RULES
from restore.decide.difference import Difference
from restore.decide.environment_rules import OF_CACHES, OF_PROCESSES
from restore.decide.limit_rules import LIMIT_RULES
from restore.decide.need_rules import NEED_RULES
from restore.decide.neutral_rules import NEUTRAL_RULES
from restore.decide.rule import Rule
from restore.signals import DeadlinePassed

_RESTORE_API = "CUDA driver API, cuCheckpointProcessRestore"
_CUDA_PLUGIN = "CRIU, plugins/cuda/README.md"

RULES: Mapping[str, Rule] = {
    "architecture": Rule(
        rung=Rung.PROCESS,
        hard=True,
        fixed=True,
        why="A process consists of machine code and registers, which CRIU stores in a format for each "
        "architecture.",
        source="CRIU, images/core.proto (march)",
        advice="make a snapshot on this architecture",
    ),
    "page-size": Rule(
        rung=Rung.PROCESS,
        hard=True,
        fixed=True,
        why="CRIU counts memory in the pages of the OS kernel on which it dumped.",
        source="CRIU, images/pagemap.proto (nr_pages)",
        advice="boot an OS kernel with pages of the recorded size",
    ),
    "cpu-feature": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="Libraries choose their code once, at their start, by the features of the processor. An "
        "instruction that is missing here kills the process. Additional features do no harm, and features "
        "that are no instructions (`hypervisor`, `vmx`, `md_clear`) are not compared.",
        source="glibc's indirect functions; oneDNN developer guide, CPU dispatcher control; CRIU wiki, "
        "Cpuinfo; rekindle/node/instructions.py",
        advice="make the snapshot on the oldest processor of the fleet, or one for each kind of node",
    ),
    "cpu-vendor": Rule(
        rung=Rung.PROCESS,
        hard=False,
        why="Only features decide whether the process runs. But its libraries keep the code that they chose "
        "for the other processor.",
        source="oneDNN developer guide, CPU dispatcher control",
        advice="expect the performance of code that was chosen for the other processor",
    ),
    "xsave": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="The registers of every thread are saved in the XSAVE format. A state component that is in use "
        "but not enabled here cannot be loaded. Which ones were in use is not recorded, so all count.",
        source="Intel SDM volume 1, chapter 13 (XRSTOR); criu(8), --cpu-cap fpu",
        advice="make the snapshot on a processor without that component, or with it disabled",
    ),
    "capabilities": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="CRIU gives the process the capabilities that it had. If CRIU lacks one of them itself, it does "
        "not fail, but hangs.",
        source="CRIU, criu/pie/restorer.c: restore_creds; observed",
        advice="give this container the recorded capabilities, or make the snapshot with fewer",
    ),
    "kernel": Rule(
        rung=Rung.PROCESS,
        hard=False,
        why="Newer OS kernels stay compatible with processes from older ones.",
        source="Linux, Documentation/ABI/README: system calls never change and are always there",
        advice="no action needed",
    ),
    "kernel-older": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="The process keeps using the features that it found at its start, which an older OS kernel may "
        "lack; so may CRIU. The first two numbers of the version count.",
        source="libraries that ask once and remember: libuv, uv__kernel_version; asyncio, can_use_pidfd",
        advice="update this node's OS kernel, or make the snapshot on the oldest one of the fleet",
    ),
    "libc": Rule(
        rung=Rung.PROCESS,
        hard=False,
        why="The process has it mapped as files, which are compared by themselves.",
        source="the rule rootfs-file",
        advice="no action needed if no file differs",
    ),
    "rootfs-file": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="CRIU maps this node's files into the process, which continues in the middle of their code. A "
        "file is the same if its size is, and its build id or sha256. Of files above 256 MiB without a build "
        "id, parts are compared. Files that the kernel cache contains may be missing.",
        source="criu(8), --file-validation; checkpoint-restore/criu#1049",
        advice="start from the container image that the snapshot was made in; if this is that one, the file "
        "has changed since: make a new snapshot",
    ),
    "directory": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="The process works in this directory, has it open, or has a file in it that was deleted, which "
        "CRIU makes there again for a moment. A directory or a file that the server made itself is made "
        "where it is missing, which needs a place that is not read-only.",
        source="docs/snapshots.md; CRIU, criu/files-reg.c: create_ghost",
        advice="make the directory, mount its volume, or make it writable",
    ),
    "driver-file": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="The process has libraries of NVIDIA's driver mapped, as libcuda.so.VERSION. They must be of the "
        "recorded version: containers get them from the node, by NVIDIA's container runtime, so they change "
        "with its driver, whatever the image.",
        source="NVIDIA/cuda-checkpoint#21; NVIDIA container toolkit, driver capabilities",
        advice="install the recorded version of the driver on this node, or make a snapshot with today's",
    ),
    "package": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="The process continues with the packages that it has imported. Compared are the versions of "
        "those of which it has loaded a file, the directories that Python searches, and what Python would "
        "run or find first in them: `.pth` files, sitecustomize, a module of the same name, a new package "
        "with entry points for others to load.",
        source="Python documentation, site and importlib.metadata; PyPA, Recording installed projects",
        advice="make a snapshot with the packages of today, or install the recorded ones",
    ),
    "package-other": Rule(
        rung=Rung.PROCESS,
        hard=False,
        why="Packages beside those that the process uses were installed, removed or updated. It has loaded "
        "nothing of them.",
        source="PyPA, Recording installed projects",
        advice="no action needed",
    ),
    "code-file": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="The process continues with the code that it has read: modules, scripts, files within packages. "
        "Their contents are compared; of cached bytecode, that of the source.",
        source="PEP 3147, PEP 552",
        advice="make a snapshot with the code of today",
    ),
    "named-file": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="The server has read a file that its command or a variable names, or one in a directory that its "
        "command names, and would read other content today: a configuration, a chat template, an adapter.",
        source="docs/adr/0027-what-is-on-the-disk.md",
        advice="make a snapshot with the files of today",
    ),
    "read-file": Rule(
        rung=Rung.PROCESS,
        hard=False,
        why="The server has read a file that nothing names, and would read other content today. It may be a "
        "configuration or data of no importance: say so by policy.",
        source="docs/adr/0027-what-is-on-the-disk.md",
        advice="make a snapshot with the files of today if the server depends on them",
    ),
    "model-file": Rule(
        rung=Rung.PROCESS,
        hard=False,
        why="The restored process has the weights in memory.",
        source="docs/operations.md, what a server in a cell sees",
        advice="fetch the model: lower rungs need it",
    ),
    "model-changed": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="The process has another model in memory than a start would load: another revision of the hub's, "
        "or other files. Compared are the digest by which the hub's cache names a file, all of a small file, "
        "and parts of a large one: the header, and a page of every tensor.",
        source="huggingface_hub, Understand caching; safetensors, Format",
        advice="make a snapshot with the model of today, or fetch the recorded one",
    ),
    "model-reloaded": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="The server was saved without its weights, and reloads them from the model's files. Their "
        "digests are compared as well, before a client gets an answer.",
        source="rekindle snapshot --weights reload; vLLM, sleep mode at level 2",
        advice="fetch the recorded revision of the model to the recorded place",
    ),
    "command": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="The process continues with the options of its own start, whatever the command says now. The "
        "address may differ, since rekindle publishes it, and so may the path of the program.",
        source="docs/adr/0008-ladder.md",
        advice="make a snapshot with this command",
    ),
    "not-proved": Rule(
        rung=Rung.PROCESS,
        hard=False,
        why="Whether an image can be restored shows when it is: a snapshot is restored once before it is "
        "published, but for --no-prove.",
        source="docs/snapshots.md; observed: CRIU dumps more than it can restore",
        advice="make the snapshot without --no-prove",
    ),
    "api-key": Rule(
        rung=Rung.PROCESS,
        hard=True,
        fixed=True,
        why="Today's API key of vLLM, and no other, must open the server. A gate before it enforces the key, "
        "which therefore need not be in the image. That is impossible if the server shares the host's "
        "network, has a --middleware of its own, or is started in a way that hides its key; and a server "
        "that was saved with a key cannot be opened without one.",
        source="vLLM, entrypoints/serve/middleware/authenticate.py; docs/secrets.md",
        advice="make the snapshot without a key, in a cell with its own network, and give the key to restore",
    ),
    **OF_PROCESSES,
    "privileges": Rule(
        rung=Rung.PROCESS,
        hard=True,
        fixed=True,
        why="A cell needs CAP_SYS_ADMIN, CAP_NET_ADMIN and CAP_SYS_TIME. CRIU also needs CAP_SYS_CHROOT and "
        "CAP_SETPCAP, and all capabilities that the processes had.",
        source="namespaces(7), time_namespaces(7); checkpoint-restore/criu#684; each tried by itself",
        advice="run as root with these capabilities, and with those that the server had; see `rekindle "
        "doctor`",
    ),
    "criu": Rule(
        rung=Rung.PROCESS,
        hard=True,
        fixed=True,
        why="CRIU restores the process. Its version does not tell whether it works with this OS kernel, so "
        "that is tried with a small process. If it fails, it is tried again after an hour, or by `rekindle "
        "doctor`.",
        source="docs/measurements.md, CRIU",
        advice="run hack/get-criu, or set REKINDLE_CRIU to a CRIU that works",
    ),
    "criu-version": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="A newer CRIU reads the dumps of older ones. An older one may misread those of newer ones: crit "
        "4.1.1 reads the page maps of 4.2 as empty. The first two numbers of the version count.",
        source="checkpoint-restore/criu#2128, #2847",
        advice="install the recorded version of CRIU or a newer one",
    ),
    "memory": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="The server immediately needs as much memory of its own as it had when it first answered. Mapped "
        "memory files do not count, since they can be read again. Above the limit of a control group, the OS "
        "kernel kills the server, or with memory.oom.group the whole group.",
        source="Linux, Documentation/admin-guide/cgroup-v2.rst (memory.max, memory.oom.group)",
        advice="give the container more memory, or end other processes",
    ),
    **CREDENTIAL_RULES,
    **LIMIT_RULES,
    **NEED_RULES,
    **NEUTRAL_RULES,
    "gpu-probe": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="NVML failed to start, or failed for one of the GPUs, so it is unknown which GPUs this node has.",
        source="NVML API reference, nvmlInit_v2",
        advice="repair the driver: does nvidia-smi work?",
    ),
    "gpu-unsupported": Rule(
        rung=Rung.PROCESS,
        hard=True,
        fixed=True,
        why="Only the state of NVIDIA GPUs is saved. CRIU's plugin for AMD GPUs is not used.",
        source="CRIU, plugins/amdgpu",
        advice="use the kernel cache",
    ),
    "gpu-count": Rule(
        rung=Rung.PROCESS,
        hard=True,
        fixed=True,
        why="Every checkpointed GPU must be restored to one of its own. If this node has more, they are "
        "chosen by `restore --gpu UUID` or by their free memory, which needs driver 580.",
        source=f"{_RESTORE_API}: the map must name every checkpointed GPU; {_CUDA_PLUGIN}: the same count",
        advice="make as many GPUs visible as the server had",
    ),
    "gpu-model": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="Loaded GPU kernels, allocations and graphs are specific to the chip. The name and the compute "
        "capability are compared.",
        source=f"{_RESTORE_API}: the same chip type",
        advice="restore on the recorded model, or make a snapshot for this one",
    ),
    "gpu-memory": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="The allocated memory must fit.",
        source=f"{_RESTORE_API}: enough memory",
        advice="restore on a GPU with as much memory",
    ),
    "gpu-uuid": Rule(
        rung=Rung.PROCESS,
        hard=False,
        why="Other GPUs of the same kind replace the recorded ones, by a device map.",
        source=f"{_RESTORE_API}: pairs of UUIDs, since CUDA 13.0, which is driver 580",
        advice="no action needed",
    ),
    "gpu-ecc": Rule(
        rung=Rung.PROCESS,
        hard=False,
        why="ECC does not change the contents of memory. On GPUs with GDDR memory it takes a part of it, but "
        "the size of the memory is compared by itself.",
        source="NVML API reference, nvmlDeviceGetEccMode",
        advice="use the same setting on all nodes: nvidia-smi -e, and a reboot",
    ),
    "gpu-topology": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="NCCL chose its routes by the links between the GPUs at its start. For a single GPU, no link is "
        "compared.",
        source="NCCL user guide, NCCL_P2P_LEVEL and NCCL_TOPO_FILE",
        advice="restore on a node whose GPUs are linked in the same way",
    ),
    "driver": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="The driver keeps data of its own in the process. Another branch of the driver is not guaranteed "
        "to understand it.",
        source="cuda-checkpoint, README: all of it is in the driver",
        advice="install the recorded branch of the driver, or make a snapshot for this one",
    ),
    "driver-version": Rule(
        rung=Rung.PROCESS,
        hard=False,
        why="The branch is the same. The part of the driver that the process has mapped, "
        "libcuda.so.VERSION, is compared as a file.",
        source="the rule driver-file; NVIDIA/cuda-checkpoint#21",
        advice="no action needed if no file differs",
    ),
    "mig": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="CUDA checkpointing does not support MIG.",
        source=f"{_CUDA_PLUGIN}; NVIDIA/cuda-checkpoint#42",
        advice="turn MIG off on nodes that restore processes: nvidia-smi -mig 0",
    ),
    "mps": Rule(
        rung=Rung.PROCESS,
        hard=True,
        why="CUDA checkpointing does not support MPS.",
        source=_CUDA_PLUGIN,
        advice="end the MPS daemon on nodes that restore processes",
    ),
    "cuda": Rule(
        rung=Rung.PROCESS,
        hard=True,
        fixed=True,
        why="The driver restores CUDA state: through its API (570 or newer), or for cuda-checkpoint (555 or "
        "newer).",
        source="CUDA driver API, CUDA Checkpointing; cuda-checkpoint, README",
        advice="install a driver of branch 580 or newer; see `rekindle doctor`",
    ),
    "no-cache": Rule(
        rung=Rung.CACHE,
        hard=True,
        fixed=True,
        why="The image has no kernel cache.",
        source="the image's index: docs/format.md",
        advice="make the snapshot of a server that keeps its kernels in a cache, and without --no-cache",
    ),
    "cache-architecture": Rule(
        rung=Rung.CACHE,
        hard=True,
        fixed=True,
        why="Caches also contain machine code for the processor: launchers of GPU kernels, and C++ kernels.",
        source="Triton, runtime/build.py; Inductor, cpp_builder.py",
        advice="make a cache on this architecture",
    ),
    "cache-target": Rule(
        rung=Rung.CACHE,
        hard=True,
        why="A GPU kernel is compiled for one chip and one warp size, and never looked up on another chip. "
        "Graphs of vLLM and Inductor do not name their target: the GPUs that the process held count.",
        source="Triton, runtime/cache.py (get_cache_key) and the hash of its backends",
        advice="make a cache for this GPU: `rekindle pack-cache` after a start",
    ),
    "cache-cpu-feature": Rule(
        rung=Rung.CACHE,
        hard=True,
        why="C++ kernels are compiled for the exact processor, but their key only contains the text "
        "`-march=native`: another processor may find them, and crash. None of such a cache is used.",
        source="Inductor, cpp_builder.py and CppCodeCache in codecache.py",
        advice="make a cache on a processor like this one",
    ),
    "cache-version": Rule(
        rung=Rung.CACHE,
        hard=True,
        why="The compiler is part of the key, by its version or a hash of its files: another version never "
        "finds the entry. Packages that are not installed here are not compared.",
        source="Triton, triton_key; Inductor, torch_key; vLLM, VllmConfig.compute_hash",
        advice="make a cache with the versions installed here",
    ),
    "cache-environment": Rule(
        rung=Rung.CACHE,
        hard=False,
        fixed=True,
        why="vLLM hashes nearly all its variables and its configuration into the key of its cache, and "
        "compilers hash some of theirs. Reported when the cache is extracted; the report says whether it was "
        "hit.",
        source="vLLM, envs.compile_factors; Triton, get_cache_key",
        advice="start with the recorded value if the cache is not hit",
    ),
    **OF_CACHES,
    "no-command": Rule(
        rung=Rung.COLD,
        hard=True,
        fixed=True,
        why="A lower rung starts a command. A recorded command from which a secret was removed cannot be "
        "started, and without an image there is no recorded command.",
        source="docs/secrets.md",
        advice="give the command: rekindle restore IMAGE -- COMMAND…",
    ),
}


_OF_VARIABLES = {code for code, rule in OF_PROCESSES.items() if not rule.fixed}


class Strictness(Struct, frozen=True, kw_only=True):
    """The codes of the rules that a policy makes soft, and of those that it makes hard.

    `variables` are patterns of variables that may differ, whatever the policy says of their rules. Raises
    UsageError for an unknown code, and for a rule that is fixed.
    """

    soft: frozenset[str] = frozenset()
    hard: frozenset[str] = frozenset()
    variables: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for code in sorted(self.soft | self.hard):
            if code not in RULES:
                raise UsageError(
                    f"unknown rule {code!r} in [match] of the policy",
                    hint="docs/matching.md lists all rules",
                )
            if RULES[code].fixed:
                raise UsageError(f"a policy cannot change the rule {code}", cause=RULES[code].why)
        if both := sorted(self.soft & self.hard):
            raise UsageError(f"the policy makes the rule {both[0]} both soft and hard")

    def apply(self, reason: Reason) -> Reason:
        """Return the reason as the policy makes it."""
        hard = (reason.hard or reason.code in self.hard) and reason.code not in self.soft
        if reason.code in _OF_VARIABLES and any(fnmatchcase(reason.field, each) for each in self.variables):
            hard = False
        return reason if hard == reason.hard else structs.replace(reason, hard=hard, by_policy=True)


def reason_for(found: Difference) -> Reason:
    """Return the reason that a difference is, by its rule."""
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


def failure_reason(rung: Rung, phase: str, error: BaseException) -> Reason:
    """Return the reason that a rung failed in a phase.

    After a bug in rekindle, the next rung may still be taken.
    """
    option = Rung.CACHE if rung is Rung.CACHE else Rung.PROCESS
    advice = f"--{option}-deadline S allows more"
    match error:
        case DeadlinePassed():
            code, text = "deadline", f"{phase} was not done after {error.seconds:.1f} s"
        case RekindleError():
            code = _CODES.get(error.code, error.code)
            text = f"{error.message} ({error.cause})" if error.cause else error.message
            advice = f"see {error.log}" if error.log else error.hint
        case _:
            code, text, advice = "bug", repr(error), "report it, with the lines that name its place"
    return Reason(rung=rung, code=code, field=phase, recorded="", here=text, hard=True, advice=advice)
