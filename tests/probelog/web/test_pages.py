"""The pages over a socket: what they say, that all of it is escaped, and what they answer to bad input."""

from __future__ import annotations

import html
import re
from urllib.parse import parse_qs, quote, urlsplit

import httpx
import pytest

import probelog
from probelog.web.middleware import SECURITY_HEADERS
from tests.probelog.web.conftest import LATENT, MODELS, SCRIPT

pytestmark = pytest.mark.xdist_group("web")  # they share an index

PAGES = [
    "/",
    "/search?q=dog",
    "/search?q=dog&k=200",
    "/search?q=dog,+puppy&not=cat&licence=mit&k=5",
    "/search?licence=mit",
    "/search?like=anna/pets%231",
    "/models/tree/child",
    "/models/mallory/html",
    f"/models/mallory/{quote(SCRIPT)}",
    "/models/eve/hostile",
    "/tree/tree/child",
    "/index",
    "/?kind=generator",
    "/search?kind=generator&q=chair",
    "/search?kind=generator&licence=mit",
    "/search?kind=generator&like=anna/pets%231",
    "/search?like=hugo/violins",
    f"/generators/mallory/{quote(SCRIPT)}",
    "/generators/leo/%1b%5b31mred",
]


def hidden_controls(text: str) -> list[str]:
    return re.findall(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]", text)


@pytest.mark.parametrize("path", PAGES)
def test_a_page_has_nothing_that_an_uploader_could_have_put_there(web: httpx.Client, path: str) -> None:
    answer = web.get(path)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert not hidden_controls(answer.text)
    # One script, from a file; no handler and no style within the page; nothing is asked of anybody else.
    assert re.findall(r"<script[^>]*>", answer.text) == re.findall(
        r'<script src="/static/[^"]*" defer>', answer.text
    )
    assert answer.text.count("<script") == 1
    assert not re.search(r"<[^>]*\s(on\w+|style)=", answer.text)
    sources = re.findall(
        r'<(?:img|link|script|form|input|source)[^>]*\s(?:src|href|action)="([^"]*)"', answer.text
    )
    assert sources
    assert all(source.startswith("/") and not source.startswith("//") for source in sources)
    links = re.findall(r'<a [^>]*href="([^"]*)"([^>]*)', answer.text)
    assert all(re.match(r"/(?!/)|#|https://huggingface\.co/", link) for link, _ in links)
    assert all("noreferrer noopener" in rest for link, rest in links if link.startswith("https"))


EVERYTHING = [
    *PAGES,
    "/nowhere",
    "/search?k=0&q=dog",
    "/models/no/body",
    "/api/search?q=dog",
    "/api/search",
    "/api/models/no/body",
    "/api/tree/tree/child",
    "/healthz",
    "/metrics",
    "/probes/aaaa/1",
    "/probes/zzzz/1",
    "/samples/first/0/gina/cats",
    "/samples/first/99/gina/cats",
    "/api/openapi.json",
]


@pytest.mark.parametrize("path", EVERYTHING)
def test_every_answer_has_the_security_headers(web: httpx.Client, path: str) -> None:
    headers = web.get(path).headers
    for name, value in SECURITY_HEADERS.items():
        assert headers[name] == value
    assert "server" not in headers
    assert "unsafe" not in headers["content-security-policy"]


def test_a_search_shows_what_the_client_answers(web: httpx.Client, index: probelog.Index) -> None:
    text = web.get("/search?q=dog&k=7").text
    hits = index.search("dog", k=7)
    shown = re.findall(r'<h3><a href="/models/([^"]*)">', text)
    assert shown == [quote(hit.repo) for hit in hits]
    assert re.findall(r"<b>(\d+ %)</b>", text) == [f"{100 * (hit.confidence or 0):.0f} %" for hit in hits]
    assert 'value="dog"' in text
    strips = re.findall(
        r'<ul class="strip" aria-label="Pictures that fire it (\w+)">(.*?)</ul>', text, re.DOTALL
    )
    shown = [(kind, re.findall(r'src="/probes/a{16}/(\d+)"', strip)) for kind, strip in strips]
    expected = []
    for item in index.evidence_of(hits, pictures=False):
        expected.append(("most", [str(probe.probe) for probe in item.strongest]))
        expected += [("least", [str(probe.probe) for probe in item.weakest])] if item.weakest else []
    assert shown == expected
    # Each with its value, and what completion estimated is marked.
    everything = [probe for item in index.evidence_of(hits) for probe in (*item.strongest, *item.weakest)]
    assert re.findall(r'alt="probe \d+, (-?\d+\.\d)', text) == [f"{probe.value:.1f}" for probe in everything]
    assert text.count('class="estimated"') == sum(probe.observed is False for probe in everything)


def test_what_uploaders_wrote_is_shown_as_text(web: httpx.Client) -> None:
    text = web.get("/models/mallory/html").text
    assert html.escape(SCRIPT) in text
    assert "{{ 7*7 }}" in text
    text = web.get(f"/models/mallory/{quote(SCRIPT)}").text
    assert html.escape(SCRIPT) in text
    text = web.get("/index").text
    assert html.escape(SCRIPT) in text


def test_every_search_is_an_address(web: httpx.Client) -> None:
    """Links of a page lead to the search with one thing changed, and keep all others."""
    text = web.get("/search?q=dog,puppy&not=cat&licence=mit&by=family&k=5").text
    links = [html.unescape(link) for link in re.findall(r'href="(/search\?[^"]*)"', text)]
    asked = {"q": ["dog, puppy"], "not": ["cat"], "licence": ["mit"], "by": ["family"], "k": ["5"]}
    without_fold = {**asked}
    del without_fold["by"]
    queries = [parse_qs(urlsplit(link).query) for link in links]
    assert without_fold in queries
    assert {name: value for name, value in asked.items() if name not in ("licence", "k")} in queries
    assert {**{n: v for n, v in asked.items() if n != "k"}, "library": ["timm"]} in queries
    assert all(web.get(link).status_code == 200 for link in links[:12])


def test_answers_of_a_least_confidence(web: httpx.Client, index: probelog.Index) -> None:
    everything = index.search("dog", k=20)
    least = sorted(hit.confidence or 0 for hit in everything)[10]
    text = web.get("/search", params={"q": "dog", "min_confidence": least}).text
    assert text.count('<li class="hit">') == sum((hit.confidence or 0) >= least for hit in everything)
    assert f'name="min_confidence" value="{least}"' in text
    assert "min_confidence=0.5" in text


def test_facets_count_the_models_that_a_choice_leaves(web: httpx.Client) -> None:
    counts = {facet["name"]: facet for facet in web.get("/api/facets").json()["facets"]}
    licences = {value["key"]: value["count"] for value in counts["licence"]["values"]}
    assert licences["mit"] == sum(model.licence == "mit" for model in MODELS)
    assert licences["unknown"] == sum(model.licence is None for model in MODELS)
    answer = web.get("/api/facets?licence=mit&downloads=1000").json()
    chosen = sum(model.licence == "mit" and (model.downloads or 0) >= 1000 for model in MODELS)
    assert answer["models"] == chosen
    by_name = {facet["name"]: facet for facet in answer["facets"]}
    # A facet's own choice does not narrow it: its values are alternatives.
    rich = [model for model in MODELS if (model.downloads or 0) >= 1000]
    found = {value["key"]: value["count"] for value in by_name["licence"]["values"]}
    assert found == {
        licence: sum(model.licence == licence for model in rich)
        for licence in {model.licence for model in rich}
    }


@pytest.mark.parametrize(
    ("facet", "value"),
    [("licence", "mit"), ("licence", "unknown"), ("head", "single"), ("downloads", "100"), ("downloads", "unknown"),
     ("size", "unknown"), ("created", "unknown"), ("root", LATENT), ("licence", "it's; DROP TABLE"), ("created", "2024")],
)  # fmt: skip
def test_answers_meet_the_filters(web: httpx.Client, facet: str, value: str) -> None:
    count = web.get("/api/facets", params={facet: value}).json()["models"]
    answer = web.get("/api/search", params={"q": "dog", facet: value, "k": 200}).json()
    repos = {hit["repo"] for hit in answer["hits"]}
    assert len(repos) + sum({hit["repo"]: hit["duplicates"] for hit in answer["hits"]}.values()) == count
    assert web.get("/search", params={"q": "dog", facet: value}).status_code == 200


def test_a_models_page(web: httpx.Client, index: probelog.Index) -> None:
    text = web.get("/models/tree/child").text
    for item in index.show("tree/child").logits:
        assert ", ".join(item.concepts) in text
    assert "tree/root (finetune)" in text
    assert '<span class="tag conditions">' in text or '<span class="tag forbidden">' in text
    for hit in index.models_like("tree/child", k=5):
        assert f'<a href="/models/{quote(hit.repo)}">' in text
    text = web.get("/models/anna/pets").text
    assert "bert/pets-copy" in text[text.index('id="same"') :]


def test_a_model_with_many_classes_has_pages(web: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("probelog.web.answers.LOGITS", 4)
    assert "start=4" in web.get("/models/emil/things").text
    text = web.get("/models/emil/things?start=4").text
    assert re.findall(r'<span class="label">(thing \d)', text) == [f"thing {i}" for i in range(4, 8)]
    assert "start=8" in text
    assert "start=0" in text
    answer = web.get("/api/models/emil/things?start=8").json()
    assert [item["label"] for item in answer["model"]["logits"]] == ["thing 8"]
    assert answer["more"] is False


def test_a_tree_is_indented_and_can_be_folded(web: httpx.Client) -> None:
    text = web.get("/tree/tree/child").text
    tree = text[text.index('<ul class="tree">') : text.index("</main>")]
    level, levels = 0, {}
    for token in re.findall(r"<ul|</ul>|<details|</details>|<li|</li>|/models/[\w/]+|latent:\w+", tree):
        level += {"<ul": 1, "</ul>": -1}.get(token, 0)
        if token.startswith(("/models", "latent")):
            levels.setdefault(token.removeprefix("/models/"), level)
    assert levels == {LATENT: 1, "tree/root": 2, "tree/child": 3, "tree/grandchild": 4, "tree/sibling": 3}
    assert level == 0
    for tag in ("ul", "li", "details"):
        assert tree.count(f"<{tag}") == tree.count(f"</{tag}>")
    assert "90 %" in tree
    assert "quantised" in tree


def test_the_indexs_page(web: httpx.Client, index: probelog.Index) -> None:
    text = web.get("/index").text
    assert index.generation in text
    assert "75 %" in text
    assert "passed" in text
    assert "2026-01-02 03:04 UTC" in text


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("/search?q=dog&k=0", 400, "k='0' is no number from 1 to 200"),
        ("/search?q=dog&k=9999999999999999999", 400, "is no number from 1 to 200"),
        ("/search?q=dog&by=owner", 400, "by='owner' is none of logit, model, family"),
        ("/search?q=dog&min_confidence=nan", 400, "is no number from 0 to 1"),
        ("/search?q=dog&size=huge", 400, "size='huge' is none of"),
        ("/search?q=dog&created=year", 400, "created='year' is no year"),
        ("/search?q=%00dog", 400, "holds a character that no text has"),
        ("/search?q=dog&licence=%00", 400, "licence holds a character"),
        ("/search?q=" + "dog,+" * 21 + "x," + ",".join(map(str, range(21))), 400, "at most 20 names"),
        ("/search?q=" + "x" * 201, 400, "200 characters"),
        ("/search?like=nobody", 400, "names no logit"),
        ("/search?like=no/body%230", 400, "does not hold &#39;no/body&#39;"),
        ("/search?picture=x", 400, "the address holds no picture"),
        ("/models/no/body", 404, "does not hold &#39;no/body&#39;"),
        ("/generators/no/body", 404, "does not hold"),
        ("/samples/first/4/gina/cats", 404, "there is no sample 4"),
        ("/samples/first/99999999999999999999/gina/cats", 404, "there is no sample"),
        ("/samples/first/0/no/body", 404, "does not hold"),
        ("/?kind=poet", 400, "kind='poet' is none of classifier, generator"),
        ("/search?kind=generator&sketch=x", 400, "the address holds no picture"),
        ("/models/ana/pets", 404, "did you mean anna/pets"),
        ("/models/", 404, "does not hold"),
        ("/models/anna/pets?start=-1", 400, "start=&#39;-1&#39; is no number"),
        ("/models/a%00b", 404, "does not hold"),
        ("/tree/no/body", 404, "does not hold"),
        ("/nowhere", 404, "there is no such page"),
        ("/probes/aaaa/99999999999999999999", 404, "the index has no such probes"),
        ("/probes/aaaa/1", 400, "there is no picture of a probe 1"),
        ("/static/0/style.css", 404, "there is no such page"),
        ("/static/0/..%2f..%2fapp.py", 404, "there is no such page"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_said(web: httpx.Client, path: str, status: int, said: str) -> None:
    answer = web.get(path)
    assert answer.status_code == status, answer.text
    assert said in answer.text or said in html.unescape(answer.text)
    assert "Traceback" not in answer.text


def test_an_empty_search_is_the_front_page(web: httpx.Client) -> None:
    answer = web.get("/search?q=&not=")
    assert (answer.status_code, answer.headers["location"]) == (303, "/")


def test_static_files_never_change_under_an_address(web: httpx.Client) -> None:
    text = web.get("/").text
    paths = re.findall(r'"(/static/[0-9a-f]{16}/[\w.]+)"', text)
    assert {path.rpartition("/")[2] for path in paths} == {"style.css", "page.js", "icon.svg"}
    for path in paths:
        answer = web.get(path)
        assert answer.status_code == 200
        assert "immutable" in answer.headers["cache-control"]
    assert "http" not in web.get(paths[-1]).text.replace("http://www.w3.org/2000/svg", "")
    assert web.get("/").headers["cache-control"] == "no-cache"
