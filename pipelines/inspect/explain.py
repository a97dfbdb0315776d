"""``probelog-index explain``: everything that a store knows about one repository, from the listing to its tree."""

from __future__ import annotations

import dataclasses
import datetime as dt
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.complete.record import completed
from pipelines.inspect.failures import catalogues, group_receipts, ledgers
from pipelines.inspect.remedies import remedy
from pipelines.nightly.record import NightlyFiles
from pipelines.trees.record import read_trees
from probelog.arrays import values_of
from probelog.errors import StoreError, UsageError
from probelog.index.generation import Generation
from probelog.index.pointer import Pointer, read_pointer
from probelog.index.tables import is_valid_sql_text
from probelog.kinds.registry import GENERATOR
from probelog.storage import layout
from probelog.storage.ledger import PROBED, Contents, ItemResult, Ledger, Receipt, item_key
from probelog.storage.parquet_parts import Part, read_part
from probelog.storage.schemas import (
    CATALOGUE,
    DESCRIPTORS,
    EDGES,
    FAILURES,
    TREE_FACTS,
    TREE_MODELS,
    CatalogueRow,
    Failure,
    from_table,
)
from probelog.storage.store import Store

# More than a model is ever tried.
_MOST_ATTEMPTS = 100
_NAMED_CHILDREN = 10
_LISTED = (
    "sha", "library", "architecture", "parameters", "licence", "last_modified", "gated", "disabled", "base_model",
)  # fmt: skip
_PROBED = (
    "logits", "head", "library", "architecture", "parameters", "recipe", "dtype", "precision", "device",
    "weight_digest", "bytes", "copy_of_repo", "copy_of_sha",
)  # fmt: skip
_SAMPLED = (
    "pipeline", "architecture", "conditioning", "image_size", "parameters", "base_repo", "base_sha", "samples", "steps",
    "dtype", "precision", "device", "weight_digest", "bytes", "copy_of_repo", "copy_of_sha",
)  # fmt: skip


@dataclass(frozen=True)
class Story:
    """What a store knows about one repository; each list holds plain values, oldest stage first.

    Attributes:
        repo: its name.
        store: the store's address.
        listed: by a crawl or a nightly run (``key``), and as what.
        refused: rows of a crawl that could not be used, with ``reason`` and ``detail``.
        removed: why nightly runs removed it.
        attempts: at running it, or at reading its weights, by ledger (``key``).
        completions: that describe its logits, by ``key``.
        generations: that hold it, ``live``, ``previous`` or ``withdrawn``.
        trees: recoveries of model trees that hold it, with the edges to its parents.
    """

    repo: str
    store: str
    listed: list[dict[str, Any]]
    refused: list[dict[str, Any]]
    removed: list[dict[str, Any]]
    attempts: list[dict[str, Any]]
    completions: list[dict[str, Any]]
    generations: list[dict[str, Any]]
    trees: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    def lines(self) -> Iterator[str]:
        """The same for a person."""
        yield f"{self.repo} in {self.store}"
        for item in self.listed:
            facts = [f"{name} {item[name]}" for name in _LISTED[1:] if item[name] not in (None, False)]
            yield f"listed     {item['key']}, {item['at']}: commit {item['sha']}"
            yield f"             {', '.join(facts) or 'no facts'}"
        yield from (
            f"refused    {item['key']}: {item['reason']}: {item['detail']}; what to do: {remedy(item['reason'])}"
            for item in self.refused
        )
        yield from (f"removed    {item['key']}: {item['reason']}: {item['detail']}" for item in self.removed)
        if not self.attempts:
            of_generator = any(item["library"] in GENERATOR.libraries for item in self.listed)
            yield f"{'sampled' if of_generator else 'probed '}    never"
        for item in self.attempts:
            yield from _attempt_lines(item)
        for item in self.completions:
            yield (
                f"completed  {item['key']}: {item['described']:,} logits described, "
                f"{item['logits'] - item['described']:,} constant ones dropped"
            )
        for item in self.generations:
            yield f"index      generation {item['generation']}, {item['state']}, {item['published']}: " + (
                item["error"] if item["error"] else f"commit {item['sha']}{_place(item)}"
            )
        if not self.generations:
            yield "index      in no generation that is kept"
        for item in self.trees:
            yield f"tree       {item['key']}: family {item['family']}{_place(item)}"
            for edge in item["parents"]:
                yield (
                    f"             made from {edge['parent']}: {edge['relation']}, probability "
                    f"{edge['probability']:.2f}" + (", declared" if edge["declared"] else "")
                )
            if item["children"]:
                names = ", ".join(item["named_children"])
                yield f"             {item['children']:,} models made from it: {names}"


def explain(uri: str, repo: str) -> Story:
    """The story of a repository, at one commit where it is named ``REPO@SHA``.

    Raises:
        UsageError: the store knows nothing of it; names similar ones.
        StoreError: what is read is damaged.
    """
    store = Store(uri)
    repo, _, commit = repo.partition("@")
    groups = ledgers(store)
    listed, refused, names = _listing(store, repo)
    removed: list[dict[str, Any]] = []
    for group in groups.values():
        for ledger in group:
            _nightly(ledger, repo, listed, removed)
    generations = list(_generations(store, repo))
    shas = {item["sha"] for item in (*listed, *generations) if item["sha"]}
    attempts, receipts = _attempts(groups, repo, {commit} if commit else shas)
    if commit:
        listed, generations = (
            [item for item in items if item["sha"] == commit] for items in (listed, generations)
        )
    story = Story(
        repo=repo,
        store=store.uri,
        listed=listed,
        refused=refused,
        removed=removed,
        attempts=attempts,
        completions=list(_completions(store, repo, attempts, receipts)),
        generations=generations,
        trees=list(_trees(store, repo)),
    )
    if not any((story.listed, refused, removed, attempts, generations, story.trees)):
        close = difflib.get_close_matches(repo, names, n=3, cutoff=0.5)
        raise UsageError(
            f"{store.uri} knows nothing of {repo!r}{f' at commit {commit}' if commit else ''}"
            + (f"; did you mean {' or '.join(close)}?" if close else "")
        )
    return story


def _attempt_lines(item: dict[str, Any]) -> Iterator[str]:
    start = f"{item['key']}: commit {item['sha']}, attempt {item['attempt']}, {item['at']}"
    if item["reason"] is not None:
        yield f"failed     {start}: {item['stage']}: {item['reason']}: {item['detail']}"
        yield f"             what to do: {remedy(item['reason'])}"
        return
    verb = "probed " if "probes" in item else "sampled"
    yield f"{verb}    {start}" + ("" if item["receipt"] else ", not yet sealed")
    copied = f", a copy of {item['copy_of_repo']}@{item['copy_of_sha']}" if item["copy_of_repo"] else ""
    if "probes" in item:
        seen = f"{item['logits']:,} logits ({item['head']}) on {item['probes']:,} probes"
        what = item["library"]
    else:
        base = f" with base {item['base_repo']}@{item['base_sha']}" if item["base_repo"] else ""
        steps = f" in {item['steps']} steps" if item["steps"] else ""
        seen = f"{item['samples']:,} samples of {item['image_size']} pixels{steps}{base}"
        what = item["pipeline"]
    what = what if what == item["architecture"] else f"{what} {item['architecture']}"
    yield (
        f"             {seen}{copied}; "
        f"{what}, {item['parameters']:,} parameters, {item['precision']} on "
        f"{item['device']}" + (f", {item['bytes']:,} bytes downloaded" if item["bytes"] else "")
    )
    yield "             seconds: " + ", ".join(
        f"{part} {value:.2f}" for part, value in item["seconds"].items()
    )
    if "recipe" in item:
        yield f"             recipe {item['recipe']}"


def _place(item: dict[str, Any]) -> str:
    if item["root"] is None:
        return ""
    if item["parent"] is None:
        return ", a root of its tree"
    return f", root {item['root']}, parent {item['parent']}, depth {item['depth']}"


def _plain(value: object) -> object:
    return value.isoformat(timespec="seconds") if isinstance(value, dt.datetime) else value


def _is_repo(repo: str) -> pc.Expression:
    return pc.field("repo") == repo


def _row(row: CatalogueRow, key: str, at: str) -> dict[str, Any]:
    return {"key": key, "at": at} | {name: _plain(getattr(row, name)) for name in _LISTED}


def _listing(store: Store, repo: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    """Its rows in all crawls, those that could not be used, and names to compare a wrong one with."""
    listed, refused = [], []
    names: list[str] = []
    for path in catalogues(store):
        key, content = path.split("/")[1], store.read_json(path)
        at = str(content.get("finished") or content["started"])
        for part in content["rows"]:
            table = read_part(store, Part(**part), CATALOGUE)
            listed += [_row(row, key, at) for row in from_table(table.filter(_is_repo(repo)), CatalogueRow)]
            names += values_of(table["repo"], str)
        for part in content["failures"]:
            table = read_part(store, Part(**part), FAILURES).filter(_is_repo(repo))
            refused += [
                {"key": key, "reason": item.reason, "detail": item.detail}
                for item in from_table(table, Failure)
            ]
    return listed, refused, names


def _nightly(ledger: Ledger, repo: str, listed: list[dict[str, Any]], removed: list[dict[str, Any]]) -> None:
    """What the record of nightly runs in one ledger says."""
    key, _, base = ledger.paths.key.partition("-")
    if not base:
        return
    files = NightlyFiles(ledger.store, key, base)
    record = files.read()
    if record is None:
        return
    listed += [_row(row, files.key, record.reconciled) for row in files.rows(record) if row.repo == repo]
    if repo in record.removed:
        removed.append({"key": files.key, **record.removed[repo]})


def _attempts(
    groups: dict[str, list[Ledger]], repo: str, shas: set[str]
) -> tuple[list[dict[str, Any]], dict[str, Receipt]]:
    """What came of every attempt at some commits (and at those that receipts name); the receipts of these."""
    attempts: list[dict[str, Any]] = []
    used: dict[str, Receipt] = {}
    for key, group in groups.items():
        contents, commits = group[0].contents, set(shas)
        receipts = []
        for receipt in group_receipts(group):
            commits |= {sha for name, sha in receipt.originals.values() if name == repo}
            receipts.append(replace(receipt, originals={}))
        keys = {
            item_key(repo, sha, attempt): (sha, attempt)
            for sha in commits
            for attempt in range(1, _MOST_ATTEMPTS)
        }
        for receipt in receipts:
            for sha, attempt in (keys.pop(item) for item in receipt.items if item in keys):
                used[receipt.name] = receipt
                mine = _is_repo(repo) & (pc.field("sha") == sha)
                models = read_part(group[0].store, receipt.models, contents.models_schema).filter(mine)
                failures = read_part(group[0].store, receipt.failures, FAILURES).filter(mine)
                attempts += _results(contents, models, failures, key, sha, attempt, receipt)
        for ledger in group:
            for item in ledger.spooled() & keys.keys():
                result = ledger.spooled_result(item)
                if isinstance(result, ItemResult):
                    attempts += _results(contents, result.models, result.failures, key, *keys[item], None)
    attempts.sort(key=lambda item: (item["key"], item["sha"], item["attempt"]))
    return attempts, used


def _results(
    contents: Contents,
    models: pa.Table,
    failures: pa.Table,
    key: str,
    sha: str,
    attempt: int,
    receipt: Receipt | None,
) -> Iterator[dict[str, Any]]:
    facts = {"key": key, "sha": sha, "attempt": attempt, "receipt": None if receipt is None else receipt.name}
    at = None if receipt is None else receipt.at
    for failure in from_table(failures, Failure):
        if failure.attempts == attempt:
            yield facts | {
                "at": _plain(failure.at) or at,
                "stage": failure.stage,
                "reason": failure.reason,
                "detail": failure.detail,
            }
    for model in from_table(models, contents.record):
        own = {"probes": len(model.probes)} if contents is PROBED else {}
        yield (
            facts
            | own
            | {
                "at": at,
                "reason": None,
                **{name: getattr(model, name) for name in (_PROBED if contents is PROBED else _SAMPLED)},
                "seconds": {part: getattr(model, f"seconds_{part}") for part in contents.phases},
            }
        )


def _completions(
    store: Store, repo: str, attempts: Sequence[dict[str, Any]], receipts: dict[str, Receipt]
) -> Iterator[dict[str, Any]]:
    indexed = {item["receipt"]: item for item in attempts if item["reason"] is None and item["receipt"]}
    for folder in store.folders(layout.COMPLETIONS):
        key = folder.split("/")[1]
        done = completed(store, key)
        for name in indexed.keys() & (() if done is None else done.parts.keys()):
            item = indexed[name]
            rows = read_part(store, done.parts[name], DESCRIPTORS, ["repo", "sha"])  # type: ignore[union-attr]
            mine = rows.filter(_is_repo(repo) & (pc.field("sha") == item["sha"]))
            yield {
                "key": key,
                "receipt": name,
                "sha": item["sha"],
                "logits": item["logits"],
                "described": mine.num_rows,
            }


def _generations(store: Store, repo: str) -> Iterator[dict[str, Any]]:
    index = store.child(layout.INDEX)
    if not index.exists(layout.POINTER):
        return
    pointer = read_pointer(index)[0]
    states = ["live", *("previous" for _ in pointer.previous), *("withdrawn" for _ in pointer.withdrawn)]
    for facts, state in zip(pointer.kept_facts, states, strict=True):
        name = str(facts["generation"])
        found = {"generation": name, "state": state, "published": facts["published"], "error": None}
        try:
            generation = Generation(index, Pointer(name, "", "", base=facts.get("base")))
            columns = ["repo", "sha", "logits", *TREE_FACTS]
            rows = generation.models_named("repo", [repo], columns) if is_valid_sql_text(repo) else []
            if generation.settings.generators is not None:
                generator = generation.generators.named(repo)
                rows += [] if generator is None else [generator | {"logits": None}]
        except StoreError as error:
            yield found | dict.fromkeys(("sha", "logits", *TREE_FACTS)) | {"error": str(error)}
            continue
        for row in rows:
            yield found | {column: row[column] for column in columns[1:]}


def _trees(store: Store, repo: str) -> Iterator[dict[str, Any]]:
    for folder in store.folders(layout.TREES):
        key = folder.split("/")[1]
        done = read_trees(store, key)
        if done is None:
            continue
        places = read_part(store, done.models, TREE_MODELS).filter(_is_repo(repo)).to_pylist()
        if not places:
            continue
        edges = read_part(store, done.edges, EDGES)
        children = edges.filter(pc.field("parent") == repo)["child"].to_pylist()
        yield {
            "key": key,
            **{name: places[0][name] for name in ("sha", "family", *TREE_FACTS)},
            "parents": edges.filter(pc.field("child") == repo).to_pylist(),
            "children": len(children),
            "named_children": children[:_NAMED_CHILDREN],
        }
