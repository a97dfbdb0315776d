"""The demo: a small hub of real classifiers on loopback, the whole job over it, and questions to the result."""

from __future__ import annotations

import json
import os
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.job.eta import duration
from pipelines.job.progress import Report
from probelog.errors import ProbeLogError
from probelog.storage.layout import LedgerFolder
from probelog.terminal import printable

if TYPE_CHECKING:
    from pipelines.job.job import Job
    from probelog.trees.edges import Edge

WORLD = Path(__file__).parent / "world"
GENERATORS = "generators.json"
FRACTION = 0.25
ASKED_MODEL = "cinder/umber-v1"
QUESTIONS = ("dog", "umbrella", "guitar", "airplane", "hot dog")
MADE = ("umbrella", "hot dog")


def run_demo(out: Path, compare: bool = True) -> None:
    """Serve the demo's hub, index it with a fraction of the probes, ask it, and say how good the answers are.

    Run again on the same folder it finds its work done and answers at once.

    Args:
        out: where the stores go.
        compare: also index it with all probes, to say what the fraction costs.

    Raises:
        ProbeLogError: the demo's world is not in this checkout.
    """
    if not (WORLD / "truth.json").is_file():
        raise ProbeLogError(
            f"the demo's world is missing at {WORLD}: make it with `python -m pipelines.demo.builder --out {WORLD}`"
        )
    # Set before Ray starts: it would otherwise write a token file into the home directory.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"  # noqa: S105 - a switch

    from cluster.runtime.session import session
    from pipelines.hubserver import running

    started = time.monotonic()
    report = Report()
    with running(WORLD / "hub") as endpoint:
        os.environ["HF_ENDPOINT"] = endpoint
        report.say(f"demo: a hub of icon classifiers is served at {endpoint}; nothing else is contacted")
        with session("local"):
            some = _index(out / "store", FRACTION, report, generators=(WORLD / GENERATORS).is_file())
            if compare:
                report.say("demo: the same once more with all probes, to compare")
                _index(out / "store-all-probes", 1.0, report)
    _show_failures(some, report)
    index = some.config.store
    _ask(index, report)
    if some.config.generators.enabled:
        _ask_generators(index, report)
    _show_tree(index, report)
    _accuracy(out, compare, report)
    report.say(
        f"\ndone in {duration(time.monotonic() - started)}. The index lies in {index}. Next:\n"
        f'  uv run probelog search "cat" --index {index}\n'
        f"  uv run probelog search --like REPO#0 --index {index}\n"
        f"  uv run probelog show REPO --index {index}\n"
        f"  uv run probelog tree {ASKED_MODEL} --index {index}\n"
        f"  uv run probelog-index status --store {index}"
    )


def _index(store: Path, fraction: float, report: Report, *, generators: bool = False) -> Job:
    from pipelines.config.model import Config, Generators
    from pipelines.full import run_full
    from pipelines.job.job import Job

    config = Config(
        store=str(store),
        probes=str(WORLD / "probes.parquet"),
        probe_count=None,
        encoder=str(WORLD / "encoder"),
        background=str(WORLD / "concepts.txt"),
        fraction=fraction,
        batch_models=16,
        generators=Generators.model_validate({"enabled": generators}),
    )
    job = Job.of(config, report)
    run_full(job)
    return job


def _show_failures(job: Job, report: Report) -> None:
    """What was refused, and why: untrusted files are the normal case on a Hub."""
    from pipelines.inspect.status import status
    from probelog.storage.ledger import Ledger

    report.say("\nrefused, each with its reason:")
    for counted in status(job.config.store).ledgers:
        ledger = Ledger(job.store, LedgerFolder.of(counted.key).path)
        receipts = ledger.receipts()
        for failure in ledger.failures(receipts, ledger.models(receipts)):
            report.say(f"  {failure.repo:<32} {failure.reason:<18} {printable(failure.detail, 90)}")


def _ask(index_uri: str, report: Report) -> None:
    from pipelines.benchmark.questions import Truth
    from probelog.search.client import open_index

    truth = Truth.read(WORLD / "truth.json")
    index = open_index(index_uri)
    report.say(f"\nasking {index.models} models ({index.logits} logits), none of them by its labels:")
    for question in QUESTIONS:
        begun = time.monotonic()
        hits = index.search(text=question, k=3)
        took = 1000 * (time.monotonic() - begun)
        report.say(f"\n  which models recognise {question!r}?   ({took:.0f} ms)")
        for hit in hits:
            copies = f" (+{hit.duplicates} with the same weights)" if hit.duplicates else ""
            label = f"not {hit.label}" if hit.negated else hit.label
            right = not hit.negated and truth.answers(question, hit.repo, hit.logit)
            report.say(
                f"    {hit.rank}. {'right' if right else 'wrong'}  {hit.repo}{copies}, class {hit.logit}, "
                f"declared as {label!r}"
            )


def _ask_generators(index_uri: str, report: Report) -> None:
    """The other kind of model: found by the pictures that it makes."""
    from probelog.search.client import open_index

    made = {
        facts["repo"]: facts["concepts"]
        for facts in json.loads((WORLD / GENERATORS).read_text(encoding="utf-8"))["generators"]
    }
    index = open_index(index_uri)
    report.say(f"\nand {index.generators} generators, by what they make:")
    for question in MADE:
        begun = time.monotonic()
        hits = index.search(text=question, k=2, kind="generator")
        report.say(f"\n  which models make {question!r}?   ({1000 * (time.monotonic() - begun):.0f} ms)")
        for hit in hits:
            right = question in made.get(hit.repo, ())
            report.say(f"    {hit.rank}. {'right' if right else 'wrong'}  {hit.repo}, {hit.pipeline}")


def _show_tree(index_uri: str, report: Report) -> None:
    """The tree of one model: what it was made from, and all that comes from there."""
    from probelog.search.client import open_index
    from probelog.trees.edges import is_latent_name

    parents = {
        repo: model["parent"]
        for repo, model in json.loads((WORLD / "truth.json").read_text())["models"].items()
    }
    index = open_index(index_uri)
    root = index.show(ASKED_MODEL).root
    children: dict[str, list[Edge]] = {}
    for edge in index.edges():
        children.setdefault(edge.parent, []).append(edge)
    latent = root is not None and is_latent_name(root)
    report.say(
        f"\nwhere {ASKED_MODEL} is from, by the weights alone:\n"
        f"  {'a base that is not on this hub' if latent else root}"
    )
    below = [(1, edge) for edge in reversed(children.get(root or "", []))]
    while below:
        depth, edge = below.pop()
        # Of the bases, which no repository holds, the truth says nothing.
        right = parents[edge.child] == (None if is_latent_name(edge.parent) else edge.parent)
        report.say(
            f"  {'    ' * depth}{'right' if right else 'wrong'}  {edge.child}: {edge.relation}, "
            f"probability {edge.probability:.2f}"
        )
        below += [(depth + 1, child) for child in reversed(children.get(edge.child, []))]


def _accuracy(out: Path, compare: bool, report: Report) -> None:
    from pipelines.evaluate import evaluate

    names = ["store", "store-all-probes"] if compare else ["store"]
    some, *every = [evaluate(str(out / name), WORLD / "truth.json").methods[0].single for name in names]
    if some is None:
        raise ProbeLogError("the demo's truth file names no single concept")
    report.say(
        f"\nthe right answer came first for {some.top1:.0%} of {some.queries} concepts "
        f"(among the first five: {some.top5:.0%}) with {FRACTION:.0%} of the probes a model;"
    )
    for evaluation in every:
        assert evaluation is not None
        report.say(f"with all probes: {evaluation.top1:.0%} ({evaluation.top5:.0%});")
    report.say(f"by chance: {some.chance:.1%}")
