# SPDX-License-Identifier: Apache-2.0
"""Pull ahead what this node can restore, and label the node with the rung that a restore takes here.

    python3 pull_ahead.py --label rekindle/chat --every 300 -- IMAGE [options about trust and registries]

The label is `process` once the dump is unpacked in $REKINDLE_HOME, else `cache` or `cold`. If the registry
cannot be reached, or the image is refused, it stays as it is. Needs `rekindle` on PATH, $NODE_NAME, and the
right to patch nodes.
"""

import argparse
import json
import os
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

ACCOUNT = Path(os.environ.get("SERVICE_ACCOUNT", "/var/run/secrets/kubernetes.io/serviceaccount"))
_LOWER = 3
"""The exit status of `rekindle match` if the process cannot be restored."""


def match_words(image: Sequence[str]) -> list[str]:
    """Return the command that compares this node with the snapshot."""
    return ["rekindle", "match", *image, "--json"]


def pull_words(image: Sequence[str]) -> list[str]:
    """Return the command that fetches and unpacks the dump, unless it is here already."""
    return ["rekindle", "pull", *image, "--unpack"]


def look(image: Sequence[str]) -> str | None:
    """Prepare this node, and return the rung that a restore takes; None if that is not known."""
    done = subprocess.run(match_words(image), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in {0, _LOWER}:
        return None
    rung = str(json.loads(done.stdout)["rung"] or "none")
    if rung == "process" and subprocess.run(pull_words(image), check=False).returncode:
        return None
    return rung


def label(name: str, value: str) -> None:
    """Label this node. Raises OSError."""
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    host = f"[{host}]" if ":" in host else host
    request = urllib.request.Request(
        f"https://{host}:{port}/api/v1/nodes/{os.environ['NODE_NAME']}",
        data=json.dumps({"metadata": {"labels": {name: value}}}).encode(),
        headers={
            "Authorization": f"Bearer {(ACCOUNT / 'token').read_text().strip()}",
            "Content-Type": "application/merge-patch+json",
        },
        method="PATCH",
    )
    context = ssl.create_default_context(cafile=ACCOUNT / "ca.crt")
    with urllib.request.urlopen(request, timeout=30, context=context):  # noqa: S310
        pass


def main() -> int:
    """Look again and again until a signal comes; once without --every."""
    parser = argparse.ArgumentParser(description="Pull ahead what this node can restore, and label the node.")
    parser.add_argument("--label", required=True, help="name of the label")
    parser.add_argument("--every", type=float, help="seconds until the next look")
    parser.add_argument("image", nargs="+", help="the image, and options about trust and registries")
    args = parser.parse_args()
    while True:
        problem = ""
        rung = look(args.image)
        if rung is not None:
            try:
                label(args.label, rung)
                print(f"{args.label}={rung}", flush=True)
            except OSError as error:
                problem = f"cannot label the node: {error}"
                print(problem, file=sys.stderr, flush=True)
        if args.every is None:
            return 1 if problem or rung is None else 0
        time.sleep(args.every)


if __name__ == "__main__":
    sys.exit(main())
