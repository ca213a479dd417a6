"""Put a fast OpenBLAS in front of the reference BLAS of the MLX wheel on Linux, before MLX is imported."""

from __future__ import annotations

import ctypes
import ctypes.util
import hashlib
import logging
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from macft.files import cache_dir, write_bytes

logger = logging.getLogger("macft")

INSTALL = "pip install cmeel-openblas, or apt-get install libopenblas0-pthread"

# Runs in a child process: a library built for another CPU dies by a signal there, not here.
_PROBE = """
import ctypes, sys
for path in sys.argv[1:-1]:
    ctypes.CDLL(path)
blas = ctypes.CDLL(sys.argv[-1], mode=ctypes.RTLD_GLOBAL)
n = 64
row = ctypes.c_float * (n * n)
a, b, c = row(*([1.0] * n * n)), row(*([2.0] * n * n)), row()
one, zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
blas.cblas_sgemm(101, 111, 111, n, n, n, one, a, n, b, n, zero, c, n)
sys.exit(0 if all(value == 2.0 * n for value in c) else 1)
"""


@cache
def preload() -> str:
    """Load the best available BLAS with global symbols; returns what MLX will multiply with."""
    if sys.platform != "linux":
        return "Metal and Accelerate" if sys.platform == "darwin" else "the BLAS of the MLX wheel"
    if "mlx.core" in sys.modules:
        return "reference BLAS (MLX was imported before macft could load OpenBLAS)"
    for name, libraries in _candidates():
        if _works(libraries):
            for library in libraries[:-1]:
                ctypes.CDLL(str(library))
            ctypes.CDLL(str(libraries[-1]), mode=ctypes.RTLD_GLOBAL)
            return f"OpenBLAS ({name})"
    logger.warning("MLX has only its reference BLAS here, about 100 times slower than OpenBLAS; to get it: %s", INSTALL)
    return "reference BLAS"


def describe() -> str:
    """The BLAS in use and the speed of a float32 product on it, measured now."""
    name = preload()
    import mlx.core as mx

    size = 1024
    a = mx.random.normal((size, size))
    mx.eval(a @ a)
    start = time.perf_counter()
    for _ in range(3):
        mx.eval(a @ a)
    seconds = (time.perf_counter() - start) / 3
    return f"{name}, {2 * size**3 / seconds / 1e9:.0f} GFLOP/s in float32"


def is_fast() -> bool:
    """Whether MLX multiplies at full speed on this machine."""
    return not preload().startswith("reference")


def _candidates() -> Iterator[tuple[str, list[Path]]]:
    """(name, libraries in loading order), best first."""
    wheel = _wheel_file("cmeel-openblas", "libopenblas.so")
    if wheel is not None and _has_avx512():
        yield "cmeel-openblas", [wheel]
        fortran = _fortran_runtime()
        if fortran:
            yield "cmeel-openblas", [*fortran, wheel]
    for name in ("libopenblas.so.0", "libopenblas.so"):
        yield "system", [Path(name)]


def _has_avx512() -> bool:
    """The x86-64 build of cmeel-openblas dies on CPUs without AVX-512."""
    if platform.machine() != "x86_64":
        return True
    try:
        return "avx512f" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def _wheel_file(package: str, name: str) -> Path | None:
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        return None
    found = [Path(str(file.locate())) for file in files if file.name == name]
    return found[0] if found and found[0].exists() else None


def _fortran_runtime() -> list[Path]:
    """The Fortran runtime that OpenBLAS asks for, from the MLX wheel, under the name it asks for.

    The wheel ships libgfortran under a mangled name, so OpenBLAS does not find it. A copy in the
    cache gets the plain name back in its SONAME field; the loader then takes it for the real one.
    """
    try:
        files = distribution("mlx-cpu").files or []
    except PackageNotFoundError:
        return []
    bundled = {file.name.split("-")[0]: Path(str(file.locate())) for file in files if "mlx_cpu.libs" in str(file)}
    fortran, quadmath = bundled.get("libgfortran"), bundled.get("libquadmath")
    if fortran is None or not fortran.exists():
        return []
    content = fortran.read_bytes()
    mangled = fortran.name.encode() + b"\0"
    if content.count(mangled) != 1:
        return []
    digest = hashlib.blake2b(content, digest_size=8).hexdigest()
    copy = cache_dir() / "lib" / digest / "libgfortran.so.5"
    if not copy.exists():
        write_bytes(copy, content.replace(mangled, b"libgfortran.so.5".ljust(len(mangled), b"\0")))
    return [quadmath, copy] if quadmath is not None else [copy]


def _works(libraries: list[Path]) -> bool:
    """Whether a small product comes out right in a child process; success is remembered."""
    key = " ".join(f"{library} {library.stat().st_mtime_ns if library.exists() else ''}" for library in libraries)
    cpu = Path("/proc/cpuinfo").read_bytes().split(b"\n\n")[0].split(b"flags")[-1][:2000]
    mark = cache_dir() / "blas" / hashlib.blake2b(key.encode() + cpu, digest_size=8).hexdigest()
    if mark.exists():
        return True
    command = [sys.executable, "-c", _PROBE, *map(str, libraries)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    if done.returncode == 0:
        write_bytes(mark, b"")
    return done.returncode == 0
