# SPDX-License-Identifier: Apache-2.0
"""The servers under test: the decoder of hack/gpu/server.py, and vLLM."""

import json
from collections.abc import Sequence
from pathlib import Path

from hack.gpu.errors import SkippedError, StepError
from hack.gpu.journal import kept
from hack.gpu.starts import LONG_SECONDS, Subject, free_port
from hack.gpu.trial import Trial, TrialOptions
from rekindle.engine.choose import for_command
from rekindle.run import run

ORACLE = {
    "method": "POST",
    "path": "/answer",
    "body": {"prompt": [11, 22, 33], "count": 16},
    "select": ["/tokens", "/checksum"],
}
_HACK = Path(__file__).parents[1]


def server(options: TrialOptions, *words: str) -> Sequence[str]:
    """Return the command that runs hack/gpu/server.py with these words."""
    flags = ["--stand-in"] if options.stand_in else []
    return [options.python, str(_HACK / "gpu/server.py"), *flags, *words]


def decoder(trial: Trial, feature: str = "") -> Subject:
    """Return the decoder. It listens on the same port in every run with this work directory.

    With `feature`, it also holds one of hack/gpu/features.py."""
    port, oracle = kept(trial.lab.work / "port", str(free_port())), trial.lab.work / "oracle.json"
    oracle.write_text(json.dumps(ORACLE))
    quick = ["--quick"] if trial.options.quick else []
    extra = ["--with", feature] if feature else []
    command = server(trial.options, "serve", port, "--gib", str(trial.options.gib), *quick, *extra)
    ready = f"http://127.0.0.1:{port}/health"
    caches = trial.lab.work / "kernels"
    return Subject(
        name=f"gpu-{feature}" if feature else "gpu",
        command=command,
        engine=for_command(command, ready_url=ready, oracle_file=oracle),
        caches=caches,
        environment={"TRITON_CACHE_DIR": str(caches / "triton"), "CUDA_CACHE_PATH": str(caches / "cuda")},
        options=["--ready-url", ready, "--oracle-request", str(oracle)],
        own=True,
    )


def vllm(trial: Trial) -> Subject:
    """Return vLLM with the model of the options or a tiny one. Raises SkippedError if the server's Python
    has no vLLM, StepError if the tiny model cannot be created."""
    python, model = trial.options.python, trial.options.vllm_model
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    if run([python, "-c", look], timeout=60).status:
        raise SkippedError("the server's Python has no vLLM")
    if model is None:
        model = trial.lab.work / "model"
        if not model.exists():
            made = run([python, str(_HACK / "tiny_model.py"), str(model)], timeout=LONG_SECONDS)
            if made.status:
                raise StepError(f"could not create a model: {made.output[-1000:]}")
    script = Path(python).with_name("vllm")
    program = [str(script)] if script.exists() else [python, "-m", "vllm.entrypoints.cli.main"]
    command = [
        *(*program, "serve", str(model)),
        *("--served-model-name", "tiny"),
        *("--host", "127.0.0.1", "--port", kept(trial.lab.work / "vllm-port", str(free_port()))),
        *("--max-model-len", "512", "--gpu-memory-utilization", "0.2"),
    ]
    engine = for_command(command)
    caches = trial.lab.work / "vllm-kernels"
    environment = {**engine.environment(), **engine.cache_environment(caches), "HF_HUB_OFFLINE": "1"}
    return Subject(name="vllm", command=command, engine=engine, caches=caches, environment=environment)
