# SPDX-License-Identifier: Apache-2.0
"""The engine for vLLM's OpenAI-compatible server."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import structs

from rekindle.engine import Compiled, Endpoint, Engine, Request, variables
from rekindle.engine.vllm_command import ServerCommand, read
from rekindle.errors import MismatchError, OracleError, UsageError
from rekindle.fields import JSON
from rekindle.node import packages

if TYPE_CHECKING:
    from rekindle.engine.client import Client, Response

_ORACLE_PROMPT = "The capital of France is"
_ORACLE_TOKENS = 16
_WARM_LENGTHS = (1, 16, 128, 1024)  # tokens
_WARM_AT_ONCE = (1, 4)
# vllm/compilation/backends.py of 0.32; older versions print no range.
_LOADED = re.compile(
    r"Directly load the compiled graph\(s\) for [^\n]{0,80}from the cache, took ([0-9.]{1,12}) s"
)
_COMPILED = re.compile(r"Compiling a graph for [^\n]{0,80}takes ([0-9.]{1,12}) s")
_LOGPROB_TOLERANCE = 1e-3
# vllm/envs.py of 0.32 reads these, and whatever its libraries read.
_READ = ("VLLM_", "S3_", "MOONCAKE_", "LMCACHE_")
# Of one node: addresses. A restored server keeps to the network of its cell.
_ADDRESSES = frozenset({"VLLM_HOST_IP", "VLLM_PORT", "VLLM_LOOPBACK_IP"})
_NOT_IN_KEYS = frozenset({"VLLM_LOGGING_LEVEL", *_ADDRESSES})
# Of those in the key (envs.compile_factors), what chooses kernels and how models are compiled, and opens,
# limits or loads nothing.
_CHOOSE_KERNELS = (
    *("VLLM_ATTENTION_", "VLLM_BATCH_INVARIANT", "VLLM_BLOCKSCALE_", "VLLM_COMPILE_", "VLLM_CPU_"),
    *("VLLM_DBO_", "VLLM_DCP_", "VLLM_DEEP", "VLLM_DISABLE_", "VLLM_DISABLED_KERNELS", "VLLM_FLASH"),
    *("VLLM_ENABLE_CUDAGRAPH", "VLLM_ENABLE_FLA_", "VLLM_ENABLE_GEMM", "VLLM_ENABLE_INDUCTOR_"),
    *("VLLM_ENABLE_PREGRAD_", "VLLM_FLOAT32_", "VLLM_FUSED_", "VLLM_GDN_", "VLLM_HUMMING_"),
    *("VLLM_KV_CACHE_LAYOUT", "VLLM_MARLIN_", "VLLM_MLA_", "VLLM_MOE_", "VLLM_MULTI_STREAM_", "VLLM_MXFP"),
    *("VLLM_ROCM_", "VLLM_SSM_", "VLLM_TRITON_", "VLLM_USE_", "VLLM_V1_", "VLLM_XPU_"),
)
_OTHER_SOURCES = ("VLLM_USE_MODELSCOPE", "VLLM_USE_RUST_")
_TIMEOUT_SECONDS = 60.0
_UNAUTHORIZED = 401


class VllmEngine(Engine):
    """A server started by `vllm serve` or by vllm.entrypoints.openai.api_server."""

    name = "vllm"
    compiles = True
    serves_one_port = True

    def __init__(self, *, endpoint: Endpoint, api_keys: Sequence[str] | None = None, gpus: int = 1) -> None:
        """`api_keys` are the keys of which the server requires one; None if only the environment can tell.

        `gpus` is the number of GPUs that the model is spread over.
        """
        self.endpoint = endpoint
        self.api_keys = api_keys
        self.gpus = gpus

    @classmethod
    def recognize(
        cls, argv: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> "VllmEngine | None":
        """Return the engine if a command starts vLLM's server in an environment, by default ours.

        Raises UsageError for unsupported options, and if it cannot be told what the command starts.
        """
        command = read(argv, os.environ if environment is None else environment)
        if command is None:
            return None
        if command.option("--uds"):
            raise UsageError(
                "a server on a unix socket (--uds) is not supported", hint="use --host and --port"
            )
        if command.option("--ssl-keyfile") or command.option("--ssl-certfile"):
            raise UsageError(
                "a server that speaks TLS itself is not supported",
                cause="the oracle's request is sent as plain HTTP, within the cell",
                hint="omit --ssl-keyfile and --ssl-certfile; put a TLS proxy in front of the published port",
            )
        if command.has("--grpc"):
            raise UsageError("a server that speaks gRPC is not supported", hint="omit --grpc")
        port = command.option("--port") or "8000"
        if not port.isdecimal() or not 0 < int(port) < 65536:
            raise UsageError(f"invalid --port {port!r}")
        host = command.option("--host") or "0.0.0.0"
        endpoint = Endpoint(host=host, port=int(port))
        return cls(endpoint=endpoint, api_keys=command.api_keys(), gpus=command.gpus)

    def environment(self) -> Mapping[str, str]:
        # Spawned workers inherit no descriptors. Usage statistics and Xet open connections to the internet,
        # which cannot be restored. Nor can NCCL's memory that is shared over NVLink, and its RDMA.
        several = {"NCCL_NVLS_ENABLE": "0", "NCCL_IB_DISABLE": "1"} if self.gpus > 1 else {}
        return {
            **several,
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_DISABLE_XET": "1",
        }

    def cache_environment(self, directory: Path) -> Mapping[str, str]:
        return {
            "VLLM_CACHE_ROOT": str(directory / "vllm"),
            "TORCHINDUCTOR_CACHE_DIR": str(directory / "inductor"),
            "TRITON_CACHE_DIR": str(directory / "triton"),
        }

    def reads(self, name: str) -> bool:
        if name.startswith(_READ):
            return name not in _ADDRESSES and not variables.names_a_cache(name)
        return variables.is_of_libraries(name)

    def in_cache_keys(self, name: str) -> bool:
        if name.startswith("VLLM_"):
            return name not in _NOT_IN_KEYS and not variables.names_a_cache(name)
        return name == "HF_HUB_OFFLINE" or variables.is_of_compilers(name)

    def replays(self, name: str) -> bool:
        chosen = name.startswith(_CHOOSE_KERNELS) and not name.startswith(_OTHER_SOURCES)
        return chosen or variables.chooses_kernels(name)

    def model(self, argv: Sequence[str]) -> tuple[str, str] | None:
        command = read(argv, os.environ)
        named = command.model if command else None
        return (named, (command and command.option("--revision")) or "main") if named else None

    def milestones(self) -> Sequence[tuple[str, str]]:
        return (
            ("imports", "non-default args"),
            ("configuration", "Initializing a V1 LLM engine"),
            ("weights", "Loading weights took"),
            ("compile", "init engine (profile"),
            ("http", "Application startup complete"),
        )

    def compiled(self, log: str) -> Compiled:
        loaded = [float(seconds) for seconds in _LOADED.findall(log)]
        made = [float(seconds) for seconds in _COMPILED.findall(log)]
        return Compiled(
            loaded=len(loaded),
            loaded_seconds=sum(loaded),
            compiled=len(made),
            compiled_seconds=sum(made),
        )

    def disposable(self) -> Sequence[str]:
        # Precompiled C++ headers, 150 MB. Without them, the compiler uses the plain header beside them.
        return ("torchinductor_*/precompiled_headers/*.gch",)

    def options(self) -> dict[str, JSON]:
        keys: dict[str, JSON] = {"api_keys": len(set(self.api_keys))} if self.api_keys else {}
        return {**keys, "gpus": self.gpus} if self.gpus > 1 else keys

    def enforced(self) -> frozenset[str]:
        return frozenset({"VLLM_API_KEY", "--api-key", "--api_key"})

    def authorize(self, request: Request, environment: Mapping[str, str]) -> Request:
        keys = self.api_keys
        if keys is None:
            keys = [environment.get("VLLM_API_KEY", "")]
        return _with_key(request, keys[0]) if keys and keys[0] else request

    def require_accepted(self, client: "Client") -> None:
        for key in (self.api_keys or ())[1:]:  # the oracle's request had the first
            asked = _with_key(Request(method="GET", path="/v1/models"), key)
            if client.ask(asked, timeout=_TIMEOUT_SECONDS).status == _UNAUTHORIZED:
                raise MismatchError(_OTHER_KEY, cause="it answers with status 401", hint=_KEY_HINT)

    def ready(self, client: "Client", timeout: float) -> bool:
        return client.get("/health", timeout=min(timeout, _TIMEOUT_SECONDS)).status == 200

    def warm_requests(self, client: "Client") -> Sequence[Sequence[Request]]:
        model, length = self._model(client)
        batches = []
        for tokens in _WARM_LENGTHS:
            for count in _WARM_AT_ONCE:
                prompts = [_prompt(number, min(tokens, length - 16)) for number in range(count)]
                batches.append([completion(model, prompt, 8) for prompt in prompts])
        chat = {
            "model": model,
            "messages": [{"role": "user", "content": "Hello!"}],
            "max_tokens": 8,
            "stream": True,
        }
        batches.append([Request(method="POST", path="/v1/chat/completions", headers={}, body=chat)])
        return batches

    def oracle_request(self, client: "Client") -> Request:
        model, _ = self._model(client)
        return completion(model, _ORACLE_PROMPT, _ORACLE_TOKENS)

    def answer(self, response: "Response") -> JSON:
        if response.status == _UNAUTHORIZED:
            raise OracleError(_OTHER_KEY, cause="it answers with status 401", hint=_KEY_HINT)
        if response.status != 200:
            raise OracleError(
                f"the oracle's request was answered with status {response.status}",
                cause=response.body[:500].decode(errors="replace"),
            )
        tokens: list[str] = []
        logprobs: list[float] = []
        try:
            # Not splitlines: lines of an event stream end with a line feed only, and vLLM does not escape
            # other line separators in its texts.
            for line in response.body.decode().split("\n"):
                if line.startswith("data: ") and line.strip() != "data: [DONE]":
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        raise ValueError(str(event["error"]))
                    for choice in event["choices"]:
                        if found := choice["logprobs"]:
                            if not isinstance(found["tokens"], list):
                                raise TypeError("the tokens are not a list")
                            tokens += found["tokens"]
                            logprobs += found["token_logprobs"]
            answer = {"tokens": tokens, "logprobs": [round(value, 6) for value in logprobs]}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise OracleError(
                "the oracle's answer is not a stream of completions",
                cause=f"{error!r:.300} in {response.body[:300].decode(errors='replace')}",
            ) from error
        if not tokens or not _is_answer(answer):
            raise OracleError(
                "the oracle's answer contains no tokens with logprobs",
                cause=response.body[:300].decode(errors="replace"),
            )
        return answer

    def agree(self, expected: JSON, got: JSON) -> bool:
        if not _is_answer(expected) or not _is_answer(got):
            return False
        return bool(expected["tokens"] == got["tokens"]) and all(
            abs(a - b) <= _LOGPROB_TOLERANCE
            for a, b in zip(expected["logprobs"], got["logprobs"], strict=True)
        )

    def _model(self, client: "Client") -> tuple[str, int]:
        """Ask the server for the name of its model and the length of its context in tokens."""
        request = self.authorize(Request(method="GET", path="/v1/models", headers={}, body=None), os.environ)
        response = client.ask(request, timeout=_TIMEOUT_SECONDS)
        try:
            model = json.loads(response.body)["data"][0]
            return str(model["id"]), int(model.get("max_model_len") or 2048)
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise OracleError(
                f"/v1/models names no model (status {response.status})",
                cause=response.body[:300].decode(errors="replace"),
                hint="if the server requires a key, set VLLM_API_KEY",
            ) from error


_OTHER_KEY = "the server does not accept the API key that it would require today"
_KEY_HINT = "make the snapshot without a key; restore enforces that of today (docs/secrets.md)"


def _with_key(request: Request, key: str) -> Request:
    return structs.replace(request, headers={**request.headers, "Authorization": f"Bearer {key}"})


def _is_answer(value: JSON) -> bool:
    """Tell whether a value has the form that `VllmEngine.answer` returns: texts, and a number for each."""
    match value:
        case {"tokens": list(tokens), "logprobs": list(logprobs)}:
            return (
                len(tokens) == len(logprobs)
                and all(isinstance(token, str) for token in tokens)
                and all(isinstance(logprob, int | float) for logprob in logprobs)
            )
    return False


def _prompt(number: int, tokens: int) -> list[int]:
    """Return a prompt of exactly `tokens` tokens. Different numbers share no prefix, so no cached block."""
    return [3 + (number * 31 + position * 7) % 200 for position in range(tokens)]


def served_name(command: ServerCommand) -> str:
    """Return the name that a command gives its model."""
    return command.option("--served-model-name") or command.model or ""


def serving_words(argv: Sequence[str], environment: Mapping[str, str]) -> tuple[list[str], ServerCommand]:
    """Return the wrappers and the Python interpreter of a command, and the command. Raises UsageError."""
    command = read(argv, environment)
    python = packages.interpreter(argv, environment)
    if command is None or python is None:
        raise UsageError(f"cannot tell which Python runs {argv[0]}", hint="start it as python -m vllm serve")
    return [*command.unwrapped.wrappers, str(python)], command


def completion(model: str, prompt: str | list[int], tokens: int) -> Request:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 1,
        "stream": True,
    }
    return Request(method="POST", path="/v1/completions", headers={}, body=body)
