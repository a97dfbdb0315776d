"""`probelog`: the analyst's command line over a published index."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from probelog import terminal
from probelog.cli.generators import print_generator, print_generators
from probelog.cli.output import (
    Form,
    add_row,
    answer_queries,
    as_json,
    folded,
    new_table,
    picture,
    print_csv,
    print_for_programs,
    print_hits,
    print_models,
    print_names,
    print_notes,
    print_rows,
    print_table,
    print_tree,
    shown_columns,
    tree_place,
)
from probelog.errors import QueryError, UsageError
from probelog.terminal import printable

if TYPE_CHECKING:
    import pyarrow as pa

    from probelog.search.client import Index
    from probelog.search.results import Answers

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="Search a ProbeLog index for models that recognise a concept, from their weights alone.",
)
terminal.answer_version(app)

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


FormOption = Annotated[
    Form, typer.Option("--format", help="A table for people, JSON (one object a line), or CSV.")
]

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


class Fold(StrEnum):
    """What answers can be folded by."""

    LOGIT = "logit"
    MODEL = "model"
    FAMILY = "family"


class Kind(StrEnum):
    """The kinds of models that are searched."""

    CLASSIFIER = "classifier"
    GENERATOR = "generator"


class Order(StrEnum):
    """What answers can be sorted by."""

    SCORE = "score"
    CONFIDENCE = "confidence"


def main() -> None:
    """Run the command line."""
    terminal.silence_libraries()
    warnings.showwarning = lambda message, *_: print_notes([str(message)])
    terminal.run(app, "probelog")


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
    sketch: Annotated[
        list[Path] | None,
        typer.Option(
            "--sketch", help="A drawing of lines, dark on white, - for standard input; may be repeated."
        ),
    ] = None,
    like: Annotated[
        str | None,
        typer.Option(
            "--like",
            help="REPO#LOGIT: find what recognises, or makes, the same. REPO of a generator: likewise. "
            "REPO of a classifier: find generators of what it recognises.",
        ),
    ] = None,
    like_index: Annotated[
        str | None,
        typer.Option(
            "--like-index", help="The index that holds the logit or classifier of --like; default: --index."
        ),
    ] = None,
    negative: Annotated[
        list[str] | None,
        typer.Option("--not", help="A concept that must not be recognised, or made; may be repeated."),
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
    kind: Annotated[
        Kind, typer.Option("--kind", help="classifier: models that recognise it; generator: that make it.")
    ] = Kind.CLASSIFIER,
    method: Annotated[
        str | None,
        typer.Option(
            "--method", help="Of generators: how samples are compared with the query (docs/method.md)."
        ),
    ] = None,
    form: FormOption = Form.TABLE,
    json_lines: JsonOption = False,
    quiet: QuietOption = False,
    page: HtmlOption = None,
) -> None:
    """Find the models that recognise a concept, or make it, given by text, images, a sketch or a model of the index.

    Text, images, sketches and --like may be combined: together they describe one concept.
    """
    opened = _open(index)
    form = Form.JSON if json_lines else form
    if kind == Kind.GENERATOR and queries is None:
        if model is not None or page is not None:
            raise QueryError(
                "--kind generator cannot be combined with --html, which shows what logits answer to, or with --model: "
                "--like REPO finds generators that make the same"
            )
        made = opened.search(
            text or (),
            images=[picture(item) for item in image or ()] or None,
            sketch=[picture(item) for item in sketch or ()] or None,
            like=like,
            like_index=None if like_index is None else _open(like_index),
            negative=negative or (),
            k=k,
            where=where,
            by=by,
            min_confidence=min_confidence,
            sort=sort,
            method=method,
            kind="generator",
        )
        if not quiet:
            print_notes(made.notes)
        print_generators(made, form, quiet, where is not None or min_confidence is not None)
        return
    if queries is not None:
        if text or image or sketch or like or negative or model is not None or page or quiet or method:
            raise QueryError(
                "--queries can be combined with --kind, -k, --where, --by, --min-confidence, --sort and --format only"
            )
        search_many: Callable[..., Sequence[Answers[Any]]] = opened.search_many
        search_all = partial(
            search_many,
            k=k,
            where=where,
            by=by,
            min_confidence=min_confidence,
            sort=sort,
            kind=kind.value,
        )
        answer_queries(queries, search_all, form)
        return
    if model is not None:
        if (
            text
            or image
            or sketch
            or like
            or negative
            or min_confidence is not None
            or page
            or sort != Order.SCORE
        ):
            raise QueryError(
                "--model finds models that recognise what one model does; it can be combined with -k, --where and --by only"
            )
        print_models(opened.models_like(model, k=k, where=where, by=by), form, quiet, where)
        return
    results = opened.search(
        text or (),
        images=[picture(item) for item in image or ()] or None,
        sketch=[picture(item) for item in sketch or ()] or None,
        like=like,
        like_index=None if like_index is None else _open(like_index),
        negative=negative or (),
        k=k,
        where=where,
        by=by,
        min_confidence=min_confidence,
        sort=sort,
        method=method,
    )
    if not quiet:
        print_notes(results.notes)
    if page is not None:
        from probelog.search.page import answers_page

        asked = ", ".join(
            [*(text or ()), *(["pictures"] if image or sketch else []), *([like] if like else [])]
        )
        page.write_text(
            answers_page(asked, results, results.notes, opened.evidence_of(results)), encoding="utf-8"
        )
    if print_for_programs(results, form, quiet, lambda hit: f"{hit.repo}#{hit.logit}"):
        return
    if not results:
        filtered = where is not None or min_confidence is not None
        typer.echo("nothing in this index meets the filter" if filtered else "this index is empty")
        return
    print_hits(results)
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
    json_lines: JsonOption = False,
    quiet: QuietOption = False,
    page: HtmlOption = None,
) -> None:
    """Show what each logit of one model recognises, or what a generator makes."""
    opened = _open(index)
    if repo not in opened and opened.has_generator(repo):
        if page is not None:
            raise QueryError("--html shows what logits answer to; a generator has none")
        print_generator(opened.show_generator(repo), Form.JSON if json_lines else form, quiet)
        return
    summary = opened.show(repo, concepts)
    if page is not None:
        from probelog.search.page import model_page

        first = replace(summary, logits=summary.logits[:_LOGITS_OF_PAGE])
        page.write_text(model_page(summary, opened.evidence_of(first)), encoding="utf-8")
    form = Form.JSON if json_lines else form
    if form == Form.JSON and not quiet:
        typer.echo(as_json(summary))
        return
    if quiet or form == Form.CSV:
        print_rows(summary.to_arrow(), form, quiet, [f"{repo}#{item.logit}" for item in summary.logits])
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
        typer.echo(f"model tree: {tree_place(summary)}")
    if summary.same_weights:
        typer.echo(f"the same weights: {', '.join(printable(other) for other in summary.same_weights)}")
    table = new_table("class>", "declared label", "recognises (likeliest concepts)")
    for item in summary.logits:
        label = printable(item.label, limit=60)
        add_row(
            table,
            str(item.logit),
            f"not {label}" if item.negated else label,
            ", ".join(printable(concept, limit=60) for concept in item.concepts),
        )
    print_table(table)


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
    json_lines: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Find the models that cover a set of concepts best, and what each of them lacks."""
    results = _open(index).search_domain(concepts, k=k, where=where, by=by, min_confidence=min_confidence)
    if not quiet:
        print_notes(results.notes)
    if print_for_programs(results, Form.JSON if json_lines else form, quiet, lambda hit: hit.repo):
        return
    if not results:
        typer.echo("nothing in this index meets the filter" if where else "this index is empty")
        return
    table = new_table("#>", "repository", "covers>", "lacks", "licence", "downloads>")
    for hit in results:
        add_row(
            table,
            str(hit.rank),
            printable(hit.repo) + folded(hit),
            f"{hit.coverage:.0%}",
            ", ".join(hit.lacks) or "-",
            printable(hit.licence or "-", limit=30),
            "-" if hit.downloads is None else f"{hit.downloads:,}",
        )
    print_table(table)


@app.command()
def tree(
    repo: Annotated[str, typer.Argument(help="A repository of the index: owner/name.")],
    index: IndexOption,
    limit: Annotated[
        int, typer.Option("--limit", min=1, help="Largest number of descendants, and of siblings.")
    ] = 1000,
    form: FormOption = Form.TABLE,
    json_lines: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show which models one model was made from, and which were made from it or from its parents."""
    relatives = _open(index).tree(repo, limit=limit)
    if not quiet:
        print_notes(relatives.notes)
    form = Form.JSON if json_lines else form
    if quiet:
        names = (name for edge in relatives.edges for name in (edge.parent, edge.child))
        print_names([repo, *names])
    elif form == Form.JSON:
        for edge in relatives.edges:
            typer.echo(json.dumps(edge.to_dict()))
    elif form == Form.CSV:
        print_csv(relatives.edges.to_arrow())
    else:
        print_tree(relatives)


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
    json_lines: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show where licences conflict along model trees, and where declared parents are not what the weights show."""
    import pyarrow as pa

    from probelog.trees.licences import ConflictKind

    conflicts = _open(index).licence_conflicts(kind or tuple(ConflictKind), limit=limit)
    if not quiet:
        print_notes(conflicts.notes)
    form = Form.JSON if json_lines else form
    rows = [item.to_dict() for item in conflicts]
    if quiet:
        print_names(item.child for item in conflicts)
        return
    if form == Form.JSON:
        for row in rows:
            typer.echo(json.dumps(row))
        return
    if form == Form.CSV:
        texts = ("kind", "child", "parent", "child_licence", "parent_licence", "reason")
        kinds: dict[str, pa.DataType] = {**dict.fromkeys(texts, pa.string()), "probability": pa.float64()}
        print_csv(pa.Table.from_pylist(rows, pa.schema(kinds)))
        return
    if not conflicts:
        typer.echo("no conflict is known in this index")
        return
    table = new_table("kind", "model", "licence", "parent", "its licence", "probability>", "why")
    for item in conflicts:
        add_row(
            table,
            item.kind.value,
            item.child,
            item.child_licence or "-",
            item.parent,
            item.parent_licence or "-",
            "-" if item.edge is None else f"{item.edge.probability:.0%}",
            item.reason,
        )
    print_table(table)


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
    json_lines: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """List the models of an index."""
    table = _open(index).models(where, sort=sort, limit=k + 1)
    if table.num_rows > k and not quiet:
        print_notes([f"there are more models than these {k:,}: raise -k, or narrow --where"])
    table = table.slice(0, k)
    form = Form.JSON if json_lines else form
    if quiet or form != Form.TABLE:
        print_rows(table, form, quiet, map(str, table["repo"].to_pylist()))
        return
    if not table.num_rows:
        typer.echo("nothing in this index meets the filter" if where else "this index is empty")
        return
    shown = shown_columns("repository", "library", "architecture", "classes>", "licence", "downloads>")
    listed = new_table(*shown)
    for row in table.to_pylist():
        cells = {
            "repository": row["repo"],
            "library": row["library"] or "-",
            "architecture": row["architecture"] or "-",
            "classes>": str(row["logits"]),
            "licence": printable(row["licence"] or "-", limit=30),
            "downloads>": "-" if row["downloads"] is None else f"{row['downloads']:,}",
        }
        add_row(listed, *(cells[column] for column in shown))
    print_table(listed)


@app.command()
def info(index: IndexOption, form: FormOption = Form.TABLE, json_lines: JsonOption = False) -> None:
    """Show an index's content and how it was made."""
    opened = _open(index)
    facts = {"uri": opened.uri, "generation": opened.generation, **opened.settings}
    form = Form.JSON if json_lines else form
    if form == Form.JSON:
        typer.echo(json.dumps(facts))
        return
    plain = {name: value for name, value in facts.items() if isinstance(value, str | int | float | bool)}
    if form == Form.CSV:
        import pyarrow as pa

        print_csv(pa.table({"name": [*plain], "value": [str(value) for value in plain.values()]}))
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
