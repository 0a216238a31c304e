# SPDX-License-Identifier: Apache-2.0
"""Which processor features of /proc/cpuinfo name instructions that a program may use.

The other features say how the OS kernel, a hypervisor or a debugger may use the processor, which errors it is
free of, or what is fast. No program depends on them: it would run the same code without them.

Sources: Linux, arch/x86/include/asm/cpufeatures.h (names); Intel SDM volume 1, chapter 5, and volume 2; AMD
APM volume 3, appendix D (which instructions need a feature, and which of them run at privilege level 3);
Linux, Documentation/arch/arm64/elf_hwcaps.rst.
"""

from collections.abc import Set as AbstractSet

_X86 = """
    fpu tsc cx8 sep cmov clflush mmx fxsr syscall lm mmxext rdtscp 3dnow 3dnowext 3dnowprefetch
    pni ssse3 cx16 movbe popcnt pclmulqdq aes rdrand f16c fma xsave xsaveopt xsavec xgetbv1
    lahf_lm abm misalignsse xop fma4 tbm lwp mwaitx ring3mwait clzero rdpru
    fsgsbase bmi1 bmi2 rtm mpx rdseed adx clflushopt clwb sha_ni sha512 sm3 sm4 ospke waitpkg gfni vaes
    vpclmulqdq rdpid cldemote movdiri movdir64b enqcmd serialize tsxldtrk cmpccxadd movrs sgx user_shstk
    apx rng_en ace_en ace2_en phe_en pmm_en
"""
_X86_FAMILIES = ("sse", "avx", "amx_")  # new ones appear with new processors
# The event stream wakes who waits for an event; a program that finds none only waits longer.
_ARM_OTHERS = frozenset({"evtstrm"})


def of(architecture: str, features: AbstractSet[str]) -> frozenset[str]:
    """Return those of a processor's features that name instructions."""
    if architecture == "x86_64":
        known = set(_X86.split())
        return frozenset(each for each in features if each in known or each.startswith(_X86_FAMILIES))
    return frozenset(features - _ARM_OTHERS)
