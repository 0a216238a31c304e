# SPDX-License-Identifier: Apache-2.0
"""Render the Markdown report from report.json alone."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

GOAL = 10.0  # a restore should be at least so many times as fast as a cold start
_SHOWN_SECONDS = 0.0005


def render(document: Mapping[str, Any]) -> str:
    """Return the page. It gives the reason for every step that is not done."""
    steps, options = document["steps"], document["options"]
    parts = ["# GPU acceptance\n"]
    if options["stand_in"]:
        parts.append(
            "**The driver, NVML and the server were stand-ins: this shows that the test runs, and says "
            "nothing about a GPU.**\n"
        )
    parts += [
        f"{document['created']}, {options['gib']:g} GiB of weights"
        + (", quick" if options["quick"] else "")
        + ". Times are medians in seconds (fastest to slowest); n is the number of runs.\n",
        _verdicts(steps),
        _summary(steps),
    ]
    sections: Sequence[tuple[str, str, Callable[[Mapping[str, Any]], str]]] = (
        ("machine", "Machine", _machine),
        ("probes", "Probes", _probes),
        ("doctor", "rekindle doctor", _doctor),
        ("cold", "Starts without rekindle", _starts),
        ("snapshot", "Snapshot", _snapshot),
        ("restore", "Restores, each after `kill -9` of the one before", _restores),
        ("floor", "The floor, and the time above it", lambda _: _floor(steps)),
        ("rollback", "Failures, and whether the server answers afterwards", _rollback),
        ("cache", "The kernel cache, with a doctored record", _cache),
        ("backends", "Both backends of the driver", _backends),
        ("load", "Restores under load", _restores),
        ("uncached", "Restores of a dump that is not in the page cache", lambda _: _uncached(steps)),
        ("memory", "Memory mapped, and copied", _memory),
        *((name, f"A server {name.replace('-', ' ', 1)}", _feature) for name in steps if "with-" in name),
        ("vllm-start", "vLLM: starts without rekindle", _vllm_start),
        ("vllm-snapshot", "vLLM: snapshot", lambda step: _snapshot(step["snapshot"])),
        ("vllm-restore", "vLLM: restores", _restores),
        ("vllm-cache", "vLLM: the kernel cache, with a doctored record", _cache),
        ("kill", "kill -9 of a live restored server", _restores),
    )
    for name, title, written in sections:
        step = steps[name]
        parts.append(f"## {title}\n")
        if step["status"] != "done":
            parts.append(f"**{step['status']}**: {_line(step['reason'])}\n")
        parts.append(_written_or_error(written, step))
    return "\n".join(part for part in parts if part)


def _written_or_error(written: Callable[[Mapping[str, Any]], str], step: Mapping[str, Any]) -> str:
    """Return the section of a step; as much as there is, if the step failed."""
    if step["status"] == "done":
        return written(step)
    try:
        return written(step)
    except (KeyError, IndexError, statistics.StatisticsError):
        return ""


def _verdicts(steps: Mapping[str, Any]) -> str:
    lines = []
    for title, step_of_cold, step_of_runs in (
        ("The decoder", "cold", "restore"),
        ("vLLM", "vllm-start", "vllm-restore"),
    ):
        cold, runs = steps[step_of_cold].get("cold"), steps[step_of_runs].get("runs")
        if not cold or not runs:
            lines.append(f"- {title}: not measured.")
            continue
        before, after = _median(cold, "seconds"), _median(runs, "seconds")
        ratio = before / after
        lines.append(
            f"- {title}: first token {after:.2f} s after the start of `rekindle restore` (n = {len(runs)}), "
            f"{before:.2f} s after a cold start (n = {len(cold)}): **{ratio:.1f} times as fast; at most 1/10 "
            f"of the cold start: {'yes' if ratio >= GOAL else 'no'}**."
        )
    if (floor := _floor_seconds(steps)) and steps["restore"].get("runs"):
        least = sum(floor.values())
        above = _median(steps["restore"]["runs"], "seconds") - least
        lines.append(
            f"- The floor of that restore (its bytes at this machine's copy rates): {least:.2f} s; "
            f"above it: {above:.2f} s."
        )
    return "\n".join(lines) + "\n"


def _summary(steps: Mapping[str, Any]) -> str:
    rows = [
        (name, step["status"], f"{step['seconds']:.1f} s", _line(step["reason"]))
        for name, step in steps.items()
    ]
    return _table(("step", "", "took", "reason"), rows)


def _machine(step: Mapping[str, Any]) -> str:
    gpus = [f"{each['name']} ({each['arch']}), {_gib(each['memory_bytes'])}" for each in step["gpus"]]
    rows = [
        ("GPU", "; ".join(gpus) or f"none: {step['problem']}"),
        ("driver, newest CUDA", f"{step['driver']}, {step['cuda']}"),
        ("processor", f"{step['processor']}, {step['cores']} cores"),
        ("memory", f"{_gib(step['memory_bytes'])}, {_gib(step['available_bytes'])} available"),
        ("disk", f"{_gib(step['disk_free_bytes'])} free"),
        ("OS kernel", step["kernel"]),
        ("server's packages", ", ".join(f"{name} {value}" for name, value in step["packages"].items())),
        ("rekindle, Python", f"{step['rekindle']}, {step['python']}"),
    ]
    return _table(("", ""), rows)


def _doctor(step: Mapping[str, Any]) -> str:
    rows = [
        (
            check["name"],
            "ok" if check["ok"] else "MISSING" if check["needed"] else "note",
            _line(check["detail"]),
        )
        for check in step["checks"]
    ]
    return _table(("check", "", ""), rows)


def _starts(step: Mapping[str, Any]) -> str:
    rows = [
        (name, str(len(step[key])), _spread(step[key], "seconds"))
        for name, key in (("caches empty", "cold"), ("caches warm", "warm"))
    ]
    text = _table(("start", "n", "first token"), rows)
    facts = [one["facts"] for one in step["cold"] if "facts" in one]
    if facts:
        text += "\n" + _phase_table([one["phases"] for one in facts], "the server's own phases, cold")
        held = facts[-1].get("held_bytes", 0)
        text += f"\n{facts[-1]['kernels']} GPU kernels compiled; {_gib(held)} of device memory held.\n"
    return text


def _snapshot(step: Mapping[str, Any]) -> str:
    rows = [
        ("total", f"{step['report']['seconds']:.2f} s"),
        ("processes with CUDA", str(len(step["cuda_pids"]))),
        ("threads", str(step["threads"])),
        ("dump by CRIU", _gib(step["dump_bytes"])),
        ("without zero pages", _gib(step["stored_bytes"])),
        ("image", _gib(step["image_bytes"])),
        ("rekindle's own memory", f"{step['report']['peak_rss_bytes'] / 1e6:.0f} MB"),
    ]
    phases = [{phase["name"]: phase["seconds"] for phase in step["report"]["phases"]}]
    return _table(("", ""), rows) + "\n" + _phase_table(phases, "phases")


def _restores(step: Mapping[str, Any]) -> str:
    runs = step["runs"]
    rows = [
        ("first token at our client", str(len(runs)), _spread(runs, "seconds")),
        ("first token in rekindle's report", str(len(runs)), _spread(runs, "first_token_seconds")),
    ]
    return (
        _table(("", "n", ""), rows)
        + "\nEach run gave the recorded answer and left no process behind.\n\n"
        + _phase_table([run["phases"] for run in runs], "phases")
    )


def _floor_seconds(steps: Mapping[str, Any]) -> dict[str, float]:
    """Return the least time of a restore with the dump in the page cache, by the bytes that it moves."""
    step = steps["floor"]
    if step["status"] != "done":
        return {}
    found = {"dump from the page cache": step["dump_bytes"] / step["page_cache_rate"]}
    rates = step["device"].get("rates", {})
    if rates.get("pinned_to_device"):
        found["state to the device"] = step["held_bytes"] / rates["pinned_to_device"]
    return found


def _floor(steps: Mapping[str, Any]) -> str:
    step = steps["floor"]
    rates = {
        "read from the page cache, one thread": step["page_cache_rate"],
        "read from the disk, one thread": step["disk_rate"],
        **{name.replace("_", " "): rate for name, rate in step["device"].get("rates", {}).items()},
    }
    text = _table(("copying", "GB/s"), [(name, f"{rate / 1e9:.2f}") for name, rate in rates.items()])
    floor = _floor_seconds(steps)
    rows = [(name, f"{seconds:.3f} s") for name, seconds in floor.items()]
    text += "\n" + _table(
        ("floor", ""),
        [
            ("bytes of the dump, on the device", f"{_gib(step['dump_bytes'])}, {_gib(step['held_bytes'])}"),
            *rows,
        ],
    )
    runs = steps["restore"].get("runs", [])
    if not runs:
        return text
    above = dict.fromkeys(_names(run["phases"] for run in runs), 0.0)
    for name in above:
        above[name] = statistics.median(run["phases"].get(name, 0.0) for run in runs)
    above["restore"] = above.get("restore", 0.0) - floor.get("dump from the page cache", 0.0)
    if "cuda" in above:
        above["cuda"] -= floor.get("state to the device", 0.0)
    ordered = sorted(above.items(), key=lambda pair: -pair[1])
    named = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in ordered if seconds >= 0.005)
    return f"{text}\nTime above the floor by phase (medians, less the floor of that phase): {named}.\n"


def _uncached(steps: Mapping[str, Any]) -> str:
    text = _restores(steps["uncached"])
    if steps["floor"]["status"] == "done":
        seconds = steps["floor"]["dump_bytes"] / steps["floor"]["disk_rate"]
        text += f"\nOne thread takes {seconds:.2f} s to read the dump from this disk.\n"
    return text


def _rollback(step: Mapping[str, Any]) -> str:
    rows = [
        (
            case["name"],
            "yes" if case["answers"] else "**no**",
            ", ".join(case["states"]),
            f"{case['seconds']:.2f} s",
            _line(case["message"])[:200],
        )
        for case in step["cases"]
    ]
    return f"Backend: {step['backend']}.\n\n" + _table(
        ("failure", "answers", "state", "took", "message"), rows
    )


def _cache(step: Mapping[str, Any]) -> str:
    runs = step["runs"]
    rows = [("first token at our client", str(len(runs)), _spread(runs, "seconds"))]
    text = _table(("", "n", ""), rows)
    text += "\nReasons against the process rung: " + "; ".join(
        f"`{each['code']}` (was {each['recorded']}, is {each['here']})" for each in step["reasons"]
    )
    proof = runs[-1]["proof"]
    text += (
        f".\n\nProof, from the files that the server opened and created: **{proof['verdict']}**; "
        f"{proof['used']} of {proof['entries']} entries used, {proof['made']} compiled again.\n"
    )
    agreeing = sum(run["agrees"] for run in runs)
    return text + f"{agreeing} of {len(runs)} runs gave the recorded answer.\n"


def _backends(step: Mapping[str, Any]) -> str:
    text = ""
    for name, backend in step["backends"].items():
        if problem := backend.get("problem") or backend.get("missing"):
            text += f"- {name}: {_line(problem)}\n"
            continue
        text += (
            f"- {name}: opened in {backend['open_seconds']:.2f} s; first token of a restore "
            f"{_spread(backend['runs'], 'seconds')} s (n = {len(backend['runs'])})\n"
        )
    rows = []
    for name, backend in step["backends"].items():
        if backend.get("cycles") and "problem" not in backend:
            for what in ("lock", "checkpoint", "restore", "unlock"):
                seconds = [{"seconds": cycle[what]} for cycle in backend["cycles"]]
                rows.append((name, what, str(len(seconds)), _spread(seconds, "seconds")))
    return text + ("\n" + _table(("backend", "step, on a live server", "n", ""), rows) if rows else "")


def _vllm_start(step: Mapping[str, Any]) -> str:
    return f"`{' '.join(step['command'])}`\n\n" + _starts(step)


def _probes(step: Mapping[str, Any]) -> str:
    rows = [(each["probe"], each["decides"], _line(each["answer"])) for each in step["probes"]]
    return _table(("probe", "decides", "answer"), rows)


def _memory(step: Mapping[str, Any]) -> str:
    rows = []
    for name in ("map", "copy"):
        for cache in ("cached", "uncached"):
            runs = step["runs"][name][cache]
            both = [{"seconds": run["phases"].get("cuda", 0.0)} for run in runs]
            rows.append((name, cache, str(len(runs)), _spread(runs, "seconds"), _spread(both, "seconds")))
    return _table(("memory", "page cache", "n", "first token", "CUDA state to the GPU"), rows)


def _feature(step: Mapping[str, Any]) -> str:
    rows = [
        ("snapshot", f"{step['snapshot']['report']['seconds']:.2f} s"),
        ("first token of a restore", _spread(step["runs"], "seconds")),
    ]
    return _table(("", ""), rows)


def _phase_table(runs: Sequence[Mapping[str, float]], title: str) -> str:
    rows = []
    for name in _names(runs):
        values = [{"seconds": run.get(name, 0.0)} for run in runs]
        if _median(values, "seconds") >= _SHOWN_SECONDS:
            rows.append((name, _spread(values, "seconds")))
    return _table((f"{title} (n = {len(runs)})", ""), rows)


def _names(runs: Iterable[Mapping[str, float]]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run))


def _median(runs: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(statistics.median(run[name] for run in runs))


def _spread(runs: Sequence[Mapping[str, Any]], name: str) -> str:
    values = [run[name] for run in runs]
    middle = f"{statistics.median(values):.3f}"
    return f"{middle} ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else middle


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _line(text: str) -> str:
    """Return the text as one line for a table."""
    return " ".join(str(text).split()).replace("|", "\\|")[:600]


def _gib(size: float) -> str:
    return f"{size / (1 << 30):.2f} GiB"
