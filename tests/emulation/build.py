"""Builds csrc/cuda for the CPU: the sources with the parts that are not C++ replaced by those of shim.h."""

import re
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"


def _cut(text: str, start: str, end: str, new: str = "") -> str:
    first = text.index(start)
    return text[:first] + new + text[text.index(end, first) :]


def sources() -> str:
    """The kernels without inline assembly and launches."""
    attention = (CSRC / "cuda/paged_attention.cuh").read_text()
    attention = _cut(
        attention, "__device__ __forceinline__ void mma(", "__device__ __forceinline__ uint32_t pack_half2"
    )
    copy = """  void copy_async(uint4* to, const uint32_t* from, int count) const {
    for (int i = threadIdx.x; i < count; i += S::kThreads) to[i] = reinterpret_cast<const uint4*>(from)[i];
  }

"""
    attention = _cut(attention, "  __device__ void copy_async(", "  __device__ void run()", copy)
    attention = attention.replace('asm volatile("cp.async.wait_all;" ::: "memory");', ";")
    attention = attention[: attention.index("template <int D, int NT>\n__global__")] + "}  // namespace wkvquant\n"
    write = (CSRC / "cuda/cache_write.cu").read_text()
    write = re.sub(
        r"(cache_write<D, \w+>)<<<(grid, .*?), 0, stream>>>(\(.*?\));", r"run_grid(\2, [&] { \1\3; });", write
    )
    write = (
        write.replace("__global__", "").replace("cudaGetLastError()", "cudaSuccess").replace("kWarps", "kWriteWarps")
    )
    together = (CSRC / "cuda/common.cuh").read_text() + attention + write
    return together.replace("#pragma once", "").replace('#include "common.cuh"', "")


def build(folder: Path) -> Path:
    """The shared library, made in `folder`. Needs g++ and the headers of nvcc."""
    (folder / "generated.h").write_text(sources())
    probe = folder / "probe.cu"
    probe.write_text("#include <cuda_fp16.h>\n")
    listed = subprocess.run(["nvcc", "-M", str(probe)], capture_output=True, text=True, check=True).stdout
    header = next(word for word in listed.split() if word.endswith("/cuda_fp16.h"))
    library = folder / "emulated.so"
    includes = [f"-I{path}" for path in (folder, HERE, Path(header).parent, CSRC, CSRC / "cuda")]
    flags = ["-std=c++17", "-O2", "-march=native", "-w", "-fPIC", "-shared", "-U_FORTIFY_SOURCE"]
    subprocess.run(["g++", *flags, *includes, str(HERE / "kernels.cpp"), "-o", str(library)], check=True)
    return library
