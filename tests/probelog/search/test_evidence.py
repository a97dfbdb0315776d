"""Why a logit answers: the probes at both ends, what is a guess, and pages that show them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import probelog
from probelog.errors import QueryError, StoreError
from probelog.index.generation import Generation
from probelog.index.pointer import read_pointer
from probelog.index.schema import EVIDENCE, SHOWN_PROBES, WEAKEST_PROBES
from probelog.publication.rows import Ends, LogitBatch, evidence_of
from probelog.search.evidence import media_type
from probelog.search.page import answers_page, answers_table, model_page
from probelog.storage.store import Store
from tests.support.worlds.small_index import Model, SmallIndex, build

MODELS = (
    Model("anna/pets", ("cat", "<b>dog</b>", "owl")),
    Model("bert/copy", ("a", "b", "c"), weights="digest of anna/pets"),
    Model("dora/hot-dog", ("hot dog",), head="single"),
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallIndex:
    return build(
        Store(tmp_path_factory.mktemp("evidence") / "index"), models=MODELS, kind="dual", images=False
    )


@pytest.fixture(scope="module")
def index(small: SmallIndex) -> probelog.Index:
    return probelog.open_index(small.store.uri)


def test_a_value_of_it_fits_into_sixty_bytes() -> None:
    assert EVIDENCE.itemsize <= 60


@pytest.mark.parametrize(("repo", "logit", "negated"), [("anna/pets", 1, False), ("bert/copy", 1, False), ("dora/hot-dog", 0, False), ("dora/hot-dog", 0, True)])  # fmt: skip
def test_probes_at_both_ends(
    small: SmallIndex, index: probelog.Index, repo: str, logit: int, negated: bool
) -> None:
    number = [model.repo for model in MODELS].index(repo)
    z = small.z[small.owners.index((number, logit, -1 if negated else 1))]
    shown = index.evidence(repo, logit, negated=negated)
    order = np.argsort(-z, kind="stable")
    assert [item.probe for item in shown.strongest] == order[:SHOWN_PROBES].tolist()
    assert [item.probe for item in shown.weakest] == np.argsort(z, kind="stable")[:WEAKEST_PROBES].tolist()
    for item in (*shown.strongest, *shown.weakest):
        assert item.value == pytest.approx(z[item.probe], abs=2e-3)
        assert item.observed is (item.probe % 2 == 0), "as the publisher said"
    assert (shown.repo, shown.sha, shown.negated) == (repo, MODELS[number].sha, negated)


def test_of_hits_and_of_a_model_at_once(index: probelog.Index) -> None:
    hits = index.search("dog", k=4)
    assert index.evidence_of(hits) == [hit.evidence for hit in hits]
    assert [item.probe for item in hits[0].evidence.strongest] == hits[0].probes
    summary = index.show("dora/hot-dog")
    assert index.evidence_of(summary) == [
        index.evidence("dora/hot-dog", item.logit, negated=item.negated) for item in summary.logits
    ]
    assert index.evidence_of([]) == []


def test_only_pictures_are_given_out(tmp_path: Path, small: SmallIndex) -> None:
    """A thumbnail is whatever the publisher wrote."""
    for name, kind in (("a.png", "image/png"), ("a.jpg", "image/jpeg"), ("a.webp", "image/webp")):
        Image.new("RGB", (2, 2)).save(tmp_path / name)
        assert media_type((tmp_path / name).read_bytes()) == kind
    for other in (b"", b"<svg onload=alert(1)>", b"GIF89a", b"\xff\xd8\xff" + b"x" * (1 << 20)):
        assert media_type(other) is None
    index = probelog.open_index(small.store.uri)  # whose pictures are texts
    shown = index.evidence("anna/pets", 0)
    assert {(item.picture, item.media_type) for item in shown.strongest} == {(None, None)}


def test_a_hit_of_another_generation(tmp_path: Path) -> None:
    store = Store(tmp_path / "index")
    build(store, "first", models=MODELS, kind="dual", images=False)
    index = probelog.open_index(store.uri)
    pets, hot_dog = (
        index.search("dog", k=9, where=f"repo = '{repo}'")[0] for repo in ("anna/pets", "dora/hot-dog")
    )
    index._checked = -1e9
    moved = replace(MODELS[2], weights="others")
    build(store, "second", models=(MODELS[1], MODELS[0], moved), kind="dual", images=False)
    expected = probelog.open_index(store.uri).evidence("anna/pets", pets.logit)
    assert pets.evidence == expected, "found by its name: rows are others now"
    with pytest.raises(QueryError, match="another commit of anna/pets now: search again"):
        index.evidence_of([_other_commit(pets)])
    assert hot_dog.evidence.repo == "dora/hot-dog"
    with pytest.raises(QueryError, match="was not given by an index"):
        replace(pets, rank=2).evidence  # noqa: B018 - it is read


def _other_commit(hit: probelog.Hit) -> probelog.Hit:
    other = replace(hit, sha="0" * 40)
    object.__setattr__(other, "_origin", hit._origin)
    return other


def changed(name: str, value: Any) -> Callable[[LogitBatch], LogitBatch]:
    def tamper(batch: LogitBatch) -> LogitBatch:
        assert batch.evidence is not None
        evidence = batch.evidence.copy()
        evidence[name] = value
        return batch._replace(evidence=evidence)

    return tamper


@pytest.mark.parametrize(
    ("name", "value"),
    [("values", np.nan), ("weakest_values", np.inf), ("weakest", 40), ("count", WEAKEST_PROBES + 1)],
)
def test_evidence_that_is_none_is_refused(name: str, value: float, tmp_path: Path) -> None:
    made = build(
        Store(tmp_path / "index"), models=MODELS, kind="dual", images=False, tamper=changed(name, value)
    )
    index = probelog.open_index(made.store.uri)
    assert len(index.search("dog")), "who does not ask for evidence does not read it"
    with pytest.raises(StoreError, match=r"is damaged \(logits\): its evidence is none"):
        index.evidence("anna/pets", 0)


def test_an_older_index_says_that_it_does_not_know(tmp_path: Path) -> None:
    made = build(
        Store(tmp_path / "index"),
        models=MODELS,
        kind="dual",
        images=False,
        tamper=lambda batch: batch._replace(evidence=None),
    )
    index = probelog.open_index(made.store.uri)
    shown = index.evidence("anna/pets", 0)
    assert {(item.value, item.observed) for item in shown.strongest} == {(None, None)}
    assert (len(shown.strongest), shown.weakest) == (SHOWN_PROBES, [])
    hits = index.search("dog", k=2)
    assert "does not say which probes the models saw" in answers_page(
        "dog", hits, [], index.evidence_of(hits)
    )
    # Its table may lack the column, too.
    generation = Generation(made.store, read_pointer(made.store)[0])
    table = generation._tables.open("logits")
    table.drop_columns(["evidence"])
    again = probelog.open_index(made.store.uri).evidence("anna/pets", 0)
    assert again == shown


def test_what_a_model_saw_is_marked_probe_by_probe() -> None:
    strongest = Ends(np.array([[3, 9, 1]]), np.array([[2.0, 1.5, 1.0]]))
    evidence = evidence_of(np.array([1, 3, 4]), strongest, Ends(np.array([[4]]), np.array([[-2.0]])))
    assert evidence["observed"].tolist() == [0b101]
    assert evidence["values"][0].tolist() == [2, 1.5, 1, 0, 0, 0, 0, 0]
    assert (evidence["count"][0], evidence["weakest"][0, 0], evidence["weakest_observed"][0]) == (1, 4, 1)
    assert evidence_of(np.array([1]), strongest, None)["count"].tolist() == [0]


# Pages


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)>\u202e'


def test_a_page_loads_nothing_and_shows_what_is_a_guess(tmp_path: Path) -> None:
    models = (replace(MODELS[0], labels=(HOSTILE, "b", "c"), licence=HOSTILE), MODELS[2])
    made = build(Store(tmp_path / "index"), models=models, kind="dual", images=False)
    index = probelog.open_index(made.store.uri)
    hits = index.search("dog", k=10)
    evidence = index.evidence_of(hits)
    Image.new("RGB", (3, 3)).save(tmp_path / "a.webp")
    picture = (tmp_path / "a.webp").read_bytes()
    first = evidence[0].strongest[0]
    evidence[0].strongest[0] = replace(first, picture=picture, media_type="image/webp")
    pages = [
        answers_page(HOSTILE, hits, [HOSTILE], evidence),
        model_page(index.show("anna/pets"), index.evidence_of(index.show("anna/pets", limit=2))),
        answers_table(hits),
    ]
    for source in pages:
        page = Page(source)
        assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object", "link", "form", "base"}
        assert "alert(1)" in page.text, "shown as the text that it is"
        assert "\u202e" not in source
        for tag, attributes in page.tags:
            assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
            assert str(attributes.get("href", "https://")).startswith("https://")
            assert str(attributes.get("src", "data:image/webp;base64,")).startswith("data:image/webp;base64,")
    page = Page(pages[0])
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert re.fullmatch(
        r"default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; style-src 'sha256-[\w+/=]+'",
        policy,
    )
    shown = [attributes["class"] for tag, attributes in page.tags if tag == "figure"]
    probes = [probe for item in evidence for probe in (*item.strongest, *item.weakest)]
    assert shown == ["seen" if probe.observed else "estimated" for probe in probes]
    assert sum(tag == "img" for tag, _ in page.tags) == 1
    assert "The first 2 of 3 logits." in pages[1]


def test_a_notebook_shows_a_table(index: probelog.Index) -> None:
    hits = index.search("dog", k=3)
    page = Page(hits._repr_html_())
    assert sum(tag == "tr" for tag, _ in page.tags) == 4
    assert len(hits._repr_html_()) < 3000
    assert hits[0].url in {attributes.get("href") for _, attributes in page.tags}
