# SPDX-License-Identifier: Apache-2.0
"""Compare what a snapshot's process needs with this node, field by field.

Pure. restore/decide/rules.py defines what each difference means.
"""

import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

from rekindle.node import instructions
from rekindle.node.fingerprint import Fingerprint
from rekindle.node.gpu import Gpu
from rekindle.node.mapped import describe_recorded
from rekindle.node.packages import major_minor
from rekindle.record import Record
from restore.decide import match_limits
from restore.decide.abilities import Abilities
from restore.decide.difference import Difference

_ADDRESS = ("--host", "--port")
# Libraries that are part of NVIDIA's driver: libcuda.so.580.65.06, libnvidia-ml.so.1, and so on.
_OF_DRIVER = re.compile(r"lib(cuda|cudadebugger|nvcuvid|nvidia-[a-z0-9-]+)\.so(\.[0-9.]+)?")


def compare(
    record: Record,
    node: Fingerprint,
    abilities: Abilities,
    different: Mapping[str, str],
    command: Sequence[str] | None = None,
    loaded: Sequence[Difference] = (),
    environment: Mapping[str, str] = MappingProxyType({}),
    enforced: frozenset[str] = frozenset(),
) -> list[Difference]:
    """Return the differences that may keep the process from running here.

    `different` is the result of `match_loaded.mapped`, and `loaded` that of `match_loaded.compare`. `command`
    is the one that the user gave, if any, and `environment` what it would be started in; the options in
    `enforced` need not be the recorded ones.
    """
    recorded = record.node
    return [
        *_command(record, command, environment, enforced),
        *_equal("architecture", "architecture", recorded.architecture, node.architecture),
        *_equal("page-size", "bytes of a page", recorded.page_bytes, node.page_bytes),
        *missing_features("cpu-feature", recorded, node),
        *_equal("cpu-vendor", "processor's vendor", recorded.cpu_vendor, node.cpu_vendor),
        *_bits("xsave", "extended states", recorded.xsave, node.xsave),
        *_bits("capabilities", "capabilities", recorded.capabilities, node.capabilities),
        *_kernel(recorded.kernel, node.kernel),
        *_equal("libc", "C library", recorded.libc, node.libc),
        *_ability_problems(abilities, record),
        *_memory(abilities, record),
        *match_limits.compare(record, node),
        *_gpus(record, node),
        *_files(record, different),
        *loaded,
        *([] if record.proved else [Difference("not-proved", "proof", "none", "not restored so far")]),
    ]


def _files(record: Record, different: Mapping[str, str]) -> Iterator[Difference]:
    """Yield the mapped files that differ. Those of the GPU's driver have a code of their own."""
    for file in record.mapped_files:
        if file.path in different:
            code = "driver-file" if _OF_DRIVER.fullmatch(posixpath.basename(file.path)) else "rootfs-file"
            yield Difference(code, file.path, describe_recorded(file), different[file.path])


def device_map(record: Record, node: Fingerprint) -> dict[str, str]:
    """Map the UUIDs of recorded GPUs to GPUs of this node; empty if they are the same.

    GPUs that are on both nodes map to themselves, the rest by position. If both nodes have equally many, all
    are named: the driver refused a map of only those that CUDA_VISIBLE_DEVICES left to the process
    (NVIDIA/cuda-python#1983).
    """
    held = list(record.process.gpus)
    here = [gpu.uuid for gpu in node.devices.gpus]
    if all(uuid in here for uuid in held):
        return {}
    recorded = [gpu.uuid for gpu in record.node.devices.gpus]
    if len(recorded) != len(here) or not set(held) <= set(recorded):
        recorded = held
    free = [uuid for uuid in here if uuid not in recorded]
    return {uuid: uuid if uuid in here else free.pop(0) for uuid in recorded if uuid in here or free}


def _equal(code: str, name: str, recorded: object, here: object) -> Iterator[Difference]:
    """Yield a difference, unless a side is "": not recorded, or unknown here."""
    if recorded != here and recorded != "" and here != "":
        yield Difference(code, name, str(recorded), str(here))


def _command(
    record: Record, command: Sequence[str] | None, environment: Mapping[str, str], enforced: frozenset[str]
) -> Iterator[Difference]:
    if command is not None and not starts_recorded(record, command, environment, enforced):
        from rekindle.secrets.redact import redact_command

        yield Difference("command", "command", " ".join(record.command), " ".join(redact_command(command)))


def starts_recorded(
    record: Record,
    given: Sequence[str],
    environment: Mapping[str, str],
    enforced: frozenset[str] = frozenset(),
) -> bool:
    """Return whether a command starts the recorded server here, as it was recorded or in other wrappers."""
    here = environment
    if same_command(record.command, given, enforced):
        if not any("$" in word for word in given):
            return True
        # A shell may give its words other values than then.
        here = {name: environment[name] for name in record.environment if name in environment}
    from rekindle.secrets.redact import redact_command  # its patterns take 8 ms to compile

    was = _unwrapped(record.command, record.environment, enforced)
    return was == _unwrapped(redact_command(given), here, enforced)


def same_command(
    recorded: Sequence[str], given: Sequence[str], enforced: frozenset[str] = frozenset()
) -> bool:
    """Return whether two commands are the same in the same environment.

    Its address, the program's path, and the options in `enforced` may differ.
    """
    if plain_command(recorded, enforced) == plain_command(given, enforced):
        return True
    from rekindle.secrets.redact import redact_command  # its patterns take 8 ms to compile

    return plain_command(recorded, enforced) == plain_command(redact_command(given), enforced)


def _unwrapped(
    command: Sequence[str], environment: Mapping[str, str], enforced: frozenset[str]
) -> list[list[str]]:
    """Return a command and its wrappers as far as they must be the same."""
    from rekindle.command_line import UnclearCommand, unwrap
    from rekindle.engine.vllm_command import without_api_key

    try:
        found = unwrap(command, environment)
    except UnclearCommand:
        return [plain_command(command, enforced)]
    assigned = [f"{name}={value}" for name, value in found.assigned.items() if name not in enforced]
    return [
        list(found.wrappers),
        sorted(assigned),
        sorted(found.unset),
        [found.directory],
        plain_command(without_api_key(found.argv) if enforced else found.argv),
    ]


def plain_command(command: Sequence[str], without: frozenset[str] = frozenset()) -> list[str]:
    """Return a command without the server's address and without the directory of its program.

    The options in `without` and all their values are left out, too.
    """
    found = []
    skip = skip_values = False
    for number, word in enumerate(command):
        if skip:
            skip = False
        elif word in _ADDRESS:
            skip, skip_values = True, False
        elif word.startswith("--") and word.partition("=")[0] in without:
            skip_values = True
        elif skip_values and not word.startswith("--"):
            continue
        else:
            skip_values = False
            if not word.startswith(tuple(f"{option}=" for option in _ADDRESS)):
                found.append(posixpath.basename(word) if number == 0 else word)
    return found


def missing_features(code: str, recorded: Fingerprint, here: Fingerprint) -> Iterator[Difference]:
    """Yield a difference if this node's processor lacks recorded features that programs may use."""
    if missing := instructions.of(recorded.architecture, recorded.cpu_features - here.cpu_features):
        missing_here = f"missing on {here.cpu_model}"
        yield Difference(code, "processor features", " ".join(sorted(missing)), missing_here)


def _bits(code: str, name: str, recorded: int, here: int) -> Iterator[Difference]:
    """Yield a difference if recorded bits are missing here. Additional bits do no harm; 0 means unknown."""
    if recorded & ~here and here:
        yield Difference(code, name, f"{recorded:#x}", f"{here:#x}")


def _kernel(recorded: str, here: str) -> Iterator[Difference]:
    if recorded != here:
        older = major_minor(here) < major_minor(recorded)
        yield Difference("kernel-older" if older else "kernel", "kernel", recorded, here)


def _ability_problems(abilities: Abilities, record: Record) -> Iterator[Difference]:
    for code, problem in abilities.problems.items():
        if code != "cuda" or record.process.gpus:
            yield Difference(code, code, "", problem)
    if abilities.criu is not None and major_minor(abilities.criu.version) < major_minor(record.criu.version):
        yield Difference("criu-version", "CRIU", record.criu.version, abilities.criu.version)


def _memory(abilities: Abilities, record: Record) -> Iterator[Difference]:
    """Yield a difference if less memory is available than the server had when it first answered."""
    needed = memory_needed(record)
    if abilities.memory_bytes is not None and abilities.memory_bytes < needed:
        yield Difference(
            "memory", "memory", f"{needed:,} bytes", f"{abilities.memory_bytes:,} bytes available"
        )


def memory_needed(record: Record) -> int:
    """Return the bytes of its own memory that a restored server has when it first answers.

    For an image that was not proved or has no memory files, all stored memory counts.
    """
    return record.dump.own_bytes or record.dump.stored_bytes


def _gpus(record: Record, node: Fingerprint) -> Iterator[Difference]:
    """Compare the GPUs that the process held. Others do not matter to it."""
    if not record.process.gpus:
        return
    held = held_gpus(record)
    here = node.devices.gpus
    if any(gpu.vendor != "nvidia" for gpu in held):
        yield Difference("gpu-unsupported", "GPU", held[0].name, _models(here))
        return
    if node.devices.problem:
        yield Difference("gpu-probe", "GPUs", _models(held), node.devices.problem)
        return
    if len(here) not in {len(record.process.gpus), len(record.node.devices.gpus)}:
        yield Difference("gpu-count", "GPUs", _models(held) or str(len(record.process.gpus)), _models(here))
    places = device_map(record, node) or {gpu.uuid: gpu.uuid for gpu in held}
    by_uuid = {gpu.uuid: gpu for gpu in here}
    pairs = [(gpu, by_uuid[places[gpu.uuid]]) for gpu in held if places.get(gpu.uuid) in by_uuid]
    yield from _unequal("gpu-model", pairs, lambda gpu: f"{gpu.name} ({gpu.arch})", lambda a, b: a == b)
    yield from _unequal(
        "gpu-memory",
        pairs,
        lambda gpu: f"{gpu.memory_bytes / (1 << 30):.1f} GiB",
        lambda a, b: _gib(b) >= _gib(a),
    )
    yield from _unequal("gpu-ecc", pairs, lambda gpu: "on" if gpu.ecc else "off", lambda a, b: a == b)
    yield from _unequal("gpu-uuid", pairs, lambda gpu: gpu.uuid, lambda a, b: a == b)
    yield from _either("mig", any(gpu.mig for gpu in held), any(gpu.mig for gpu in here))
    yield from _either("mps", record.node.devices.mps, node.devices.mps)
    if len(held) > 1:
        was, now = " ".join(record.node.devices.links), " ".join(node.devices.links)
        yield from _equal("gpu-topology", "links between the GPUs", was, now)
    was, now = record.node.devices.driver, node.devices.driver
    if was != now:
        same_branch = was.partition(".")[0] == now.partition(".")[0]
        yield Difference("driver-version" if same_branch else "driver", "driver", was, now or "none")


def held_gpus(record: Record) -> list[Gpu]:
    """Return the GPUs that the process held."""
    return [gpu for gpu in record.node.devices.gpus if gpu.uuid in record.process.gpus]


def _either(code: str, recorded: bool, here: bool) -> Iterator[Difference]:
    """Yield a difference if a feature is on, here or on the recorded node."""
    if recorded or here:
        yield Difference(code, code.upper(), "on" if recorded else "off", "on" if here else "off")


def _unequal(
    code: str,
    pairs: Sequence[tuple[Gpu, Gpu]],
    shown: Callable[[Gpu], str],
    fits: Callable[[str, str], bool],
) -> Iterator[Difference]:
    """Yield the first pair of GPUs that do not fit each other in one property."""
    for recorded, here in pairs:
        if not fits(shown(recorded), shown(here)):
            yield Difference(code, code.replace("gpu-", "GPU's "), shown(recorded), shown(here))
            return


def _gib(text: str) -> float:
    return float(text.partition(" ")[0])


def _models(gpus: Sequence[Gpu]) -> str:
    counts = Counter(gpu.name for gpu in gpus)
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"
