# SPDX-License-Identifier: Apache-2.0
"""Give restored processes the permission to use AMX tiles, which CRIU does not restore.

A process must ask the OS kernel before its first tile instruction (arch_prctl(ARCH_REQ_XCOMP_PERM)). The
permission is inherited by fork, cleared by exec and unknown to CRIU 4.2.1: after a restore the first
tile instruction kills the task with SIGILL. We preload a shared object into CRIU whose constructor asks
for the permission, so that the tasks that CRIU forks inherit it. It is compiled before the first restore
on a processor with AMX, and links no library, so that every loader accepts it.
"""

import hashlib
import os
from pathlib import Path

from rekindle.errors import CapabilityError, UsageError

SOURCE = """
__attribute__((constructor)) static void ask(void) {
    long result = 158 /* arch_prctl */;
    __asm__ volatile("syscall" : "+a"(result)
                     : "D"(0x1023L) /* ARCH_REQ_XCOMP_PERM */, "S"(18L) /* XFEATURE_XTILE_DATA */
                     : "rcx", "r11", "memory");
    (void)result;
}
"""


def present() -> bool:
    """Tell whether this processor has AMX and the OS kernel lets processes use it."""
    return "amx_tile" in Path("/proc/cpuinfo").read_text().split()


def environment(tools: Path) -> dict[str, str]:
    """Return the variables that CRIU needs so that restored tasks may use AMX; {} without AMX.

    Raises UsageError for a directory that LD_PRELOAD cannot name, and as `compiled` does.
    """
    if not present():
        return {}
    helper = str(compiled(tools))
    if any(character in helper for character in " \t\n:"):  # these separate the entries of LD_PRELOAD
        raise UsageError(
            f"cannot preload {helper!r} into CRIU",
            hint="set REKINDLE_HOME to a path without blanks and colons",
        )
    return {"LD_PRELOAD": helper}


def compiled(tools: Path) -> Path:
    """Return the path of the shared object, compiled if it does not exist yet.

    Raises CapabilityError if there is no C compiler or it fails.
    """
    from rekindle.run import replay, run

    target = tools / f"amx-{hashlib.sha256(SOURCE.encode()).hexdigest()[:16]}.so"
    if target.exists():
        return target
    import shutil  # it loads compressors that a restore does not need

    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if compiler is None:
        raise CapabilityError(
            "restoring on a processor with AMX needs a C compiler, and none is installed",
            hint="apt-get install gcc",
        )
    source = tools / f"{target.stem}.{os.getpid()}.c"
    staged = source.with_suffix(".so")
    source.write_text(SOURCE)
    argv = [compiler, "-O2", "-fPIC", "-shared", "-nostdlib", "-o", str(staged), str(source)]
    try:
        done = run(argv, timeout=60)
        if done.status != 0:
            raise CapabilityError("cannot compile the AMX helper", cause=done.output, hint=replay(argv))
        staged.replace(target)
    finally:
        source.unlink(missing_ok=True)
        staged.unlink(missing_ok=True)
    return target
