"""Compiles this folder's C++ once per machine and gives its functions to Python.

The library is kept in the user's cache under a name that says what it was made of, so a changed source, processor or
path of the compiler makes a new one. Plain C functions on addresses: no torch headers, a second or two to compile.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

_FLAGS = [
    *("-O3", "-march=native", "-std=c++17", "-fPIC", "-shared", "-fopenmp", "-Wno-psabi"),
    # Nothing that lets the compiler assume numbers to be finite: a NaN must stay one.
    *("-fno-math-errno", "-fno-trapping-math"),
    # OpenMP is torch's own, found when the library is loaded: a second one would bring threads of its own.
    *("-nodefaultlibs", "-lstdc++", "-lm", "-lc", "-lgcc"),
]
_X86_FLAGS = ["-mprefer-vector-width=512"]
_ARGUMENTS = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "d": ctypes.c_double}
_SIGNATURES = {
    "stack_rows": "ppip",
    "combine_rows": "ppipippi",
    "stack_inputs": "ppp",
    "sum_outputs": "ppp",
    "sum_outputs_wide": "ppp",
    "stack_gradients": "ppppp",
    "finish_gradients": "ppppp",
    "add_rms_norm": "pppdiip",
    "silu_mul": "ppiiip",
    "rotate": "piiipppi",
    "keep": "pipiiippippi",
    "attend": "pipppiiiippidpi",
    "greatest": "piip",
}
_SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}
_COMPILE_TIMEOUT_S = 120.0

_log = logging.getLogger(__name__)


class CompiledLoops:
    """The functions of the library by name and element type: `loops.function("attend", torch.bfloat16)(…)`.

    A function takes addresses and counts as its C++ declares them and checks nothing: the callers in this package do.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions: dict[tuple[str, torch.dtype], Callable[..., None]] = {}
        for name, signature in _SIGNATURES.items():
            for dtype, suffix in _SUFFIXES.items():
                function = getattr(library, f"{name}_{suffix}")
                function.argtypes = [_ARGUMENTS[kind] for kind in signature]
                function.restype = None
                self._functions[name, dtype] = function

    def function(self, name: str, dtype: torch.dtype) -> Callable[..., None]:
        """Raises KeyError for a type that is not compiled: ask `is_compiled_type`."""
        return self._functions[name, dtype]


def is_compiled_type(dtype: torch.dtype) -> bool:
    return dtype in _SUFFIXES


@cache
def compiled_loops() -> CompiledLoops | None:
    """The library, compiled if need be; None on a machine that cannot, which is logged once."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
    if compiler is None:
        _log.warning("no C++ compiler: the engine runs without its compiled loops, slower on CPU")
        return None
    try:
        _share_openmp()
        # The interpreter's lock is kept: a loop takes less time than giving the lock away and waiting for it again.
        return CompiledLoops(ctypes.PyDLL(str(_built(compiler))))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or error
        _log.warning("the engine runs without its compiled loops, slower on CPU: %s", detail)
        return None


def _built(compiler: str) -> Path:
    folder = Path(__file__).parent
    sources = sorted(folder.glob("*.cpp"))
    flags = [*_FLAGS, *(_X86_FLAGS if platform.machine() == "x86_64" else [])]
    parts = [compiler.encode(), *(flag.encode() for flag in flags), _processor().encode()]
    parts += [path.read_bytes() for path in (*sources, *sorted(folder.glob("*.h")))]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    library = cache_home / "flora" / "compiled" / f"loops-{digest}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place, so that replicas that start together see a whole file or none.
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            made = Path(scratch) / library.name
            command = [compiler, *map(str, sources), *flags, "-o", str(made)]
            subprocess.run(
                command, check=True, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S
            )
            made.replace(library)
    return library


def _processor() -> str:
    """What `-march=native` depends on: a cache in a shared home may be seen by other machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features"))}))


def _share_openmp() -> None:
    """Let the library see the OpenMP that torch runs on."""
    inside = Path(torch.__file__).parent
    candidates = [*inside.glob("lib/lib*omp*.so*"), *inside.parent.glob("torch.libs/lib*omp*.so*")]
    name = str(candidates[0]) if candidates else "libgomp.so.1"
    ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
