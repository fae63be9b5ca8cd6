"""CUDA that is installed and does not start: done without and said once, or refused where it was asked for by name."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnxruntime
import pytest
from tiny import THRESHOLDS, Tiny, batch, reference

from offramp.runtime import ArtifactError, ProviderError, ProviderWarning, load
from offramp.runtime import engine as engine_module
from offramp.runtime.engine import CUDA, CUDA_OPTIONS, EngineSession
from offramp.runtime.process import CPU


@pytest.fixture
def cuda_is_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """An ONNX Runtime with CUDA in it, on a machine where it does not start; yields the providers sessions ask for."""
    asked: list[Any] = []
    inference = onnxruntime.InferenceSession

    def created(model: bytes, options: Any, providers: list[Any], **more: Any) -> Any:
        asked.append(providers)
        names = [provider if isinstance(provider, str) else provider[0] for provider in providers]
        return inference(model, options, providers=[name for name in names if name != CUDA] or [CPU], **more)

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", created)
    monkeypatch.setattr(engine_module, "_missing_driver", lambda: "")
    yield asked


def test_cuda_that_does_not_start_is_warned_of_once_per_load(tiny: Tiny, cuda_is_installed: list[Any]) -> None:
    for _ in range(2):
        cuda_is_installed.clear()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            session = load(tiny.path, threads=1)
        (warning,) = said
        assert warning.category is ProviderWarning
        assert warning.filename == __file__
        text = str(warning.message)
        assert "CUDAExecutionProvider could not start (a driver or library is missing)" in text
        assert "running on CPUExecutionProvider" in text
        assert "providers=['CPUExecutionProvider']" in text
        assert cuda_is_installed == [[(CUDA, CUDA_OPTIONS), CPU], [CPU], [CPU]], "later stages do not try again"
        np.testing.assert_array_equal(session.run(batch(9)).exits, reference(batch(9), THRESHOLDS)[1])


def test_meaning_the_cpu_is_silent(tiny: Tiny, cuda_is_installed: list[Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tiny.path, providers=[CPU], threads=1)
    assert cuda_is_installed == [[CPU]] * 3


def test_cuda_asked_for_by_name_is_refused(tiny: Tiny, cuda_is_installed: list[Any]) -> None:
    for providers in ([CUDA], [CUDA, CPU]):
        cuda_is_installed.clear()
        with pytest.raises(ProviderError, match=r"could not start .*works with CPUExecutionProvider"):
            load(tiny.path, providers=providers)
        assert len(cuda_is_installed) == 1


def test_without_a_driver_onnxruntime_is_not_even_asked_for_cuda(
    tiny: Tiny, cuda_is_installed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "_missing_driver", lambda: "no NVIDIA driver: libcuda.so.1 is not there")
    with pytest.warns(ProviderWarning, match=r"could not start \(no NVIDIA driver: libcuda"):
        load(tiny.path, threads=1)
    assert cuda_is_installed == [[CPU]] * 3
    with pytest.raises(ProviderError, match="no NVIDIA driver"):
        load(tiny.path, providers=[CUDA])


def test_a_driver_is_looked_for_by_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []
    monkeypatch.setattr(engine_module.ctypes, "CDLL", found.append)
    assert engine_module._missing_driver() == ""
    monkeypatch.setattr(engine_module.sys, "platform", "win32")
    assert engine_module._missing_driver() == ""
    assert found[-1] == "nvcuda.dll"

    def absent(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(engine_module.ctypes, "CDLL", absent)
    assert engine_module._missing_driver() == "no NVIDIA driver: nvcuda.dll is not there"


def test_a_provider_that_throws_is_done_without_and_a_wrong_model_is_not(
    tiny: Tiny, cuda_is_installed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    create = onnxruntime.InferenceSession

    def throws(model: bytes, options: Any, providers: list[Any], **more: Any) -> Any:
        if not isinstance(providers[0], str):
            raise RuntimeError("CUDA failure 100: no CUDA-capable device is detected")
        return create(model, options, providers, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", throws)
    with pytest.warns(ProviderWarning, match="could not start .CUDA failure 100: no CUDA-capable device"):
        load(tiny.path, threads=1)
    with pytest.raises(ProviderError, match="CUDA failure 100"):
        load(tiny.path, providers=[CUDA])
    with pytest.raises(ArtifactError, match="refused by onnxruntime"):
        EngineSession(b"not a model", "wrong", [CUDA, CPU], 1, strict=False)
