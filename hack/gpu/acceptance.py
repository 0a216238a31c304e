# SPDX-License-Identifier: Apache-2.0
"""Test rekindle on this machine's NVIDIA GPU; see docs/gpu/README.md.

A step that fails or passes its deadline does not stop the others. The report is rewritten after every step,
so that an interrupted run keeps what it has. One call takes at most --deadline seconds: with --work, the
next call goes on with the steps that are left. Exits with 0 when all are done, 1 if any failed, and 75 if
steps are left.
"""

import argparse
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from hack.gpu.errors import LateError, SkippedError, in_words
from hack.gpu.journal import Found, Journal, kept
from hack.gpu.starts import MARK, Lab, marked
from hack.gpu.steps import STEPS, AcceptanceStep
from hack.gpu.trial import Trial, TrialOptions

_END_SECONDS = 10.0  # for the end of the last step and the report
_RUN_AGAIN = "no time left in this call: run it again with the same --work"


def main() -> int:
    args = _arguments()
    signal.signal(signal.SIGTERM, _exit)
    with contextlib.ExitStack() as stack:
        base = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory(dir=_large_disk())))
        work = base.absolute()
        for directory in (work, work / "home", work / "logs", args.out):
            directory.mkdir(parents=True, exist_ok=True)
        lab = Lab(work=work, mark=kept(work / "mark", os.urandom(8).hex()))
        options = _options(args)
        shown = {name: getattr(options, name) for name in ("gib", "runs", "quick", "stand_in")}
        names = [step.name for step in STEPS]
        journal = Journal(work=work, out=args.out, logs=lab.logs, steps=names, options=shown)
        journal.load()
        stack.callback(_kill_all, lab)
        os.environ[MARK] = lab.mark  # for processes that rekindle starts from within this one
        deadline = time.monotonic() + args.deadline - _END_SECONDS
        journal.write()
        for step in _chosen(args.only, journal):
            journal.results[step.name] = _run(
                Trial(options=options, lab=lab, journal=journal), step, deadline
            )
            journal.write()
    failed = [name for name in journal.results if journal.status(name) == "failed"]
    left = [name for name in journal.results if journal.status(name) == "unfinished"]
    told = [f"{what}: {', '.join(names)}" for what, names in (("failed", failed), ("left", left)) if names]
    print("; ".join([f"gpu-acceptance: {args.out / 'report.md'}", *told]))
    return 75 if left else 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu-acceptance", description=__doc__)
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="directory for report.md, report.json and log.txt"
    )
    parser.add_argument("--quick", action="store_true", help="use little memory and few runs")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        choices=[step.name for step in STEPS],
        metavar="STEP",
        help="run this step and the steps that it needs: " + ", ".join(step.name for step in STEPS),
    )
    parser.add_argument("--gib", type=float, help="GiB of weights on the GPU (default: 4; with --quick: 1)")
    parser.add_argument("--runs", type=int, help="number of restores (default: 10; with --quick: 3)")
    parser.add_argument(
        "--deadline", type=float, default=540.0, metavar="S", help="seconds for this call (default: 540)"
    )
    parser.add_argument(
        "--work", type=Path, help="keep all files in this directory; a later run continues there"
    )
    parser.add_argument(
        "--python",
        default=os.environ.get("SERVER_PYTHON") or shutil.which("python3"),
        help="interpreter with torch and Triton for the server (default: $SERVER_PYTHON, or python3)",
    )
    parser.add_argument(
        "--vllm-model", type=Path, metavar="DIR", help="model for vLLM, instead of a tiny one"
    )
    parser.add_argument(
        "--stand-in", action="store_true", help="run against the tests' fake driver, without torch"
    )
    return parser.parse_args()


def _options(args: argparse.Namespace) -> TrialOptions:
    return TrialOptions(
        python=args.python,
        gib=args.gib or (1.0 if args.quick else 4.0),
        runs=args.runs or (3 if args.quick else 10),
        few=1 if args.quick else 3,
        cold_runs=1 if args.quick else 2,
        quick=args.quick,
        stand_in=args.stand_in,
        vllm_model=args.vllm_model,
    )


def _chosen(only: list[str], journal: Journal) -> list[AcceptanceStep]:
    """Return the steps to run: all that were not run yet, or the requested ones and the steps they need."""
    done = {step.name for step in STEPS if journal.status(step.name) == "done"}
    if not only:
        over = done | {step.name for step in STEPS if journal.status(step.name) == "failed" or step.asked}
        return [step for step in STEPS if step.name not in over]
    wanted = {"machine", *only}
    needed = {name for step in STEPS if step.name in wanted for name in step.needs}
    return [s for s in STEPS if s.name in wanted or (s.name in needed and s.name not in done)]


def _run(trial: Trial, step: AcceptanceStep, deadline: float) -> Found:
    """Run one step. Return its findings, with `status` (`done`, `failed`, `skipped` or `unfinished`),
    `reason` and `seconds`. Unfinished is a step for which this call has no time; one that began twice and is
    still not done has failed."""
    missing = [name for name in step.needs if trial.journal.status(name) != "done"]
    if missing:
        return {"status": "skipped", "reason": f"needs {', '.join(missing)}", "seconds": 0.0}
    left = deadline - time.monotonic()
    begun = trial.journal.results.get(step.name, {}).get("begun", 0)
    if left < 1:
        return {"status": "unfinished", "reason": _RUN_AGAIN, "seconds": 0.0, "begun": begun}
    _say(f"{step.name} …")
    began = time.monotonic()
    found: Found = {}
    status, reason = "done", ""
    try:
        with _at_most(min(step.seconds, left)):
            step.act(trial, found)
    except SkippedError as error:
        status, reason = "skipped", str(error)
    except LateError as error:
        if left < step.seconds and not begun:
            _kill_all(trial.lab)
            seconds = time.monotonic() - began
            return {"status": "unfinished", "reason": _RUN_AGAIN, "seconds": seconds, "begun": begun + 1}
        status, reason = "failed", in_words(error)
    except Exception as error:
        status, reason = "failed", in_words(error)
        with open(trial.lab.log("failures"), "a") as file:
            file.write(f"{step.name}:\n{traceback.format_exc()}\n")
    _kill_all(trial.lab)
    seconds = time.monotonic() - began
    _say(f"{step.name} {status} after {seconds:.1f} s {reason[:300]}")
    return {**found, "status": status, "reason": reason, "seconds": seconds}


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    def late(*_: object) -> None:
        raise LateError(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _exit(signum: int, _: object) -> None:
    raise SystemExit(128 + signum)


def _kill_all(lab: Lab) -> None:
    """Kill every process of this run that is still there."""
    for pid in marked(lab):
        _say(f"killing leftover process {pid}")
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _large_disk() -> str | None:
    """Return a directory for gigabytes of dumps: /tmp may be in memory."""
    return "/var/tmp" if os.access("/var/tmp", os.W_OK) else None  # noqa: S108


def _say(text: str) -> None:
    print(f"gpu-acceptance: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
