"""Builds the CPU kernels: one shared library with a plain C interface, which vllm_wkvquant/native.py loads.

Every ISA is one source with its own flags; the library picks one at run time. WKVQUANT_CUDA=0 leaves CUDA kernels out,
1 insists on them; unset, they are built where nvcc and sources exist, for the architectures of WKVQUANT_CUDA_ARCHS
(80;90a). CXX names the compiler.
"""

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import Distribution, Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
MIN_GCC = 11
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
FLAGS += ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]  # gcc 105593: its own AVX-512 intrinsics
ISA_FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mfma", "-mf16c"],
}
ISA_FLAGS["avx512"].append("-mprefer-vector-width=512")
CUDA_ARCHS = os.environ.get("WKVQUANT_CUDA_ARCHS", "80;90a").split(";")
CUDA_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall"]
CUDA_FLAGS += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHS]
CUDA_FLAGS.append(f"-DWKV_CUDA_ARCHS={'_'.join(CUDA_ARCHS)}")
X86 = platform.machine() in ("x86_64", "AMD64")


def find_compiler() -> str:
    """The C++ compiler; SystemExit where it is missing or too old."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise SystemExit(f"vllm-wkvquant: C++ compiler {compiler!r} not found; install g++ >= {MIN_GCC} or set CXX")
    version = subprocess.run([compiler, "-dumpversion"], capture_output=True, text=True, check=True).stdout.strip()
    if int(re.match(r"\d+", version)[0]) < MIN_GCC:
        raise SystemExit(f"vllm-wkvquant: {compiler} {version} is too old; g++ >= {MIN_GCC} is needed (set CXX)")
    return compiler


def cuda_sources() -> list[Path]:
    """CUDA sources to compile, as WKVQUANT_CUDA asks; SystemExit where it cannot be had."""
    wanted = os.environ.get("WKVQUANT_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"vllm-wkvquant: WKVQUANT_CUDA={wanted!r} is neither 0 nor 1")
    sources, nvcc = sorted((ROOT / "csrc/cuda").glob("*.cu")), shutil.which("nvcc")
    if wanted == "1" and nvcc is None:
        raise SystemExit("vllm-wkvquant: WKVQUANT_CUDA=1 but nvcc is not on PATH")
    if wanted == "1" and not sources:
        raise SystemExit("vllm-wkvquant: WKVQUANT_CUDA=1 but this version has no CUDA kernels (csrc/cuda is empty)")
    return sources if nvcc and wanted != "0" else []


class BuildKernels(build_ext):
    """g++ over csrc/cpu, one set of flags a source; nvcc over csrc/cuda."""

    def get_ext_filename(self, fullname: str) -> str:
        """No Python ABI in the name: the library does not use it."""
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Compile what changed, and link."""
        compiler = find_compiler()
        cuda = ext.name.endswith("cuda")
        temp = Path(self.build_temp) / ext.name.rpartition(".")[2]
        if cuda:
            temp /= "_".join(CUDA_ARCHS)  # objects of other architectures are no use
        temp.mkdir(parents=True, exist_ok=True)
        headers = max(path.stat().st_mtime for path in [*ROOT.glob("csrc/**/*.*h"), Path(__file__)])
        objects = []
        for source in map(Path, ext.sources):
            objects.append(temp / f"{source.stem}.o")
            if objects[-1].exists() and objects[-1].stat().st_mtime > max(headers, source.stat().st_mtime):
                continue
            if cuda:
                self.spawn(["nvcc", *CUDA_FLAGS, "-Icsrc", "-c", str(source), "-o", str(objects[-1])])
                continue
            flags = FLAGS + (ISA_FLAGS.get(source.stem, []) if X86 else [])
            self.spawn([compiler, *flags, "-Icsrc", "-c", str(source), "-o", str(objects[-1])])
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        if cuda:
            self.spawn(["nvcc", "-shared", "--cudart=static", *CUDA_FLAGS, *map(str, objects), "-o", str(target)])
            return
        self.spawn([compiler, "-shared", "-fopenmp", "-Wl,--no-undefined", *map(str, objects), "-o", str(target)])


class BinaryDistribution(Distribution):
    """A wheel of one platform, for every Python."""

    def has_ext_modules(self) -> bool:
        """Always: the library is not an option."""
        return True


class PlatformWheel(bdist_wheel):
    """py3-none-<platform>."""

    def get_tag(self) -> tuple[str, str, str]:
        """The library binds to no Python version."""
        return "py3", "none", super().get_tag()[2]


cuda = [str(path.relative_to(ROOT)) for path in cuda_sources()]
sources = [f"csrc/cpu/{name}.cpp" for name in ("api", "prepare", "scalar", *(ISA_FLAGS if X86 else ()))]
headers = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.*h"))  # for the source distribution
setup(
    ext_modules=[
        Extension("vllm_wkvquant._wkvquant_cpu", sources, depends=headers),
        *([Extension("vllm_wkvquant._wkvquant_cuda", cuda, depends=headers)] if cuda else []),
    ],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
    distclass=BinaryDistribution,
)
