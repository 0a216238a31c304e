# SPDX-License-Identifier: Apache-2.0
"""The permission to use AMX tiles, which CRIU does not restore.

A process must ask the kernel before its first tile instruction (arch_prctl(ARCH_REQ_XCOMP_PERM)). The
permission is inherited by fork, cleared by exec and unknown to CRIU 4.2.1: after a restore the first
tile instruction kills the task with SIGILL. So CRIU itself asks, before it forks the tasks: a shared
object whose constructor does that is preloaded into it. It is compiled on the first restore on a
processor with AMX; it uses no library, so that it fits every loader.
"""

import hashlib
import os
import shutil
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
    """Whether this processor has AMX and the kernel lets processes use it."""
    return "amx_tile" in Path("/proc/cpuinfo").read_text().split()


def environment(tools: Path) -> dict[str, str]:
    """What CRIU's environment needs so that restored tasks may use AMX; nothing where there is none."""
    if not present():
        return {}
    helper = str(compiled(tools))
    if any(character in helper for character in " \t\n:"):  # LD_PRELOAD is a list that these divide
        raise UsageError(f"{helper} cannot be preloaded", hint="set REKINDLE_HOME to a path without such")
    return {"LD_PRELOAD": helper}


def compiled(tools: Path) -> Path:
    """The shared object, compiled if it is not there yet. Raises CapabilityError without a C compiler."""
    from rekindle.run import replay, run

    target = tools / f"amx-{hashlib.sha256(SOURCE.encode()).hexdigest()[:16]}.so"
    if target.exists():
        return target
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if compiler is None:
        raise CapabilityError(
            "this processor has AMX, and there is no C compiler to prepare the restore for it",
            hint="install one: apt-get install gcc",
        )
    source = tools / f"{target.stem}.{os.getpid()}.c"
    staged = source.with_suffix(".so")
    source.write_text(SOURCE)
    argv = [compiler, "-O2", "-fPIC", "-shared", "-nostdlib", "-o", str(staged), str(source)]
    try:
        done = run(argv, timeout=60)
        if done.status != 0:
            raise CapabilityError("the AMX helper does not compile", cause=done.output, hint=replay(argv))
        staged.replace(target)
    finally:
        source.unlink(missing_ok=True)
        staged.unlink(missing_ok=True)
    return target
