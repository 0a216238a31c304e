# SPDX-License-Identifier: Apache-2.0
"""Compare what a snapshot's process needs with this node, field by field.

Pure. restore/decide/rules.py defines what each difference means.
"""

import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from rekindle.environment import SECRET
from rekindle.node import instructions
from rekindle.node.fingerprint import Fingerprint
from rekindle.node.mapped import describe_recorded
from rekindle.node.packages import major_minor
from rekindle.record import Record
from restore.decide import match_credentials, match_gpus, match_limits
from restore.decide.abilities import Abilities
from restore.decide.difference import Difference
from restore.decide.match_gpus import ANY_GPU, GpuChoice

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
    choice: GpuChoice = ANY_GPU,
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
        *match_credentials.compare(record, node),
        *match_gpus.compare(record, node, choice),
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
        return
    for name in expanded_otherwise(record, command or record.command, environment, enforced):
        yield Difference("command", f"${name} in the command", "another value", "the value of today")


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
        # A shell may give its words other values than then: see also `expanded_otherwise`.
        here = {name: environment[name] for name in record.environment if name in environment}
    from rekindle.secrets.redact import redact_command  # its patterns take 8 ms to compile

    was = _unwrapped(record.command, record.environment, enforced)
    return was == _unwrapped(redact_command(given), here, enforced)


def expanded_otherwise(
    record: Record, given: Sequence[str], environment: Mapping[str, str], enforced: frozenset[str]
) -> Iterator[str]:
    """Yield the variables by whose values of today a shell would start another server than the recorded one.

    Those that only the address depends on are left out. Secrets are compared later, and variables whose
    values are recorded by `starts_recorded`.
    """
    from rekindle.command_line import variables_in
    from rekindle.engine.variables import is_noise, names_a_cache

    known = record.variables
    if known is None or not any("$" in word for word in given):
        return
    for name in sorted(variables_in(given) - {*record.environment, *known.withheld, *enforced}):
        mark, value = known.marks.get(name), environment.get(name)
        if mark is None and (value is None or is_noise(name, value) or names_a_cache(name)):
            continue
        if mark is not None and (mark == SECRET or (value is not None and known.is_same(name, value))):
            continue
        if _depends_on(given, name, environment, enforced):
            yield name


def _depends_on(
    command: Sequence[str], name: str, environment: Mapping[str, str], enforced: frozenset[str]
) -> bool:
    """Tell whether a command starts another server for another value of a variable, as far as is known."""
    from rekindle.command_line import UnclearCommand, unwrap

    one, other = ({**environment, name: value} for value in ("1", "2"))
    try:
        unwrap(command, one)
    except UnclearCommand:
        return True
    return _unwrapped(command, one, enforced) != _unwrapped(command, other, enforced)


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
