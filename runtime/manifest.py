"""The manifest: what an artifact is, as frozen dataclasses that are also its JSON schema.

`manifest.json` is the canonical serialisation (sorted keys, two-space indent, one trailing newline) of
`Manifest` plus a `digest`, the SHA-256 of the same serialisation without it. Reading demands that the file
is byte for byte its own canonical form, so one altered byte anywhere is noticed; every other file of the
artifact is listed with size and SHA-256.

Refused, each with the field named: another format version, a missing, surplus or mistyped field, a file
name that leaves the artifact, stages and exits that do not match.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import numbers
import re
import types
import typing
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from .errors import ArtifactError, UsageError

FORMAT_VERSION = 3
MANIFEST_NAME = "manifest.json"
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")
_PRECISIONS = ("fp32", "fp16", "int8")
_DTYPE = re.compile(r"bool|u?int(8|16|32|64)|float(16|32|64)")

Range = tuple[int, int | None]  # of sizes, from least to most; None: as long as you like
ANY: Range = (1, None)

T = TypeVar("T")


@dataclass(frozen=True)
class TensorSpec:
    """One input of the model. Dimension 0 is the batch and is written as `"batch"`."""

    name: str
    dtype: str  # numpy's name
    shape: tuple[int | str, ...]  # a name for a dimension that may vary
    ranges: dict[str, Range] = field(default_factory=dict)  # of these, the batch aside, within which the graph is right


def said(span: Range) -> str:
    """A range in words: "1 to 512"."""
    least, most = span
    return f"{least} or more" if most is None else f"{least} to {most}"


@dataclass(frozen=True)
class StageSpec:
    """A segment and its head in one ONNX file.

    The file reads the values named in `inputs` and yields, under ONNX names equal to the value names,
    `outputs`, then `probabilities [rows, K]` and `confidence [rows]`. Of all values known by then, those in
    `carries` are needed by later stages: they are what compaction compacts.
    """

    file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    carries: tuple[str, ...]


@dataclass(frozen=True)
class ExitSpec:
    """One exit; the last is the backbone's own output, which has no head."""

    place: str  # module path, or the graph's name for the value
    cut: str  # the value's name in the backbone's graph; "" for the backbone's own output
    head: str  # one phrase a person can read
    head_config: dict[str, Any]  # family and its settings: enough to rebuild it
    parameters: int  # of the head
    head_flops: int  # per row
    segment_flops: int  # per row, of the backbone between the exit before and this one
    temperature: float


@dataclass(frozen=True)
class Certificate:
    """Evidence that the mean risk on new rows is within the tolerance, wrong with probability at most `delta`.

    Holds for rows drawn as the certification rows were, which nothing else has seen.
    """

    delta: float
    rows: int
    observed: float  # risk summed over these rows: those answered otherwise than by the backbone, or their regret
    bound: float  # upper confidence bound on the risk at level 1 - delta


@dataclass(frozen=True)
class Plan:
    """Thresholds for one tolerance. A row leaves at the first exit with confidence >= threshold."""

    tolerance: float
    policy: str
    thresholds: tuple[float | None, ...]  # [exits - 1]; None: that exit never answers
    certificate: Certificate | None

    @property
    def limits(self) -> tuple[float, ...]:
        """[exits - 1]; an exit that never answers has infinity."""
        return tuple(math.inf if t is None else t for t in self.thresholds)


@dataclass(frozen=True)
class ExitEvaluation:
    """One exit on the held-out test rows."""

    exit_rate: float  # of all rows
    agreement: float | None  # with the backbone, among rows that leave here; None if no row does
    agreement_all: float  # with the backbone, were every row answered here
    accuracy: float | None  # among rows that leave here, if labels were given


@dataclass(frozen=True)
class StaticEvaluation:
    """A smaller model named to compare with, on the held-out test rows."""

    name: str
    parameters: int
    flops: float  # per row
    disagreement: float  # with the backbone
    regret: float  # mean of the backbone's p(its class) - p(the answer)
    accuracy: float | None


@dataclass(frozen=True)
class Evaluation:
    """The whole program on the held-out test rows: the eager reference run, or the stages' where they are not fp32."""

    rows: int
    exits: tuple[ExitEvaluation, ...]
    disagreement: float
    disagreement_interval: tuple[float, float]  # 95 %, Clopper-Pearson
    regret: float  # mean of the backbone's p(its class) - p(the answer)
    accuracy_backbone: float | None
    accuracy: float | None
    flops_backbone: float  # per row
    flops: float  # per row, heads included
    oracle_flops: float  # per row, if each row left at the first exit that agrees and unasked heads were free
    static: StaticEvaluation | None = None  # a smaller model, if one was named


@dataclass(frozen=True)
class Splits:
    """Disjoint parts of the data given, cut in this order from a permutation seeded with `seed`."""

    seed: int
    distil: int
    calibrate: int
    select: int
    certify: int
    test: int


@dataclass(frozen=True)
class BackboneSpec:
    """The model as it came, so that a person can tell which one this artifact was made from."""

    name: str
    fingerprint: str  # SHA-256 over graph and weights
    parameters: int
    flops: int  # per row
    scores: str  # "logits", "probabilities" or "log_probabilities"


@dataclass(frozen=True)
class FileSpec:
    """Size in bytes and SHA-256 of one file of the artifact."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Timing:
    """Milliseconds per row, medians over interleaved rounds, both sides in ONNX Runtime."""

    batch: int
    threads: int
    rounds: int
    backbone_ms: float
    offramp_ms: float
    ratio: float  # offramp / backbone, median over rounds
    ratio_quartiles: tuple[float, float]
    ideal_over: float | None  # offramp / ideal, median over rounds
    ideal_ms: float | None  # sum over stages of the stage's own time for the rows that reach it
    stage_ms: tuple[float, ...]  # each stage alone, per row of the batch, on the rows that reach it


@dataclass(frozen=True)
class Tuned:
    """What `offramp tune` measured and gained, in milliseconds; expected values on the selection rows."""

    machine: str
    threads: int | None  # None: ONNX Runtime's own choice
    objective: str
    backbone_ms: float  # with every exit silent
    before_ms: float
    after_ms: float
    batches: tuple[int, ...]  # sizes, ascending
    silent_ms: tuple[tuple[float, ...], ...]  # [stages][sizes] a call whose exit is not asked
    asked_ms: tuple[tuple[float, ...], ...]  # [stages][sizes] a call whose exit is asked


@dataclass(frozen=True)
class Measured:
    """What differs from run to run: times, versions, and the files that quote them."""

    created: str
    machine: str
    versions: dict[str, str]
    timings: tuple[Timing, ...]
    files: dict[str, FileSpec]
    tuned: Tuned | None = None
    worth_dropping: tuple[float, ...] = ()  # [exits - 1] share of answered rows from which compaction pays; (): any
    chosen_by: str | None = None  # milliseconds exits were chosen to save: "batch 8, 2 threads"; None: FLOPs


@dataclass(frozen=True)
class Manifest:
    """An artifact's table of contents; see the module docstring for the rules it is read by."""

    format_version: int
    backbone: BackboneSpec
    inputs: tuple[TensorSpec, ...]
    classes: int
    confidence: str  # the metric: "max_probability", "margin" or "entropy"
    risk: str  # that the tolerances bound: "disagreement" or "regret"
    stages: tuple[StageSpec, ...]
    exits: tuple[ExitSpec, ...]
    plans: tuple[Plan, ...]
    default_plan: int
    splits: Splits
    preprocessing: str | None
    evaluation: Evaluation
    files: dict[str, FileSpec]
    measured: Measured
    precision: str = "fp32"  # of the stages: "fp32", "fp16" or "int8"; their answers are float32

    def plan(self, tolerance: float | None = None) -> Plan | None:
        """The boldest plan whose tolerance is not above the one asked for; the default one for None.

        None where no plan is as timid as that: the last stage answers, the backbone's own at its precision. Raises
        `UsageError` outside [0, 1].
        """
        if tolerance is None:
            return self.plans[self.default_plan]
        given: object = tolerance
        if not (isinstance(given, numbers.Real) and 0 <= float(given) <= 1):
            raise UsageError(f"tolerance {tolerance!r} is not a share of rows; give a number from 0 to 1")
        # 0.01 in float32 is less than 0.01: what was written is meant.
        asked = float(str(given)) if hasattr(given, "dtype") else float(given)
        within = [plan for plan in self.plans if plan.tolerance <= asked]
        return max(within, key=lambda plan: plan.tolerance) if within and asked > 0 else None

    def thresholds(self, tolerance: float | None = None) -> tuple[float, ...]:
        """[exits - 1] of `plan(tolerance)`; an exit that never answers has infinity."""
        plan = self.plan(tolerance)
        if plan is None:
            return (math.inf,) * (len(self.exits) - 1)
        return plan.limits

    def all_files(self) -> dict[str, FileSpec]:
        """Every file of the artifact but the manifest itself."""
        return {**self.files, **self.measured.files}


def dump_manifest(manifest: Manifest) -> bytes:
    """The canonical bytes of `manifest.json`, digest included."""
    body = dataclasses.asdict(manifest)
    digest = hashlib.sha256(_canonical(body)).hexdigest()
    return _canonical({**body, "digest": digest})


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Bytes of a `manifest.json` -> `Manifest`.

    Raises `ArtifactError` naming `where` and the field, for anything but a complete, unaltered manifest of
    this format version.
    """
    try:
        body = json.loads(data.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{where}: not readable as JSON ({error}); copy the artifact again") from error
    if not isinstance(body, dict):
        raise ArtifactError(f"{where}: holds {type(body).__name__}, not an object; copy the artifact again")
    version = body.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ArtifactError(
            f"{where}: format version {version} is newer than this offramp reads ({FORMAT_VERSION}); upgrade offramp"
        )
    if version != FORMAT_VERSION:
        raise ArtifactError(f"{where}: format version {version!r} is not {FORMAT_VERSION}; compile the model again")
    digest = body.pop("digest", None)
    try:
        altered = hashlib.sha256(_canonical(body)).hexdigest() != digest
        altered = altered or _canonical({**body, "digest": digest}) != data
    except (ValueError, RecursionError):  # 1e999 reads as infinity, which has no canonical form
        altered = True
    if altered:
        raise ArtifactError(f"{where}: altered since it was written (digest differs); copy the artifact again")
    manifest = cast(Manifest, _read(Manifest, body, where))
    _check(manifest, where)
    return manifest


def _canonical(body: dict[str, Any]) -> bytes:
    return (json.dumps(body, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _read(kind: Any, value: Any, where: str) -> Any:
    """Check `value` against the type `kind` and build it, recursing through dataclasses and containers."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(cast(type, kind), value, where)
    if origin in (types.UnionType, typing.Union):
        for option in args:
            if option is type(None) and value is None:
                return None
            if option is not type(None) and value is not None:
                try:
                    return _read(option, value, where)
                except ArtifactError:
                    if option is args[-1] or args[-1] is type(None):
                        raise
        raise ArtifactError(f"{where}: {value!r} is not {kind}; compile the model again")
    if origin is tuple:
        items = _expect(list, value, where)
        kinds = [args[0]] * len(items) if args[-1] is Ellipsis else list(args)
        if len(kinds) != len(items):
            raise ArtifactError(f"{where}: {len(items)} entries instead of {len(kinds)}; compile the model again")
        return tuple(_read(k, item, f"{where}[{i}]") for i, (k, item) in enumerate(zip(kinds, items, strict=True)))
    if origin is dict:
        mapping = _expect(dict, value, where)
        return {key: _read(args[1], item, f"{where}.{key}") for key, item in mapping.items()}
    if kind is float and type(value) is int and abs(value) < 2**1023:
        return float(value)
    return _expect(kind, value, where)


def _read_dataclass(kind: type[T], value: Any, where: str) -> T:
    mapping = _expect(dict, value, where)
    hints = typing.get_type_hints(kind)
    for name in hints.keys() - mapping.keys():
        raise ArtifactError(f"{where}.{name}: missing; compile the model again")
    for name in mapping.keys() - hints.keys():
        raise ArtifactError(f"{where}.{name}: not a field of format {FORMAT_VERSION}; compile the model again")
    return kind(**{name: _read(hint, mapping[name], f"{where}.{name}") for name, hint in hints.items()})


def _expect(kind: type, value: Any, where: str) -> Any:
    if type(value) is not kind:
        raise ArtifactError(f"{where}: {value!r:.80} is not {kind.__name__}; compile the model again")
    return value


def _check(manifest: Manifest, where: str) -> None:
    """What the types cannot say."""
    for name in manifest.all_files():
        if not _SAFE_NAME.fullmatch(name) or name == MANIFEST_NAME:
            raise ArtifactError(f"{where}: file name {name!r} leaves the artifact or is reserved; do not use it")
        if name in manifest.files and name in manifest.measured.files:
            raise ArtifactError(f"{where}: file {name!r} is listed twice; compile the model again")
    if manifest.precision not in _PRECISIONS:
        raise ArtifactError(f"{where}: precision {manifest.precision!r} is unknown; compile the model again")
    _check_inputs(manifest, where)
    exits = len(manifest.exits)
    if not manifest.stages and not {"model.onnx", "model.ts"} & manifest.files.keys():
        raise ArtifactError(f"{where}: holds neither stages nor model.onnx nor model.ts; compile the model again")
    if manifest.stages and len(manifest.stages) != exits:
        raise ArtifactError(f"{where}: {len(manifest.stages)} stages but {exits} exits; compile the model again")
    for stage in manifest.stages:
        if stage.file not in manifest.files:
            raise ArtifactError(f"{where}: stage {stage.file!r} is not among the files; compile the model again")
    if not 0 <= manifest.default_plan < len(manifest.plans):
        raise ArtifactError(f"{where}: default plan {manifest.default_plan} does not exist; compile the model again")
    for plan in manifest.plans:
        if len(plan.thresholds) != exits - 1:
            raise ArtifactError(f"{where}: a plan has {len(plan.thresholds)} thresholds for {exits - 1} exits")
    if len(manifest.measured.worth_dropping) not in (0, exits - 1):
        raise ArtifactError(
            f"{where}: tells for {len(manifest.measured.worth_dropping)} of {exits - 1} exits to compact"
        )
    if (tuned := manifest.measured.tuned) is not None:
        rows = len(tuned.silent_ms), len(tuned.asked_ms)
        sizes = {len(times) for times in (*tuned.silent_ms, *tuned.asked_ms)}
        if rows != (exits, exits) or sizes != {len(tuned.batches)} or not tuned.batches:
            raise ArtifactError(f"{where}: the times it was tuned by are not of its stages; tune it again")
    if len(manifest.evaluation.exits) != exits:
        raise ArtifactError(f"{where}: evaluation covers {len(manifest.evaluation.exits)} of {exits} exits")


def _check_inputs(manifest: Manifest, where: str) -> None:
    """The runtime takes these at their word when it checks a batch."""
    names = [spec.name for spec in manifest.inputs]
    if not names or len({*names}) != len(names) or manifest.classes < 1:
        raise ArtifactError(f"{where}: no inputs, an input twice, or no classes; compile the model again")
    for spec in manifest.inputs:
        if not _DTYPE.fullmatch(spec.dtype):
            raise ArtifactError(f"{where}: input dtype {spec.dtype!r} is not supported; compile the model again")
        if spec.shape[:1] != ("batch",) or any(isinstance(n, int) and n < 0 for n in spec.shape):
            raise ArtifactError(f"{where}: input shape {spec.shape} is malformed; compile the model again")
        for name, (least, most) in spec.ranges.items():
            if name not in spec.shape[1:] or least < 0 or (most is not None and most < least):
                raise ArtifactError(f"{where}: input range of {name!r} is malformed; compile the model again")
