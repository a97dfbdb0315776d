"""`probelog`: the analyst's command line over a published index."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from probelog import __version__, terminal
from probelog.errors import QueryError, UsageError
from probelog.terminal import printable

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.table import Table

    from probelog.search.client import Index
    from probelog.search.results import Answers, DomainHit, Hit, ModelHit, ModelResults, ModelSummary, Results
    from probelog.search.trees import Tree
    from probelog.trees.edges import Edge

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="Search a ProbeLog index for models that recognise a concept, from their weights alone.",
)

IndexOption = Annotated[
    str,
    typer.Option(
        "--index",
        help="The published index, or the store that holds it: a directory, or s3://, gs:// or az://bucket/prefix.",
        envvar="PROBELOG_INDEX",
        show_envvar=True,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="The same as --format json.")]
QuietOption = Annotated[
    bool,
    typer.Option(
        "-q", "--quiet", help="Print names alone, one a line, for other commands: REPO or REPO#LOGIT."
    ),
]
WhereOption = Annotated[
    str | None,
    typer.Option(
        "--where", help="SQL condition over the models, e.g. \"licence = 'mit' AND downloads > 100\"."
    ),
]


class Form(StrEnum):
    """How answers are printed."""

    TABLE = "table"
    JSON = "json"
    CSV = "csv"


FormOption = Annotated[
    Form, typer.Option("--format", help="A table for people, JSON (one object a line), or CSV.")
]

# Of a tree that is printed: parents beside the main one, steps of indentation, and the weight of a sole parent.
_OTHER_PARENTS = 10
_DEEPEST_INDENT = 20
_WHOLE = 0.995


HtmlOption = Annotated[
    Path | None,
    typer.Option(
        "--html",
        help="Write the answer into this file as well, a page of its own with the probes that each logit answers to.",
        dir_okay=False,
    ),
]

# Of a model's logits, so many are on a page with their probes.
_LOGITS_OF_PAGE = 200


# Of a file of queries, so many are asked at a time.
_QUERIES_AT_ONCE = 1024
_PICTURE_BYTES = 256 << 20
# Below so many columns of the terminal, tables have less air and less in them, and least.
_NARROW, _NARROWEST = 100, 70


class Fold(StrEnum):
    """What answers can be folded by."""

    LOGIT = "logit"
    MODEL = "model"
    FAMILY = "family"


class Order(StrEnum):
    """What answers can be sorted by."""

    SCORE = "score"
    CONFIDENCE = "confidence"


def main() -> None:
    """Run the command line."""
    terminal.silence_libraries()
    warnings.showwarning = lambda message, *_: _print_notes([str(message)])
    terminal.run(app, "probelog")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"probelog {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("-V", "--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def search(
    index: IndexOption,
    text: Annotated[
        list[str] | None,
        typer.Argument(
            help="Name of the concept in plain words; several names of the same concept make one query."
        ),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            "--image", help="A picture of the concept, - for standard input; several make one query."
        ),
    ] = None,
    like: Annotated[
        str | None, typer.Option("--like", help="REPO#LOGIT: find other logits of the same meaning.")
    ] = None,
    like_index: Annotated[
        str | None,
        typer.Option("--like-index", help="The index that holds the logit of --like; default: --index."),
    ] = None,
    negative: Annotated[
        list[str] | None,
        typer.Option("--not", help="A concept that must not be recognised; may be repeated."),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="REPO: find other models that recognise what this one does.")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Number of answers.")] = 10,
    where: WhereOption = None,
    by: Annotated[
        Fold | None,
        typer.Option(
            "--by", help="Fold answers: of each model, or of each family (model tree), the best one alone."
        ),
    ] = None,
    min_confidence: Annotated[
        float | None,
        typer.Option(
            "--min-confidence", min=0, max=1, help="Only answers of at least this confidence, such as 0.5."
        ),
    ] = None,
    sort: Annotated[Order, typer.Option("--sort", help="What answers are ordered by.")] = Order.SCORE,
    queries: Annotated[
        Path | None,
        typer.Option(
            "--queries",
            help="A file with a name on each line, - for standard input: all are answered, as JSON or CSV.",
        ),
    ] = None,
    form: FormOption = Form.TABLE,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    page: HtmlOption = None,
) -> None:
    """Find the models that recognise a concept, given by text, images, a logit or a model of the index.

    Text, images and --like may be combined: together they describe one concept.
    """
    opened = _open(index)
    form = Form.JSON if as_json else form
    if queries is not None:
        if text or image or like or negative or model is not None or page or quiet:
            raise QueryError(
                "--queries can be combined with -k, --where, --by, --min-confidence, --sort and --format only"
            )
        search_all = partial(
            opened.search_many, k=k, where=where, by=by, min_confidence=min_confidence, sort=sort
        )
        _answer_queries(queries, search_all, form)
        return
    if model is not None:
        if text or image or like or negative or min_confidence is not None or page or sort != Order.SCORE:
            raise QueryError(
                "--model finds models that recognise what one model does; it can be combined with -k, --where and --by only"
            )
        _print_models(opened.models_like(model, k=k, where=where, by=by), form, quiet, where)
        return
    results = opened.search(
        text or (),
        images=[_picture(item) for item in image or ()] or None,
        like=like,
        like_index=None if like_index is None else _open(like_index),
        negative=negative or (),
        k=k,
        where=where,
        by=by,
        min_confidence=min_confidence,
        sort=sort,
    )
    if not quiet:
        _print_notes(results.notes)
    if page is not None:
        from probelog.search.page import answers_page

        asked = ", ".join([*(text or ()), *(["pictures"] if image else []), *([like] if like else [])])
        page.write_text(
            answers_page(asked, results, results.notes, opened.evidence_of(results)), encoding="utf-8"
        )
    if _printed(results, form, quiet, lambda hit: f"{hit.repo}#{hit.logit}"):
        return
    if not results:
        filtered = where is not None or min_confidence is not None
        typer.echo("nothing in this index meets the filter" if filtered else "this index is empty")
        return
    _print_hits(results)
    confidences = [hit.confidence for hit in results if hit.confidence is not None]
    if sort == Order.SCORE and confidences != sorted(confidences, reverse=True):
        typer.echo(
            "ordered by score; confidence also weighs what else a logit recognises (--sort confidence)",
            err=True,
        )


@app.command()
def show(
    repo: Annotated[str, typer.Argument(help="A repository of the index: owner/name.")],
    index: IndexOption,
    concepts: Annotated[
        int, typer.Option("-c", "--concepts", min=1, help="Number of concepts per logit.")
    ] = 4,
    form: FormOption = Form.TABLE,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    page: HtmlOption = None,
) -> None:
    """Show what each logit of one model recognises."""
    opened = _open(index)
    summary = opened.show(repo, concepts)
    if page is not None:
        from probelog.search.page import model_page

        first = replace(summary, logits=summary.logits[:_LOGITS_OF_PAGE])
        page.write_text(model_page(summary, opened.evidence_of(first)), encoding="utf-8")
    form = Form.JSON if as_json else form
    if form == Form.JSON and not quiet:
        typer.echo(_as_json(summary))
        return
    if quiet or form == Form.CSV:
        _print_rows(summary.to_arrow(), form, quiet, [f"{repo}#{item.logit}" for item in summary.logits])
        return
    facts = [
        f"{summary.library} {summary.architecture}",
        f"{summary.head} head",
        f"{summary.parameters:,} parameters" if summary.parameters else "",
        f"licence {summary.licence or 'unknown'}",
        f"{summary.downloads:,} downloads" if summary.downloads is not None else "",
        f"observed on {summary.observed} probes",
        f"created {summary.created_at:%Y-%m-%d}" if summary.created_at is not None else "",
    ]
    typer.echo(f"{printable(summary.repo)} @ {printable(summary.sha)[:12]}")
    typer.echo(", ".join(printable(fact) for fact in facts if fact))
    if summary.parents:
        declared = {(parent.repo, parent.relation) for parent in summary.parents}
        named = (f"{printable(repo)} ({printable(relation)})" for repo, relation in sorted(declared))
        typer.echo(f"declared parents: {', '.join(named)}")
    if summary.root is not None:
        place = [
            f"root {printable(summary.root)}" if summary.parent else "root of its tree",
            f"parent {printable(summary.parent)}" if summary.parent else "",
            f"depth {summary.depth}" if summary.parent and summary.depth is not None else "",
        ]
        typer.echo(f"model tree: {', '.join(item for item in place if item)}")
    if summary.same_weights:
        typer.echo(f"the same weights: {', '.join(printable(other) for other in summary.same_weights)}")
    table = _table("class>", "declared label", "recognises (likeliest concepts)")
    for item in summary.logits:
        label = printable(item.label, limit=60)
        _add(
            table,
            str(item.logit),
            f"not {label}" if item.negated else label,
            ", ".join(printable(concept, limit=60) for concept in item.concepts),
        )
    _print(table)


@app.command()
def snippet(
    logit: Annotated[str, typer.Argument(help="REPO#NUMBER or REPO#LABEL: a logit of the index.")],
    index: IndexOption,
    image: Annotated[str, typer.Option("--image", help="Path of the picture in the code.")] = "image.jpg",
) -> None:
    """Print Python code that loads just the indexed commit of a model and computes this logit of a picture."""
    repo, _, name = logit.partition("#")
    typer.echo(_open(index).snippet(repo, name, image=image), nl=False)


@app.command()
def domain(
    index: IndexOption,
    concepts: Annotated[list[str], typer.Argument(help="Names of different things.")],
    k: Annotated[int, typer.Option("-k", min=1, help="Number of answers.")] = 10,
    where: WhereOption = None,
    by: Annotated[
        Fold | None,
        typer.Option("--by", help="Fold answers: of each family (model tree) the best one alone."),
    ] = None,
    min_confidence: Annotated[
        float,
        typer.Option(
            "--min-confidence", min=0, max=1, help="A model lacks what it recognises with less confidence."
        ),
    ] = 0.5,
    form: FormOption = Form.TABLE,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Find the models that cover a set of concepts best, and what each of them lacks."""
    results = _open(index).search_domain(concepts, k=k, where=where, by=by, min_confidence=min_confidence)
    if not quiet:
        _print_notes(results.notes)
    if _printed(results, Form.JSON if as_json else form, quiet, lambda hit: hit.repo):
        return
    if not results:
        typer.echo("nothing in this index meets the filter" if where else "this index is empty")
        return
    table = _table("#>", "repository", "covers>", "lacks", "licence", "downloads>")
    for hit in results:
        _add(
            table,
            str(hit.rank),
            printable(hit.repo) + _folded(hit),
            f"{hit.coverage:.0%}",
            ", ".join(hit.lacks) or "-",
            printable(hit.licence or "-", limit=30),
            "-" if hit.downloads is None else f"{hit.downloads:,}",
        )
    _print(table)


@app.command()
def tree(
    repo: Annotated[str, typer.Argument(help="A repository of the index: owner/name.")],
    index: IndexOption,
    limit: Annotated[
        int, typer.Option("--limit", min=1, help="Largest number of descendants, and of siblings.")
    ] = 1000,
    form: FormOption = Form.TABLE,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show which models one model was made from, and which were made from it or from its parents."""
    relatives = _open(index).tree(repo, limit=limit)
    if not quiet:
        _print_notes(relatives.notes)
    form = Form.JSON if as_json else form
    if quiet:
        names = (name for edge in relatives.edges for name in (edge.parent, edge.child))
        _print_names([repo, *names])
    elif form == Form.JSON:
        for edge in relatives.edges:
            typer.echo(json.dumps(edge.to_dict()))
    elif form == Form.CSV:
        _print_csv(relatives.edges.to_arrow())
    else:
        _print_tree(relatives)


@app.command()
def licences(
    index: IndexOption,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            "--kind",
            help="forbidden, conditions, notice, contradicted or undeclared; may be repeated. Default: all.",
        ),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Largest number of each kind.")] = 1000,
    form: FormOption = Form.TABLE,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show where licences conflict along model trees, and where declared parents are not what the weights show."""
    import pyarrow as pa

    from probelog.trees.licences import ConflictKind

    conflicts = _open(index).licence_conflicts(kind or tuple(ConflictKind), limit=limit)
    if not quiet:
        _print_notes(conflicts.notes)
    form = Form.JSON if as_json else form
    rows = [item.to_dict() for item in conflicts]
    if quiet:
        _print_names(item.child for item in conflicts)
        return
    if form == Form.JSON:
        for row in rows:
            typer.echo(json.dumps(row))
        return
    if form == Form.CSV:
        texts = ("kind", "child", "parent", "child_licence", "parent_licence", "reason")
        kinds: dict[str, pa.DataType] = {**dict.fromkeys(texts, pa.string()), "probability": pa.float64()}
        _print_csv(pa.Table.from_pylist(rows, pa.schema(kinds)))
        return
    if not conflicts:
        typer.echo("no conflict is known in this index")
        return
    table = _table("kind", "model", "licence", "parent", "its licence", "probability>", "why")
    for item in conflicts:
        _add(
            table,
            item.kind.value,
            item.child,
            item.child_licence or "-",
            item.parent,
            item.parent_licence or "-",
            "-" if item.edge is None else f"{item.edge.probability:.0%}",
            item.reason,
        )
    _print(table)


@app.command()
def models(
    index: IndexOption,
    where: WhereOption = None,
    sort: Annotated[
        str,
        typer.Option(
            "--sort", help="Column to sort by: numbers and times from the largest, texts from A to Z."
        ),
    ] = "downloads",
    k: Annotated[int, typer.Option("-k", min=1, help="Number of models.")] = 50,
    form: FormOption = Form.TABLE,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """List the models of an index."""
    table = _open(index).models(where, sort=sort, limit=k + 1)
    if table.num_rows > k and not quiet:
        _print_notes([f"there are more models than these {k:,}: raise -k, or narrow --where"])
    table = table.slice(0, k)
    form = Form.JSON if as_json else form
    if quiet or form != Form.TABLE:
        _print_rows(table, form, quiet, map(str, table["repo"].to_pylist()))
        return
    if not table.num_rows:
        typer.echo("nothing in this index meets the filter" if where else "this index is empty")
        return
    shown = _columns("repository", "library", "architecture", "classes>", "licence", "downloads>")
    listed = _table(*shown)
    for row in table.to_pylist():
        cells = {
            "repository": row["repo"],
            "library": row["library"] or "-",
            "architecture": row["architecture"] or "-",
            "classes>": str(row["logits"]),
            "licence": printable(row["licence"] or "-", limit=30),
            "downloads>": "-" if row["downloads"] is None else f"{row['downloads']:,}",
        }
        _add(listed, *(cells[column] for column in shown))
    _print(listed)


@app.command()
def info(index: IndexOption, form: FormOption = Form.TABLE, as_json: JsonOption = False) -> None:
    """Show an index's content and how it was made."""
    opened = _open(index)
    facts = {"uri": opened.uri, "generation": opened.generation, **opened.settings}
    form = Form.JSON if as_json else form
    if form == Form.JSON:
        typer.echo(json.dumps(facts))
        return
    plain = {name: value for name, value in facts.items() if isinstance(value, str | int | float | bool)}
    if form == Form.CSV:
        import pyarrow as pa

        _print_csv(pa.table({"name": [*plain], "value": [str(value) for value in plain.values()]}))
        return
    for name, value in plain.items():
        typer.echo(f"{name:<22} {printable(value)}")


@app.command()
def web(
    index: IndexOption,
    host: Annotated[str, typer.Option("--host", help="Where to listen.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Likewise; 0 takes a free one.")
    ] = 8017,
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow-host", help="A name that the server answers by; may be repeated."),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            "--threads", min=1, max=64, help="Answers that are computed at the same time; cores, at most 4."
        ),
    ] = None,
) -> None:
    """Serve a page that searches the index, and the same answers for programs (docs/web.md)."""
    try:
        from probelog.web.server import serve
    except ImportError as error:
        raise UsageError(
            f"the page needs more packages ({error.name} is missing): pip install 'probelog[web]'"
        ) from error
    serve(index, host, port, allow_host or (), threads)


def _open(uri: str) -> Index:
    from probelog.search.client import open_index

    return open_index(uri)


def _as_json(answer: Hit | ModelHit | DomainHit | ModelSummary) -> str:
    """An answer as one line of JSON; times are ISO 8601."""
    return json.dumps(asdict(answer), default=lambda time: time.isoformat())


def _picture(path: Path) -> Path | bytes:
    """A picture of the command line: a file, or what comes from standard input."""
    if str(path) != "-":
        return path
    data = sys.stdin.buffer.read(_PICTURE_BYTES + 1) if sys.stdin is not None else b""
    if not data:
        raise QueryError("standard input is empty: probelog search --image - < picture.jpg")
    if len(data) > _PICTURE_BYTES:
        raise QueryError(f"standard input: more than {_PICTURE_BYTES >> 20} MiB. Scale the picture down.")
    return data


def _answer_queries(file: Path, search_all: Callable[[list[str]], list[Results]], form: Form) -> None:
    """Answer each line of a file: an object a line with the line itself, or rows of CSV that begin with it."""
    stream = sys.stdin.buffer if str(file) == "-" else file.open("rb")
    first = True
    with stream:
        names = (text for line in stream if (text := line.decode("utf-8-sig", "replace").strip()))
        while piece := list(itertools.islice(names, _QUERIES_AT_ONCE)):
            for name, results in zip(piece, search_all(piece), strict=True):
                if form != Form.CSV:
                    hits = ", ".join(map(_as_json, results))
                    typer.echo(
                        f'{{"query": {json.dumps(name)}, "notes": {json.dumps(results.notes)}, "hits": [{hits}]}}'
                    )
                    continue
                table = results.to_arrow()
                _print_csv(table.add_column(0, "query", [[name] * table.num_rows]), head=first)
                first = False


def _printed(answers: Answers[Any], form: Form, quiet: bool, name: Callable[[Any], str]) -> bool:
    """Whether answers were printed for programs; a table for people is the command's own."""
    if quiet:
        _print_names(map(name, answers))
    elif form == Form.JSON:
        for answer in answers:
            typer.echo(_as_json(answer))
    elif form == Form.CSV:
        _print_csv(answers.to_arrow())
    return quiet or form != Form.TABLE


def _print_rows(table: pa.Table, form: Form, quiet: bool, names: Iterable[str]) -> None:
    if quiet:
        _print_names(names)
    elif form == Form.CSV:
        _print_csv(table)
    else:
        for row in table.to_pylist():
            typer.echo(json.dumps(row, default=lambda time: time.isoformat()))


def _print_names(names: Iterable[str]) -> None:
    for name in dict.fromkeys(names):
        typer.echo(printable(name))


def _print_csv(table: pa.Table, head: bool = True) -> None:
    from probelog.spreadsheet import csv_lines

    rows = (row.values() for batch in table.to_batches(max_chunksize=1000) for row in batch.to_pylist())
    for line in itertools.islice(csv_lines(table.column_names, rows), 0 if head else 1, None):
        typer.echo(line, nl=False)


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        typer.echo(f"note: {printable(note)}", err=True)


def _print_hits(hits: Sequence[Hit]) -> None:
    confidence = "conf.>" if _narrow() else "confidence>"
    columns = _columns(
        "#>", "repository", "class>", "declared label", confidence, "score>", "licence", "downloads>"
    )
    table = _table(*columns)
    if _narrow():
        table.columns[3].max_width = 15  # so that names of repositories, the longest cells, are not folded
    for hit in hits:
        label = printable(hit.label, limit=60)
        cells = {
            "#>": str(hit.rank),
            "repository": printable(hit.repo) + _folded(hit),
            "class>": str(hit.logit),
            "declared label": f"not {label}" if hit.negated else label,
            confidence: "-" if hit.confidence is None else f"{hit.confidence:.0%}",
            "score>": f"{hit.score:.2f}",
            "licence": printable(hit.licence or "-", limit=30),
            "downloads>": "-" if hit.downloads is None else f"{hit.downloads:,}",
        }
        _add(table, *(cells[column] for column in columns))
    _print(table)


def _print_models(hits: ModelResults, form: Form, quiet: bool, where: str | None) -> None:
    if _printed(hits, form, quiet, lambda hit: hit.repo):
        return
    if not hits:
        typer.echo(
            "no other model in this index meets the filter" if where else "this index holds no other model"
        )
        return
    table = _table("#>", "repository", "classes>", "score>", "licence", "downloads>")
    for hit in hits:
        _add(
            table,
            str(hit.rank),
            printable(hit.repo) + _folded(hit),
            str(hit.logits),
            f"{hit.score:.3f}",
            printable(hit.licence or "-", limit=30),
            "-" if hit.downloads is None else f"{hit.downloads:,}",
        )
    _print(table)


def _folded(hit: Hit | ModelHit | DomainHit) -> str:
    """How many other models an answer stands for."""
    if hit.relatives is not None:
        return f" (+{hit.relatives} of its family)" if hit.relatives else ""
    return f" (+{hit.duplicates} {'copy' if hit.duplicates == 1 else 'copies'})" if hit.duplicates else ""


def _print_tree(relatives: Tree) -> None:
    """A line a model, indented below its main parent; the model that was asked for is marked."""
    from probelog.search.trees import main_parents

    edges = relatives.edges
    main = main_parents(edges)
    children: dict[str, list[str]] = {}
    for item in main.values():
        children.setdefault(item.parent, []).append(item.child)
    names = {relatives.repo, *(item.parent for item in edges)}
    latent = {item.parent for item in edges if item.latent}
    table = _table("model", "relation", "probability>", "")
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
        _add(
            table,
            "  " * min(level, _DEEPEST_INDENT) + printable(name),
            "" if edge is None else _share(edge),
            "" if edge is None else f"{edge.probability:.0%}",
            ", ".join(remark for remark in remarks if remark),
        )
    _print(table)


def _share(edge: Edge) -> str:
    return edge.relation.value if edge.weight > _WHOLE else f"{edge.relation.value} {edge.weight:.0%}"


def _table(*columns: str) -> Table:
    """A table without lines; a title that ends in ``>`` makes a column of numbers."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0) if _narrow() else (0, 1))
    for title in columns:
        table.add_column(
            title.removesuffix(">"), justify="right" if title.endswith(">") else "left", overflow="fold"
        )
    return table


def _add(table: Table, *cells: str) -> None:
    from rich.text import Text

    # Text, not str: strings would be read as Rich markup, and labels are untrusted.
    table.add_row(*(Text(printable(cell, limit=1000)) for cell in cells))


def _width() -> int:
    # Output into a file or a pipe is not folded.
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000


def _narrow() -> bool:
    return _width() < _NARROW


def _columns(*columns: str) -> list[str]:
    """Those of a table's columns that the terminal has room for."""
    left_out = {"score>", "library"} if _narrow() else set()
    if _width() < _NARROWEST:
        left_out |= {"licence", "downloads>", "architecture"}
    return [column for column in columns if column not in left_out]


def _print(table: Table) -> None:
    from rich.console import Console

    Console(width=_width()).print(table)
