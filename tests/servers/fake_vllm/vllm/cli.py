# SPDX-License-Identifier: Apache-2.0
"""`vllm serve MODEL [options]`."""

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path

from .api import Api, listen
from .engine import Engine


def parser(prog: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog=prog, allow_abbrev=True)
    made.add_argument("model_tag", nargs="?")
    made.add_argument("--model")
    made.add_argument("--served-model-name", nargs="+")
    made.add_argument("--host")
    made.add_argument("--port", type=int, default=8000)
    made.add_argument("--root-path", default="")
    made.add_argument("--max-model-len", type=int, default=512)
    made.add_argument("--api-key", nargs="+")
    made.add_argument("--middleware", action="append", default=[])
    made.add_argument("--enable-sleep-mode", action=argparse.BooleanOptionalAction, default=False)
    return made


def parse(argv: list[str], prog: str = "vllm serve") -> argparse.Namespace:
    args = parser(prog).parse_args([flexible(word) for word in with_config(argv)])
    args.model = args.model_tag or args.model
    if args.enable_sleep_mode and "FAKE_CUDA" not in os.environ:
        sys.exit("Sleep mode is not supported on current platform.")
    return args


def with_config(argv: list[str]) -> list[str]:
    """Puts the options of a file before those of the command line; JSON is YAML, too."""
    if "--config" not in argv:
        return argv
    at = argv.index("--config")
    words = []
    for name, value in json.loads(Path(argv[at + 1]).read_text()).items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    model = argv[:at][:1]
    return [*model, *words, *argv[len(model) : at], *argv[at + 2 :]]


def flexible(word: str) -> str:
    """Underscores in the name of an option are dashes."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


async def serve(argv: list[str]) -> None:
    args = parse(argv)
    engine = await Engine.start(args.model)
    await listen(Api(engine, args), args.host or "0.0.0.0", args.port)


def main() -> None:
    if sys.argv[1:2] != ["serve"]:
        sys.exit("vllm: this one only serves")
    asyncio.run(serve(sys.argv[2:]))
