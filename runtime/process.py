"""What the ONNX Runtime sessions of one process share: the library, an arena of memory, and, if asked, threads.

ONNX Runtime is imported on first use, so that `import offramp.runtime` costs nothing and works where it is missing.

What each of the following is worth on two cores is measured by `benchmarks.sessions`; README has its table.

Threads: by default every session owns a pool whose workers spin after each `run`, waiting for more. With one session
per stage the idle pools steal the cores from the busy one. With `force_spinning_stop` workers spin while their own
session runs and must be woken by the next. ONNX Runtime's process-wide pool does neither. It is the best there is, but
once it exists ONNX Runtime refuses every session of the process that wants one of its own, so it is not a library's to
impose: `share_threads` is for the application to call. Without it workers stop spinning when their session returns.
Spinning wants free cores: on a machine that is shared take `threads=1`.

Memory: every session would keep an arena of its own, as large as its largest batch, and a plan of it for every number
of rows it ever saw. Stages run one after the other, so all sessions of the process share one arena, and make no plans.
(The table's batches have one size each, so that plans cost nothing there.)

Fusion: an addition and the LayerNormalization behind it are left as they are on the CPU. ONNX Runtime 1.32 makes one
operator of them where it knows their shapes, which it does in stages and often not in the whole model; the one takes
longer than the two and rounds otherwise. So are a bias and its GELU: their one operator fills a second buffer, and took
up to 2.6 times as long in one opening of a session as in another, though not in those the table is of. Plain backbones
that artifacts are measured against run in sessions of the same kind.

Refused: no onnxruntime; threads or memory that cannot be had.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import sys
import threading
from typing import Any

from .errors import ProviderError, UsageError

CPU = "CPUExecutionProvider"
SLOWER_FUSED = ["SkipLayerNormFusion", "BiasGeluFusion"]


def find_onnxruntime() -> Any:
    """The module `onnxruntime`, or a `ProviderError` that says what to install."""
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise ProviderError(
            f"onnxruntime cannot be imported ({error}); run pip install 'offramp[cpu]', or 'offramp[gpu]' for CUDA"
        ) from error


_MOST_THREADS = 4096


def check_threads(threads: int | None) -> None:
    """None is ONNX Runtime's own count, the physical cores; 1 runs in the calling thread alone."""
    whole = isinstance(threads, int) and not isinstance(threads, bool)
    if threads is not None and not (whole and 1 <= threads <= _MOST_THREADS):
        raise UsageError(
            f"threads is {threads!r}; give a whole number from 1 to {_MOST_THREADS}, or None for the physical cores"
        )


_shared: list[int] = []  # threads of the process's pool, once `share_threads` has made it
_arena: list[int] = []  # bytes that the process's arena may take, 0 for any, once it was made
_making = threading.Lock()  # of the arena: artifacts may be loaded from several threads


def share_threads(threads: int | None = None) -> None:
    """Let every ONNX Runtime session of this process, not only ours, run on one pool of `threads` threads.

    The fastest way to run stages with more than one thread, most of all small batches of small models; `threads` None
    takes the physical cores. To be called once, by the application, before sessions are made: from then on ONNX Runtime
    refuses any session, of whatever library, that does not set `use_per_session_threads = False`. Ours do; to `load`
    leave `threads` out.

    Raises `UsageError` for a wrong number, or when the process has such a pool already.
    """
    check_threads(threads)
    ort = find_onnxruntime()
    try:
        ort.set_global_thread_pool_sizes(threads or 0, 1)
    except Exception as error:  # ONNX Runtime's errors share no other root
        raise UsageError(f"threads cannot be shared anew ({reason_of(error)}); call share_threads once") from error
    _shared.append(threads or 0)


def started(ort: Any, proto: bytes, options: Any, providers: list[Any]) -> Any:
    """A session; where someone else has made a pool for the whole process, on that one."""
    disabled = SLOWER_FUSED if providers == [CPU] else None
    start = functools.partial(
        ort.InferenceSession, proto, options, providers=providers, enable_fallback=0, disabled_optimizers=disabled
    )
    try:
        return start()
    except Exception as error:  # ONNX Runtime's errors share no other root
        if "use_per_session_threads" not in str(error):
            raise
        options.use_per_session_threads = False
        return start()


def threads_are_shared() -> bool:
    """Whether `share_threads` was called: no session of this process can have threads of its own any more."""
    return bool(_shared)


def limit_memory(bound: int) -> None:
    """Let the arena that all our sessions of this process share take `bound` bytes at most, weights not counted.

    To be called once, by the application, before anything is loaded. A batch that needs more is refused. On the CPU
    alone: arenas on a GPU stay as ONNX Runtime has them.

    Raises `UsageError` for a wrong number, or when there is an arena already.
    """
    if isinstance(bound, bool) or not isinstance(bound, int) or bound < 1:
        raise UsageError(f"a memory bound of {bound!r} bytes holds nothing; give a whole number from 1 up")
    if not _make_arena(find_onnxruntime(), bound):
        raise UsageError("memory is taken already, so it cannot be bounded anew; call limit_memory once, before load")


def _make_arena(ort: Any, bound: int) -> bool:
    """Register the arena with ONNX Runtime's environment, where only sessions that ask for it take it.

    False where that was done before.
    """
    with _making:
        if _arena:
            return False
        memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
        ort.create_and_register_allocator(memory, ort.OrtArenaCfg(bound, -1, -1, -1))  # growth as by default
        _arena.append(bound)
    return True


def session_options(ort: Any, threads: int | None) -> Any:
    """What every session of ours asks for; `threads` as for `check_threads`."""
    _make_arena(ort, 0)
    options = ort.SessionOptions()
    if _shared:
        if threads is not None and threads != _shared[0]:
            raise UsageError(f"threads is {threads}, but this process shares its threads; leave it out")
        options.use_per_session_threads = False
    else:
        options.intra_op_num_threads = threads or 0
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3  # errors; warnings about the graph are the compiler's business
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.enable_mem_pattern = False
    return options


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hand_back() -> bool:
    """Hand freed memory to the operating system. glibc keeps what lies between live blocks.

    False where that cannot be asked for.
    """
    trim = _trim()
    if trim is not None:
        trim(0)
    return trim is not None


@functools.cache
def _trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # musl has none


def reason_of(error: Exception) -> str:
    """ONNX Runtime's message on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
