# SPDX-License-Identifier: Apache-2.0
"""Environment variables: those that a server's libraries read, and the noise of platforms and sessions.

A restored process keeps the variables of its own start, so a start today may behave differently. Noise is
what differs between any two starts without a consequence. Each engine adds what its own servers read.
"""

import re

# Read by CUDA and its libraries, torch, compilers of GPU kernels, OpenMP and the like, the libraries of
# Hugging Face, ROCm, and the dynamic linker.
_OF_LIBRARIES = (
    *("CUDA_", "CUBLAS", "CUDNN_", "NCCL_", "TORCH", "PYTORCH_", "TRITON_", "FLASHINFER_", "DG_"),
    *("OMP_", "GOMP_", "KMP_", "MKL_", "DNNL_", "ONEDNN_", "OPENBLAS_", "GLOO_", "UCX_"),
    *("HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_", "TOKENIZERS_", "SAFETENSORS_"),
    *("HIP_", "HSA_", "ROCM_", "ROCR_", "LD_"),
)
_OF_PYTHON = frozenset({"PYTHONPATH", "PYTHONHOME", "PYTHONHASHSEED"})
_OF_COMPILERS = ("TORCH", "TRITON_", "FLASHINFER_", "DG_", "CUDA_HOME")
_CHOOSE_KERNELS = (
    *("TORCHINDUCTOR_", "TORCHDYNAMO_", "TORCH_COMPILE", "TRITON_", "FLASHINFER_", "DG_", "CUDA_HOME"),
)

_NOISE = frozenset(
    {
        # Shells, terminals and logins.
        *("_", "PWD", "OLDPWD", "SHLVL", "SHELL", "TERM", "COLORTERM", "COLUMNS", "LINES", "LS_COLORS"),
        *("DISPLAY", "MAIL", "HOSTNAME", "DBUS_SESSION_BUS_ADDRESS"),
        # systemd.exec(5), sd_notify(3).
        *("INVOCATION_ID", "JOURNAL_STREAM", "NOTIFY_SOCKET", "MAINPID", "MANAGERPID", "SYSTEMD_EXEC_PID"),
        *("WATCHDOG_PID", "WATCHDOG_USEC", "MEMORY_PRESSURE_WATCH", "MEMORY_PRESSURE_WRITE", "container"),
        # Which GPUs a container has, for its runtime. The GPUs themselves are compared.
        "NVIDIA_VISIBLE_DEVICES",
        # The trace that a start belongs to: OpenTelemetry's environment variable carrier.
        *("TRACEPARENT", "TRACESTATE"),
        # A server in a cell has a TMPDIR of ours.
        "TMPDIR",
    }
)
_NOISE_PREFIXES = (
    *("KUBERNETES_", "POD_", "LISTEN_", "REKINDLE_", "SSH_", "SUDO_"),
    *("XDG_RUNTIME", "XDG_SESSION", "XDG_SEAT", "XDG_VTNR", "TERM_", "TMUX"),
)
# Kubernetes sets these for each Service of the namespace: NAME_SERVICE_HOST, NAME_PORT_80_TCP_ADDR, …
_SERVICE = re.compile(
    r".+_(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT_\d+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)"
)
_SERVICE_URLS = ("tcp://", "udp://", "sctp://")


def is_noise(name: str, value: str = "") -> bool:
    """Tell whether a variable differs between starts of the same server without a consequence.

    `value` matters for NAME_PORT only, which is a Service's if it is a URL.
    """
    if name in _NOISE or name.startswith(_NOISE_PREFIXES):
        return True
    if "_PORT" not in name and not name.endswith("_HOST"):
        return False
    return _SERVICE.fullmatch(name) is not None or (
        name.endswith("_PORT") and value.startswith(_SERVICE_URLS)
    )


def names_a_cache(name: str) -> bool:
    """Tell whether a variable names the place of a kernel cache, which `rekindle extract` also sets."""
    from rekindle.engine.caches import VARIABLES  # imported late: most restores find no variable that differs

    return name in VARIABLES.values() or name == "TRITON_HOME"


def is_of_libraries(name: str) -> bool:
    """Tell whether common libraries of LLM servers read a variable, other than the place of a cache."""
    return name in _OF_PYTHON or (name.startswith(_OF_LIBRARIES) and not names_a_cache(name))


def is_of_compilers(name: str) -> bool:
    """Tell whether a variable may be part of the key of a kernel cache."""
    return name.startswith(_OF_COMPILERS) and not names_a_cache(name)


def chooses_kernels(name: str) -> bool:
    """Tell whether a variable changes nothing but which kernels a compiler makes."""
    return name.startswith(_CHOOSE_KERNELS) and not names_a_cache(name)
