"""Every hostile repository of a generator is refused for its reason; what loads has done no harm."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipelines.demo.builder.hostile import PICKLE_VICTIM
from probelog.errors import ItemFailure
from probelog.generators.loading import LoadOptions, load_generator
from probelog.generators.sampling import Sampler
from tests.support.hub import hostile_generators
from tests.support.hub.hostile_generators import REPOSITORIES, SOUND
from tests.support.paths import CHECKOUT


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each sound repository."""
    folder = tmp_path_factory.mktemp("sound")
    for name, build in SOUND.items():
        build(folder / name)
    return folder


def test_every_hostile_repository_is_in_the_table() -> None:
    """docs/generators.md names each with the reason it gets."""
    text = (CHECKOUT / "docs" / "generators.md").read_text()
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    listed = {row[0]: row[2] for row in rows if row[0] in REPOSITORIES}
    assert listed == {
        name: "loads" if reason is None else reason.value for name, (_, _, reason) in REPOSITORIES.items()
    }


@pytest.mark.parametrize("name", REPOSITORIES)
def test_hostile_repository(name: str, sound: Path, tmp_path: Path) -> None:
    original, change, reason = REPOSITORIES[name]
    folder = tmp_path / "repository"
    shutil.copytree(sound / original, folder)
    change(folder)
    options = LoadOptions(steps=2, prompts=["a cat"])
    if reason is None:
        generator = load_generator(folder, options, sound / "text")
        assert Sampler(generator, seed=0, batch_size=2).sample([0, 1]).pixels.shape == (2, 16, 16, 3)
    else:
        with pytest.raises(ItemFailure) as failure:
            Sampler(load_generator(folder, options, sound / "text"), seed=0, batch_size=2).sample([0, 1])
        assert failure.value.reason is reason, failure.value.detail
        assert len(failure.value.detail) < 1000
    assert not Path(PICKLE_VICTIM).exists()


def test_an_adapter_has_a_base_that_is_none_itself(sound: Path, tmp_path: Path) -> None:
    _, change, _ = REPOSITORIES["adapter-speaks"]
    change(tmp_path / "adapter")
    generator = load_generator(tmp_path / "adapter", LoadOptions(steps=2), sound / "text")
    assert generator.trigger_words == ["[31m a photo of  sks  dog"]
    for base, reason in ((None, "missing-base"), (tmp_path / "adapter", "config-mismatch")):
        with pytest.raises(ItemFailure, match=reason):
            load_generator(tmp_path / "adapter", LoadOptions(), base)


def test_the_table_has_thirty_at_least() -> None:
    assert len(hostile_generators.REPOSITORIES) >= 30
