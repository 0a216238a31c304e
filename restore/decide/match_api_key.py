# SPDX-License-Identifier: Apache-2.0
"""Compare the API key that a start today would require with the server in an image. Pure, except for `today`.

What the restored server does not check itself, a gate before it does (restore/serve/gate.py), if nobody can
reach the server but through the gate.
"""

from collections.abc import Iterator, Mapping, Sequence

from msgspec import Struct

from rekindle.cell import Network
from rekindle.errors import UsageError
from rekindle.record import Record
from restore.decide.difference import Difference

_OWN_MIDDLEWARE = "rekindle_gate.Gate"
_RUST = "VLLM_USE_RUST_FRONTEND"
_KEY, _NONE = "required", "not required"


class ApiKeys(Struct, frozen=True, kw_only=True):
    """The keys of which a start today would require one; `problem` says why they cannot be enforced.

    `root_path` is the path below which the server stands behind a proxy.
    """

    keys: Sequence[str] = ()
    root_path: str = ""
    problem: str = ""


def today(record: Record, given: Sequence[str], environment: Mapping[str, str]) -> ApiKeys:
    """Return the keys for a command that was given, or else for the recorded one."""
    if record.engine.name != "vllm":
        return ApiKeys()
    if not given and "VLLM_API_KEY" not in environment and not _mentions_key(record.command):
        return ApiKeys()
    from rekindle.engine.vllm_command import read

    try:
        command = read(given or record.command, environment)
    except UsageError as error:
        return ApiKeys(problem=f"{error.message} ({error.cause})")
    if command is None:  # another program: the command is a difference
        return ApiKeys()
    keys = command.api_keys()
    if not given and command.has("--api-key"):  # its value was not recorded
        keys = tuple(key for key in [environment.get("VLLM_API_KEY", "")] if key)
    problem = ""
    if set(command.every("--middleware")) - {_OWN_MIDDLEWARE}:
        problem = "the server's own --middleware sees requests before the key is checked"
    elif command.unwrapped.environment.get(_RUST, "0") not in {"", "0"}:
        problem = f"the server's frontend is another program ({_RUST})"
    return ApiKeys(keys=keys, root_path=command.option("--root-path") or "", problem=problem if keys else "")


def compare(record: Record, keys: ApiKeys) -> Iterator[Difference]:
    """Yield a difference if today's keys cannot be enforced, or only the image's server requires one."""
    inside = _KEY if requires_key(record) else _NONE
    if keys.problem:
        yield Difference("api-key", "API key", inside, keys.problem)
    elif keys.keys and record.process.network is Network.HOST:
        yield Difference(
            "api-key", "API key", inside, "required, which cannot be enforced on the host's network"
        )
    elif not keys.keys and inside == _KEY:
        yield Difference("api-key", "API key", inside, _NONE)


def requires_key(record: Record) -> bool:
    """Tell whether the server in the image requires a key. Older images tell only by their command."""
    count = record.engine.options.get("api_keys", 0)
    return (isinstance(count, int) and count > 0) or (
        record.engine.name == "vllm" and _mentions_key(record.command)
    )


def _mentions_key(command: Sequence[str]) -> bool:
    return any("--api" in word for word in command)
