"""Registers, stack and shared memory of every CUDA kernel, read out of the built library.

    python benchmarks/cuda_resources.py

Stack is what ptxas spilled: the kernels use no local arrays. Exits with 1 where a kernel spills more than KNOWN allows.
Shared memory is that of a launch with one team a CTA and a shift on all rotary pairs of base 5e5. Needs cuobjdump, on
the PATH or beside triton, but no GPU.
"""

import ctypes
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from vllm_wkvquant import native_cuda, reference
from vllm_wkvquant.reference import KVParams

# (architecture, kernel) -> bytes of stack that are accepted, with nvcc 13.0: two CTAs of attention on a multiprocessor
# leave a thread 168 registers, and keys are seldom written from fp32
KNOWN = {("sm_121", "cache_write<64, float>"): 8}


def cuobjdump() -> str:
    """Path of the tool; SystemExit where there is none."""
    triton = importlib.util.find_spec("triton")
    beside = [Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"] if triton and triton.origin else []
    found = shutil.which("cuobjdump") or next((str(path) for path in beside if path.exists()), None)
    if found is None:
        raise SystemExit("cuobjdump is neither on the PATH nor beside triton")
    return found


def shared_bytes(head_size: int, tiles: int, strands: int) -> int:
    """Dynamic shared memory of a CTA of an attention kernel."""
    inv_freq = [5e5 ** (-2 * j / head_size) for j in range(head_size // 2)]
    ones = torch.ones(1, head_size)
    params = KVParams(ones, ones, ones, key_hadamard=True, rope_turns=reference.rope_turns(inv_freq))
    fields = native_cuda.prepare(params).fields
    return native_cuda.library().wkvquant_cuda_shared_bytes(ctypes.byref(fields), tiles, strands)


def described(symbol: str) -> tuple[str, tuple[int, int, int] | None]:
    """A kernel's name with its template's arguments, and those of an attention kernel. Others keep their symbols."""
    if found := re.search(r"paged_attentionILi(\d+)ELi(\d+)ELi(\d+)EE", symbol):
        head_size, tiles, strands = map(int, found.groups())
        return f"paged_attention<{head_size}, {tiles}, {strands}>", (head_size, tiles, strands)
    if found := re.search(r"(gather_kv|cache_write)ILi(\d+)E(f|6__half|13__nv_bfloat16)E", symbol):
        dtype = {"f": "float"}.get(found[3], found[3].partition("__")[2])
        return f"{found[1]}<{found[2]}, {dtype}>", None
    return "plan_step" if "plan_step" in symbol else symbol, None


def main() -> None:
    """Print the table; exit with 1 on spills."""
    if not native_cuda.LIBRARY.exists():
        raise SystemExit(f"{native_cuda.LIBRARY} does not exist; build it with `make cuda`")
    command = [cuobjdump(), "--dump-resource-usage", str(native_cuda.LIBRARY)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    print(f"{'arch':8}{'kernel':46}{'registers':>10}{'stack':>7}{'shared memory':>15}")
    arch, kernel, failed = "", None, []
    for line in listed.splitlines():
        if found := re.match(r"arch = (\S+)", line):
            arch = found[1]
        if found := re.match(r" Function (\w+):", line):
            kernel = described(found[1])
        if kernel and (found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line)):
            registers, stack, static = map(int, found.groups())
            shown, sizes = kernel
            shared = static + (shared_bytes(*sizes) if sizes else 0)
            allowed = KNOWN.get((arch, shown), 0)
            print(f"{arch:8}{shown:46}{registers:10}{stack:7}{shared:15}")
            if stack > allowed:
                failed.append(f"{shown} on {arch}: {stack} bytes of stack, {allowed} are accepted")
            kernel = None
    if not arch:
        failed.append(f"no kernel found in {native_cuda.LIBRARY}")
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
