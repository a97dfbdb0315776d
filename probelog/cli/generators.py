"""What the commands say about generators."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from probelog.cli.output import (
    Form,
    add_row,
    as_json,
    folded,
    new_table,
    print_csv,
    print_for_programs,
    print_names,
    print_table,
    shown_columns,
    tree_place,
)
from probelog.terminal import printable

if TYPE_CHECKING:
    from probelog.search.generators.results import GeneratorResults, GeneratorSummary


def print_generators(results: GeneratorResults, form: Form, quiet: bool, filtered: bool) -> None:
    """Print generators as answers."""
    if print_for_programs(results, form, quiet, lambda hit: hit.repo):
        return
    if not results:
        typer.echo(
            "no generator in this index meets the filter"
            if filtered
            else "this index holds no other generator"
        )
        return
    found_by = ["found by"] if any(hit.found_by for hit in results) else []
    columns = shown_columns(
        "#>", "repository", *found_by, "kind", "base", "confidence>", "score>", "licence", "downloads>"
    )
    table = new_table(*columns)
    for hit in results:
        cells = {
            "#>": str(hit.rank),
            "repository": printable(hit.repo) + folded(hit),
            "found by": ", ".join(printable(item.label, limit=30) for item in hit.found_by),
            "kind": printable(hit.pipeline, limit=40),
            "base": printable(hit.base_repo or "-", limit=60),
            "confidence>": "-" if hit.confidence is None else f"{hit.confidence:.0%}",
            "score>": f"{hit.score:.2f}",
            "licence": printable(hit.licence or "-", limit=30),
            "downloads>": "-" if hit.downloads is None else f"{hit.downloads:,}",
        }
        add_row(table, *(cells[column] for column in columns))
    print_table(table)


def print_generator(summary: GeneratorSummary, form: Form, quiet: bool) -> None:
    """Print the facts of one generator, and what it makes."""
    if quiet:
        print_names([summary.repo])
        return
    if form == Form.JSON:
        typer.echo(as_json(summary))
        return
    if form == Form.CSV:
        print_csv(summary.to_arrow())
        return
    facts = [
        f"{summary.pipeline} {summary.architecture}",
        f"conditioned by {summary.conditioning}" if summary.conditioning != "none" else "",
        f"{summary.image_size} pixels" if summary.image_size else "",
        f"{summary.parameters:,} parameters" if summary.parameters else "",
        f"licence {summary.licence or 'unknown'}",
        f"{summary.downloads:,} downloads" if summary.downloads is not None else "",
        f"{summary.samples} samples" + (f" in {summary.steps} steps" if summary.steps else ""),
        f"{summary.pictures} of them as pictures" if summary.pictures else "",
    ]
    typer.echo(f"{printable(summary.repo)} @ {printable(summary.sha)[:12]}")
    typer.echo(", ".join(printable(fact) for fact in facts if fact))
    if summary.root is not None:
        typer.echo(f"model tree: {tree_place(summary)}")
    if summary.base_repo is not None:
        moved = (
            f" (moves its samples by {summary.strength:.2f}, consistency {summary.consistency:.2f})"
            if summary.strength is not None and summary.consistency is not None
            else ""
        )
        typer.echo(f"adapter of {printable(summary.base_repo)}{moved}")
    for title, names in (
        ("trigger words", summary.trigger_words),
        ("the same samples", summary.same_samples),
    ):
        if names:
            typer.echo(f"{title}: {', '.join(printable(name, limit=60) for name in names[:20])}")
    table = new_table("makes (likeliest concepts)", "log-odds>")
    for concept, score in zip(summary.concepts, summary.scores, strict=True):
        add_row(table, printable(concept, limit=60), f"{score:.2f}")
    print_table(table)
