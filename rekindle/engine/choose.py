# SPDX-License-Identifier: Apache-2.0
"""Which engine a command or a record means, and how vLLM is started so that it can be saved.

Engines are imported only once chosen: a restore that needs none must not load an HTTP client.
"""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from rekindle.engine import Endpoint, Engine
from rekindle.errors import FormatError, UsageError
from rekindle.fields import JSON
from rekindle.node import packages

if TYPE_CHECKING:
    from rekindle.engine.vllm import VllmEngine


def for_command(
    argv: Sequence[str], *, ready_url: str | None = None, oracle_file: Path | None = None
) -> Engine:
    """The engine for a command. Raises UsageError if it is not known and the options do not say."""
    from rekindle.engine import http, vllm

    if ready_url is not None:
        return http.HttpEngine.from_options(ready_url, oracle_file)
    if engine := vllm.VllmEngine.recognise(argv):
        return engine
    raise UsageError(
        f"{argv[0]} is no server that rekindle knows",
        hint="say how to talk to it: --ready-url http://127.0.0.1:PORT/PATH --oracle-request FILE",
    )


def restored(name: str, endpoint: Endpoint, options: Mapping[str, JSON]) -> Engine:
    """The engine that a record names. Raises FormatError for one that is not known here."""
    from rekindle.engine import http

    match name:
        case "vllm":
            return _restored_vllm(endpoint, options)
        case "http":
            return http.HttpEngine.from_record(endpoint, options)
    raise FormatError(f"the record's engine {name!r} is not known here", hint="use a newer rekindle")


def _restored_vllm(endpoint: Endpoint, options: Mapping[str, JSON]) -> "VllmEngine":
    """The engine of a record. Raises FormatError for options that are not known here."""
    from rekindle.engine.vllm import VllmEngine

    match options.get("asleep"):
        case None:
            return VllmEngine(endpoint=endpoint)
        case bool():  # which would be 1
            pass
        case 1 | 2 as level:
            from rekindle.engine.vllm_asleep import Sleeping

            return Sleeping(endpoint=endpoint, level=level)
        case "boundary":
            from rekindle.engine.vllm_asleep import AtBoundary

            return AtBoundary(endpoint=endpoint)
    raise FormatError("the record's vLLM sleeps in a way that is not known here", hint="use a newer rekindle")


class Weights(StrEnum):
    """Where the weights of a model on a GPU are while the server is saved: in the image, which is complete
    then; not in it, and read again from the model's files; or where they are, with all that the GPU holds."""

    IMAGE = "image"
    RELOAD = "reload"
    AS_IS = "as-is"


def asleep(
    engine: "VllmEngine", argv: Sequence[str], weights: Weights, version: str, *, warmed: bool = False
) -> "VllmEngine":
    """The engine for a server that is to sleep through the snapshot. vLLM's own snapshot server is taken
    where there is one (since 0.31) and it does what is asked: it reads the weights again, and takes no
    requests before, so it cannot be `warmed` with those of the user."""
    from rekindle.engine.vllm import option
    from rekindle.engine.vllm_asleep import AtBoundary, Sleeping

    if weights is Weights.RELOAD and packages.release(version) >= (0, 31) and not warmed:
        return AtBoundary(endpoint=engine.endpoint, api_key=option(argv, "--api-key"))
    level = 2 if weights is Weights.RELOAD else 1
    return Sleeping(endpoint=engine.endpoint, level=level, api_key=option(argv, "--api-key"))


def as_compiled(argv: Sequence[str], options: Mapping[str, JSON]) -> list[str]:
    """How a command is started so that it finds the kernels of a server with these options of a record:
    whether sleep mode is on is part of the key of vLLM's cache (0.32: ModelConfig.compute_hash)."""
    from rekindle.engine.vllm import is_server

    asleep = options.get("asleep") is not None and is_server(argv)
    return [*argv, "--enable-sleep-mode"] if asleep else list(argv)
