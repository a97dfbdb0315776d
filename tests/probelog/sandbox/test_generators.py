"""Generators in confined processes: sampled, released, and none can say what no process of ours says."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from probelog.errors import FailureReason, ItemFailure
from probelog.sandbox.generators import GeneratorProcess, generator_server
from probelog.sandbox.spec import GeneratorSpec, downloads_folder
from tests.support.worlds import tiny_generators

pytestmark = pytest.mark.acceptance  # it takes seconds to import the libraries


BUILDERS: dict[str, Callable[[Path], None]] = {
    "LDMPipeline": tiny_generators.latent,
    "DiTPipeline": tiny_generators.class_to_image,
    **{kind: partial(tiny_generators.decoder, kind=kind) for kind in tiny_generators.DECODERS},
}


def test_every_pipeline_is_sampled_with_what_its_process_may_read(tmp_path: Path) -> None:
    folder = downloads_folder(tmp_path)
    process = GeneratorProcess(
        generator_server(tmp_path), GeneratorSpec(steps=2, batch_size=4, memory_bytes=2 << 30)
    )
    try:
        for pipeline, build in BUILDERS.items():
            build(folder / pipeline)
            loaded = process.load(folder / pipeline, "ada/model", "0" * 40, 60)
            assert loaded.facts["pipeline"] == pipeline
            pixels = process.sample(range(3), 60).pixels
            assert pixels.shape == (3, *loaded.size, 3)
            assert len({picture.tobytes() for picture in pixels}) == 3, "each from noise of its own"
            process.release()
    finally:
        process.close()


def test_generators_are_sampled_in_processes_of_their_own(tmp_path: Path) -> None:
    folder = downloads_folder(tmp_path)
    tiny_generators.unconditional(folder / "plain")
    tiny_generators.unconditional(folder / "classes", num_class_embeds=3)
    spec = GeneratorSpec(steps=3, batch_size=4, memory_bytes=2 << 30)
    process = GeneratorProcess(generator_server(tmp_path), spec)
    try:
        loaded = process.load(folder / "plain", "ada/plain", "0" * 40, 60)
        assert loaded.facts["pipeline"] == "DDPMPipeline"
        assert loaded.facts["architecture"] == "UNet2DModel"
        assert set(loaded.weights["repo"].to_pylist()) == {"ada/plain"}
        all_at_once = process.sample(range(6), 60)
        assert all_at_once.pixels.shape == (6, 16, 16, 3)
        assert [all_at_once.base, all_at_once.prompts, all_at_once.classes] == [None] * 3
        # Within rounding: a batch of another size adds up in another order.
        one = process.sample([4], 60).pixels[0].astype(int)
        assert np.abs(one - all_at_once.pixels[4].astype(int)).max() <= 1

        process.release()
        with_classes = process.load(folder / "classes", "ada/classes", "1" * 40, 60)
        assert (with_classes.facts["conditioning"], with_classes.class_count) == ("class", 3)
        classes = process.sample(range(6), 60).classes
        assert classes is not None
        assert sorted(classes.tolist()) == [0, 0, 1, 1, 2, 2]

        process.release()
        tiny_generators.text_to_image(folder / "base")
        tiny_generators.adapter(folder / "adapter", folder / "base", "peft")
        adapter = process.load(folder / "adapter", "ada/lora", "3" * 40, 60, folder / "base")
        assert adapter.adapter
        assert all(".lora_" in name for name in adapter.weights["tensor"].to_pylist())
        both = process.sample(range(2), 60)
        assert both.prompts is not None
        assert both.prompts.tolist() == [0, 1]
        assert both.base is not None
        assert both.base.shape == both.pixels.shape
        process.release()
        base = process.load(folder / "base", "ada/base", "4" * 40, 60)
        assert base.facts["prompts"] == adapter.facts["prompts"]
        np.testing.assert_array_equal(process.sample(range(2), 60).pixels, both.base)

        process.release()
        digest = base.facts["weight_digest"]
        again = process.load(folder / "adapter", "ada/lora", "3" * 40, 60, folder / "base", digest)
        assert again.identity == adapter.identity
        alone = process.sample(range(2), 60, base=False)
        assert alone.base is None
        np.testing.assert_array_equal(alone.pixels, both.pixels)

        with pytest.raises(ItemFailure) as failure:
            process.load(folder / "adapter", "ada/lora", "3" * 40, 60)
        assert failure.value.reason is FailureReason.MISSING_BASE
        process.load(folder / "plain", "ada/plain", "0" * 40, 60)
        with pytest.raises(ItemFailure) as failure:
            process.sample(range(10_000), 0.2)
        assert failure.value.reason is FailureReason.TIMEOUT
        with pytest.raises(ItemFailure) as failure:
            process.load(tmp_path / "downloads", "ada/none", "2" * 40, 60)
        assert failure.value.reason is FailureReason.NOT_A_GENERATOR
    finally:
        process.close()
