"""What is noted of descriptors while they pass, and which logits the checks ask for."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from pipelines.complete.descriptors import DescriptorSummary, Eligible, ModelDescriptors
from probelog.index.schema import EVIDENCE
from probelog.storage.schemas import Head, ProbedModel


def described(number: int, identity: str, logits: int, head: Head = Head.SOFTMAX) -> ModelDescriptors:
    model = ProbedModel(
        repo=f"owner/model-{number}",
        sha="0" * 40,
        library="timm",
        architecture="resnet",
        recipe="",
        dtype="float32",
        device="cpu",
        weight_digest=identity,
        weight_mean=0.0,
        weight_std=1.0,
        identity=identity,
        head=head,
        logits=logits,
        labels=[],
        parameters=1,
        probes=[],
    )
    negated = np.zeros(logits, bool)
    if head == Head.SINGLE:
        negated[logits // 2 :] = True
    directions = np.full((logits, 3), number, np.float32) + np.arange(logits, dtype=np.float32)[:, None] / 100
    return ModelDescriptors(
        model,
        number,
        np.arange(logits),
        negated,
        directions,
        np.zeros((logits, 1), np.int32),
        np.zeros(logits, EVIDENCE),
    )


def noted(summary: DescriptorSummary, *stream: ModelDescriptors) -> list[str]:
    passed = [*summary.of(stream)]
    assert passed == [*stream]
    return [logit.name for logit in summary.samples]


def many(models: int) -> Iterator[ModelDescriptors]:
    return (described(number, str(number), 5) for number in range(models))


def test_logits_are_counted_in_the_order_of_the_stream() -> None:
    summary = DescriptorSummary(3, 3)
    noted(summary, described(2, "b", 4), described(0, "a", 3), described(2, "b", 9))
    assert [*summary.logits.items()] == [(2, 4), (0, 3)], "the first of two is the one that an index keeps"


def test_the_logit_in_the_middle_is_asked_for() -> None:
    summary = DescriptorSummary(1, 3)
    assert noted(summary, described(7, "a", 5)) == ["owner/model-7#2"]
    (logit,) = summary.samples
    assert logit.key == ("a", 2, False)
    np.testing.assert_allclose(logit.direction, [7.02, 7.02, 7.02], rtol=1e-6)
    assert logit.direction.base is None, "it holds on to no matrix of all of the model's directions"


def test_copies_and_what_is_passed_over_are_not_asked_for() -> None:
    summary = DescriptorSummary(4, 10, passed_over={"known"})
    names = noted(
        summary, described(0, "known", 3), described(1, "a", 3), described(2, "a", 3), described(3, "b", 3)
    )
    assert names == ["owner/model-1#1", "owner/model-3#1"]


def test_the_opposite_of_a_single_logit_is_not_asked_for() -> None:
    summary = DescriptorSummary(2, 10)
    assert noted(summary, described(0, "a", 2, Head.SINGLE), described(1, "b", 3)) == ["owner/model-1#1"]


def test_some_models_from_everywhere_are_asked_for() -> None:
    summary = DescriptorSummary(2000, 20)
    names = noted(summary, *many(2000))
    assert 10 <= len(names) <= 20
    numbers = [int(name.split("-")[1].split("#")[0]) for name in names]
    assert numbers[0] == 0, "the first one whatever its hash"
    assert numbers[-1] > 1000
    again = DescriptorSummary(2000, 20)
    assert noted(again, *many(2000)) == names
    few = DescriptorSummary(3, 20)
    assert len(noted(few, *many(3))) == 3, "all of few"


@pytest.mark.parametrize("piece", [1, 7, 300])
def test_the_eligible_models_of_pieces_make_the_summary_of_the_whole_stream(piece: int) -> None:
    """Copies among them, and heads of one logit, with which the stream begins."""
    stream = [
        described(
            number, str(number % 250), 2 + number % 3, Head.SINGLE if number % 250 < 9 else Head.SOFTMAX
        )
        for number in range(300)
    ]
    whole, pieced = (DescriptorSummary(300, 20) for _ in range(2))
    names = noted(whole, *stream)
    sent = 0
    for start in range(0, 300, piece):
        eligible = Eligible(pieced.share)
        for one in stream[start : start + piece]:
            known = one if eligible(one) else None
            sent += known is not None
            pieced.note(one.model, one.number, len(one.logits), known)
    assert [logit.name for logit in pieced.samples] == names
    assert pieced.logits == whole.logits
    assert piece == 1 or sent < 120, "most are not sent"
