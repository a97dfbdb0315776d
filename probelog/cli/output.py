"""What commands print: tables for people, JSON and CSV for programs, notes beside them."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from probelog.errors import QueryError
from probelog.terminal import printable

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.table import Table

    from probelog.search.generators.results import GeneratorHit, GeneratorSummary
    from probelog.search.results import Answers, DomainHit, Hit, ModelHit, ModelResults, ModelSummary
    from probelog.search.trees import Tree
    from probelog.storage.schemas import TreeFacts
    from probelog.trees.edges import Edge

# Of a tree that is printed: parents beside the main one, steps of indentation, and the weight of a sole parent.
_OTHER_PARENTS = 10
_DEEPEST_INDENT = 20
_WHOLE = 0.995


# Of a file of queries, so many are asked at a time.
_QUERIES_AT_ONCE = 1024
_PICTURE_BYTES = 256 << 20
# Below so many columns of the terminal, tables have less air and less in them, and least.
_NARROW, _NARROWEST = 100, 70


class Form(StrEnum):
    """How answers are printed."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


def as_json(answer: Hit | ModelHit | DomainHit | ModelSummary | GeneratorHit | GeneratorSummary) -> str:
    """An answer as one line of JSON; times are ISO 8601."""
    return json.dumps(asdict(answer), default=lambda time: time.isoformat())


def picture(path: Path) -> Path | bytes:
    """A picture of the command line: a file, or what comes from standard input."""
    if str(path) != "-":
        return path
    data = sys.stdin.buffer.read(_PICTURE_BYTES + 1) if sys.stdin is not None else b""
    if not data:
        raise QueryError("standard input is empty: probelog search --image - < picture.jpg")
    if len(data) > _PICTURE_BYTES:
        raise QueryError(f"standard input: more than {_PICTURE_BYTES >> 20} MiB. Scale the picture down.")
    return data


def answer_queries(file: Path, search_all: Callable[[list[str]], Sequence[Answers[Any]]], form: Form) -> None:
    """Answer each line of a file: an object a line with the line itself, or rows of CSV that begin with it."""
    stream = sys.stdin.buffer if str(file) == "-" else file.open("rb")
    first = True
    with stream:
        names = (text for line in stream if (text := line.decode("utf-8-sig", "replace").strip()))
        while piece := list(itertools.islice(names, _QUERIES_AT_ONCE)):
            for name, results in zip(piece, search_all(piece), strict=True):
                if form != Form.CSV:
                    hits = ", ".join(map(as_json, results))
                    typer.echo(
                        f'{{"query": {json.dumps(name)}, "notes": {json.dumps(results.notes)}, "hits": [{hits}]}}'
                    )
                    continue
                table = results.to_arrow()
                print_csv(table.add_column(0, "query", [[name] * table.num_rows]), head=first)
                first = False


def print_for_programs(answers: Answers[Any], form: Form, quiet: bool, name: Callable[[Any], str]) -> bool:
    """Whether answers were printed for programs; a table for people is the command's own."""
    if quiet:
        print_names(map(name, answers))
    elif form == Form.JSON:
        for answer in answers:
            typer.echo(as_json(answer))
    elif form == Form.CSV:
        print_csv(answers.to_arrow())
    return quiet or form != Form.TABLE


def print_rows(table: pa.Table, form: Form, quiet: bool, names: Iterable[str]) -> None:
    if quiet:
        print_names(names)
    elif form == Form.CSV:
        print_csv(table)
    else:
        for row in table.to_pylist():
            typer.echo(json.dumps(row, default=lambda time: time.isoformat()))


def print_names(names: Iterable[str]) -> None:
    for name in dict.fromkeys(names):
        typer.echo(printable(name))


def print_csv(table: pa.Table, head: bool = True) -> None:
    from probelog.spreadsheet import csv_lines

    rows = (row.values() for batch in table.to_batches(max_chunksize=1000) for row in batch.to_pylist())
    for line in itertools.islice(csv_lines(table.column_names, rows), 0 if head else 1, None):
        typer.echo(line, nl=False)


def print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        typer.echo(f"note: {printable(note)}", err=True)


def print_hits(hits: Sequence[Hit]) -> None:
    confidence = "conf.>" if narrow() else "confidence>"
    columns = shown_columns(
        "#>", "repository", "class>", "declared label", confidence, "score>", "licence", "downloads>"
    )
    table = new_table(*columns)
    if narrow():
        table.columns[3].max_width = 15  # so that names of repositories, the longest cells, are not folded
    for hit in hits:
        label = printable(hit.label, limit=60)
        cells = {
            "#>": str(hit.rank),
            "repository": printable(hit.repo) + folded(hit),
            "class>": str(hit.logit),
            "declared label": f"not {label}" if hit.negated else label,
            confidence: "-" if hit.confidence is None else f"{hit.confidence:.0%}",
            "score>": f"{hit.score:.2f}",
            "licence": printable(hit.licence or "-", limit=30),
            "downloads>": "-" if hit.downloads is None else f"{hit.downloads:,}",
        }
        add_row(table, *(cells[column] for column in columns))
    print_table(table)


def print_models(hits: ModelResults, form: Form, quiet: bool, where: str | None) -> None:
    if print_for_programs(hits, form, quiet, lambda hit: hit.repo):
        return
    if not hits:
        typer.echo(
            "no other model in this index meets the filter" if where else "this index holds no other model"
        )
        return
    table = new_table("#>", "repository", "classes>", "score>", "licence", "downloads>")
    for hit in hits:
        add_row(
            table,
            str(hit.rank),
            printable(hit.repo) + folded(hit),
            str(hit.logits),
            f"{hit.score:.3f}",
            printable(hit.licence or "-", limit=30),
            "-" if hit.downloads is None else f"{hit.downloads:,}",
        )
    print_table(table)


def folded(hit: Hit | ModelHit | DomainHit | GeneratorHit) -> str:
    """How many other models an answer stands for."""
    if hit.relatives is not None:
        return f" (+{hit.relatives} of its family)" if hit.relatives else ""
    return copies(hit.duplicates)


def copies(count: int) -> str:
    """How many other repositories hold the same."""
    return f" (+{count} {'copy' if count == 1 else 'copies'})" if count else ""


def tree_place(facts: TreeFacts) -> str:
    """A model's place in its tree, in words."""
    place = [
        f"root {printable(facts.root)}" if facts.parent else "root of its tree",
        f"parent {printable(facts.parent)}" if facts.parent else "",
        f"depth {facts.depth}" if facts.parent and facts.depth is not None else "",
    ]
    return ", ".join(item for item in place if item)


def print_tree(relatives: Tree) -> None:
    """A line a model, indented below its main parent; the model that was asked for is marked."""
    from probelog.search.trees import main_parents

    edges = relatives.edges
    main = main_parents(edges)
    children: dict[str, list[str]] = {}
    for item in main.values():
        children.setdefault(item.parent, []).append(item.child)
    names = {relatives.repo, *(item.parent for item in edges)}
    latent = {item.parent for item in edges if item.latent}
    table = new_table("model", "relation", "probability>", "")
    # From the last to the first, with the level of each: a tree may be deeper than the stack.
    waiting = [(name, 0) for name in sorted(names - main.keys(), reverse=True)]
    while waiting:
        name, level = waiting.pop()
        waiting += [(child, level + 1) for child in sorted(children.get(name, ()), reverse=True)]
        edge = main.get(name)
        others = [item for item in edges if item.child == name and item is not edge]
        remarks = [
            "<- asked for" if name == relatives.repo else "",
            "not in this index" if name in latent else "",
            "declared" if edge is not None and edge.declared else "",
            *(
                f"also {printable(item.parent)} ({_share(item)}, {item.probability:.0%})"
                for item in others[:_OTHER_PARENTS]
            ),
        ]
        add_row(
            table,
            "  " * min(level, _DEEPEST_INDENT) + printable(name),
            "" if edge is None else _share(edge),
            "" if edge is None else f"{edge.probability:.0%}",
            ", ".join(remark for remark in remarks if remark),
        )
    print_table(table)


def _share(edge: Edge) -> str:
    return edge.relation.value if edge.weight > _WHOLE else f"{edge.relation.value} {edge.weight:.0%}"


def new_table(*columns: str) -> Table:
    """A table without lines; a title that ends in ``>`` makes a column of numbers."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0) if narrow() else (0, 1))
    for title in columns:
        table.add_column(
            title.removesuffix(">"), justify="right" if title.endswith(">") else "left", overflow="fold"
        )
    return table


def add_row(table: Table, *cells: str) -> None:
    from rich.text import Text

    # Text, not str: strings would be read as Rich markup, and labels are untrusted.
    table.add_row(*(Text(printable(cell, limit=1000)) for cell in cells))


def _width() -> int:
    # Output into a file or a pipe is not folded.
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000


def narrow() -> bool:
    return _width() < _NARROW


def shown_columns(*columns: str) -> list[str]:
    """Those of a table's columns that the terminal has room for."""
    left_out = {"score>", "library"} if narrow() else set()
    if _width() < _NARROWEST:
        left_out |= {"licence", "downloads>", "architecture"}
    return [column for column in columns if column not in left_out]


def print_table(table: Table) -> None:
    from rich.console import Console

    Console(width=_width()).print(table)
