"""One self-contained page that puts the benchmark's tables and plots side by side."""

from __future__ import annotations

import base64
import datetime as dt
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipelines.benchmark import tables
from pipelines.benchmark.cells import TEXT, Cell
from pipelines.benchmark.plots import Bins, Line, hub_plot, line_plot, reliability_plot
from pipelines.benchmark.probed import ProbedHub
from pipelines.benchmark.questions import ALL, SINGLE
from pipelines.benchmark.tables import BOTH, Finished, Row
from pipelines.job.templates import rendered
from probelog import __version__
from probelog.evaluation.accuracy import DEVELOPMENT, TEST
from probelog.storage.store import Store
from probelog.terminal import printable

_EXAMPLES = 20


def write_page(out: Store, done: Finished, written: Mapping[str, Sequence[Row]], baseline: str) -> None:
    """Write the plots (``NAME.png``) and ``index.html``, which holds them too.

    Args:
        out: the folder.
        done: what was measured.
        written: the tables by name, as ``run_benchmark`` writes them.
        baseline: the method that the others are compared with.
    """
    methods = list(dict.fromkeys(cell.method for cell in done.outcomes))
    means = [row for row in written["results"] if row["seed"] is None]
    protocols = list(dict.fromkeys(row["protocol"] for row in means))
    plots = _plots(
        done, [row for row in means if row["protocol"] == protocols[0]], written["sweeps"], methods
    )
    # Where nothing was judged by a truth file, there is nothing to draw.
    if judged := written.get("reliability"):
        plots["reliability"] = ("Confidence against the share of right hits", _reliability(judged))
    for name, (_, data) in plots.items():
        out.write(f"{name}.png", data)
    filters = {"percent": _percent, "probes": _share, "plain": lambda text: printable(text, 80)}
    page = rendered(
        Path(__file__).parent / "page.html.j2",
        filters,
        version=__version__,
        at=dt.datetime.now(dt.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        hubs=[_facts(hub, done) for hub in done.hubs.values()],
        methods=methods,
        baseline=baseline,
        protocols=protocols,
        accuracy=_by_method([row for row in means if row["asked"] == TEXT and row["half"] == BOTH]),
        halves=_halves(means),
        images=[
            row for row in means if row["asked"] != TEXT and (row["part"], row["half"]) == (SINGLE, BOTH)
        ],
        differences=[
            row
            for row in written["differences"]
            if row["asked"] == TEXT and row["part"] == ALL and row["half"] in (BOTH, TEST)
        ],
        plots={name: (title, base64.b64encode(data).decode()) for name, (title, data) in plots.items()},
        examples={name: _examples(done, name, baseline) for name in done.hubs},
        calibration={
            (row["probe_set"], row["budget"], row["protocol"], row["part"]): row
            for row in written.get("reliability", [])
        }.values(),
        absent=[row for row in written.get("absent", []) if row["draw"] is None],
        **{name: written.get(name, []) for name in ("hubness", "reverse", "prauc", "by_rank", "labels")},
    )
    out.write("index.html", page)


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}"


def _share(value: float) -> str:
    """A share as a person says it: all, 1/8, 0.3."""
    if value == 1:
        return "all"
    return f"1/{round(1 / value)}" if abs(1 / value - round(1 / value)) < 1e-9 else f"{value:g}"


def _facts(hub: ProbedHub, done: Finished) -> Row:
    settings, questions = hub.generation.settings, done.questions[hub.name]
    return {
        "name": hub.name,
        "uri": hub.store.uri,
        "generation": hub.generation.pointer.generation,
        "probe_set": settings.probe_set[:16],
        "probes": hub.probes,
        "fraction": hub.fraction,
        "prompt": ", ".join(settings.prompts),
        "encoder": settings.encoder,
        "background": len(hub.generation.background),
        "models": len(hub.models),
        "logits": len(hub.logits),
        "left_out": hub.left_out,
        "asked": len(questions.names),
        "answerable": len(questions.answerable),
        "single": int(questions.single.sum()),
    }


def _by_method(rows: Sequence[Row]) -> dict[str, dict[tuple[float, str], dict[str, Row]]]:
    """By probe set and protocol, then by (budget, method), then by part."""
    rows_by_method: dict[str, dict[tuple[float, str], dict[str, Row]]] = {}
    for row in sorted(rows, key=lambda row: -row["budget"]):
        title = f"{row['probe_set']}, {row['protocol']}"
        place = rows_by_method.setdefault(title, {}).setdefault((row["budget"], row["method"]), {})
        place[row["part"]] = row
    return rows_by_method


def _halves(means: Sequence[Row]) -> dict[str, dict[tuple[float, str], dict[str, Row]]]:
    """All concepts of the tuned half beside those of the untouched one."""
    rows_by_half: dict[str, dict[tuple[float, str], dict[str, Row]]] = {}
    for row in sorted(means, key=lambda row: -row["budget"]):
        if row["asked"] == TEXT and row["part"] == ALL and row["half"] in (DEVELOPMENT, TEST):
            title = f"{row['probe_set']}, {row['protocol']}"
            place = rows_by_half.setdefault(title, {}).setdefault((row["budget"], row["method"]), {})
            place[row["half"]] = row
    return rows_by_half


def _plots(
    done: Finished, means: Sequence[Row], sweeps: Sequence[Row], methods: Sequence[str]
) -> dict[str, tuple[str, bytes]]:
    names = list(done.hubs)
    shown = _shown_part(means)
    texts = [row for row in means if row["asked"] == TEXT and row["half"] == BOTH and row["part"] == shown]
    levels = {
        name: next(100 * row["chance_top1"] for row in texts if row["probe_set"] == name) for name in names
    }
    label = f"top-1, {'single classes' if shown == SINGLE else 'all concepts'} (%)"
    plots = {
        "accuracy-by-probes": (
            "Accuracy against the share of the probes that each model sees",
            line_plot(
                {name: _lines(texts, name, methods, "budget") for name in names},
                methods,
                "share of the probes",
                label,
                ticks=_share,
                levels=levels,
            ),
        )
    }
    for sweep, title, x_label in (
        ("r", "Accuracy of version 2 against its truncation r", "r, probes compared"),
        ("background", "Accuracy against the size of the background", "background concepts"),
    ):
        rows_of_sweep = [row for row in sweeps if row["sweep"] == sweep]
        if rows_of_sweep:
            panels = {name: _lines(rows_of_sweep, name, methods, "value") for name in names}
            ticks = "{:g}".format
            plots[f"accuracy-by-{sweep}"] = (
                title,
                line_plot(panels, methods, x_label, label, ticks=ticks, levels=levels),
            )
    largest = {name: max(cell.share for cell in done.outcomes if cell.probe_set == name) for name in names}
    plots["hub-curve"] = (
        "Hubs: how many logits take which share of the first places",
        hub_plot(
            {name: tables.hub_curves(done, name, largest[name], means[0]["protocol"]) for name in names},
            methods,
        ),
    )
    return plots


def _reliability(rows: Sequence[Row]) -> bytes:
    panels: dict[str, dict[str, Bins]] = {}
    for row in rows:
        if row["part"] != ALL:
            title = "single classes" if row["part"] == SINGLE else "superclasses"
            name = f"{row['probe_set']}, {row['protocol']}, {_share(row['budget'])} probes"
            confidences, right, hits = panels.setdefault(title, {}).setdefault(name, ([], [], []))
            confidences.append(row["confidence"])
            right.append(row["right"])
            hits.append(row["hits"])
    return reliability_plot(panels)


def _shown_part(means: Sequence[Row]) -> str:
    """Single classes, but where some probe set has none with an answer: all concepts."""
    have = {row["probe_set"] for row in means if row["part"] == SINGLE}
    return SINGLE if have == {row["probe_set"] for row in means} else ALL


def _lines(rows: Sequence[Row], probe_set: str, methods: Sequence[str], x: str) -> dict[str, Line]:
    lines: dict[str, Line] = {}
    for method in methods:
        points = sorted(
            (row for row in rows if (row["probe_set"], row["method"]) == (probe_set, method)),
            key=lambda row: row[x],
        )
        if points:
            y, low, high = ([100 * row[name] for row in points] for name in ("top1", "top1_low", "top1_high"))
            lines[method] = ([row[x] for row in points], y, low, high)
    return lines


def _examples(done: Finished, probe_set: str, baseline: str) -> list[Row]:
    """The first answers to some concepts at the largest budget, each method's beside the others'."""
    cells_of_set = [cell for cell in done.outcomes if cell.probe_set == probe_set]
    largest, protocol = max(cell.share for cell in cells_of_set), cells_of_set[0].protocol
    cells = {
        cell.method: cell
        for cell in cells_of_set
        if cell == Cell(probe_set, cell.method, largest, seed=0, protocol=protocol)
    }
    hub, questions = done.hubs[probe_set], done.questions[probe_set]
    concepts = done.outcomes[cells[baseline]].concepts
    step = max(1, len(concepts) // _EXAMPLES)
    examples = []
    for place in range(0, len(concepts), step):
        number = int(concepts[place])
        answers = {}
        for method, cell in cells.items():
            first = int(done.outcomes[cell].answers.first[place, 0])
            answers[method] = (hub.logits[first], bool(questions.relevant[number, first]))
        examples.append({"concept": questions.names[number], "answers": answers})
    return examples[:_EXAMPLES]
