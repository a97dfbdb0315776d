"""A generation of which workers made and checked the rows is the one that a publisher makes alone."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines.complete.descriptors import ModelDescriptors
from pipelines.publish import pieces, release, stage
from pipelines.publish.encoder import ExportedEncoder
from pipelines.publish.release import PublishResult
from probelog.errors import StoreError
from probelog.index.pointer import read_pointer
from probelog.index.schema import connect
from probelog.publication.rows import EncodedRows
from probelog.search.client import open_index
from probelog.storage.schemas import ProbedModel
from probelog.storage.store import Store
from tests.pipelines.publish.test_stage import published
from tests.pipelines.publish.test_whole import World
from tests.pipelines.test_resume import gcs_address
from tests.support.processes.operator_command import kill_tree, operator, operator_process, wait_until
from tests.support.worlds import tiny_encoders
from tests.support.worlds.tiny_world import Indexed

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A piece for each of its two batches; among its models are a copy and one that is not listed."""
    exported = ExportedEncoder(tiny_encoders.text_files("clip"), tiny_encoders.image_files("clip"), None)
    monkeypatch.setattr(stage, "exported_encoder", lambda *_: (exported, 1e-5, 2e-5))
    monkeypatch.setattr(pieces, "PIECE_ROWS", 1)
    return World(tmp_path)


def spread(world: World) -> PublishResult:
    return world.publish(config={"spread_logits": 1})


def tables(store: Store, generation: str) -> dict[str, pa.Table]:
    connection = connect(store.child("index"), generation)
    return {name: connection.open_table(name).to_arrow() for name in ("logits", "models", "meta", "probes")}


def times(store: Store) -> dict[str, dt.datetime | None]:
    """When the pieces were written that are there."""
    return {name: store.modified(name) for name in store.names("publish")}


def test_the_tables_are_those_of_one_process_also_after_a_stop(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = tables(world.store, world.publish().pointer.generation)
    hits = open_index(world.store.uri).search("cat")
    world.store.delete_folder("index")

    real = pieces.Pieces.rows

    def stopped(*given: Any) -> Iterator[EncodedRows]:
        yield from real(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pieces.Pieces, "rows", stopped)
        with pytest.raises(KeyboardInterrupt):
            spread(world)
    first, second = written = times(world.store)
    assert not world.store.names("index"), "what was built is removed"
    world.store.delete(second)

    seen = {}

    def watched(*given: Any) -> Iterator[EncodedRows]:
        yield from real(*given)
        seen.update(times(world.store))

    monkeypatch.setattr(pieces.Pieces, "rows", watched)
    together = tables(world.store, spread(world).pointer.generation)
    assert seen[first] == written[first], "what is there is not made again"
    assert seen.keys() == written.keys()
    assert not world.store.names("publish"), "what is published needs no pieces"
    assert alone["logits"].num_rows == 10
    for name, table in alone.items():
        assert table.equals(together[name]), name
    assert open_index(world.store.uri).search("cat") == hits


def test_what_samples_keep_does_not_keep_the_piece(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    real, kept = pieces.Pieces.rows, []

    def watched(
        self: pieces.Pieces, note: pieces.Note, progress: Callable[[int], None]
    ) -> Iterator[EncodedRows]:
        def noted(model: ProbedModel, number: int, logits: int, described: ModelDescriptors | None) -> None:
            note(model, number, logits, described)
            kept.extend([] if described is None else [described.directions])

        return real(self, noted, progress)

    monkeypatch.setattr(pieces.Pieces, "rows", watched)
    spread(world)
    assert kept
    assert all(directions.flags.owndata for directions in kept)


def test_a_piece_that_is_damaged_is_not_published(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    real = pieces.read_piece
    monkeypatch.setattr(pieces, "read_piece", lambda data, where: real(data[:-1], where))
    with pytest.raises(StoreError, match=r"publish/\w+/\w+\.arrow is damaged: its digest is not"):
        spread(world)


def test_workers_notice_what_one_process_notices(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A score that is wrong in one row, and a row that holds no number."""
    real = pieces.Pieces.rows

    def tampered(name: str, value: float) -> Callable[..., Iterator[EncodedRows]]:
        def rows(*given: Any) -> Iterator[EncodedRows]:
            for some in real(*given):
                facts = some.facts.copy()
                facts[name][0] = value
                yield some._replace(facts=facts)

        return rows

    for name, value, message in (
        ("offset", np.nan, "values of offset of its logits are not finite"),
        ("logit", -1, "a value is not one that a logit has"),
        ("offset", -99, "a wrong score"),
    ):
        monkeypatch.setattr(pieces.Pieces, "rows", tampered(name, value))
        with pytest.raises(StoreError, match=message):
            spread(world)


@pytest.mark.acceptance
def test_a_publisher_that_is_killed_goes_on_with_the_pieces(
    indexed: Indexed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command, with SIGKILL; its tasks run on the Ray of the other tests."""
    monkeypatch.setenv("HF_ENDPOINT", indexed.endpoint)
    folder = indexed.copy_store(tmp_path / "store")
    store, changes = Store(folder), {"prompt": "{}", "spread_logits": 1, "ray_address": gcs_address()}
    file = indexed.world.config_file(tmp_path / "job.toml", folder, **changes)
    with operator_process("publish", "--config", file) as process:
        wait_until(process, lambda: store.names("publish"))
        kill_tree(process)
    written = times(store)
    assert read_pointer(store.child("index"))[0] == indexed.run.published.pointer
    monkeypatch.setattr(release, "sweep_pieces", lambda _: None)
    assert operator("publish", "--config", file).status == 0
    assert times(store) == written, "what is there is not made again"
    alone = Store(indexed.copy_store(tmp_path / "alone"))
    one = tables(alone, published(indexed, alone).pointer.generation)
    other = tables(store, read_pointer(store.child("index"))[0].generation)
    assert one["logits"].equals(other["logits"])
    places = ["repo", "weights", "first_row", "rows", "copies"]
    assert one["models"].select(places).equals(other["models"].select(places))
