"""Inputs as people have them: named, in a dict, optional; and lengths that vary from batch to batch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from models import QUICK, Attention, Chain, captured, rows, sentences, with_exits
from torch import nn
from torch.export import Dim, export

from offramp.compiler import Signature, capture, compile
from offramp.compiler.arguments import example_inputs
from offramp.compiler.signature import parse_dynamic
from offramp.passes import Backbone, find_candidates
from offramp.runtime import load
from offramp.runtime.errors import InputError, ModelError, UsageError

FREE = (("ids", ("batch", "sequence")), ("mask", ("batch", "sequence")))
FIXED = (("ids", ("batch", 5)), ("mask", ("batch", 5)))


def shapes(backbone: Backbone) -> tuple[tuple[str, tuple[int | str, ...]], ...]:
    return tuple((i.name, i.shape) for i in backbone.inputs)


def longer(count: int, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 20, (count, length), generator=generator)
    return {"ids": ids, "mask": (torch.arange(length) < length - 1).long().expand(count, length).contiguous()}


class OneDict(Attention):
    def forward(self, batch: dict[str, torch.Tensor], scale: float = 1.0) -> torch.Tensor:  # type: ignore[override]
        return super().forward(batch["ids"], batch["mask"]) * scale


class Optional(Attention):
    def forward(self, ids=None, mask=None, bias=None, flag=True):  # type: ignore[no-untyped-def]
        scores = super().forward(ids, torch.ones_like(ids) if mask is None else mask)
        return (scores if bias is None else scores + bias,) if flag else None


class Positions(Attention):
    """Learnt positions fix the length."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(5, 8))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.last((self.embed(ids) + self.positions).mean(1) * mask[:, :1])


class Pairs(Attention):
    """Tokens in twos: only even lengths."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        twos = self.embed(ids * mask).reshape(ids.shape[0], ids.shape[1] // 2, 2, 8)
        return self.last(twos.sum(2).mean(1))


class Branches(Attention):
    """Sums what it attends to, unless there are more tokens than `at`, or fewer."""

    def __init__(self, at: int, above: bool) -> None:
        super().__init__()
        self.at, self.above = at, above

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        scores = super().forward(ids, mask)
        other = ids.shape[1] > self.at if self.above else ids.shape[1] < self.at
        return scores.flip(1) if other else scores


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        return self.layer(values[0] - 2 * values[1])


@pytest.mark.parametrize("kind", [Attention, OneDict, Optional])
def test_token_ids_may_have_any_length(kind: type[Attention]) -> None:
    said: list[str] = []
    torch.manual_seed(0)
    model = kind()
    backbone = capture(model, sentences(8), say=said.append)
    assert shapes(backbone) == FREE
    assert said == [f"{kind.__name__}: 'sequence' of ids, mask may vary from batch to batch"]
    for length in (3, 5, 17):
        given = longer(4, length)
        torch.testing.assert_close(backbone.graph_module(*given.values()), Attention.forward(model, **given))


def test_optional_inputs_keep_their_defaults() -> None:
    assert shapes(captured(Optional, ids=sentences(4)["ids"])) == FREE[:1]


def test_several_positional_inputs_keep_their_order() -> None:
    model, given = Several(), {"left": rows(4), "right": rows(4, seed=1)}
    backbone = capture(model, given)
    assert [i.name for i in backbone.inputs] == ["left", "right"]
    torch.testing.assert_close(backbone.graph_module(*given.values()), model(*given.values()))


def test_inputs_that_do_not_fit() -> None:
    with pytest.raises(InputError, match=r"OneDict does not run on the data .*KeyError: 'mask'"):
        captured(OneDict, ids=sentences(4)["ids"], other=sentences(4)["mask"])
    with pytest.raises(InputError, match="input name 'token ids' is not a Python name; rename it"):
        capture(OneDict(), {"token ids": sentences(4)["ids"], "mask": sentences(4)["mask"]})


def test_a_length_that_the_model_fixes_stays_fixed() -> None:
    backbone = captured(Positions, **sentences(8))
    assert dict(shapes(backbone))["ids"] == ("batch", 5)
    with pytest.raises(ModelError, match="Positions fixes dimension 1 of input ids at 5; leave it out of dynamic"):
        capture(Positions(), sentences(8), dynamic={"ids": {1: "sequence"}})
    program = export(Chain(), (rows(4),), dynamic_shapes=({0: Dim("batch")},))
    with pytest.raises(ModelError, match="program fixes dimension 1 of input x at 6; leave it out of dynamic"):
        capture(program, {"x": rows(4)}, dynamic={"x": {1: "width"}})


def test_a_length_the_model_only_sometimes_takes_is_free_on_request() -> None:
    example = longer(8, 6)
    assert shapes(captured(Pairs, **example)) == (("ids", ("batch", 6)), ("mask", ("batch", 6)))
    model = Pairs()
    backbone = capture(model, example, dynamic={"ids": {1: "words"}, "mask": {1: "words"}})
    assert shapes(backbone) == (("ids", ("batch", "words")), ("mask", ("batch", "words")))
    other = longer(3, 10)
    torch.testing.assert_close(backbone.graph_module(*other.values()), model(**other))


@pytest.mark.parametrize(
    ("at", "above", "span"),
    [(9, True, (1, 9)), (6, True, (1, 6)), (5, False, (5, None)), (2, False, (2, None)), (5000, True, (1, 5000))],
)
def test_a_length_is_free_as_far_as_the_model_does_the_same(at: int, above: bool, span: tuple[int, int | None]) -> None:
    said: list[str] = []
    model, example = Branches(at, above), longer(8, 6)
    backbone = capture(model, example, say=said.append)
    assert shapes(backbone) == FREE
    assert [i.ranges for i in backbone.inputs] == [{"sequence": span}] * 2
    ending = {(1, 9): "1 to 9 long", (5, None): "5 or more long"}.get(span, "long")
    assert said[0].endswith(ending)
    for length in (span[0], span[1] if span[1] and span[1] < 100 else 20):
        given = longer(4, length)
        torch.testing.assert_close(backbone.graph_module(*given.values()), model(**given))


class Eleven(Attention):
    """One length of all is answered otherwise."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        scores = super().forward(ids, mask)
        return scores.flip(1) if ids.shape[1] == 11 else scores


class Every(Attention):
    """Every other length is."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        scores = super().forward(ids, mask)
        return scores.flip(1) if ids.shape[1] % 2 else scores


class Tall(nn.Module):
    """Turns images that are higher than wide."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turned = x.rot90(1, (2, 3)) if x.shape[2] > x.shape[3] else x
        return self.last(torch.relu(self.first(turned)).amax((2, 3)))


class Chunks(Attention):
    """As many tokens as a chunk holds, or fewer, are summed, more are not; no range says so to torch."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        scores = super().forward(ids, mask)
        return scores if ids.shape[1] % 8 in (0, ids.shape[1]) and ids.shape[1] // 16 == 0 else scores.flip(1)


@pytest.mark.parametrize("kind", [Eleven, Chunks])
def test_a_length_the_model_goes_by_beyond_the_data_s_is_free_up_to_there(kind: type[Attention]) -> None:
    model, example = kind(), longer(8, 6)
    backbone = capture(model, example)
    assert shapes(backbone) == FREE
    assert [i.ranges for i in backbone.inputs] == [{"sequence": (1, 6)}] * 2
    for length in range(1, 7):
        given = longer(4, length)
        torch.testing.assert_close(backbone.graph_module(*given.values()), model(**given))


def test_a_length_the_model_goes_by_otherwise_stays_fixed() -> None:
    assert shapes(capture(Every(), longer(8, 6))) == (("ids", ("batch", 6)), ("mask", ("batch", 6)))


@pytest.mark.parametrize("kind", [Eleven, Chunks, Every])
def test_a_length_the_model_goes_by_otherwise_cannot_be_asked_for(kind: type[Attention]) -> None:
    model, example = kind(), longer(8, 6)
    with pytest.raises(
        ModelError, match="answers otherwise than itself when dimension 1 of ids, 1 of mask has another"
    ):
        capture(model, example, dynamic={"ids": {1: "words"}, "mask": {1: "words"}})


def test_sizes_that_a_model_compares_are_not_free() -> None:
    words = {"x": {2: "height", 3: "width"}}
    for size in ((9, 12), (9, 9), (12, 9)):
        with pytest.raises(ModelError, match="answers otherwise than itself when dimension 2 of x, 3 of x"):
            capture(Tall(), {"x": torch.randn(4, 3, *size)}, dynamic=words)
    capture(Tall(), {"x": torch.randn(4, 3, 9, 12)}, dynamic={"x": {3: "width"}})


def test_what_a_saved_program_was_exported_under_is_said() -> None:
    free = {0: Dim("batch"), 2: Dim.AUTO, 3: Dim.AUTO}
    example = torch.randn(4, 3, 9, 12)
    said: list[str] = []
    capture(export(Tall(), (example,), dynamic_shapes=(free,)), {"x": example}, say=said.append)
    assert "was exported for sizes of which L['x'].size()[2] <= L['x'].size()[3]" in said[0]
    said.clear()
    given = longer(8, 6)
    length = {0: Dim("batch"), 1: Dim("length", min=2, max=9)}
    program = export(Attention(), tuple(given.values()), dynamic_shapes=(length, length))
    capture(program, given, say=said.append)
    assert [line for line in said if "exported for sizes" in line] == []


def test_a_length_with_no_answer_tells_nothing() -> None:
    class Mean(Attention):
        """The first tokens of padded rows leave nothing to take the mean of."""

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            there = mask[..., None]
            return self.last((torch.tanh(self.embed(ids)) * there).sum(1) / there.sum(1))

    example = longer(8, 12)
    example["mask"] = (torch.arange(12) >= 2).long().expand(8, 12).contiguous()
    assert shapes(capture(Mean(), example)) == FREE


def test_a_length_the_graph_cannot_have_is_not_within_the_range() -> None:
    class Step(Attention):
        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            step = 12 // (ids.shape[1] - 1) if ids.shape[1] > 1 else 1
            return super().forward(ids, mask) * step

    assert [i.ranges for i in capture(Step(), longer(8, 6)).inputs] == [{"sequence": (2, None)}] * 2


def test_a_saved_program_s_range_is_kept(tmp_path: Path) -> None:
    length = Dim("length", min=4, max=9)
    size = {0: Dim("batch"), 1: length}
    torch.manual_seed(0)
    program = export(Branches(9, above=True).eval(), tuple(longer(8, 6).values()), dynamic_shapes=(size, size))
    data = {name: value.numpy() for name, value in longer(300, 6).items()}
    manifest = compile(program, data, tmp_path / "out", options=QUICK)
    assert [spec.ranges for spec in manifest.inputs] == [{"sequence": (4, 9)}] * 2
    with load(tmp_path / "out") as session:
        for length, fits in ((3, False), (4, True), (9, True), (10, False)):
            given = {name: value.numpy() for name, value in longer(4, length).items()}
            if fits:
                assert len(session.run(given).classes) == 4
            else:
                with pytest.raises(
                    InputError, match=f"has {length} for 'sequence', the model takes 4 to 9; cut or pad"
                ):
                    session.run(given)


def test_a_length_is_fixed_on_request() -> None:
    assert shapes(capture(Attention(), sentences(8), dynamic={"ids": {}, "mask": {}})) == FIXED


def test_any_dimension_is_free_on_request() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    backbone = capture(model, {"input": torch.randn(4, 3, 9, 8)}, dynamic={"input": {2: "height", 3: "width"}})
    assert shapes(backbone) == (("input", ("batch", 3, "height", "width")),)
    images = torch.randn(2, 3, 6, 11)
    torch.testing.assert_close(backbone.graph_module(images), model(images))


@pytest.mark.parametrize(
    ("dynamic", "says"),
    [
        ({"idz": {1: "sequence"}}, "has no input idz; it has ids, mask"),
        ({"ids": {2: "sequence"}}, r"input ids \[8, 5\] of Attention has no dimension 2"),
        ({"ids": {0: "sequence"}}, "0 is the batch and free already"),
        ({"ids": {1: "batch"}}, "'batch' cannot name dimension 1 of ids"),
    ],
)
def test_refused_dimensions(dynamic: dict[str, dict[int, str]], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        capture(Attention(), sentences(8), dynamic=dynamic)


def test_dimensions_that_are_one_need_one_word() -> None:
    with pytest.raises(ModelError, match=r"needs 'a' and 'b' .* to be equal; give them one word"):
        capture(Attention(), sentences(8), dynamic={"ids": {1: "a"}, "mask": {1: "b"}})


def test_dimensions_on_the_command_line() -> None:
    assert parse_dynamic(["ids:1=a", "x:2=b", "x:3=c", "mask:"]) == {"ids": {1: "a"}, "x": {2: "b", 3: "c"}, "mask": {}}
    for wrong in ("ids", "ids:1", "ids:one=a", ":1=a", "ids:1="):
        with pytest.raises(UsageError, match="is not INPUT:DIMENSION=WORD"):
            parse_dynamic([wrong])


def test_no_exit_goes_where_the_number_of_features_varies() -> None:
    class Scan(Attention):
        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            weights = torch.softmax(self.mix[0](self.embed(ids)).sum(2) * mask, 1)
            return self.last(torch.stack([weights.amax(1), weights.mean(1)] * 4, 1))

    found = find_candidates(captured(Scan, **sentences(8)))
    assert [r for r in found.refused if "dimension 1 varies: heads read a fixed number of features" in r.reason]
    assert all(isinstance(c.shape[-1], int) for c in found.kept)


def test_a_saved_program_with_a_dict_and_a_free_length() -> None:
    torch.manual_seed(0)
    model, size = OneDict().eval(), {0: Dim("batch"), 1: Dim.AUTO}
    given = sentences(4)
    program = export(model, (given,), {"scale": 2.0}, dynamic_shapes=({"ids": size, "mask": size}, None))
    assert list(example_inputs(program)) == ["batch_ids", "batch_mask", "scale"][:2]
    backbone = capture(program, {f"batch_{name}": value for name, value in given.items()})
    assert [i.shape for i in backbone.inputs] == [("batch", "sequence")] * 2
    alone = export(model, (given,), dynamic_shapes=({"ids": size, "mask": size},))
    assert shapes(capture(alone, example_inputs(alone))) == FREE
    torch.testing.assert_close(backbone.graph_module(*longer(2, 9).values()), model(longer(2, 9), scale=2.0))


def test_a_program_runs_at_another_length() -> None:
    backbone = captured(Attention, **sentences(8))
    found = find_candidates(backbone).kept
    assert found[0].shape == ("batch", "sequence", 8)
    program = with_exits(backbone, [found[0].name])
    answers, exits = program(*longer(4, 17).values())
    assert answers.shape == (4, 4) and exits.shape == (4,)


def test_an_artifact_runs_at_another_length(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = {name: value.numpy() for name, value in sentences(300).items()}
    options = dataclasses.replace(QUICK, signature=Signature(dynamic={"ids": {1: "words"}, "mask": {1: "words"}}))
    model = OneDict().eval()
    manifest = compile(model, data, tmp_path / "out", options=options)
    assert [(i.name, i.shape) for i in manifest.inputs] == [("ids", ("batch", "words")), ("mask", ("batch", "words"))]
    given = longer(6, 17)
    expected = torch.softmax(model(given), 1).detach().numpy()
    for executor in ("segments", "single-file"):
        with load(tmp_path / "out", executor=executor) as session:
            answers = session.run_all({name: value.numpy() for name, value in given.items()})
            np.testing.assert_allclose(answers.probabilities[-1], expected, atol=1e-5)


def test_a_transformer_from_a_configuration() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, vocab_size=20)).eval()
    given = {"input_ids": sentences(8)["ids"], "attention_mask": sentences(8)["mask"]}
    backbone = capture(model, given)
    assert shapes(backbone) == tuple((name, ("batch", "sequence")) for name in given)
    other = {"input_ids": longer(3, 17)["ids"], "attention_mask": longer(3, 17)["mask"]}
    torch.testing.assert_close(backbone.graph_module(*other.values()), model(**other).logits)
    assert len(find_candidates(backbone).kept) >= 2


def test_a_plain_model_has_no_free_dimension_but_the_batch() -> None:
    assert shapes(captured(Chain)) == (("x", ("batch", 6)),)
