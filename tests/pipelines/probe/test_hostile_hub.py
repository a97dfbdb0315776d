"""A Hub where most repositories are broken or hostile, and some are only ill for a while."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.full import FullRun, run_crawl, run_full
from pipelines.inspect.status import status
from pipelines.job.job import Job
from probelog.errors import FailureReason
from probelog.search.client import open_index
from probelog.storage.schemas import Failure
from tests.support.hub import faults
from tests.support.hub.faults import FaultyHub, faulty
from tests.support.hub.hostile import REPOSITORIES, trap, write_json
from tests.support.worlds.tiny_world import Indexed

GOOD = ["ada/resnet", "bob/many-labels"]
# A download knows nothing of links inside the Hub's folder, pipes are not served, and a file that the Hub does not
# have is missed before anybody reads an index.
OTHERWISE: dict[str, FailureReason | None] = {
    "linked-weights": None,
    "linked-config": None,
    "linked-processor": None,
    "missing-shard": FailureReason.NOT_FOUND,
    "pipe": FailureReason.NOT_FOUND,
}
SPOILED, VANISHED = "aa/arrives-spoiled", "zz/vanishes"


@dataclass
class Hostile:
    """A hub of hostile and of good repositories."""

    root: Path
    indexed: Indexed
    tmp_path: Path
    names: list[str]

    def add_hostile(self) -> None:
        for name in self.names:
            REPOSITORIES[name][0](self.root / "hostile" / name)

    def expected(self) -> dict[str, FailureReason | None]:
        return {f"hostile/{name}": reason_of(name) for name in self.names}

    def add_good(self, names: list[str]) -> None:
        for name in names:
            source = name if name in GOOD else GOOD[0]
            shutil.copytree(self.indexed.world.hub / source, self.root / name)

    def finish(self) -> None:
        listing = [
            {
                "id": f"{path.parent.name}/{path.name}",
                "pipeline_tag": "image-classification",
                "library": "timm" if path.name.startswith("timm") else "transformers",
            }
            for path in sorted(self.root.glob("*/*"))
            if path.is_dir()
        ]
        write_json(self.root, "hub.json", listing)

    def run(self, **options: bool) -> FullRun:
        return run_full(self.job(), **options)

    def job(self) -> Job:
        return self.indexed.job(
            self.tmp_path / "store",
            batch_models=8,
            probe_count=30,
            fraction=0.5,
            workers=1,
        )


def reason_of(name: str) -> FailureReason | None:
    return OTHERWISE.get(name, REPOSITORIES[name][1])


def reasons(failures: list[Failure]) -> dict[str, str]:
    return {failure.repo: failure.reason for failure in failures}


@pytest.fixture
def hostile(indexed: Indexed, tmp_path: Path) -> Hostile:
    return Hostile(tmp_path / "hub", indexed, tmp_path, [*REPOSITORIES])


def check_harmless(hostile: Hostile) -> None:
    assert not [name for name in hostile.names if trap(hostile.root / "hostile" / name).exists()]
    downloads = hostile.indexed.world.scratch.glob("**/downloads/**/*")
    assert not [path for path in downloads if path.is_file()]


@pytest.mark.acceptance
def test_a_hub_of_untrusted_repositories(hostile: Hostile, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile.add_hostile()
    hostile.add_good([*GOOD, SPOILED, VANISHED])
    hostile.finish()
    with faulty(hostile.root) as (endpoint, hub):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        check_three_runs(hostile, hub)


def check_three_runs(hostile: Hostile, hub: FaultyHub) -> None:
    shas = {row.repo: row.sha for row in run_crawl(hostile.job()).rows()}
    hub.spoil(f"/{SPOILED}/resolve/{shas[SPOILED]}/model.safetensors", faults.flipped)
    shutil.rmtree(hostile.root / VANISHED)
    first = hostile.run()
    check_harmless(hostile)
    assert {row.repo for row in first.catalogue.rows()} >= {*hostile.expected(), *GOOD}
    sound = {repo for repo, reason in hostile.expected().items() if reason is None} | set(GOOD)
    bad = {repo: reason.value for repo, reason in hostile.expected().items() if reason is not None}
    ill = {SPOILED: "wrong-digest"}
    assert reasons(first.probed.failures) == bad | ill | {VANISHED: "not-found"}
    retryable = {failure.repo: failure.retryable for failure in first.probed.failures}
    assert {repo for repo, again in retryable.items() if again} == set(ill)
    assert all(failure.detail and failure.attempts == 1 for failure in first.probed.failures)
    index = open_index(hostile.tmp_path / "store")
    assert {hit.repo for hit in index.search(text="dog", k=100)} <= sound
    assert {index.show(repo).repo for repo in sound} == sound
    labels = [logit.label for logit in index.show("hostile/label-escapes").logits]
    assert all(label.isprintable() and len(label) <= 300 for label in labels)
    found = status(str(hostile.tmp_path / "store")).ledgers[0]
    assert found.failed == {
        reason: list(reasons(first.probed.failures).values()).count(reason)
        for reason in reasons(first.probed.failures).values()
    }
    assert found.planned == found.indexed + sum(found.failed.values())

    hub.rules.clear()
    asked = len(hub.requests)
    second = hostile.run()
    fetched = {request.address.split("/resolve/")[0].lstrip("/") for request in hub.requests[asked:]}
    assert fetched == set(ill), "what is permanent is not tried again"
    assert reasons(second.probed.failures) == bad | {VANISHED: "not-found"}
    assert {index.show(repo).repo for repo in sound} == sound, "an open index goes on"
    assert open_index(hostile.tmp_path / "store").show(SPOILED).repo == SPOILED

    # The owner repairs one, another comes back; a third run must be told to look.
    hostile.add_good([VANISHED])
    assert hostile.run().probed.failures == second.probed.failures
    third = hostile.run(retry_failed=True)
    assert reasons(third.probed.failures) == bad
    assert {failure.attempts for failure in third.probed.failures} == {2}
    assert third.probed.models == len(sound) + 2
