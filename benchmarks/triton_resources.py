"""Registers, stack and shared memory of the Triton kernels, compiled here for a GPU that need not be here.

    python benchmarks/triton_resources.py [--arch 90] [--head-sizes 64,80] [--dtypes bfloat16,float16]

The kernels of a decode in parts and of a chunk, 4 query heads to a KV head, pages of 64 tokens. Stack is spills and an
array of 28 bytes for the sines of large angles. Takes a minute a head size the first time; Triton keeps what it
compiled. Needs cuobjdump, on the PATH or beside triton.
"""

import argparse
import re
import subprocess
import tempfile
from typing import Any

import torch
import triton
from cuda_resources import cuobjdump
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_wkvquant import native_triton, triton_kernels
from vllm_wkvquant.layout import HEAD_SIZES, PageLayout
from vllm_wkvquant.reference import hadamard_block

GROUP, BLOCK_SIZE = 4, 64
# of arguments that are not i32
TYPES = {
    **dict.fromkeys(["slots", "positions", "turns"], "*i64"),
    **dict.fromkeys(["block_table", "seq_lens", "starts", "first", "key_starts"], "*i32"),
    **dict.fromkeys(["keys", "values"], "*fp16"),
    "cache": "*u8",
    "basis": "*fp16",
    "scale": "fp32",
}
TABLES = ["lse", "parts_lse", "key_scale", "query_scale", "k_shift", "v_shift", "k_first", "v_first"]
TYPES |= dict.fromkeys([*TABLES, "k_extra", "v_extra"], "*fp32")
ALIGNED = ("q_token", "q_head", "k_token", "k_head", "v_token", "v_head", "out_token", "out_head", "block_stride")
SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def compile_kernel(kernel: Any, constants: dict[str, Any], types: dict[str, str], arch: int, **options: int) -> Any:
    """The kernel compiled for sm_<arch>. types: of the arguments that are not as in TYPES."""
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        kind = (TYPES | types).get(name, "i32")
        signature[name] = "constexpr" if name in constants else kind
        if name not in constants and (kind.startswith("*") or name in ALIGNED):
            attributes[(i,)] = [["tt.divisibility", 16]]
    constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def kernels(head_size: int, dtype: torch.dtype, arch: int) -> dict[str, Any]:
    """Compiled kernels by what they are for."""
    pairs, page = head_size // 2, PageLayout(head_size, BLOCK_SIZE)
    sizes = {"D": head_size, "COLUMNS": triton.next_power_of_2(head_size)}
    constants = sizes | {
        "PAIRS": pairs,
        "HADAMARD": hadamard_block(head_size).bit_length() - 1,
        "BLOCK_SIZE": BLOCK_SIZE,
        "PAGE": page.nbytes,
        "V_CODES": page.v_codes,
        "K_META": page.k_meta,
        "V_META": page.v_meta,
    }
    types = dict.fromkeys(["query", "key", "value", "out"], f"*{SHORT[dtype]}")
    write = constants | {"ROWS": native_triton.WRITE_ROWS}
    found = {"cache_write": compile_kernel(triton_kernels.write, write, types, arch)}
    gather = constants | {"ROWS": native_triton.GATHER_ROWS, "HEADS": 8}
    found["gather_kv"] = compile_kernel(triton_kernels.gather, gather, types, arch)
    for name, rows, special in (
        ("decode, in parts", GROUP, {}),
        ("chunk", 100, {"lse": None}),
    ):
        tile, keys, warps = native_triton._tile(rows, GROUP, head_size, dtype)
        shapes = {
            "ROTARY": max(16, triton.next_power_of_2(pairs)),
            "GROUP": GROUP,
            "ROWS": tile,
            "KEYS": keys,
            "BASIS": native_triton.BASIS,
            "PART_TURNS": native_triton.PART_KEYS // keys,
            "OPERAND": native_triton.OPERANDS[dtype],
        }
        found[f"{name}, {tile} rows, {keys} keys, {warps} warps"] = compile_kernel(
            triton_kernels.attention,
            constants | shapes | special,
            types | ({} if special else {"out": "*fp32"}),
            arch,
            num_warps=warps,
            num_stages=2,
        )
    combine = sizes | {"HEADS": 32, "PARTS": native_triton.MAX_PARTS}
    found["combine"] = compile_kernel(triton_kernels.combine, combine, types | {"parts": "*fp32"}, arch)
    return found


def usage(kernel: Any) -> tuple[int, int, int]:
    """(registers of a thread, bytes of its stack, bytes of shared memory)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [cuobjdump(), "--dump-resource-usage", file.name]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", listed)[1]) for name in ("REG", "STACK"))
    return registers, stack, kernel.metadata.shared


def main() -> None:
    """Print a row for every kernel."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--head-sizes", default=",".join(map(str, HEAD_SIZES)))
    parser.add_argument("--dtypes", default="bfloat16,float16")
    args = parser.parse_args()
    print(f"sm_{args.arch}, Triton {triton.__version__}")
    print(f"{'head size':12}{'type':10}{'kernel':46}{'registers':>10}{'stack':>7}{'shared memory':>15}")
    for head_size in map(int, args.head_sizes.split(",")):
        for dtype in args.dtypes.split(","):
            for name, kernel in kernels(head_size, getattr(torch, dtype), args.arch).items():
                registers, stack, shared = usage(kernel)
                print(f"{head_size:<12}{dtype:10}{name:46}{registers:10}{stack:7}{shared:15}", flush=True)


if __name__ == "__main__":
    main()
