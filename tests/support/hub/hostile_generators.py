"""Repositories of generators as an attacker, or a broken upload, would make them: each changes a copy of a sound one.

`REPOSITORIES` names them all with the reason they must be refused for; None means they must load, harmlessly.
"""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from pipelines.demo.builder.hostile import evil_pickle
from probelog.errors import FailureReason
from tests.support.worlds import tiny_generators

Change = Callable[[Path], None]
#: The sound ones, by name.
SOUND: dict[str, Callable[[Path], None]] = {
    "plain": tiny_generators.unconditional,
    "flat": tiny_generators.flat,
    "decoder": tiny_generators.decoder,
    "text": tiny_generators.text_to_image,
    "latent": tiny_generators.latent,
    "codes": lambda folder: tiny_generators.decoder(folder, "VQModel"),
    "tiny": lambda folder: tiny_generators.decoder(folder, "AutoencoderTiny"),
    "transformer": tiny_generators.class_to_image,
}
_UNET = "unet/diffusion_pytorch_model.safetensors"
_SCHEDULER = "scheduler/scheduler_config.json"
_TRANSFORMER = "transformer/config.json"
_ADAPTER = "adapter_model.safetensors"
_TARGET = "base_model.model.up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def _set(file: str, **values: Any) -> Change:
    def change(folder: Path) -> None:
        config = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**config, **values}))

    return change


def _write(file: str, content: str | bytes) -> Change:
    def change(folder: Path) -> None:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def _weights(file: str, change: Callable[[dict[str, Any]], None]) -> Change:
    def changed(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file)

    return changed


def _fill(value: float) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        tensors.update({name: np.full_like(tensor, value) for name, tensor in tensors.items()})

    return change


def _not_a_number(prefix: str) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        for name in tensors:
            if name.startswith(prefix):
                tensors[name] = np.full_like(tensors[name], np.nan)

    return change


def _fewer_blocks(folder: Path) -> None:
    shutil.rmtree(folder)
    tiny_generators.decoder(
        folder,
        block_out_channels=(8,) * 3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",),
    )


def _pickles(folder: Path) -> None:
    (folder / _UNET).unlink()
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(evil_pickle())


def _cut(folder: Path) -> None:
    data = (folder / _UNET).read_bytes()
    (folder / _UNET).write_bytes(data[: len(data) // 2])


def _link(name: str, target: str) -> Change:
    def change(folder: Path) -> None:
        place = folder / name
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
        place.symlink_to(target)

    return change


def _sharded(folder: Path) -> None:
    (folder / _UNET).unlink()
    index = {"weight_map": {"conv_in.weight": "../../../evil.safetensors"}}
    (folder / f"{_UNET}.index.json").write_text(json.dumps(index))


def _adapter(config: dict[str, Any] | None = None, rank: int = 2, width: int = 16, **names: str) -> Change:
    """An adapter of one product; ``names`` replaces parts of the keys, ``drop`` leaves one out."""

    def change(folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        target = names.get("target", _TARGET)
        tensors = {
            f"{target}.lora_A.weight": np.ones((rank, width), np.float32),
            f"{target}.lora_B.weight": np.ones((16, rank), np.float32),
        }
        tensors.pop(f"{target}.{names.get('drop')}", None)
        if "more" in names:
            tensors[f"{target}.{names['more']}"] = np.full((), float(names.get("value", "1")), np.float32)
        save_file(tensors, folder / _ADAPTER)
        settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, **(config or {})}
        (folder / "adapter_config.json").write_text(json.dumps(settings))

    return change


def _not_finite(folder: Path) -> None:
    _adapter()(folder)
    _weights(_ADAPTER, _fill(float("nan")))(folder)


def _trigger(folder: Path) -> None:
    _adapter()(folder)
    (folder / "README.md").write_text('---\ninstance_prompt: "\x1b[31m a photo of \u202esks\x07 dog"\n---\n')


def _png(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b""))
    )
    return b"\x89PNG\r\n\x1a\n" + chunks


def _gallery(content: bytes) -> Change:
    def change(folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        for number in range(8):
            _write(f"images/{number}.png", content)(folder)

    return change


def _linked_gallery(folder: Path) -> None:
    _gallery(_png(4, 4))(folder)
    _link("images/0.png", "/etc/hostname")(folder)


def _only(**files: str) -> Change:
    def change(folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        for name, content in files.items():
            _write(name.replace("__", "."), content)(folder)

    return change


def _vocabulary(**values: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / "tokenizer" / "tokenizer.json"
        config = json.loads(path.read_text())
        config["model"].update(values)
        path.write_text(json.dumps(config))

    return change


_F = FailureReason
#: By name: the sound repository that is changed, how, and the reason.
REPOSITORIES: dict[str, tuple[str, Change, FailureReason | None]] = {
    "pickled-unet": ("plain", _pickles, _F.UNSAFE_FORMAT),
    "own-pipeline": ("plain", _set("model_index.json", _class_name=["pipeline", "Evil"]), _F.REMOTE_CODE),
    "own-unet": ("plain", _set("model_index.json", unet=["my_unet", "UNet2DModel"]), _F.REMOTE_CODE),
    "scheduler-of-os": ("plain", _set("model_index.json", scheduler=["os", "system"]), _F.REMOTE_CODE),
    "own-code-flat": ("flat", _set("config.json", auto_map={"AutoModel": "evil.Model"}), _F.REMOTE_CODE),
    "unknown-unet": ("plain", _set("model_index.json", unet=["diffusers", "OnnxModel"]), _F.UNSUPPORTED),
    "unknown-pipeline": ("text", _set("model_index.json", _class_name="FluxPipeline"), _F.UNSUPPORTED),
    "pipeline-path": ("plain", _set("model_index.json", _class_name="../../evil"), _F.CORRUPT_CONFIG),
    "part-of-three": ("plain", _set("model_index.json", unet=["a", "b", "c"]), _F.CORRUPT_CONFIG),
    "version-bait": ("plain", _set("model_index.json", _diffusers_version="999; import os", x=[1, [2]]), None),
    "index-twice": ("plain", _write("model_index.json", '{"_class_name": "A", "_class_name": "B"}'), _F.CORRUPT_CONFIG),
    "index-nested": ("plain", _write("model_index.json", '{"a":' * 60 + "1" + "}" * 60), _F.CORRUPT_CONFIG),
    "million-steps": ("plain", _set(_SCHEDULER, num_train_timesteps=10**6), _F.CORRUPT_CONFIG),
    "million-betas": ("plain", _set(_SCHEDULER, trained_betas=[0.1] * 20_000), _F.CORRUPT_CONFIG),
    "betas-for-others": ("plain", _set(_SCHEDULER, trained_betas=[0.1] * 10), _F.CORRUPT_CONFIG),
    "beta-of-five": ("plain", _set(_SCHEDULER, beta_end=5), _F.CORRUPT_CONFIG),
    "beta-nan": ("plain", _set(_SCHEDULER, beta_end=float("nan")), _F.CORRUPT_CONFIG),
    "offset-beyond": ("plain", _set(_SCHEDULER, steps_offset=90, num_train_timesteps=10), _F.CORRUPT_CONFIG),
    "unknown-prediction": ("plain", _set(_SCHEDULER, prediction_type="os.system"), _F.CORRUPT_CONFIG),
    "thresholds": ("plain", _set(_SCHEDULER, thresholding=True), _F.UNSUPPORTED),
    "flow": ("plain", _set("model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"]), _F.UNSUPPORTED),
    "no-signal": ("plain", _set(_SCHEDULER, rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False), _F.NON_FINITE),
    "many-pixels-sampled": ("plain", _set("unet/config.json", sample_size=100_000), _F.TOO_LARGE),
    "odd-pixels": ("plain", _set("unet/config.json", sample_size=15), _F.CONFIG_MISMATCH),
    "three-edges": ("plain", _set("unet/config.json", sample_size=[16, 16, 16]), _F.CORRUPT_CONFIG),
    "wide-unet": ("plain", _set("unet/config.json", block_out_channels=[16384, 16384]), _F.CONFIG_MISMATCH),
    "deep-unet": ("plain", _set("unet/config.json", layers_per_block=1000), _F.CORRUPT_CONFIG),
    "many-layers": ("plain", _set("unet/config.json", layers_per_block=16), _F.CONFIG_MISMATCH),
    "unknown-block": ("plain", _set("unet/config.json", down_block_types=["os.system", "DownBlock2D"]), _F.CORRUPT_CONFIG),
    "odd-groups": ("plain", _set("unet/config.json", norm_num_groups=5), _F.CORRUPT_CONFIG),
    "six-channels": ("plain", _set("unet/config.json", in_channels=6), _F.UNSUPPORTED),
    "billion-classes": ("plain", _set("unet/config.json", num_class_embeds=10**9), _F.CORRUPT_CONFIG),
    "classes-not-there": ("plain", _set("unet/config.json", num_class_embeds=10), _F.CONFIG_MISMATCH),
    "classes-as-vectors": ("plain", _set("unet/config.json", class_embed_type="identity"), _F.UNSUPPORTED),
    "nan-unet": ("plain", _weights(_UNET, _fill(float("nan"))), _F.NON_FINITE),
    "huge-unet": ("plain", _weights(_UNET, _fill(1e30)), _F.NON_FINITE),
    "grey-decoder": ("decoder", _weights("diffusion_pytorch_model.safetensors", _fill(0.0)), _F.CONSTANT),
    "cut-unet": ("plain", _cut, _F.CORRUPT_WEIGHTS),
    "tensor-missing": ("plain", _weights(_UNET, lambda tensors: tensors.pop("conv_in.bias")), _F.CONFIG_MISMATCH),
    "tensor-besides": ("plain", _weights(_UNET, lambda tensors: tensors.update(evil=np.ones(1))), _F.CONFIG_MISMATCH),
    "shard-outside": ("plain", _sharded, _F.UNSAFE_PATH),
    "linked-unet": ("plain", _link("unet", "/etc"), _F.UNSAFE_PATH),
    "linked-scheduler": ("plain", _link(_SCHEDULER, "/etc/passwd"), _F.UNSAFE_PATH),
    "no-unet": ("plain", lambda folder: shutil.rmtree(folder / "unet"), _F.NOT_FOUND),
    "safety-checker": ("text", _set("model_index.json", safety_checker=["evil", "Checker"]), None),
    "no-encoder": ("text", _set("model_index.json", text_encoder=[None, None]), _F.UNSUPPORTED),
    "other-encoder": ("text", _set("unet/config.json", cross_attention_dim=1024), _F.UNSUPPORTED),
    "told-more": ("text", _set("unet/config.json", addition_embed_type="text_time"), _F.UNSUPPORTED),
    "inpainting": ("text", _set("unet/config.json", in_channels=9), _F.UNSUPPORTED),
    "endless-word": ("text", _vocabulary(vocab={"a" * 1000: 0, "<|endoftext|>": 1}), _F.CORRUPT_CONFIG),
    "words-beyond": ("text", _set("text_encoder/config.json", vocab_size=10), _F.CONFIG_MISMATCH),
    "words-with-holes": ("text", _vocabulary(vocab={"a": 0, "<|endoftext|>": 10**9}), _F.CORRUPT_CONFIG),
    "merges-of-nothing": ("text", _vocabulary(merges=["no such"]), _F.CORRUPT_CONFIG),
    "negative-scale": ("text", _set("vae/config.json", scaling_factor=0), _F.CORRUPT_CONFIG),
    "fewer-blocks": ("decoder", _fewer_blocks, _F.CONFIG_MISMATCH),
    "own-vqvae": ("latent", _set("model_index.json", vqvae=["vqvae", "VQModel"]), _F.REMOTE_CODE),
    "other-vqvae": ("latent", _set("model_index.json", vqvae=["diffusers", "AutoencoderOobleck"]), _F.UNSUPPORTED),
    "other-latents": ("latent", _set("vqvae/config.json", vq_embed_dim=4), _F.UNSUPPORTED),
    "many-latents": ("latent", _set("unet/config.json", sample_size=100_000), _F.TOO_LARGE),
    "latents-beyond": ("latent", _weights(_UNET, _fill(1e30)), _F.NON_FINITE),
    "codebook-of-millions": ("codes", _set("config.json", num_vq_embeddings=10**7), _F.CORRUPT_CONFIG),
    "codes-not-there": ("codes", _set("config.json", num_vq_embeddings=1000), _F.CONFIG_MISMATCH),
    "codes-nan": ("codes", _weights("diffusion_pytorch_model.safetensors", _not_a_number("quantize")), _F.NON_FINITE),
    "tiny-enlarges": ("tiny", _set("config.json", num_decoder_blocks=[1] * 12), _F.TOO_LARGE),
    "wide-patches": ("transformer", _set(_TRANSFORMER, patch_size=100_000), _F.CORRUPT_CONFIG),
    "patches-and-a-rest": ("transformer", _set(_TRANSFORMER, patch_size=3), _F.CORRUPT_CONFIG),
    "other-patches": ("transformer", _set(_TRANSFORMER, patch_size=1), _F.CONFIG_MISMATCH),
    "many-patches": ("transformer", _set(_TRANSFORMER, sample_size=100_000), _F.TOO_LARGE),
    "sigma-by-half": ("transformer", _set(_TRANSFORMER, out_channels=6), _F.UNSUPPORTED),
    "told-texts": ("transformer", _set(_TRANSFORMER, norm_type="ada_norm_single"), _F.UNSUPPORTED),
    "one-class-less": ("transformer", _set(_TRANSFORMER, num_embeds_ada_norm=999), _F.CONFIG_MISMATCH),
    "odd-heads": ("transformer", _set(_TRANSFORMER, attention_head_dim=7), _F.CORRUPT_CONFIG),
    "deep-transformer": ("transformer", _set(_TRANSFORMER, num_layers=16), _F.CONFIG_MISMATCH),
    "adapter-of-nobody": ("text", _adapter(target="base_model.model.evil"), _F.CONFIG_MISMATCH),
    "adapter-of-another": ("text", _adapter(width=768), _F.CONFIG_MISMATCH),
    "adapter-of-rank-10000": ("text", _adapter(rank=10_000), _F.TOO_LARGE),
    "adapter-by-half": ("text", _adapter(drop="lora_B.weight"), _F.CORRUPT_WEIGHTS),
    "adapter-with-more": ("text", _adapter(more="dora_scale"), _F.UNSUPPORTED),
    "adapter-of-a-kind": ("text", _adapter({"peft_type": "IA3"}), _F.UNSUPPORTED),
    "adapter-with-modules": ("text", _adapter({"modules_to_save": ["conv_in"]}), _F.UNSUPPORTED),
    "adapter-times-million": ("text", _adapter(more="alpha", value="1e9"), _F.CORRUPT_WEIGHTS),
    "adapter-nan": ("text", _not_finite, _F.NON_FINITE),
    "adapter-speaks": ("text", _trigger, None),
    "weights-of-nothing": ("decoder", lambda folder: (folder / "config.json").unlink(), _F.NOT_A_GENERATOR),
    "language-model-alone": ("plain", _only(config__json='{"model_type": "llama"}'), _F.NOT_A_GENERATOR),
    "checkpoint": ("plain", _only(model__ckpt="no weights"), _F.UNSAFE_FORMAT),
    "read-me": ("plain", _only(README__md="# nothing"), _F.NOT_A_GENERATOR),
    "gallery-of-bombs": ("plain", _gallery(_png(60_000, 60_000)), _F.TOO_LARGE),
    "gallery-of-noise": ("plain", _gallery(b"no picture"), _F.CORRUPT_WEIGHTS),
    "gallery-linked": ("plain", _linked_gallery, _F.UNSAFE_PATH),
}  # fmt: skip
