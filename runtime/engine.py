"""ONNX Runtime asked for its providers, and given bytes to run.

CUDA: a provider that was not asked for by name and does not start is done without, with one warning. Convolution
algorithms are chosen by cuDNN's heuristic: the default tries every one of them anew for every shape, and a batch that
shrinks has many. TF32 is off: it keeps 10 bits of a factor, and thresholds and certificates are of float32 answers.
Stages need no synchronisation of ours: a run returns when its device is done, so the next session may read what it
made. CUDA graphs are captured of sessions that are made for it, by calls that are `prepared`, each of which is one
graph; what ONNX Runtime cannot capture runs without, with one warning. [onnxruntime.ai, CUDA provider]

Refused: no onnxruntime, a provider that is not there or could not start, bytes that ONNX Runtime refuses.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ArtifactError, InputError, ProviderError, ProviderWarning, StorageError, UsageError
from .process import CPU, find_onnxruntime, reason_of, session_options, started

CUDA = "CUDAExecutionProvider"
DEFAULT_PROVIDERS = (CUDA, CPU)
CUDA_OPTIONS = {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"}
CAPTURING = {**CUDA_OPTIONS, "enable_cuda_graph": "1"}
_GRAPH, _NO_GRAPH = "gpu_graph_id", "-1"  # of a run: the graph it captures and replays; none
HOST = "cpu"  # the device that arrays lie on
Value = Any  # an OrtValue: a tensor on the host or on a device


def choose_providers(asked: Sequence[str] | None) -> list[str]:
    """Providers to run on, in order of preference; None takes CUDA where it is there, then the CPU."""
    available = find_onnxruntime().get_available_providers()
    if asked is None:
        return [name for name in DEFAULT_PROVIDERS if name in available]
    names = [asked] if isinstance(asked, str) else list(asked)
    if not names:
        raise ProviderError(f"no provider given; available here: {', '.join(available)}")
    for name in names:
        if name not in available:
            raise ProviderError(f"provider {name!r} is not available; available here: {', '.join(available)}")
    return names


Chunks = Callable[[], Iterator[bytes]]  # a file's bytes, piece by piece, from the start at every call


@dataclass(frozen=True)
class ModelBytes:
    """An ONNX model, and the files its weights lie in where they are too large for the model's own."""

    proto: bytes
    external: Mapping[str, Chunks] = field(default_factory=dict)  # by the name under which the model knows them


_graphs = itertools.count(1)  # numbers of CUDA graphs, each once in the process


class EngineSession:
    """One ONNX model in ONNX Runtime."""

    def __init__(
        self, model: bytes | ModelBytes, name: str, providers: list[str], threads: int | None, strict: bool,
        graphs: bool = False,
    ) -> None:  # fmt: skip
        """`name` is what errors call the model; `strict` refuses to go on without every provider listed.

        With `graphs` CUDA captures what is `prepared`, and no two threads may run the session at the same time.
        """
        ort = find_onnxruntime()
        given = ModelBytes(model) if isinstance(model, bytes) else model
        try:
            options = session_options(ort, threads)
            with _external(options, given.external):
                self._session, reason = _started(ort, given.proto, options, providers, graphs)
        except (ArtifactError, UsageError):
            raise
        except OSError as error:
            raise StorageError(
                f"{name}: its weights cannot be unpacked ({error.strerror or error}); "
                "set TMPDIR to a folder with room for them"
            ) from error
        except Exception as error:  # ONNX Runtime's errors share no other root
            if "bad_alloc" in str(error):
                raise StorageError(f"{name}: does not fit into memory; give this process more of it") from error
            raise ArtifactError(
                f"{name}: refused by onnxruntime {ort.__version__} ({reason_of(error)}); "
                "upgrade onnxruntime or compile the model again"
            ) from error
        # A provider lost in mid-run would otherwise be replaced by the CPU with a message on stdout.
        self._session.disable_fallback()
        self._run = _call_of(self._session)
        self.name, self.threads = name, threads
        self.providers = list(self._session.get_providers())
        lost = [provider for provider in providers if provider not in self.providers]
        self.uncaptured = reason if graphs and not lost else ""  # why CUDA captures nothing of it
        self._uncaptured_run = _run_options(ort, _NO_GRAPH) if graphs else None
        reason = reason or "a driver or library is missing"
        if strict and lost:
            raise ProviderError(
                f"provider {lost[0]!r} is installed but could not start ({reason}); "
                f"it works with {', '.join(self.providers)}"
            )
        self.lost = f"{lost[0]} could not start ({reason})" if lost else ""
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        self.inputs = tuple(value.name for value in inputs)
        self.overridable = tuple(value.name for value in self._session.get_overridable_initializers())
        self.outputs = tuple(value.name for value in outputs)
        # Of inputs and outputs: a word such as "tensor(float)", and the rank, 0 where the model leaves it open.
        self.kinds = {value.name: (str(value.type), len(value.shape)) for value in (*inputs, *outputs)}

    def run(self, outputs: list[str], feed: dict[str, Any]) -> list[Any]:
        """The values named in `outputs`; the list must not be empty, or ONNX Runtime returns them all."""
        try:
            # Plain `run`: with io_binding or OrtValues a call took 4 and 40 microseconds longer.
            values: list[Any] = self._run(outputs, feed, None)
        except Exception as error:  # ONNX Runtime's errors share no other root
            raise self._failed(error) from error
        return values

    def run_bound(self, outputs: Mapping[str, str], feed: Mapping[str, Value]) -> list[Value]:
        """As `run`, on values that lie where they are; `outputs` says on which device each is wanted, such as "cuda".

        What is wanted on the host is copied there before the call returns, in the same wait for the device.
        """
        try:
            binding = self._bound(feed)  # one per call: threads may share a session
            for name, device in outputs.items():
                binding.bind_output(name, device)
            self._session.run_with_iobinding(binding, self._uncaptured_run)
            values: list[Value] = binding.get_outputs()
            binding.clear_binding_inputs()  # it lives as long as any of them, and would hold all it read
        except Exception as error:  # ONNX Runtime's errors share no other root
            raise self._failed(error) from error
        return values

    def prepared(self, outputs: Mapping[str, Value], feed: Mapping[str, Value]) -> Callable[[], None]:
        """A call that reads `feed` and writes `outputs`, the same memory every time; as a CUDA graph where it may."""
        binding = self._bound(feed)
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        options = _run_options(find_onnxruntime(), str(next(_graphs)))

        def call() -> None:
            try:
                self._session.run_with_iobinding(binding, options)
            except Exception as error:  # ONNX Runtime's errors share no other root
                raise self._failed(error) from error

        return call

    def _bound(self, feed: Mapping[str, Value]) -> Any:
        binding = self._session.io_binding()
        for name, value in feed.items():
            binding.bind_ortvalue_input(name, value)
        return binding

    def _failed(self, error: Exception) -> InputError:
        return InputError(
            f"{self.name}: onnxruntime failed on this batch ({reason_of(error)}); "
            "check its values, such as token ids beyond the vocabulary, or take a smaller batch"
        )


def start_sessions(
    models: Iterable[tuple[str, bytes | ModelBytes]], providers: list[str], threads: int | None, strict: bool,
    graphs: bool = False,
) -> list[EngineSession]:  # fmt: skip
    """A session for each name and model, in turn; `strict` refuses to go on without every provider listed.

    Else the first that loses one warns, with `ProviderWarning`, and those after it do not try again. With `graphs`
    CUDA captures them; the first that it cannot capture warns.
    """
    sessions: list[EngineSession] = []
    left = providers
    for name, model in models:
        session = EngineSession(model, name, left, threads, strict, graphs)
        if session.uncaptured and not any(one.uncaptured for one in sessions):
            warnings.warn(
                f"{name}: runs without a CUDA graph ({session.uncaptured}); do without CUDA graphs to silence this",
                ProviderWarning,
                stacklevel=3,  # whoever called `load`
            )
        if session.lost and left is providers:
            warnings.warn(
                f"{session.lost}; running on {', '.join(session.providers)}. Install what it needs, "
                f"or pass providers=[{CPU!r}] to mean the CPU and silence this",
                ProviderWarning,
                stacklevel=3,  # whoever called `load`
            )
            left = session.providers
        sessions.append(session)
    return sessions


def device_of(sessions: Sequence[EngineSession]) -> str | None:
    """The device all of them prefer and values may stay on; None: the host."""
    return "cuda" if all(session.providers[0] == CUDA for session in sessions) else None


def upload(array: np.ndarray, device: str) -> Value:
    """A value of the array's contents on a device; on the host it is the array's own memory.

    Raises `InputError` where it does not fit.
    """
    try:
        return find_onnxruntime().OrtValue.ortvalue_from_numpy(np.asarray(array, order="C"), device)
    except Exception as error:  # ONNX Runtime's errors share no other root
        raise InputError(
            f"{array.dtype} values of shape {array.shape} cannot be put on {device} ({reason_of(error)}); "
            "take a smaller batch"
        ) from error


def room(shape: Sequence[int], element: object, device: str) -> Value:
    """A value on a device, its contents still to be written; `element` is a numpy dtype or onnx.proto's number.

    Raises `InputError` where it does not fit.
    """
    try:
        return find_onnxruntime().OrtValue.ortvalue_from_shape_and_type(list(shape), element, device)
    except Exception as error:  # ONNX Runtime's errors share no other root
        raise InputError(
            f"there is no room on {device} for values of shape {tuple(shape)} ({reason_of(error)}); "
            "take a smaller batch"
        ) from error


def download(value: Value) -> np.ndarray:
    """A value's contents on the host; of one that lies there no copy is made."""
    array: np.ndarray = value.numpy()
    return array


def _started(ort: Any, proto: bytes, options: Any, providers: list[str], graphs: bool) -> tuple[Any, str]:
    """A session on `providers`; where CUDA fails, one without graphs or without CUDA, and why."""
    reason = _missing_driver() if CUDA in providers else ""
    if CUDA in providers and not reason:
        for asked in (CAPTURING, CUDA_OPTIONS) if graphs else (CUDA_OPTIONS,):
            with_options = [(name, asked) if name == CUDA else name for name in providers]
            try:
                return started(ort, proto, options, with_options), reason
            except Exception as error:  # noqa: BLE001  # a wrong model fails again below, a lost device does not
                reason = reason_of(error)
    others = [name for name in providers if name != CUDA] or [CPU]
    return started(ort, proto, options, others), reason


def _run_options(ort: Any, graph: str) -> Any:
    options = ort.RunOptions()
    options.add_run_config_entry(_GRAPH, graph)
    return options


def _call_of(session: Any) -> Any:
    """`run` of the session that ONNX Runtime's Python class wraps; of the wrapper where it hides it.

    The wrapper goes through the inputs in Python before every call, to find what the call itself refuses.
    """
    return getattr(session, "_sess", session).run


def _missing_driver() -> str:
    """Why CUDA cannot start, "" where it may: ONNX Runtime itself would say so on stderr, once per session."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        ctypes.CDLL(library)
    except OSError:
        return f"no NVIDIA driver: {library} is not there"
    return ""


@contextlib.contextmanager
def _external(options: Any, files: Mapping[str, Chunks]) -> Iterator[None]:
    """The weights in a folder of our own while the session is made, so that the bytes that were checked are what runs.

    ONNX Runtime maps them, and on Linux a mapping outlives its file. Not from memory: ONNX Runtime 1.31 takes weights
    from memory for the outer graph alone, and reads those inside a second `If` from the disk without a word.
    """
    if not files:
        yield
        return
    with tempfile.TemporaryDirectory(prefix="offramp-", ignore_cleanup_errors=True) as folder:
        for name, chunks in files.items():
            with (Path(folder) / name).open("wb") as file:
                file.writelines(chunks())
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        yield
