# SPDX-License-Identifier: Apache-2.0
"""Write docs/matching.md from restore/decide/rules.py; with --check, fail if the file differs."""

import sys

from hack.docs import pages
from rekindle.errors import RekindleError
from rekindle.report import Rung
from restore.decide.rule import Rule
from restore.decide.rules import RULES

HEAD = """\
# What is compared

Generated from `restore/decide/rules.py` by `make docs`; do not edit.

Before `restore` fetches a layer, it compares this node with the one that the image records.
`rekindle match IMAGE` and `restore --plan` print the differences and do nothing else. `inspect` neither tests
what this node can do nor reads a policy. The report has the differences under `reasons`, each with one of
these codes.

- **Hard and soft.** A hard difference forbids its rung. A soft one is only reported.
- **Missing facts.** A fact that was not recorded, or that this node does not reveal, is not compared.
- **The process** is a whole: one hard difference forbids it. Only GPUs that it held count, and only files
  that it had mapped or open, or has read.
- **Contents decide.** Times and inodes of equal files differ between copies of one container image, and are
  equal for different files where the builder sets all times to one value. See
  [what is on the disk](#what-is-on-the-disk).
- **The kernel cache** is compared entry by entry. One usable entry is enough for its rung; the differences of
  the others are soft, and reported with their number. They are hard if no entry is usable. Each kind of cache
  has a layer of its own, which is not fetched if none of its entries is usable.
- **Files from the cache.** A process may have files of the kernel cache mapped. If such a file is missing
  here, it is extracted from the image to its recorded path before the process is restored, and counts as
  present. A file with other content is a difference.
- **The environment.** A variable is hard, told or left out by its name and form: see `environment`,
  `environment-secret` and `environment-other`. A secret that was set and is set is compared after the process
  is restored and before its port opens, since no record holds it. `--accept-environment NAME` makes the
  difference of one variable soft, and so does `environment` in a policy; both take patterns (`HF_*`).
- **The device map.** GPUs that are on both nodes, by their UUIDs, keep their places; the remaining GPUs take
  the other places in order. If all recorded GPUs are here, there is no map.

## Policies

A policy can change rules, in `policy.toml` ([trust.md](trust.md)) or the file that `--policy` names:

```toml
[match]
soft = ["driver"]       # is only reported
hard = ["kernel"]       # forbids its rung
environment = ["HF_*"]  # variables whose difference is only reported
```

Reasons that follow from a policy or from `--accept-environment` say `by_policy`. Rules that are called fixed
below cannot be changed: either `restore` cannot work without them, or nothing depends on them. A difference
that a policy makes soft does not make the restore work: CRIU still compares build ids, and the driver still
checks its GPUs. If they refuse, `restore` falls back to the next rung; if not, the oracle decides.

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
process     no
               (harmless) kernel: kernel was 6.8.0-1029, is 6.11.0-21
               (harmless) gpu-uuid: GPU's uuid was GPU-7d3c…, is GPU-e10a…
               driver: driver was 580.65.06, is 570.158.01 — install the recorded branch of the driver, …
               rootfs-file: /usr/lib/…/libcuda.so.580.65.06 was 96,104,152 bytes, …, is missing — …
cache       →  fetches 48,211,003 bytes, takes about 94.5 s, the cache must be in place within 15 s
cold        or fetches 0 bytes, takes about 94.0 s
device map  GPU-7d3c… → GPU-e10a…
```

`→` marks the rung that a restore would take, `or` a fallback, `no` a rung that is not possible. A restore
gives up the process if it does not answer in the given time, and the kernel cache if it is not in place by
then; there is no limit for the start of the server on the cache. Exit status: 0 if the process can be
restored, 3 if not.
"""
TITLES = {
    Rung.PROCESS: ("The process", "Differences that forbid the process rung, or are reported for it."),
    Rung.NEUTRAL: (
        "The neutral process",
        "Besides these, what is hard for the process, but for its command, its environment and its GPUs.",
    ),
    Rung.CACHE: (
        "The kernel cache",
        "For each entry. A field that an entry does not record is not compared.",
    ),
    Rung.COLD: ("The command", "For the kernel cache and for the cold start."),
}
TAIL = """\

## Failures

A rung that was possible can still fail. `restore` then undoes it and reports a reason with one of these
codes, whose `field` is the phase that failed. No policy changes them.

"""
HAPPENED = (
    ("`restore-failed`", "CRIU could not restore the process, or the restored server does not answer"),
    ("`oracle-mismatch`", "the restored server does not give the recorded answer"),
    (
        "`deadline`",
        "the rung was not done in time: `--process-deadline`, `--cache-deadline`, or the time in the plan",
    ),
    ("`bug`", "a bug in rekindle; its traceback is on standard error"),
)
TODAY = """\

## A restored process and a start of today

Everything in which a restored process can differ from a server that the same command starts here, with the
test in `tests/integration/` that provokes it. Codes are those of the rules above.

"""
TODAY_ROWS = (
    (
        "environment variables, except those of the platform",
        "compared: `environment`, `environment-secret`, `environment-other`; lower rungs get those of today",
        "`test_environment.py`",
    ),
    (
        "secrets in variables and options",
        "compared once the process is restored, before its port opens",
        "`test_environment.py`",
    ),
    (
        "secret files: of containers, of Kubernetes, of systemd, on the disk",
        "compared once the process is restored, before its port opens: `named-file`",
        "`test_secret_files.py`",
    ),
    (
        "API keys of vLLM",
        "of today, enforced by rekindle ([secrets.md](secrets.md)); else `api-key`",
        "`test_api_key.py`, `test_vllm_key.py`",
    ),
    (
        "arguments, wrappers, variables that a shell puts into the command",
        "compared: `command`",
        "`test_ladder.py`, `test_drop_in.py`, `test_commands.py`",
    ),
    (
        "code, packages, configuration, templates, models, files mapped or named",
        "compared: `rootfs-file`, `code-file`, `package`, `named-file`, `model-changed`; others are told",
        "`test_disk.py`",
    ),
    (
        "processor, OS kernel, GPUs, driver, capabilities",
        "compared: `cpu-feature`, `xsave`, `kernel-older`, `gpu-model`, `driver`, `capabilities`",
        "`test_container.py`, `test_gpu_snapshot.py`, `tests/unit/restore/decide/test_matrix.py`",
    ),
    (
        "memory that it needs",
        "compared with the limit and what is free: `memory`",
        "`test_needs.py`",
    ),
    (
        "huge pages, tasks, room on the disk, IPv6, ports on the host's network",
        "compared with what is free: `huge-pages`, `tasks`, `disk`, `ipv6`, `port`",
        "`test_needs.py`; IPv6, which only a boot turns off: `tests/unit/restore/decide/test_match_needs.py`",
    ),
    ("pseudo-terminals", "as in the snapshot, with numbers of the cell", "`test_snapshot_restore.py`"),
    ("standard output and error", "of today", "`test_snapshot_restore.py`"),
    ("published address", "of today; without `--publish` as recorded", "`test_snapshot_restore.py`"),
    ("the date", "of today; the process sees it jump", "`test_snapshot_restore.py`"),
    (
        "monotonic clocks and timers",
        "go on from the snapshot, so no timer fires late by the time between",
        "`test_snapshot_restore.py`",
    ),
    ("PIDs", "as at the snapshot, in a PID namespace of its own", "`test_snapshot_restore.py`"),
    (
        "shared memory and TMPDIR, deleted files that were open",
        "of the snapshot; each replica has its own",
        "`test_snapshot_restore.py`",
    ),
    (
        "files open for writing, sockets bound to paths",
        "refused at the snapshot ([snapshots.md](snapshots.md))",
        "`test_obstacles.py`",
    ),
    (
        "connections to the outside",
        "refused at the snapshot; a private network has none",
        "`test_obstacles.py`",
    ),
    (
        "signals, exit status, process groups of a supervisor",
        "as of the server itself",
        "`test_control_group.py`, `test_systemd.py`",
    ),
    (
        "host name, time zone files, name service, users",
        "what the process has read, it keeps; those files are told as `read-file`",
        "`test_disk.py`",
    ),
    (
        "resource limits, oom_score_adj, nice value, I/O priority, scheduling policy, umask, core dump "
        "filter",
        "of today; what the server had set itself is set again; `limit` if that cannot be",
        "`test_limits.py`",
    ),
    (
        "random numbers of Python processes, if the program has not seeded them itself: `random`, NumPy, "
        "OpenSSL, `uuid1`, `tempfile`",
        "reseeded before the server is asked anything, unless by `snapshot --reseed none` "
        "([secrets.md](secrets.md#random-numbers)); those of other programs are shared by all replicas",
        "`test_reseed.py`",
    ),
    (
        "CPUs of threads",
        "of today; bound threads are bound again where their CPUs are here; else `cpu-affinity`",
        "`test_limits.py`",
    ),
    (
        "number of threads, chosen by the CPUs or the quota",
        "told: `cpu-count`, `cpu-quota`",
        "`test_limits.py`",
    ),
    ("timer slack", "set again if the server had set it", "`test_limits.py`"),
    ("options of sockets that CRIU loses", "set again", "`test_limits.py`"),
    (
        "Landlock, keys and keyrings, pressure triggers",
        "refused at the snapshot ([snapshots.md](snapshots.md))",
        "`test_limits.py`",
    ),
    (
        "groups, ambient capabilities, securebits, no_new_privs",
        "as at the snapshot: more than a start would have is `more-privileged`, other ones are told as "
        "`other-credentials`; no_new_privs of today is inherited",
        "`test_credentials.py`",
    ),
    (
        "addresses in memory",
        "of the snapshot, the same in all replicas; of programs that it starts after the restore, random",
        "`test_limits.py`",
    ),
    ("io_uring", "refused in a cell, so that servers use epoll", "`test_cell.py`"),
    (
        "addresses of clients",
        "127.0.0.1, unless they are [passed on](operations.md#who-the-clients-are)",
        "`test_operate.py`",
    ),
    (
        "labels of AppArmor and SELinux",
        "as at the snapshot: another one is `security-label`; without one, that of today",
        "`tests/unit/restore/decide/test_match_credentials.py`; no OS kernel here has such a module",
    ),
    ("NUMA policy", "told at the snapshot and here: `memory-policy`", "`test_limits.py`"),
)
LAST = """\

If the image cannot be read, each rung above the cold start has a reason with the code of that error and the
field `image`. After all other errors, `restore` fails: it never continues after a missing or bad signature, a
digest that does not match, or a malformed document.
"""
DISK = """\

## What is on the disk

A restored server continues with what it read at its start. What a start here would read is compared with
that. `snapshot` watches which files the server opens (fanotify) and records those that it has not written
itself, by content, as its command names them: if a link leads elsewhere today, the file behind it is
compared.

"""
READ = (
    (
        "modules that a Python server has imported, in every process of it, and other files of their "
        "packages",
        "the sha256 of each source; of packages and the standard library, of each file that was read",
        "`code-file`, hard",
    ),
    (
        "scripts of other interpreters (JavaScript, Ruby, Perl, Lua, PHP, Java, shells)",
        "the sha256",
        "`code-file`, hard",
    ),
    (
        "installed packages of the Python that the command runs",
        "name and version, in each directory that it searches",
        "`package`, hard if the server has loaded a file of it; else `package-other`, soft",
    ),
    (
        "what a start would load beyond that: new `.pth` files, sitecustomize, a module found before "
        "a loaded one, a new package with entry points other than commands",
        "the names in these directories",
        "`package`, hard",
    ),
    (
        "files that the command names, also in lists, `NAME=PATH` and JSON, or a variable; files "
        "below directories that the command names",
        "the sha256 up to 1 MiB, parts of larger ones",
        "`named-file`, hard",
    ),
    (
        "files that may hold a secret: in `/run/secrets`, `/run/credentials` and `/etc/secrets`, in memory "
        "and not writable, with the name of a secret or named by an option or variable with such a name, or "
        "named and with a password in them ([ADR 34](adr/0034-secret-files.md))",
        "a digest whose key the restored process has, so not before it is restored; only whether they are "
        "there",
        "`named-file`, hard, or as other files",
    ),
    (
        "the model that vLLM's command names",
        "the commit, if it is the hub's; each file by the digest in the hub's cache, or as above; new"
        " files in a directory",
        "`model-changed`, hard; missing: `model-file`, soft",
    ),
    (
        "other models: files of the hub's cache, and weights by their suffix",
        "the commit of each branch and tag; as above",
        "`model-changed`, hard",
    ),
    (
        "programs and libraries, and whatever else was mapped or open",
        "the build id, else the sha256; above 256 MiB parts",
        "`rootfs-file`, hard",
    ),
    (
        "other files that were read",
        "the sha256 up to 1 MiB, parts of larger ones",
        "`read-file`, soft",
    ),
)
MISSED = """\

Of a large file, the first and last 64 KiB and 256 pages are compared, and of safetensors the header and a
page of every tensor. So training, quantizing and merging are noticed. **Missed** are a change within a
tensor or a file that touches none of these pages, such as a few rows of an embedding; a library that was
patched without linking it anew, since its build id stays; a blob of the hub's cache whose content is not
what its name says.

**Not compared**:

- what was read before the command was started, or by other processes for it: a database, a service;
- directories: a file that was not there and would be read today, except the modules and model files above;
- files that the server has written itself, the kernel caches, `/proc`, `/sys`, `/dev`, and what container
  runtimes and machines make for themselves: `/etc/hosts`, `/etc/resolv.conf`, `/etc/hostname`;
- files below `/run` that are no secrets and that neither the command nor a variable names;
- tokens that a platform issues for each pod, and that clients read again: service accounts, web identities;
- cached bytecode, if its source exists: a start would use stale bytecode only if somebody made it for that;
- `RECORD` and other metadata of packages that the server has not read;
- bytes that the server would read from the network.

If fanotify does not work (a filter of system calls may forbid it), `snapshot` warns, and of modules and files
only those are compared that are mapped or open or that the command names, and the versions of all packages.

A file that changes between the server's start and the dump fails the snapshot. To compare the contents for
vLLM takes 0.3 s of processor time; what was found is remembered in `$REKINDLE_HOME/compared` until a size,
time, ctime or inode changes or the machine boots, which takes 26 ms to see (medians, n = 9). It is not
remembered for file systems whose ctime is a whole second, as that of squashfs and erofs, where it says
nothing.
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
    others = (
        ", ".join(codes),
        "an error of that class ([errors.md](errors.md)), for example while fetching a layer",
    )
    happened = pages.table(("code", "meaning"), [*HAPPENED, others])
    today = pages.table(("what", "what is done", "test"), TODAY_ROWS)
    return "".join(parts) + _disk() + TODAY + today + TAIL + happened + LAST


def _disk() -> str:
    return DISK + pages.table(("what", "compared by", "if it differs"), READ) + MISSED


def _strictness(rule: Rule) -> str:
    return ("hard" if rule.hard else "soft") + (", fixed" if rule.fixed else "")


if __name__ == "__main__":
    sys.exit(pages.finish("matching.md", page()))
