"""Who runs weights that several repositories share, and what happens to claims whose holder is gone."""

from __future__ import annotations

import pytest
import ray

from cluster.probing.coordinator import Claim, CoordinatorClient, Original, Originals, coordinator


def test_one_runs_and_the_others_wait() -> None:
    originals = Originals({}, claim_seconds=60)
    assert originals.claim("weights", "a", "one") == Claim()
    assert originals.claim("weights", "a", "one") == Claim(), "asked again by the same item"
    assert originals.claim("weights", "b", "two") == Claim(wait=True)
    originals.record_original("weights", "ada/a", "sha", "a")
    assert originals.claim("weights", "b", "two") == Claim(Original("ada/a", "sha", item="a"))
    originals.sealed("receipt", ["a", "b"])
    assert originals.claim("weights", "c", "two") == Claim(Original("ada/a", "sha", receipt="receipt"))


def test_the_first_with_some_weights_stays_their_original() -> None:
    """Two may run the same weights where a claim grew old: the later is a copy, and no copy names it."""
    originals = Originals({}, claim_seconds=0)
    assert originals.claim("weights", "a", "one") == originals.claim("weights", "b", "two") == Claim()
    originals.record_original("weights", "ada/a", "sha", "a")
    originals.record_original("weights", "bob/b", "sha", "b")
    assert originals.claim("weights", "c", "one") == Claim(Original("ada/a", "sha", item="a"))
    originals.sealed("receipt", ["a", "b"])
    assert originals.claim("weights", "c", "one") == Claim(Original("ada/a", "sha", receipt="receipt"))


def test_a_claim_ends_with_its_worker() -> None:
    """Its item may be queued behind the one that waits for it: both would wait until the claim is too old."""
    originals = Originals({}, claim_seconds=3600)
    originals.claim("weights", "a", "one")
    originals.claim("others", "c", "two")
    originals.worker_lost("one")
    assert originals.claim("weights", "b", "two") == Claim()
    assert originals.claim("weights", "a", "three") == Claim(wait=True), "the other way round now"
    assert originals.claim("others", "d", "three") == Claim(wait=True), "other workers' claims stand"


def test_a_claim_is_given_up_or_grows_old() -> None:
    originals = Originals({}, claim_seconds=0)
    originals.claim("weights", "a", "one")
    assert originals.claim("weights", "b", "two") == Claim(), "too old"
    originals.give_up("weights", "a")
    originals = Originals({}, claim_seconds=60)
    originals.claim("weights", "a", "one")
    originals.give_up("weights", "b")
    assert originals.claim("weights", "b", "two") == Claim(wait=True), "given up by another"
    originals.give_up("weights", "a")
    assert originals.claim("weights", "b", "two") == Claim()


@pytest.mark.usefixtures("local_ray")
def test_workers_go_on_without_their_coordinator() -> None:
    checks: list[None] = []
    with coordinator("http://127.0.0.1:1", {"weights": Original("ada/a", "sha")}, 60) as actor:
        client = CoordinatorClient(actor, "https://huggingface.co", lambda: checks.append(None))
        assert client.claim("weights", "b", "one") == Claim(Original("ada/a", "sha"))
        client.acquire("file")
        ray.kill(actor)
        assert client.claim("weights", "c", "one") == Claim(answered=False)
        client.record_original("others", "ada/b", "sha", "b")
        client.give_up("weights", "c")
        client.acquire("file")
        client.penalise("file", 1.5)
        client.acquire("file")
    assert client.waited >= 1, "the worker keeps the pause that the Hub asked for by itself"
    assert len(checks) >= 4
