# SPDX-License-Identifier: Apache-2.0
"""Choose the engine for a command or a record.

Engines are imported only once chosen: a restore that needs none must not load an HTTP client.
"""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from rekindle.command_line import with_words
from rekindle.engine import Endpoint, Engine
from rekindle.errors import FormatError, UsageError
from rekindle.fields import JSON
from rekindle.node import packages

if TYPE_CHECKING:
    from rekindle.engine.vllm import VllmEngine


def for_command(
    argv: Sequence[str],
    *,
    ready_url: str | None = None,
    oracle_file: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Engine:
    """Return the engine for a command in an environment, by default ours.

    Raises UsageError if it is unknown and no option describes it.
    """
    from rekindle.engine import http, vllm

    if ready_url is not None:
        return http.HttpEngine.from_options(ready_url, oracle_file)
    if engine := vllm.VllmEngine.recognize(argv, environment):
        return engine
    raise UsageError(
        f"{argv[0]} is not a server that rekindle knows",
        hint="describe it: --ready-url http://127.0.0.1:PORT/PATH --oracle-request FILE",
    )


def from_record(
    name: str, endpoint: Endpoint, options: Mapping[str, JSON], api_keys: Sequence[str] | None = None
) -> Engine:
    """Return the engine that a record names. Raises FormatError if this version does not know it.

    `api_keys` are those that a start of today would require, None if only the environment can tell.
    """
    from rekindle.engine import http

    match name:
        case "vllm":
            return _vllm_from_record(endpoint, options, api_keys)
        case "http":
            return http.HttpEngine.from_record(endpoint, options)
    raise FormatError(f"unknown engine {name!r} in the record", hint="use a newer rekindle")


def _vllm_from_record(
    endpoint: Endpoint, options: Mapping[str, JSON], api_keys: Sequence[str] | None
) -> "VllmEngine":
    """Return the vLLM engine of a record. Raises FormatError if this version does not know its options."""
    from rekindle.engine.vllm import VllmEngine

    match options.get("asleep"):
        case None:
            gpus = options.get("gpus", 1)
            return VllmEngine(endpoint=endpoint, api_keys=api_keys, gpus=gpus if isinstance(gpus, int) else 1)
        case bool():  # True would match 1
            pass
        case 1 | 2 as level:
            from rekindle.engine.vllm_asleep import Sleeping

            return Sleeping(endpoint=endpoint, level=level, api_keys=api_keys)
        case "boundary":
            from rekindle.engine.vllm_asleep import AtBoundary

            return AtBoundary(endpoint=endpoint, api_keys=api_keys)
    raise FormatError("unknown sleep mode of vLLM in the record", hint="use a newer rekindle")


class Weights(StrEnum):
    """The place of a model's weights in a snapshot of a server on a GPU.

    IMAGE: in host memory, so in the image, which is complete then. RELOAD: not in the image; they are read
    again from the model's files. AS_IS: left on the GPU and checkpointed with everything else there.
    """

    IMAGE = "image"
    RELOAD = "reload"
    AS_IS = "as-is"


def for_sleep(engine: "VllmEngine", weights: Weights, version: str, *, warmed: bool = False) -> "VllmEngine":
    """Return the engine for a server that sleeps during the snapshot.

    Uses vLLM's own snapshot server where it exists (since 0.31) and fits: it always reloads the weights,
    and accepts no requests before the restore, so the user's own requests cannot have `warmed` it.
    """
    from rekindle.engine.vllm_asleep import AtBoundary, Sleeping

    if weights is Weights.RELOAD and packages.major_minor(version) >= (0, 31) and not warmed:
        return AtBoundary(endpoint=engine.endpoint, api_keys=engine.api_keys)
    level = 2 if weights is Weights.RELOAD else 1
    return Sleeping(endpoint=engine.endpoint, level=level, api_keys=engine.api_keys)


def with_recorded_sleep_mode(argv: Sequence[str], options: Mapping[str, JSON]) -> list[str]:
    """Return the command line with which a server finds the kernel cache of one with these recorded options.

    Sleep mode is part of the key of vLLM's cache (0.32: ModelConfig.compute_hash).
    """
    from rekindle.engine.vllm_command import is_server

    slept = options.get("asleep") is not None and is_server(argv)
    return with_words(argv, ["--enable-sleep-mode"]) if slept else list(argv)
