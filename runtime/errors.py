"""Every error Offramp raises on purpose, in one small hierarchy.

A message names what is wrong, where, and what to do about it. The command line prints it as one line and
exits with status 2; Python callers catch `OfframpError` or the class they can act upon. The root lives in
the runtime because that is the one room every installation has.
"""

from __future__ import annotations


class OfframpError(Exception):
    """Root of the hierarchy."""


class ArtifactError(OfframpError):
    """The artifact cannot be trusted or read: missing, truncated or altered file, schema, version."""


class InputError(OfframpError):
    """Data does not fit the model: name, shape, dtype, not finite, empty, too few rows."""


class ToleranceError(InputError):
    """Stages of lower precision change more answers than the tolerance allows, whatever exits do."""


class ProviderError(OfframpError):
    """No onnxruntime is installed, or an execution provider asked for is not available."""


class StorageError(OfframpError):
    """An output could not be written; whatever stood there before is untouched."""


class UsageError(OfframpError):
    """An argument names something that does not exist or contradicts another."""


class UnknownModelError(UsageError):
    """A request names a model that is not served here."""


class BusyError(OfframpError):
    """A server has no room for a request now, or is about to stop; nothing of it was taken."""


class ModelError(OfframpError):
    """The model cannot be compiled: not exportable, weights that do not fit, unusable output."""


class BatchDependentError(ModelError):
    """A row's answer depends on the other rows of its batch, so rows cannot leave it."""


class NoCandidateError(ModelError):
    """No place in the model can carry an exit; the message holds the refusals."""


class PlanError(OfframpError):
    """An exit plan does not fit the backbone it is applied to."""


class PassError(OfframpError):
    """A pass broke its own contract, or the program it was given is malformed: a bug in a pass."""


class ProviderWarning(UserWarning):
    """A faster execution provider is installed but did not start; what was asked for runs on the CPU."""
