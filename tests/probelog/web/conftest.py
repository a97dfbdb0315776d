"""An index with models and generators of all sorts, hostile ones among them, and the page that shows it."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

import probelog
from probelog.storage.schemas import Parent
from probelog.storage.store import Store
from probelog.trees.edges import Edge, Relation, edge_table
from tests.support.processes.web_server import page
from tests.support.worlds import small_generators
from tests.support.worlds.small_generators import GENERATORS_OF_ALL_SORTS, Generator
from tests.support.worlds.small_index import MODELS_OF_ALL_SORTS, Model

SCRIPT = "<script>alert(1)</script>"
LATENT = "latent:0123456789ab"
MODELS = (
    *MODELS_OF_ALL_SORTS,
    Model("mallory/html", (SCRIPT, '"><img src=x onerror=alert(1)>', "=1+1", "{{ 7*7 }}"), licence=SCRIPT),
    Model(f"mallory/{SCRIPT}", ("cat", "dog")),
    Model("tree/root", ("cat", "dog"), licence="cc-by-nc-4.0"),
    Model("tree/child", ("cat", "dog"), parents=(Parent("tree/root", "finetune", "card"),)),
    Model("tree/grandchild", ("cat", "dog"), licence="apache-2.0"),
    Model("tree/sibling", ("cat", "dog")),
)
GENERATORS = (
    *GENERATORS_OF_ALL_SORTS,
    Generator(
        f"mallory/{SCRIPT}",
        ("chair",),
        SCRIPT,
        base_repo='"><img src=x>',
        trigger_words=(SCRIPT,),
        licence=SCRIPT,
    ),
)
EDGES = [
    Edge("tree/root", LATENT, Relation.FINE_TUNED, 0.75, latent=True),
    Edge("tree/child", "tree/root", Relation.FINE_TUNED, 0.9, declared=True),
    Edge("tree/sibling", "tree/root", Relation.QUANTISED, 0.8),
    Edge("tree/grandchild", "tree/child", Relation.COPY, 0.95),
    Edge("kim/lora-umbrella", "gina/cats", Relation.LOW_RANK, 1.0, declared=True),
]


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with such an index, and the gate's report on it."""
    store = Store(tmp_path_factory.mktemp("web"))
    small_generators.build(
        store.child("index"), generators=GENERATORS, models=MODELS, edges=edge_table(EDGES)
    )
    measures = [
        {"name": "declared, first answer", "value": 0.75, "counted": 40, "limit": 0.05, "verdict": "passed"},
        {"name": SCRIPT, "value": None, "meaning": SCRIPT},
        "none",
    ]
    store.write_json(
        "quality/first.json", {"passed": True, "at": "2026-01-02T03:04:05", "measures": measures}
    )
    return store


@pytest.fixture(scope="session")
def index(store: Store) -> probelog.Index:
    return probelog.open_index(store.uri)


@pytest.fixture(scope="package")
def address(index: probelog.Index) -> Iterator[str]:
    with page(index) as address:
        yield address


@pytest.fixture
def web(address: str) -> Iterator[httpx.Client]:
    """A client of the page, over a socket."""
    with httpx.Client(base_url=address, timeout=30) as client:
        yield client
