"""Names in prompts, their vectors, and when two names are the same."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from probelog.ranking.names import canonical_name, name_vectors, normal_name, prompted


def test_a_name_stands_in_every_prompt() -> None:
    prompts = ["a {}", "{} and {}", "nothing"]
    assert prompted(prompts, "  hot dog ") == ["a hot dog", "hot dog and hot dog", "nothing"]
    assert prompted([], "x") == []


def test_the_vectors_of_a_name_are_averaged_over_its_prompts() -> None:
    texts = {"a x": [1.0, 0.0], "the x": [0.0, 1.0], "a y": [1.0, 0.0], "the y": [1.0, 0.0]}
    asked: list[Sequence[str]] = []

    def embed(names: Sequence[str]) -> np.ndarray:
        asked.append(names)
        return np.array([texts[name] for name in names])

    found = name_vectors(embed, ["a {}", "the {}"], ["x", "y"])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [[0.5**0.5, 0.5**0.5], [1.0, 0.0]], rtol=1e-6)
    assert asked == [["a x", "the x", "a y", "the y"]], "all at once, a name's prompts beside each other"
    assert name_vectors(embed, ["a {}"], []).shape == (0, 0)
    assert len(asked) == 1


@pytest.mark.parametrize("name", ["Sea Lion", "sea_lion", "  SEA-lion ", "sea \t lion", "sea__-lion"])
def test_case_and_separators_do_not_make_another_name(name: str) -> None:
    assert normal_name(name) == "sea lion"


def test_other_letters_do() -> None:
    assert normal_name("sealion") != normal_name("sea lion")
    assert normal_name("Straße") == normal_name("STRASSE")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Siamese Cats", "siamese cat"),
        ("n02123045_tabby", "tabby"),
        ("goldenRetriever", "golden retriever"),
        ("café (place)", "cafe"),
        ("berries", "berry"),
        ("glasses", "glass"),
        ("boxes", "box"),
        ("bus", "bus"),
        ("grass", "grass"),
        ("iris", "iris"),
        ("gas", "gas"),
        ("ties", "tie"),
        ("men's hats", "men hat"),
        ("jack-o'-lantern", "jack o lantern"),
        ("LABEL_3", ""),
        ("(", ""),
        ("!?", ""),
        ("x" * 60, "x" * 60),
        ("x" * 61, ""),
    ],
)
def test_differences_of_writing_do_not_make_another_name(text: str, name: str) -> None:
    assert canonical_name(text) == name
