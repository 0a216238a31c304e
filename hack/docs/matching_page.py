# SPDX-License-Identifier: Apache-2.0
"""Write docs/matching.md from restore/decide/rules.py; with --check, fail if the file differs."""

import sys

from hack.docs import pages
from rekindle.errors import RekindleError
from rekindle.report import Rung
from restore.decide.rules import RULES, Rule

HEAD = """\
# What is compared

Generated from `restore/decide/rules.py` by `make docs`; do not edit.

Before `restore` fetches a layer, it compares this node with what the image says of the one that it was made
on. `rekindle match IMAGE` prints what differs and does nothing. So does `restore --plan`; `inspect` does not
try what this node can do, and asks no policy. The report has it under `reasons`, each with one of the codes
below.

- **Hard and soft.** A hard difference forbids its rung. A soft one is told, and does no harm.
- **What was not recorded** is not compared, nor what this node does not tell.
- **The process** is one whole: a single hard difference forbids it. Of the GPUs, only those count that it
  held, and of files those that it had mapped or open.
- **The kernel cache** is judged entry by entry. Its rung can be taken if any entry is of use; the others are
  told as soft then, with how many they are. Only if none is, they are hard. Each kind of cache has a layer of
  its own, and one without an entry of use is not fetched.
- **Files that the cache brings.** A process may have files of the kernel cache mapped. Those that are missing
  here are extracted from the image to where they were, before the process comes back, and count as there. A
  file that is there and differs is a difference.
- **The device map.** GPUs that are on both sides, by their UUIDs, keep their places; the other places are
  taken by the other GPUs, in their order. If all recorded ones are here, there is no map.

## A policy may say otherwise

In `policy.toml` ([trust.md](trust.md)), or the file that `--policy` names:

```toml
[match]
soft = ["driver"]       # is told, and forbids nothing any more
hard = ["kernel"]       # forbids its rung
```

Such a reason says `by_policy`. What is called fixed below cannot be changed: without it, `restore` could do
nothing, or nothing depends on it. What a policy makes soft is merely tried. CRIU still compares build ids,
the driver still looks at its GPUs, and if they refuse, the next rung is taken. If they do not, it is for the
oracle to find out.

## An example

A snapshot of vLLM on an H100, on a node with another H100 and an older driver (shortened):

```
$ rekindle match registry.example.com/models/llama:1
               recorded                                   here
architecture = x86_64
cpu_vendor   = GenuineIntel
cpu_model    = INTEL(R) XEON(R) PLATINUM 8592+
cpu_level    = x86-64-v4
xsave        = 393959
kernel       ≠ 6.8.0-1029                                 6.11.0-21
page_bytes   = 4096
libc         = glibc 2.39
container    = kubepods
packages     = python 3.12 torch 2.11.0+cu129 triton 3.6
gpus         = NVIDIA H100 80GB HBM3
gpu_driver   ≠ 580.65.06                                  570.158.01
cuda         ≠ 13.0                                       12.8
image       registry.example.com/models/llama:1 sha256:5d1c…
process     no not here
               (harmless) kernel: kernel was 6.8.0-1029, is 6.11.0-21
               (harmless) gpu-uuid: GPU's uuid was GPU-7d3c…, is GPU-e10a…
               driver: driver was 580.65.06, is 570.158.01 — install the recorded branch of the driver, …
               rootfs-file: /usr/lib/…/libcuda.so.580.65.06 was 96,104,152 bytes, …, is missing — …
cache       →  fetches 48,211,003 bytes, takes about 94.5 s, is given up after 15 s
cold        or fetches 0 bytes, takes about 94.0 s
device map  GPU-7d3c… → GPU-e10a…
```

`→` is the rung that a restore would take, `or` one that is left if that fails, `no` one that cannot be taken.
The process is given up if it does not answer in that time, the kernel cache if it is not in place; how long
the server starts on it is up to the server. Exit status: 0 if the process could be restored, 3 if not.
"""
TITLES = {
    Rung.PROCESS: ("The process", "What forbids the process rung, or is told of it."),
    Rung.CACHE: (
        "The kernel cache",
        "Of each entry. An entry that says nothing of a field does not differ in it.",
    ),
    Rung.COLD: ("The command", "For the kernel cache and for the cold start."),
}
TAIL = """\

## What comes up on the way

A rung that was possible may fail. What has come of it until then is undone, and the reason has one of these
codes. Its `field` is the phase in which that happened. No policy changes them.

"""
HAPPENED = (
    ("`restore-failed`", "CRIU could not restore the process, or the restored server does not answer"),
    ("`oracle-mismatch`", "it gives another answer than the one that was recorded"),
    (
        "`deadline`",
        "it was not done in time: `--process-deadline`, `--cache-deadline`, or what the plan says",
    ),
    ("`bug`", "an error in rekindle: its traceback is on the standard error"),
)
LAST = """\

If the image itself cannot be had, the reason has the code of that error, too, with `image` as its field, on
each rung above the cold start. All other errors end everything: a signature that is missing or bad, a digest
that does not match and a document that is malformed are never a reason to go on.
"""
OWN = {"restore", "oracle"}  # restore/decide/rules.py gives them the first two of these names


def page() -> str:
    """Return the text of the page."""
    parts = [HEAD]
    for rung, (title, text) in TITLES.items():
        rows = [
            (f"`{code}`", _strictness(rule), rule.why, rule.advice, rule.source)
            for code, rule in RULES.items()
            if rule.rung is rung
        ]
        head = ("code", "kind", "why", "what to do", "source")
        parts.append(f"\n## {title}\n\n{text}\n\n{pages.table(head, rows)}")
    codes = [f"`{e.code}`" for e in RekindleError.__subclasses__() if e.descends and e.code not in OWN]
    others = (", ".join(codes), "an error of that class ([errors.md](errors.md)), as in fetching a layer")
    return "".join(parts) + TAIL + pages.table(("code", "meaning"), [*HAPPENED, others]) + LAST


def _strictness(rule: Rule) -> str:
    return ("hard" if rule.hard else "soft") + (", fixed" if rule.fixed else "")


if __name__ == "__main__":
    sys.exit(pages.finish("matching.md", page()))
