"""The study's tables from its results, and the curve of accuracy over minutes from the run folders of trainings."""

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from variants import VARIANTS

from nin import epoch_metrics
from nin.display.svg_chart import Plot, element, round_steps, text

Line = Mapping[str, Any]
FIGURES = ("accuracy", "accuracy_flip", "loss")
START, END = "<!-- made by study.py table -->", "<!-- end -->"


def table(lines: Sequence[Line]) -> str:
    """Return the table of one data set: each variant beside the default, those that gain most first.

    The spread is the standard deviation of a figure over seeds, pooled over all variants with several. A difference is
    called one where it is more than twice its standard error, for which single runs have the same spread.
    """
    runs = defaultdict[str, list[Line]](list)
    for line in lines:
        runs[line["variant"]].append(line)
    finished = {name: [line for line in group if "failed" not in line] for name, group in runs.items()}
    figures = [name for name in FIGURES if any(name in line for line in lines)]
    spread = {name: pooled_spread(finished.values(), name) for name in figures}
    default = finished.get("default", [])

    def gain(name: str) -> float:
        return difference(finished[name], default, "loss") if finished[name] and default else math.inf

    head = [
        "variant",
        "change",
        "cost",
        "epochs",
        "seeds",
        "accuracy, %",
        "mirrored too, %",
        "cross entropy",
        "verdict",
    ]
    rows = [head, ["---", "---", *["---:"] * 6, "---"]]
    for name in sorted(runs, key=lambda name: (name != "default", gain(name))):
        group = finished[name]
        variant = VARIANTS.get(name)
        change = variant.change if variant else ""
        if not group:
            rows.append([f"`{name}`", change, "", "", str(len(runs[name])), "", "", "", runs[name][0]["failed"]])
            continue
        cells = [mean_text(group, default, figure, spread[figure], name) for figure in figures]
        cost, epochs = (statistics.mean(line[key] for line in group) for key in ("cost", "epochs"))
        verdict = verdict_text(name, group, default, spread)
        cells += [""] * (3 - len(cells))
        if "accuracy_flip" not in figures:
            cells = [cells[0], "", cells[1]]
        rows.append([f"`{name}`", change, f"{cost:.2f}", f"{epochs:.2g}", str(len(group)), *cells, verdict])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def pooled_spread(groups: Any, figure: str) -> float | None:
    """Return the standard deviation of a figure over the seeds of one variant; None where none has several."""
    squares, freedom = 0.0, 0
    for group in groups:
        values = [line[figure] for line in group if figure in line]
        if len(values) > 1:
            squares += statistics.variance(values) * (len(values) - 1)
            freedom += len(values) - 1
    return math.sqrt(squares / freedom) if freedom else None


def mean_of(group: Sequence[Line], figure: str) -> float:
    return statistics.mean(line[figure] for line in group)


def difference(group: Sequence[Line], default: Sequence[Line], figure: str) -> float:
    """Return the mean difference to the default's runs of the same seeds, or to all of them where there are none."""
    by_seed = {line["seed"]: line[figure] for line in default}
    pairs = [line[figure] - by_seed[line["seed"]] for line in group if line["seed"] in by_seed]
    return statistics.mean(pairs) if pairs else mean_of(group, figure) - mean_of(default, figure)


def mean_text(group: Sequence[Line], default: Sequence[Line], figure: str, spread: float | None, name: str) -> str:
    """Return a mean and the difference to the default's."""
    percent = 100 if figure.startswith("accuracy") else 1
    digits = 2 if percent == 100 else 4
    words = f"{percent * mean_of(group, figure):.{digits}f}"
    if name == "default":
        return words if spread is None else f"{words}, spread {percent * spread:.{digits}f}"
    return words if not default else f"{words} ({percent * difference(group, default, figure):+.{digits}f})"


def verdict_text(name: str, group: Sequence[Line], default: Sequence[Line], spread: Mapping[str, float | None]) -> str:
    """Return whether a variant differs from the default beyond chance, by accuracy and by cross entropy."""
    if name == "default" or not default:
        return ""
    others = "" if VARIANTS[name].length == 1 else f", {VARIANTS[name].length:g} times the minutes"
    others += ", knows another network's answers" if VARIANTS[name].teacher else ""
    words = []
    for figure, sign in (("accuracy", 1), ("loss", -1)):
        deviation = spread[figure]
        if deviation is None:
            return f"one seed of the default: no spread{others}"
        error = deviation * math.sqrt(1 / len(group) + 1 / len(default))
        change = sign * difference(group, default, figure)
        words.append("better" if change > 2 * error else "worse" if change < -2 * error else "within chance")
    return (words[0] if words[0] == words[1] else f"{words[0]}, by cross entropy {words[1]}") + others


def tables(lines: Sequence[Line], budgets: Mapping[str, Any]) -> str:
    """Return the part of the README that is made of the results."""
    parts = []
    for name, budget in budgets.items():
        of_set = [line for line in lines if line["set"] == name]
        if not of_set:
            continue
        clocks = {"processor_seconds": "one core", "gpu_seconds": "a GPU"}
        minutes = {where: sum(line.get(key, 0) for line in of_set) / 60 for key, where in clocks.items()}
        times = " and ".join(f"{spent:.0f} minutes of {where} in all" for where, spent in minutes.items() if spent)
        machines = sorted({f"{r['processor']}, PyTorch {r['torch']}, {r['precision']}" for r in of_set if "torch" in r})
        dates = sorted({line["date"] for line in of_set if "date" in line})
        when = " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else ""
        views = [line["accuracy_10_views"] for line in of_set if "accuracy_10_views" in line]
        words = (
            f"{budget.images or 'All'} training images, {budget.epochs} epochs of the default, settings of all runs "
            f"{settings_text(budget.settings)}; {times}; {'; '.join(machines)}; "
            f"{when}."
        )
        if views:
            words += (
                f" Ten views of each image (mirrored, and moved by a pixel in four directions): {100 * views[0]:.2f} % "
                "for the default's seed 0."
            )
        parts.append(f"### {name}\n\n{words}\n\n{table(of_set)}\n")
    return "\n".join(parts) or "Nothing has been run yet.\n"


def settings_text(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items()) or "the recipe's"


def write_tables(readme: Path, lines: Sequence[Line], budgets: Mapping[str, Any]) -> None:
    """Put the tables between the two marks of the README."""
    before, rest = readme.read_text(encoding="utf-8").split(START)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{START}\n\n{tables(lines, budgets)}\n{END}{after}", encoding="utf-8")


# the curve

STYLE = (
    "text{font:13px sans-serif;fill:#555}.grid{stroke:#8884}.line{fill:none;stroke-width:2}"
    ".c0{stroke:#888;fill:#888}.c1{stroke:#2a6f97;fill:#2a6f97}.c2{stroke:#c1121f;fill:#c1121f}"
    ".c3{stroke:#588157;fill:#588157}g text{stroke:none}"
)


def curve(runs: Mapping[str, Path]) -> str:
    """Return a drawing of accuracy over minutes for run folders by their names, of one data set.

    The minutes are those of ``timings.csv``, so the runs must be of one machine with as much other work.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for name, folder in runs.items():
        rows = epoch_metrics.read_csv(folder / epoch_metrics.METRICS_FILE)
        times = epoch_metrics.read_csv(folder / epoch_metrics.TIMINGS_FILE)
        if not rows or len(rows) != len(times):
            raise SystemExit(f"{folder}: expected the metrics.csv and timings.csv of a run, with as many epochs each")
        part = epoch_metrics.evaluated_part(rows[0])
        both = zip(times, rows, strict=True)
        points[name] = [(time["seconds"] / 60, 100 * row[f"{part}_accuracy"]) for time, row in both]
    every = list(itertools.chain.from_iterable(points.values()))
    best = max(y for _, y in every)
    lowest = max(min(y for _, y in every), best - 10)  # the first epochs would leave no room for the others
    y_ticks = round_steps(lowest, best, about=6)
    x_ticks = round_steps(0, max(x for x, _ in every), about=6)
    plot = Plot(640, 360, 44, 480, 14, 310, (0, x_ticks[-1]), (y_ticks[0], y_ticks[-1]))
    shapes = [text("minutes", (plot.left + plot.right) / 2, 350, "middle"), element("style", STYLE)]
    for number, (name, of_run) in enumerate(points.items()):
        shown = [(plot.x(x), plot.y(y)) for x, y in of_run if y >= y_ticks[0]]
        path = "M" + " L".join(f"{x:g} {y:g}" for x, y in shown)
        label = text(f"{name}: {of_run[-1][1]:.2f} %, {of_run[-1][0]:.0f} min", 488, 24 + 20 * number)
        shapes.append(element("g", element("path", class_="line", d=path) + label, class_=f"c{number % 4}"))
    picture = plot.draw(shapes, x_ticks, y_ticks, f"Accuracy in % over minutes: {', '.join(points)}")
    return picture.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
