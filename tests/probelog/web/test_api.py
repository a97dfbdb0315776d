"""The interface for programs: its answers are the client's, and what its description says; errors are problems."""

from __future__ import annotations

import csv
import io
from typing import Any
from urllib.parse import quote

import httpx
import jsonschema
import pytest

import probelog
from probelog.web.answers import as_json
from tests.probelog.encoders.test_decoding import bomb, encoded
from tests.probelog.web.conftest import SCRIPT
from tests.support.worlds.tiny_encoders import photo

pytestmark = pytest.mark.xdist_group("web")  # they share an index


@pytest.fixture(scope="module")
def description(address: str) -> dict[str, Any]:
    content: dict[str, Any] = httpx.get(f"{address}/api/openapi.json").json()
    return content


def check(description: dict[str, Any], schema: str, content: object) -> None:
    """Hold an answer against the description, in which nothing may be left out and nothing be added."""
    jsonschema.validate(
        content, {"$ref": f"#/components/schemas/{schema}", "components": description["components"]}
    )


@pytest.mark.parametrize(
    ("path", "operation"),
    [
        ("/api/search?q=dog&q=puppy&not=cat&k=3", "/api/search"),
        ("/api/search?like=anna/pets%230", "/api/search"),
        ("/api/search?kind=generator&q=cat&not=dog", "/api/search"),
        ("/api/generators/kim/lora-umbrella", "/api/generators/{repo}"),
        ("/api/facets?kind=generator&pipeline=lora", "/api/facets"),
        ("/api/models/anna/pets", "/api/models/{repo}"),
        ("/api/models/eve/hostile", "/api/models/{repo}"),
        ("/api/similar/anna/pets", "/api/similar/{repo}"),
        ("/api/tree/tree/child", "/api/tree/{repo}"),
        ("/api/licences/tree/grandchild", "/api/licences/{repo}"),
        ("/api/facets?head=softmax", "/api/facets"),
        ("/api/index", "/api/index"),
    ],
)
def test_answers_are_what_the_description_says(
    web: httpx.Client, description: dict[str, Any], path: str, operation: str
) -> None:
    answer = web.get(path)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json"), answer.text
    responses = description["paths"][operation]["get"]["responses"]
    schema = responses["200"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    check(description, schema, answer.json())
    assert answer.json()["generation"] == "first"
    named = {item["name"] for item in description["paths"][operation]["get"]["parameters"]}
    assert set(answer.request.url.params) <= named


def test_the_description_is_one(description: dict[str, Any]) -> None:
    assert description["openapi"].startswith("3.1")
    for path, operations in description["paths"].items():
        for operation in operations.values():
            inside = {item["name"] for item in operation.get("parameters", ()) if item["in"] == "path"}
            assert inside == {part[1:-1] for part in path.split("/") if part.startswith("{")}
    for schema in description["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_a_search_gives_what_the_client_gives(web: httpx.Client, index: probelog.Index) -> None:
    answer = web.get(
        "/api/search", params={"q": "dog", "not": "cat", "k": 5, "licence": ["mit", "unknown"]}
    ).json()
    expected = index.search("dog", negative="cat", k=5, where="licence = 'mit' OR licence IS NULL")
    assert answer["hits"] == [as_json(hit) for hit in expected]
    assert answer["notes"] == expected.notes
    assert answer["query"] == {"q": ["dog"], "not": ["cat"], "licence": ["mit", "unknown"], "k": ["5"]}
    several = web.get("/api/search", params={"q": ["cat", "house cat"], "k": 3}).json()
    assert [hit["repo"] for hit in several["hits"]] == [
        hit.repo for hit in index.search(["cat", "house cat"], k=3)
    ]
    assert web.get("/api/tree/tree/child").json() == {
        "generation": "first",
        **index.tree("tree/child").to_dict(),
    }


@pytest.mark.parametrize(
    ("path", "rows"),
    [
        ("/api/search?q=dog&k=4&format=csv", 4),
        ("/api/models/anna/pets?format=csv", 4),
        ("/api/similar/anna/pets?format=csv", 5),
        ("/api/search?kind=generator&q=cat&k=2&format=csv", 2),
        ("/api/tree/tree/child?format=csv", 4),
    ],
)
def test_answers_are_tables_too(web: httpx.Client, path: str, rows: int) -> None:
    answer = web.get(path)
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    assert "attachment" in answer.headers["content-disposition"]
    table = [*csv.DictReader(io.StringIO(answer.text))]
    assert len(table) == rows
    assert all(None not in row and None not in row.values() for row in table)


def test_a_table_holds_no_formula(web: httpx.Client) -> None:
    table = [*csv.DictReader(io.StringIO(web.get("/api/models/mallory/html?format=csv").text))]
    assert [row["label"] for row in table] == [SCRIPT, '"><img src=x onerror=alert(1)>', "'=1+1", "{{ 7*7 }}"]
    # JSON has what was written.
    model = web.get("/api/models/mallory/html").json()["model"]
    assert model["logits"][2]["label"] == "=1+1"


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("/api/search", 400, "the query is empty"),
        ("/api/search?q=dog&colour=red", 400, "a search for classifiers has no parameter 'colour'"),
        ("/api/search?q=dog&where=1=1", 400, "has no parameter 'where'"),
        ("/api/search?q=dog&kind=generator&by=logit", 400, "by='logit' is none of model, family"),
        ("/api/search?q=dog&pipeline=lora", 400, "a search for classifiers has no parameter 'pipeline'"),
        ("/api/search?q=dog&kind=poet", 400, "kind='poet' is none of classifier, generator"),
        ("/api/search?q=dog&format=xml", 400, "format='xml' is none of json, csv"),
        ("/api/search?q=dog&k=201", 400, "from 1 to 200"),
        ("/api/search?q=dog&downloads=many", 400, "downloads='many' is none of"),
        ("/api/facets?size=big", 400, "size='big' is none of"),
        ("/api/models/no/body", 404, "does not hold 'no/body'"),
        ("/api/generators/no/body", 404, "does not hold"),
        ("/api/similar/no/body", 404, "does not hold"),
        ("/api/licences/no/body", 404, "does not hold"),
        ("/api/tree/no/body", 404, "does not hold"),
        ("/api/tree/tree/child?limit=0", 400, "limit='0' is no number from 1 to 1000"),
        ("/api/nothing", 404, "there is no such page"),
        ("/api/models/a%00b", 404, "does not hold"),
        ("/api/models/%ff%fe", 404, "does not hold"),
    ],
)
def test_errors_are_problem_details(
    web: httpx.Client, description: dict[str, Any], path: str, status: int, said: str
) -> None:
    answer = web.get(path)
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.status_code == answer.json()["status"] == status
    assert said in answer.json()["detail"]
    check(description, "Problem", answer.json())


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "TRACE"])
def test_other_methods_are_refused(web: httpx.Client, method: str) -> None:
    answer = web.request(method, "/api/search?q=dog", content=b"x")
    assert answer.status_code == 405
    assert answer.json()["status"] == 405
    assert set(answer.headers["allow"].split(", ")) == {"GET", "HEAD"}


def test_names_of_any_kind_reach_their_models(web: httpx.Client) -> None:
    for repo in (f"mallory/{SCRIPT}", "eve/[red]name[/red]\x1b[31m"):
        answer = web.get(f"/api/models/{quote(repo)}")
        assert answer.json()["model"]["repo"] == repo


def test_health_and_metrics(web: httpx.Client) -> None:
    web.get("/search?q=dog")
    assert web.get("/healthz").json() == {"status": "ok", "generation": "first"}
    text = web.get("/metrics").text
    assert 'probelog_web_requests_total{page="search",status="200"}' in text
    assert 'probelog_web_request_seconds_bucket{le="0.5",page="search"}' in text
    assert "probelog_web_logits" in text
    assert "probelog_web_waiting 0.0" in text


# Pictures


def embedded(web: httpx.Client, seed: int) -> str:
    answer = web.post("/api/pictures", content=encoded(photo(40, 30, seed), "PNG"))
    assert answer.status_code == 201, answer.text
    return str(answer.json()["picture"])


def test_a_search_by_pictures_is_the_clients(web: httpx.Client, index: probelog.Index) -> None:
    tokens = [embedded(web, seed) for seed in (1, 2)]
    answer = web.get("/api/search", params={"picture": tokens, "k": 10}).json()
    every = index.search(images=[encoded(photo(40, 30, seed), "PNG") for seed in (1, 2)], k=100)
    expected = {(hit.repo, hit.logit, hit.negated): hit.score for hit in every}
    found = {(hit["repo"], hit["logit"], hit["negated"]): hit["score"] for hit in answer["hits"]}
    # A byte for each dimension costs little: answers may change places with those that are nearly as good.
    assert found == pytest.approx({hit: expected[hit] for hit in found}, abs=0.05)
    assert len(found) == 10
    assert min(found.values()) > sorted(expected.values())[-10] - 0.05
    mixed = web.get("/search", params={"picture": tokens[0], "q": "dog", "not": "cat"})
    assert mixed.status_code == 200
    assert f'value="{tokens[0]}"' in mixed.text


@pytest.mark.parametrize(
    ("content", "status", "said"),
    [
        (b"", 400, "not an image"),
        (encoded(photo(40, 30, 1), "PNG")[:200], 400, "damaged image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 400, "not an image"),
        (bomb(), 400, "decompression bomb"),
        (bomb(6000, 6000), 400, "6000 x 6000 pixels is more than the 24 million"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * (10 << 20), 413, "at most 10 MiB"),
    ],
    ids=["nothing", "damaged", "svg", "bomb", "many-pixels", "large"],
)
def test_what_is_no_picture(web: httpx.Client, content: bytes, status: int, said: str) -> None:
    answer = web.post("/api/pictures", content=content)
    assert (answer.status_code, answer.json()["status"]) == (status, status)
    assert said in answer.json()["detail"]
    assert web.get("/healthz").status_code == 200


def test_a_body_without_a_length_is_bounded_too(web: httpx.Client) -> None:
    answer = web.post("/api/pictures", content=(b"\0" * (1 << 20) for _ in range(11)))
    assert answer.status_code == 413


@pytest.mark.parametrize("damage", ["", "x", "AAAA", "é", "A" * 7000])
def test_pictures_that_an_address_makes_up(web: httpx.Client, damage: str) -> None:
    answer = web.get("/api/search", params={"picture": damage or "="})
    assert answer.status_code == 400
    assert "choose" in answer.json()["detail"]


def test_a_picture_of_another_encoder(web: httpx.Client) -> None:
    token = embedded(web, 1)
    assert token[:2] == "AW"  # version 1, and the first byte of the digest
    answer = web.get("/api/search", params={"picture": "AX" + token[2:]})
    assert "embedded by another encoder" in answer.json()["detail"]
