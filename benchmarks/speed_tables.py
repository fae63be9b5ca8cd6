"""The README's tables and plot of what `benchmarks.speed` measured; its results are described there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.ticker import FormatStrFormatter, NullLocator

from benchmarks.tables import folded, markdown
from offramp.runtime.table import percent

FIGURE = Path(__file__).parents[1] / "docs" / "speed.svg"
TITLES = {
    "plain": "plain", "rewritten": "rewritten", "segments": "segments", "by_flops": "by FLOPs",
    "single_file": "single file", "torchscript": "TorchScript", "ideal": "ideal", "no_exit": "no exit",
    "none_leaves": "none leaves", "heads_alone": "heads alone", "eager": "eager PyTorch", "earlyon": "earlyon",
    "wider": "segments at 2 %", "earlyon_wider": "earlyon at 2 %", "smaller": "smaller model",
    "shortened": "cut short",
}  # fmt: skip
SHOWN = (1, 8, 32, 128)  # batches
LIMITS = {  # what the executors themselves cost: of whom, by what name, as a quotient within a round
    "segments over the ideal": ("segments", "over_ideal"),
    "single file over the ideal": ("single_file", "over_ideal"),
    "none leaves, beyond the heads": ("none_leaves", "beyond_heads"),
}
PANELS = 3  # in a row of the plot
IDEAL = "ideal"
MEMORY_BATCH = 32  # rows at a time, where peak memory is taken


def title(result: Mapping[str, Any]) -> str:
    """What the tables call it."""
    threads = "1 thread" if result["threads"] == 1 else f"{result['threads']} threads"
    pools = " of its own per session" if result["own_pools"] else ""
    return f"{result['task']}{', unpadded' if result['unpadded'] else ''}, {threads}{pools}"


def time_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Ratios to the plain backbone's time, medians and quartiles over rounds."""
    others = [name for name in TITLES if name != "plain"]
    rows = []
    for result in results:
        for one in (one for one in result["batches"] if one["batch"] in SHOWN):
            cells = [f"{title(result)}, batch {one['batch']}", f"{one['variants']['plain']['ms']:.3f}"]
            for name in others:
                seen = one["variants"].get(name)
                low, high = seen["ratio_quartiles"] if seen else (0, 0)
                cells.append(f"{seen['ratio']:.2f} ({low:.2f} to {high:.2f})" if seen else "")
            rows.append(cells)
    return markdown(("task", "plain, ms per row", *(TITLES[name] for name in others)), rows)


def limits_table(results: Sequence[Mapping[str, Any]]) -> str:
    """What the executors take beyond the stages' own time and the heads', at every batch.

    With what the rounds can tell at 95 %, see `speed_rounds.error`. Results from before there was that hold what tells
    two medians apart: 1.57 times the range between the quartiles over the root of the rounds [McGill, Tukey and Larsen
    1978, "Variations of box plots"].
    """
    sizes = sorted({one["batch"] for result in results for one in result["batches"]})
    rows = []
    for result in results:
        of = {one["batch"]: one for one in result["batches"]}
        for label, (name, key) in LIMITS.items():
            cells = [_limit(of[size], name, key, result["rounds"]) if size in of else "" for size in sizes]
            if any(cells):
                rows.append([f"{title(result)}: {label}", *cells])
    return markdown(("beyond what the models take, at batch", *map(str, sizes)), rows)


def _limit(one: Mapping[str, Any], name: str, key: str, rounds: int) -> str:
    seen = one["variants"][name]
    if key not in seen:
        return ""
    low, high = seen[f"{key}_quartiles"]
    error = seen.get(f"{key}_error", 1.57 * (high - low) / math.sqrt(one.get("rounds", rounds)))
    return f"{(seen[key] - 1) * 100:.1f} ± {error * 100:.1f} %"


def answer_table(results: Sequence[Mapping[str, Any]]) -> str:
    """What the variants answer on the test rows; those that answer alike share a line."""
    rows = []
    for result in results:
        what = {name: f" ({one})" for name, one in result.get("smaller", {}).items()}
        given = [(TITLES[name] + what.get(name, ""), None, seen) for name, seen in result["answers"].items()]
        for one in result["batches"]:
            seen = one["variants"].items()
            given += [(TITLES[name], one["batch"], v) for name, v in seen if "disagreement" in v]
        alike: dict[tuple[str, ...], dict[str, list[int]]] = {}
        for name, batch, seen in given:
            shares = " / ".join(percent(share) for share in seen["exit_shares"])
            cells = (percent(seen["disagreement"], 2), f"{seen['accuracy_change'] * 100:.2f}", shares)
            alike.setdefault(cells, {}).setdefault(name, []).extend([] if batch is None else [batch])
        sizes = [one["batch"] for one in result["batches"]]
        for told, who in alike.items():
            names = ", ".join(f"{name}{_at(batches, sizes)}" for name, batches in who.items())
            rows.append([f"{title(result)}: {names}", *told])
    return markdown(("task: answered by", "disagreement", "accuracy, points", "leave at each exit"), rows)


def _at(batches: Sequence[int], sizes: Sequence[int]) -> str:
    """Some of the batch sizes, as words; those side by side as a range."""
    if not batches:
        return ""
    first = sizes.index(batches[0])
    if len(batches) > 2 and [*batches] == [*sizes[first : first + len(batches)]]:
        return f" at batch {batches[0]} to {batches[-1]}"
    return f" at batch {' and '.join(map(str, batches))}"


def memory_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Peak memory at batch 32."""
    forms = ("plain", "segments", "single_file", "beside")
    rows = []
    for result in results:
        seen = [result["memory"].get(f"{form}_mib") for form in forms]
        rows.append([title(result), *("" if mib is None else f"{mib:.1f} MiB" for mib in seen)])
    names = {**TITLES, "beside": "single file, weights beside"}
    return markdown((f"peak memory, batch {MEMORY_BATCH}", *(names[form] for form in forms)), rows)


def tables(results: Sequence[Mapping[str, Any]]) -> str:
    """The README's. What sentences that are not padded to 64 tokens are answered is what padded ones are."""
    once = [result for result in results if not result["unpadded"]]
    answers = folded("What each of them answers on the test rows, and where rows leave", answer_table(once))
    return "\n\n".join((time_table(results), limits_table(results), answers, memory_table(once)))


def plot(results: Sequence[Mapping[str, Any]]) -> None:
    """Ratio against batch size, one panel per task and number of threads; bands are quartiles."""
    matplotlib.rcParams["svg.hashsalt"] = "speed"  # the same figures, the same file
    columns = min(PANELS, len(results))
    shape = math.ceil(len(results) / columns), columns
    figure, panels = plt.subplots(
        *shape, figsize=(3.4 * columns + 1.6, 3.8 * shape[0]), squeeze=False, sharey=True, layout="constrained"
    )  # fmt: skip
    for axes in panels.flat[len(results) :]:
        axes.set_visible(False)
    shown = [item for item in TITLES.items() if item[0] not in ("plain", "heads_alone", "wider", "earlyon_wider")]
    paired, lines = plt.get_cmap("Paired"), dict[str, Any]()
    coloured = [name for name, _ in shown if name != IDEAL]
    # The one left out is a pale yellow.
    colours = dict(zip(coloured, map(paired, (*range(10), 11)), strict=True)) | {IDEAL: "black"}
    for axes, result in zip(panels.flat, results, strict=False):
        axes.axhline(1, color="grey", linewidth=0.8)
        for name, label in shown:
            points = [(o["batch"], o["variants"][name]) for o in result["batches"] if name in o["variants"]]
            if not points:
                continue
            sizes, seen = [size for size, _ in points], [values for _, values in points]
            style, colour = "--" if name == IDEAL else "-", colours[name]
            (lines[label],) = axes.plot(sizes, [v["ratio"] for v in seen], style, marker=".", color=colour)
            axes.fill_between(sizes, *zip(*(v["ratio_quartiles"] for v in seen), strict=True), color=colour, alpha=0.2)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks([one["batch"] for one in result["batches"]], [str(one["batch"]) for one in result["batches"]])
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_title(title(result))
        axes.set_xlabel("batch")
    figure.supylabel("time, plain backbone in ONNX Runtime = 1")
    figure.legend(lines.values(), lines.keys(), frameon=False, loc="outside right center")
    figure.savefig(FIGURE, metadata={"Date": None})
    plt.close(figure)
