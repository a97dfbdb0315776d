"""What a sample is made from, and how samples are made: pure functions, batches that fit, galleries."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from probelog.errors import FailureReason, ItemFailure
from probelog.generators import seeds
from probelog.generators.loading import LoadOptions, load_generator
from probelog.generators.prompts import DIVERSE, NEUTRAL, cleaned, prompts_for, trigger_words
from probelog.generators.sampling import Generator, Sampler
from probelog.models.config import LoadLimits
from tests.support.worlds import tiny_generators


def test_noise_is_a_function_of_seed_architecture_and_number() -> None:
    first = seeds.noise(1, "UNet2DModel", 7, (3, 4, 4))
    assert first.dtype == np.float32
    # As the first version drew it: what is in stores was made from these numbers.
    np.testing.assert_allclose(first[0, 0, :3], [-1.1182572, -0.8433815, 0.020794952], rtol=1e-5)
    np.testing.assert_array_equal(first, seeds.noise(1, "UNet2DModel", 7, (3, 4, 4)))
    others = [(2, "UNet2DModel", 7), (1, "AutoencoderKL", 7), (1, "UNet2DModel", 8)]
    assert all(np.abs(first - seeds.noise(*other, (3, 4, 4))).max() > 0.1 for other in others)


def test_classes_take_turns() -> None:
    classes = seeds.classes(0, "UNet2DModel", 5, range(10))
    assert sorted(classes[:5]) == sorted(classes[5:]) == [0, 1, 2, 3, 4]
    assert classes == [*seeds.classes(0, "UNet2DModel", 5, range(4)), *classes[4:]]


def test_prompts_are_the_adapters_own_then_the_operators_or_ours() -> None:
    assert prompts_for([], []) == [*NEUTRAL, *DIVERSE]
    assert prompts_for(["a", "b", "a"], ["sks dog"]) == ["sks dog", "a picture of sks dog", "a", "b"]


def test_trigger_words_are_fit_to_print(tmp_path: Path) -> None:
    card = "---\nlicense: mit\ninstance_prompt: 'a photo of sks dog'\n---\ninstance_prompt: not this\n"
    (tmp_path / "README.md").write_text(card)
    assert trigger_words(tmp_path, {"modelspec.trigger_phrase": "ohwx\x00"}) == ["ohwx", "a photo of sks dog"]
    assert cleaned(["\x1b[2J", "", "null", "x" * 5000, "b", "c", "d", "e"]) == ["[2J", "x" * 120, "b", "c"]


def generator(draw: object) -> Generator:
    return Generator(
        pipeline="UNet2DModel", architecture="UNet2DModel", conditioning="none", shape=(3, 4, 4), size=(4, 4),
        draw=draw, parameters=0, dtype="float32", weight_digest="0" * 64, identity="0" * 16, layers=[],  # type: ignore[arg-type]
    )  # fmt: skip


def test_a_batch_is_halved_where_memory_runs_out() -> None:
    sizes = []

    def draw(noise: torch.Tensor, _conditions: Sequence[int]) -> torch.Tensor:
        sizes.append(len(noise))
        if len(noise) > 2:
            raise torch.OutOfMemoryError
        return noise

    samples = Sampler(generator(draw), seed=0, batch_size=8).sample(range(5))
    assert sizes == [5, 4, 2, 2, 1]
    assert samples.batch_size == 2
    assert samples.pixels.shape == (5, 4, 4, 3)
    alone = Sampler(generator(draw), seed=0, batch_size=1).sample([3])
    np.testing.assert_array_equal(alone.pixels[0], samples.pixels[3])


def test_not_even_one_sample_fits() -> None:
    def draw(_noise: torch.Tensor, _conditions: Sequence[int]) -> torch.Tensor:
        raise torch.OutOfMemoryError

    with pytest.raises(ItemFailure) as failure:
        Sampler(generator(draw), seed=0, batch_size=8).sample(range(5))
    assert failure.value.reason is FailureReason.OUT_OF_MEMORY


class Network:
    """Draws with one product of matrices, and notes for each batch how many samples it had and in which type."""

    def __init__(self, *, overflows: int | None = None, error: float = 0.0) -> None:
        self.seen = list[tuple[int, torch.dtype]]()
        self._overflows, self._error = overflows, error

    def __call__(self, noise: torch.Tensor, _conditions: Sequence[int]) -> torch.Tensor:
        made = noise @ torch.eye(4)
        self.seen.append((len(noise), made.dtype))
        if made.dtype == torch.float32:
            return made
        if self._overflows is not None and len(self.seen) > self._overflows:
            return made * float("nan")
        return made + self._error


LOWER = torch.bfloat16
CALLS = [(1, torch.float32), (4, torch.float32), (4, LOWER)]


@pytest.mark.parametrize(
    ("network", "seconds", "precision", "rest"),
    [
        (Network(), 2.0, "bfloat16", [(4, LOWER), (2, LOWER)]),
        (Network(), 9.9, "float32", [(4, torch.float32), (2, torch.float32)]),
        (Network(error=0.5), 2.0, "float32", [(4, torch.float32), (2, torch.float32)]),
        (Network(overflows=2), 2.0, "float32", [(4, torch.float32), (2, torch.float32)]),
        (Network(overflows=3), 2.0, "float32", [(4, LOWER), (4, torch.float32), (2, torch.float32)]),
    ],
    ids=["faster", "no faster", "other pictures", "overflows", "overflows later"],
)
def test_a_shorter_type_is_used_where_it_is_faster_and_makes_the_same(
    network: Network, seconds: float, precision: str, rest: list[tuple[int, torch.dtype]]
) -> None:
    ticks = iter([0.0, 10.0, 10.0, 10.0 + seconds])
    made = Sampler(generator(network), seed=0, batch_size=4, lower="bfloat16", clock=lambda: next(ticks))
    samples = made.sample(range(10))
    assert network.seen == [*CALLS, *rest]
    assert samples.precision == precision
    exact = Sampler(generator(Network()), seed=0, batch_size=4).sample(range(10)).pixels
    assert np.abs(samples.pixels.astype(int) - exact.astype(int)).max() <= 2


def test_a_folder_of_pictures_is_a_generator(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(9):
        picture = Image.new("RGB", (40, 20), (20 * number, 0, 0))
        picture.paste((0, 255, 0), (0, 0, 20, 20))
        picture.save(tmp_path / "images" / f"{number}.png")
    made = load_generator(tmp_path, LoadOptions())
    assert (made.pipeline, made.available, made.size) == ("gallery", 9, (256, 256))
    pixels = Sampler(made, seed=0, batch_size=4).sample([8, 2]).pixels
    assert pixels.shape == (2, 256, 256, 3)
    assert pixels[:, 128, 250].tolist() == [[160, 0, 0], [40, 0, 0]]
    small = load_generator(tmp_path, LoadOptions(limits=LoadLimits(max_image_size=64)))
    assert small.size == Sampler(small, seed=0, batch_size=4).sample([0]).pixels.shape[1:3] == (64, 64)
    with pytest.raises(ItemFailure, match="9 samples and no more"):
        Sampler(made, seed=0, batch_size=4).sample([9])


def test_copies_are_known_by_their_identity(tmp_path: Path) -> None:
    tiny_generators.unconditional(tmp_path / "a", num_class_embeds=2)
    tiny_generators.unconditional(tmp_path / "b", num_class_embeds=2, scheduler={"beta_end": 0.03})
    index = tmp_path / "a" / "model_index.json"
    index.write_text(index.read_text().replace("{", '{"id2label": {"0": "cat", "1": "dog\\u001b"}, ', 1))
    one, other = (load_generator(tmp_path / name, LoadOptions()) for name in ("a", "b"))
    assert one.weight_digest == other.weight_digest
    assert one.identity != other.identity
    assert one.identity == load_generator(tmp_path / "a", LoadOptions()).identity
    assert one.class_names == ["cat", "dog"]
    assert other.class_names == []


def test_what_a_worker_imports_of_generators_is_light() -> None:
    code = (
        "import probelog.generators.download, probelog.sandbox.generators, sys; "
        "print([name for name in ('torch', 'diffusers', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
