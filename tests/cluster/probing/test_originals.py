"""Who runs weights that several repositories share, and what happens to claims whose holder is gone."""

from __future__ import annotations

from cluster.probing.originals import Claim, Original, Originals


def test_one_runs_and_the_others_wait() -> None:
    originals = Originals({}, patience=60)
    assert originals.claim("weights", "a", "one") == Claim()
    assert originals.claim("weights", "a", "one") == Claim(), "asked again by the same item"
    assert originals.claim("weights", "b", "two") == Claim(wait=True)
    originals.found("weights", "ada/a", "sha", "a")
    assert originals.claim("weights", "b", "two") == Claim(Original("ada/a", "sha", item="a"))
    originals.sealed("receipt", ["a", "b"])
    assert originals.claim("weights", "c", "two") == Claim(Original("ada/a", "sha", receipt="receipt"))


def test_a_claim_ends_with_its_worker() -> None:
    """Its item may be queued behind the one that waits for it: both would wait until the claim is too old."""
    originals = Originals({}, patience=3600)
    originals.claim("weights", "a", "one")
    originals.claim("others", "c", "two")
    originals.worker_gone("one")
    assert originals.claim("weights", "b", "two") == Claim()
    assert originals.claim("weights", "a", "three") == Claim(wait=True), "the other way round now"
    assert originals.claim("others", "d", "three") == Claim(wait=True), "other workers' claims stand"


def test_a_claim_is_given_up_or_grows_old() -> None:
    originals = Originals({}, patience=0)
    originals.claim("weights", "a", "one")
    assert originals.claim("weights", "b", "two") == Claim(), "too old"
    originals.give_up("weights", "a")
    originals = Originals({}, patience=60)
    originals.claim("weights", "a", "one")
    originals.give_up("weights", "b")
    assert originals.claim("weights", "b", "two") == Claim(wait=True), "given up by another"
    originals.give_up("weights", "a")
    assert originals.claim("weights", "b", "two") == Claim()
