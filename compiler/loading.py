"""What `MODEL` on the command line means: `package.module:callable` (with weights) or a saved `.pt2`.

Weights are read from safetensors or from a `.pt` holding tensors only; nothing is unpickled.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.export import ExportedProgram

from offramp.runtime.errors import ModelError, UsageError
from offramp.runtime.reference import is_reference, load_reference

from .quiet import quiet


def load_model(spec: str, weights: Path | None = None) -> nn.Module | ExportedProgram:
    """`package.module:callable` or `FILE.pt2` -> the model, weights loaded, in evaluation mode.

    Raises `UsageError` when the spec names nothing, `ModelError` when the file or the weights do not fit.
    """
    if spec.endswith(".pt2"):
        if weights is not None:
            raise UsageError(f"{spec} brings its own weights; leave --weights out")
        return _load_pt2(Path(spec))
    model = _call(spec)
    if weights is not None:
        load_weights(model, weights)
    return model.eval()


def load_weights(model: nn.Module, path: Path) -> None:
    """Read a state dict and put it into the model; every name and shape must fit."""
    state = _read_state(path)
    try:
        problems = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:] if line.strip()]
        raise ModelError(f"weights {path} do not fit {type(model).__name__}: {lines[0] if lines else error}") from error
    wrong = [f"no {name}" for name in problems.missing_keys] + [f"unknown {n}" for n in problems.unexpected_keys]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ModelError(
            f"weights {path} do not fit {type(model).__name__}: {', '.join(wrong[:3])}{more}; "
            "give the weights of this very architecture"
        )


def guess_shape(model: nn.Module) -> tuple[int, ...] | None:
    """Shape of one float row, guessed from the first layer; None where a guess would be a gamble.

    A convolution's channels are known and its image size is not: 224 x 224 is what most such models take.
    """
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.Embedding)), None)
    if isinstance(first, nn.Conv2d):
        return first.in_channels, 224, 224
    return (first.in_features,) if isinstance(first, nn.Linear) else None


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise UsageError(f"weights {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            state: dict[str, torch.Tensor] = load_file(path)
        else:
            with quiet():
                state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the bytes of any file at all: torch's reader raises whatever they lead it to
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ModelError(f"weights {path}: not readable ({reason}); save tensors only, best as safetensors") from error
    named = isinstance(state, dict) and all(isinstance(key, str) for key in state)
    if not named or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ModelError(f"weights {path}: hold something else than tensors by name; save model.state_dict()")
    return state


def _load_pt2(path: Path) -> ExportedProgram:
    if not path.is_file():
        raise UsageError(f"model {path}: no such file")
    try:
        with quiet():
            return torch.export.load(path)
    except Exception as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ModelError(f"model {path}: not a readable .pt2 ({reason}); save it with torch.export.save") from error


def _call(spec: str) -> nn.Module:
    if not is_reference(spec):
        raise UsageError(f"model {spec!r} is neither package.module:callable nor a .pt2 file; give one of them")
    found = load_reference(spec)
    try:
        model = found if isinstance(found, nn.Module) else found()
    except Exception as error:
        raise ModelError(f"model {spec} cannot be built: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"model {spec} gives {type(model).__name__}, not a torch.nn.Module")
    return model
