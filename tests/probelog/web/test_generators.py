"""Generators on the page and in the interface for programs: what the client answers, their pictures, sketches and files."""

from __future__ import annotations

import html
import re
from urllib.parse import parse_qs, quote, urlsplit

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import probelog
from probelog.encoders.decoding import decode
from probelog.errors import QueryError
from probelog.storage.store import Store
from probelog.web.answers import as_json
from probelog.web.pictures import form_fields
from tests.probelog.encoders.test_decoding import encoded
from tests.probelog.web.conftest import GENERATORS, SCRIPT
from tests.support.processes.web_server import page
from tests.support.worlds.small_generators import picture
from tests.support.worlds.small_index import build
from tests.support.worlds.tiny_encoders import photo

pytestmark = pytest.mark.xdist_group("web")  # they share an index


def test_a_search_shows_what_the_client_answers(web: httpx.Client, index: probelog.Index) -> None:
    text = web.get("/search?kind=generator&q=cat&k=4").text
    hits = index.search("cat", kind="generator", k=4)
    assert re.findall(r'<h3><a href="/generators/([^"]*)">', text) == [quote(hit.repo) for hit in hits]
    assert re.findall(r"<b>(\d+ %)</b>", text) == [f"{100 * (hit.confidence or 0):.0f} %" for hit in hits]
    expected = [
        f"/samples/first/{number}/{quote(hit.repo)}" for hit in hits for number in range(hit.pictures)
    ]
    assert expected
    assert re.findall(r'src="(/samples/[^"]*)"', text) == expected
    assert 'name="kind" value="generator" checked' in text


def test_pictures_that_generators_made(web: httpx.Client) -> None:
    for number in (1, 3, 1):  # read from the index, and kept
        answer = web.get(f"/samples/first/{number}/gina/cats")
        assert answer.content == picture("gina/cats", number)
        assert answer.headers["content-type"] == "image/webp"
        assert "immutable" in answer.headers["cache-control"]
    # Under another generation's address it may be another picture tomorrow.
    answer = web.get("/samples/second/1/gina/cats")
    assert (answer.content, answer.headers["cache-control"]) == (picture("gina/cats", 1), "no-cache")


def test_programs_get_what_the_client_gives(web: httpx.Client, index: probelog.Index) -> None:
    answer = web.get(
        "/api/search", params={"kind": "generator", "q": "cat", "not": "violin", "pipeline": "DDPMPipeline"}
    ).json()
    expected = index.search(
        "cat", kind="generator", negative="violin", k=20, where="pipeline = 'DDPMPipeline'"
    )
    assert answer["hits"] == [as_json(hit) for hit in expected]
    assert answer["hits"]
    assert answer["query"]["kind"] == ["generator"]
    summary = web.get("/api/generators/kim/lora-umbrella").json()["generator"]
    assert summary == as_json(index.show_generator("kim/lora-umbrella"))
    # From one kind to the other, both ways.
    for kind, like in (
        ("generator", "anna/pets#1"),
        ("classifier", "hugo/violins"),
        ("generator", "hugo/violins"),
    ):
        found = web.get("/api/search", params={"kind": kind, "like": like, "k": 3}).json()["hits"]
        repos = [hit.repo for hit in index.search(like=like, kind=kind, k=3)]
        assert [hit["repo"] for hit in found] == repos
        assert repos


def test_a_sketch_is_embedded_and_not_kept(web: httpx.Client, index: probelog.Index) -> None:
    drawn = encoded(photo(40, 30, 5), "PNG")
    answer = web.post("/api/sketches", content=drawn)
    assert answer.status_code == 201
    token = answer.json()["sketch"]
    hits = web.get("/api/search", params={"kind": "generator", "sketch": token}).json()["hits"]
    expected = index.search(sketch=decode(drawn, 10_000), kind="generator", k=20)
    assert [hit["score"] for hit in hits] == pytest.approx([hit.score for hit in expected], abs=0.2)
    text = web.get("/search", params={"kind": "generator", "sketch": token, "q": "cat"}).text
    assert f'name="sketch" value="{token}"' in text
    assert "Without sketch 1" in text
    assert web.post("/api/sketches", content=b"nothing").status_code == 400


def test_what_is_of_the_other_kind_is_left_out(web: httpx.Client) -> None:
    """A form that is switched still sends what was chosen before."""
    text = web.get("/search?kind=generator&q=cat&by=model&library=timm&head=softmax&licence=mit").text
    for link in re.findall(r'href="(/search\?[^"]*)"', text):
        query = parse_qs(urlsplit(html.unescape(link)).query)
        assert {"head", "library"}.isdisjoint(query)
        assert query.get("by") in (None, ["family"])  # each is what generators are answered by anyway
    assert "licence=mit" in text
    answer = web.get("/search?kind=generator&not=cat")
    assert (answer.status_code, answer.headers["location"]) == (303, "/?kind=generator")


def test_generators_folded_by_family(web: httpx.Client, index: probelog.Index) -> None:
    every = [hit.repo for hit in index.search("umbrella", kind="generator", k=20)]
    assert {"kim/lora-umbrella", "gina/cats"} <= {*every}
    folded = index.search("umbrella", kind="generator", k=20, by="family")
    hits = web.get("/api/search?kind=generator&q=umbrella&by=family").json()["hits"]
    assert [hit["repo"] for hit in hits] == [hit.repo for hit in folded]
    assert {*every} - {hit.repo for hit in folded} == {"gina/cats"}
    text = web.get("/search?kind=generator&q=umbrella&by=family").text
    assert "+1 of its family" in text
    assert 'by=family" aria-current="true">one a family' in text
    assert "of its family" not in web.get("/search?kind=generator&q=umbrella").text
    root = web.get("/api/search?kind=generator&q=umbrella&root=gina/cats").json()["hits"]
    assert {hit["repo"] for hit in root} == {"kim/lora-umbrella", "gina/cats"}


def test_a_whole_classifier_is_compared_on_its_page_once_the_kind_is_switched(web: httpx.Client) -> None:
    answer = web.get("/search?like=anna/pets&by=model")
    assert (answer.status_code, answer.headers["location"]) == (303, "/models/anna/pets?similar=1#similar")
    assert web.get("/search?like=anna/pets&q=cat").status_code == 400


def test_facets_of_generators(web: httpx.Client) -> None:
    answer = web.get("/api/facets?kind=generator").json()
    assert answer["models"] == len(GENERATORS)
    counts = {facet["name"]: {v["key"]: v["count"] for v in facet["values"]} for facet in answer["facets"]}
    assert {*counts} == {
        "licence", "pipeline", "architecture", "conditioning", "base_repo", "root", "size", "downloads", "created"
    }  # fmt: skip
    for facet, value in (
        ("pipeline", lambda item: item.pipeline),
        ("base_repo", lambda item: item.base_repo),
    ):
        expected = [value(item) or "unknown" for item in GENERATORS]
        assert counts[facet] == {key: expected.count(key) for key in expected}
    found = web.get("/api/search?kind=generator&q=cat&k=200&base_repo=gina/cats").json()["hits"]
    assert [hit["repo"] for hit in found] == ["kim/lora-umbrella"]
    assert "Pipeline</h3>" in web.get("/search?kind=generator&licence=mit").text


def test_a_generators_page(web: httpx.Client, index: probelog.Index) -> None:
    summary = index.show_generator("kim/lora-umbrella")
    text = web.get("/generators/kim/lora-umbrella").text
    assert ", ".join(summary.concepts) in text
    assert "<dd>gina/cats</dd>" in text
    assert "umbr" in text
    assert text.count("/samples/first/") == summary.pictures
    assert "kind=generator&amp;like=kim%2Flora-umbrella" in text
    hostile = web.get(f"/generators/mallory/{quote(SCRIPT)}").text
    assert hostile.count(html.escape(SCRIPT)) >= 5  # its name, title, pipeline, licence and trigger word
    assert "makers" in web.get("/models/anna/pets").text


def test_generators_of_what_a_classifier_recognises(web: httpx.Client, index: probelog.Index) -> None:
    assert "kind=generator&amp;like=anna%2Fpets" in web.get("/models/anna/pets").text
    found = index.search(kind="generator", like="mallory/html", k=20)
    assert web.get("/api/search?kind=generator&like=mallory/html").json()["hits"] == [
        as_json(hit) for hit in found
    ]
    text = web.get("/search?kind=generator&like=mallory/html").text
    assert text.count("recognised by <a") == len(found)
    assert f"like=mallory%2Fhtml%23{found[0].found_by[0].logit}" in text
    assert html.escape(SCRIPT) in text
    assert SCRIPT not in text
    answer = web.get("/search?kind=generator&like=nobody/nothing")
    assert answer.status_code == 400
    assert "a generator or a classifier" in answer.text
    assert web.get("/api/search?kind=generator&like=nobody/nothing").status_code in (400, 404)


def test_an_index_without_generators_offers_none(tmp_path_factory: pytest.TempPathFactory) -> None:
    store = Store(tmp_path_factory.mktemp("without"))
    build(store.child("index"))
    index = probelog.open_index(store.uri)
    with page(index) as address, httpx.Client(base_url=address, timeout=30) as client:
        for path in ("/", "/search?q=dog", "/models/anna/pets", "/index"):
            text = client.get(path).text
            assert "enerator" not in text
        for path in ("/search?kind=generator&q=cat", "/generators/a/b", "/samples/first/0/a/b"):
            answer = client.get(path)
            assert answer.status_code == 400
            assert "holds no generators" in answer.text
    index.close()


# Files without a script


def upload(web: httpx.Client, files: list[tuple[str, bytes]], **fields: str) -> httpx.Response:
    return web.post("/search", data=fields, files=[(name, (name, content)) for name, content in files])


def test_files_are_searched_with_without_a_script(web: httpx.Client) -> None:
    first, second = (encoded(photo(40, 30, seed), "PNG") for seed in (1, 2))
    answer = upload(
        web, [("picture", first), ("picture", second), ("sketch", first)], kind="generator", q="cat, dog"
    )
    assert answer.status_code == 303
    asked = parse_qs(urlsplit(answer.headers["location"]).query)
    assert (asked["kind"], asked["q"], len(asked["picture"]), len(asked["sketch"])) == (
        ["generator"],
        ["cat, dog"],
        2,
        1,
    )
    assert asked["picture"][0] == web.post("/api/pictures", content=first).json()["picture"]
    assert asked["sketch"][0] == web.post("/api/sketches", content=first).json()["sketch"]
    assert web.get(answer.headers["location"]).status_code == 200
    # Fields that were left empty are not there.
    answer = upload(web, [("picture", first), ("sketch", b"")], q="")
    assert {*parse_qs(urlsplit(answer.headers["location"]).query)} == {"picture"}
    assert 'enctype="multipart/form-data"' in web.get("/").text


def test_forms_that_are_none(web: httpx.Client) -> None:
    assert "not an image" in upload(web, [("picture", b"nothing")]).text
    assert upload(web, [("picture", b"\x89PNG" + b"\0" * (10 << 20))]).status_code == 413
    for kind in ("", "text/plain", "multipart/form-data", "multipart/form-data; boundary=" + "x" * 71):
        answer = web.post("/search", content=b"--x\r\n", headers={"content-type": kind})
        assert answer.status_code == 400
        assert "no form with pictures" in answer.text
    # Nothing in it: the front page.
    answer = web.post(
        "/search", content=b"--x--", headers={"content-type": "multipart/form-data; boundary=x"}
    )
    assert (answer.status_code, answer.headers["location"]) == (303, "/search?")


@given(st.lists(st.tuples(st.sampled_from(["q", "picture", "not"]), st.binary(max_size=60)), max_size=6))
def test_a_form_is_read_as_it_was_sent(fields: list[tuple[str, bytes]]) -> None:
    request = httpx.Request(
        "POST", "http://localhost/", files=[(n, (n, c)) for n, c in fields] or [("x", b"")]
    )
    assert form_fields(request.headers["content-type"], request.read()) == [
        item for item in fields if item[1]
    ]


@given(st.binary(max_size=200))
def test_any_body_is_a_form_or_none(body: bytes) -> None:
    for name, content in form_fields("multipart/form-data; boundary=x", b"--x\r\n" + body):
        assert name.isascii()
        assert content in body
    with pytest.raises(QueryError):
        form_fields("multipart/form-data; boundary=\n", body)
