"""Builds csrc/cuda for the CPU: the kernels with shim.h in place of the instructions that are not C++."""

import re
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"


def sources() -> str:
    """The kernels without ptx.cuh, whose functions shim.h has, and without launches."""
    names = ("common", "attention_plan", "attention_kernel")
    names += ("attention_load", "attention_rows", "attention_past", "attention_finish")
    attention = "".join((CSRC / f"cuda/{name}.cuh").read_text() for name in names)
    others = ""
    for name in ("plan", "cache_write", "gather_kv"):
        source = (CSRC / f"cuda/{name}.cu").read_text()
        launch = r"(plan_step|\w+<D, \w+>)<<<(grid, .*?), 0, .*?>>>(\(.*?\));"
        source = re.sub(launch, r"run_grid(\2, [&] { \1\3; });", source)
        # one translation unit has the names of all
        source = re.sub(r"\b(kWarps|kPart|launch)\b", rf"\1_{name}", source)
        others += source.replace("__global__", "").replace("cudaGetLastError()", "cudaSuccess")
    return re.sub(r'#pragma once|#include "\w+\.cuh"', "", attention + others)


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
    flags.append("-fno-strict-aliasing")  # as device code is compiled
    subprocess.run(["g++", *flags, *includes, str(HERE / "kernels.cpp"), "-o", str(library)], check=True)
    return library
