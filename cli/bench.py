# SPDX-License-Identifier: Apache-2.0
"""`rekindle bench`: compare cold starts and restores of one server, by phase."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cli import _arguments, _bench_picture, _report
from cli._bench_starts import Bench, BenchOptions
from oci import store
from oci.reference import RegistryReference, parse
from rekindle.engine.choose import for_command
from rekindle.errors import UsageError

_LABELS = {
    "cold": "command, empty caches",
    "warm-cache": "command, warm caches",
    "cache": "restore: kernel cache",
    "cache-cold-page-cache": "restore: kernel cache, from disk",
    "neutral": "restore: neutral process",
    "neutral-cold-page-cache": "restore: neutral process, from disk",
    "process": "restore: process",
    "process-cold-page-cache": "restore: process, from disk",
    "process-registry": "restore: process, from registry",
    "process-lazy": "restore: process, from registry, lazy",
    "process-copied": "restore: process, memory copied",
    "process-delta": "restore: delta of a replica",
    "criu-plain": "criu restore alone",
}
"""The names of the starts in the picture."""

_REPLICAS_LIMIT = 1000


def main(words: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    words, command = _arguments.split_command(words)
    parser = _arguments.Parser(
        prog="rekindle bench",
        usage="rekindle bench [options] -- COMMAND…",
        description="Compare cold starts and restores of a server: the time to the first token, by phase.",
    )
    parser.add_argument(
        "--runs", type=int, default=3, metavar="N", help="runs of every kind of start (default: 3)"
    )
    parser.add_argument(
        "--cold-runs", type=int, metavar="N", help="runs of the slow kinds of start (default: --runs)"
    )
    parser.add_argument(
        "--registry",
        metavar="HOST[:PORT]/REPOSITORY[:TAG]",
        help="push the snapshot there, and also restore it from there with an empty store",
    )
    parser.add_argument(
        "--replicas",
        metavar="N[,N…]",
        default="1,4,8",
        help="run so many replicas at once; 0 for none (default: 1,4,8)",
    )
    parser.add_argument("--delta", action="store_true", help="also save replicas that have worked, as deltas")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the phases as SVG in FILE")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the JSON document to FILE")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    parser.add_argument("--ready-url", metavar="URL", help=_arguments.READY_URL)
    parser.add_argument("--oracle-request", type=Path, metavar="FILE", help=_arguments.ORACLE_REQUEST)
    args = parser.parse_args(words)
    if not command:
        raise UsageError("no command", hint="rekindle bench -- vllm serve MODEL")
    if args.registry and not isinstance(parse(args.registry), RegistryReference):
        raise UsageError(f"--registry {args.registry} is not a repository in a registry")
    if args.runs < 1 or (args.cold_runs is not None and args.cold_runs < 1):
        raise UsageError("--runs must be 1 or more")
    _report.refuse_unwritable(args.report)
    _report.refuse_unwritable(args.picture, "--picture")
    engine = for_command(command, ready_url=args.ready_url, oracle_file=args.oracle_request)
    _arguments.require_root()
    options = BenchOptions(
        command=tuple(command),
        engine=engine,
        runs=args.runs,
        cold_runs=args.cold_runs or args.runs,
        registry=args.registry,
        replicas=_counts(args.replicas),
        delta=args.delta,
        ready_url=args.ready_url,
        oracle_file=args.oracle_request,
    )
    home = store.open_home()
    with home.work("bench") as work:
        document = Bench(options, home, work).run()
    if args.report:
        _report.write_document(args.report, document)
    if args.picture:
        _report.write_file(args.picture, _picture(document).encode())
    if args.json:
        _report.print_document(document)
    else:
        _print_table(document)
        if args.picture:
            print(f"picture: {args.picture}")
    return 0


def _counts(text: str) -> tuple[int, ...]:
    """Parse the numbers of replicas."""
    if text == "0":
        return ()
    try:
        counts = tuple(sorted({int(each) for each in text.split(",")}))
    except ValueError:
        counts = (0,)
    if not 1 <= counts[0] <= counts[-1] <= _REPLICAS_LIMIT:
        raise UsageError(f"--replicas {text}: not numbers from 1 to {_REPLICAS_LIMIT}")
    return counts


def _print_table(document: dict[str, Any]) -> None:
    starts = document["starts"]
    cold = starts["cold"]["first_token_seconds"]["median"]
    print(f"{'start':<26}{'n':>3}{'median':>10}{'min':>9}{'max':>9}{'speedup':>9}   phases of the median run")
    for name, start in starts.items():
        times = start["first_token_seconds"]
        phases = ", ".join(f"{key} {value:.2f}" for key, value in start["phases"].items() if value >= 0.005)
        print(
            f"{name:<26}{start['n']:>3}{times['median']:>8.2f} s{times['min']:>7.2f} s{times['max']:>7.2f} s"
            f"{cold / times['median']:>8.1f}x   {phases}"
        )
    process = starts["process"]["first_token_seconds"]["median"]
    plain = starts["criu-plain"]["first_token_seconds"]["median"]
    warm = starts["warm-cache"]["first_token_seconds"]["median"]
    print(f"warm-cache / process      {warm / process:.1f}")
    print(f"process / criu-plain      {process / plain:.2f}")
    print(
        f"image / dump              {document['image_bytes'] / document['dump_bytes']:.3f}"
        f"   ({document['image_bytes']:,} of {document['dump_bytes']:,} bytes)"
    )
    for each in document["replicas"]:
        seconds, name = each["first_token_seconds"], "replicas" if each["n"] > 1 else "replica"
        name = f"{each['n']} {name}, {each['memory']}"
        print(
            f"{name:<26}{each['memory_bytes'] / 1e6:,.0f} MB in all, {seconds['median']:.2f} s each"
            f" ({seconds['min']:.2f} to {seconds['max']:.2f})"
        )
    if delta := document["delta"]:
        print(
            f"delta                     dump {delta['dump_seconds']:.2f} s, {delta['dump_bytes']:,.0f} bytes"
            f" ({delta['dump_bytes'] / document['dump_bytes']:.1%} of the dump); "
            f"image {delta['image_bytes']:,.0f} bytes, published after {delta['save_seconds']:.2f} s"
        )
    peaks = ", ".join(f"{verb} {peak / 1e6:.0f} MB" for verb, peak in document["peak_rss_bytes"].items())
    print(f"rekindle's own memory     {peaks}")
    if proof := document["cache"]:
        print(
            f"kernel cache              {proof['verdict']}: {proof['used']} of {proof['entries']} entries "
            f"used, {proof['made']} compiled again"
        )
    answer = document["answer"]
    answer = answer.get("tokens", answer)
    print(f"every start answered      {json.dumps(answer)[:120]}")


def _picture(document: dict[str, Any]) -> str:
    starts = document["starts"]
    cold = starts["cold"]["first_token_seconds"]["median"]
    bars = []
    for name, start in starts.items():
        factor = cold / start["first_token_seconds"]["median"]
        note = "" if name == "cold" else f"{factor:.0f}x" if factor >= 10 else f"{factor:.1f}x"
        bars.append(_bench_picture.Bar(name=_LABELS[name], phases=start["phases"], note=note))
    return _bench_picture.draw("Seconds to the first token, by phase (median run)", bars)
