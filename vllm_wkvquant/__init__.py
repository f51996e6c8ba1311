"""4-bit weights and a 4-bit paged KV cache for vLLM.

Importing this package loads neither vllm nor a compiled library; `register` is vLLM's entry point.
"""

__version__ = "0.1.0"


def register() -> None:
    """Register the `wkvquant` quantization method and attention backend with vLLM (`vllm.general_plugins`).

    vLLM calls this in every one of its processes; it is cheap and idempotent.
    """
    from vllm_wkvquant.plugin import register as register_plugin

    register_plugin()
