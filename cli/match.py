# SPDX-License-Identifier: Apache-2.0
"""`rekindle match`: compare this node with a snapshot. Runs nothing, and fetches no layer."""

from collections.abc import Sequence

from cli import _arguments, _plan, _trust
from oci import resolve
from oci.reference import parse
from rekindle.home import Home
from rekindle.report import Rung
from rekindle.text import printable
from restore.decide import facts as gathering
from restore.decide import plan


def main(words: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    words, command = _arguments.split_command(words)
    parser = _arguments.Parser(
        prog="rekindle match",
        usage="rekindle match IMAGE [options] [-- COMMAND…]",
        description="Compare this node with a snapshot, field by field, and print which rungs a restore can "
        "take. Exits with status 3 if the process cannot be restored.",
    )
    parser.add_argument("image", metavar="IMAGE", help=_arguments.IMAGE)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    _arguments.add_accept_environment(parser)
    _arguments.add_trust(parser)
    _arguments.add_registry(parser)
    args = parser.parse_args(words)
    reference, home = parse(args.image), Home.from_environment()
    trust = _trust.options(args)
    with resolve.source(reference, home, _arguments.registry(args)) as source:
        verified = resolve.verified(source, reference, home, trust)
        image = gathering.load(verified)
        facts, _ = gathering.gather(image, reference, home, command, with_cache=True)
    made = plan.make(facts, strictness=gathering.strictness(args.policy, args.accept_environment))
    if not args.json:
        for line in _plan.fields(image.value.record.node, facts.node):
            print(printable(line))
    _plan.show(made, facts, args.image, image.value.index.digest, as_json=args.json)
    return 0 if made.first is not None and made.first.rung is Rung.PROCESS else 3
