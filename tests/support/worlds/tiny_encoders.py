"""Encoders of a few thousand random weights, saved as transformers saves real ones."""

from __future__ import annotations

import fcntl
import functools
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from probelog.encoders.onnx_export import (
    ImageEncoderFiles,
    TextEncoderFiles,
    export_image_encoder,
    export_text_encoder,
)
from probelog.encoders.torch_encoder import Encoder, load_encoder
from tests.support.paths import KEPT_EXPORTS

TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**TOWER, "image_size": 32, "patch_size": 8}
MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]
CONCEPTS = ["siberian husky", "mid-century chair", "jack-o'-lantern", "café", "dog", "golden retriever"]


def clip(folder: Path, width: int = 16) -> Path:
    """CLIP: byte-level vocabulary, causal text tower pooled at the end-of-text token; embeddings of some width."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    pieces = [
        *letters,
        *(letter + "</w>" for letter in letters),
        "do",
        "dog</w>",
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[("d", "o"), ("do", "g</w>")], model_max_length=20)
    text = {**TOWER, "vocab_size": len(vocab), "max_position_embeddings": 20}
    text |= {"bos_token_id": len(vocab) - 2, "eos_token_id": len(vocab) - 1, "pad_token_id": len(vocab) - 1}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=width))
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return _saved(folder, model, tokenizer, processor)


def siglip(folder: Path) -> Path:
    """SigLIP: unigram vocabulary, text tower pooled at the last position of texts padded to full length."""
    import torch
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, SiglipConfig, SiglipImageProcessorPil, SiglipModel

    words = ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁a", "▁photo", "▁of", "▁dog", "▁husky"]
    backend = Tokenizer(
        models.Unigram(
            [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((word, -len(word)) for word in words)], 2
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), ""), normalizers.Strip()]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=16
    )
    text = {**TOWER, "vocab_size": len(words) + 3, "max_position_embeddings": 16, "projection_size": 32}
    text |= {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    torch.manual_seed(1)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))
    return _saved(folder, model, tokenizer, SiglipImageProcessorPil(size={"height": 32, "width": 32}))


def dual(folder: Path) -> Path:
    """A vision-text dual encoder: BERT with a word vocabulary and an attention mask, and a ViT."""
    import torch
    from transformers import (
        BertConfig,
        BertTokenizer,
        VisionTextDualEncoderConfig,
        VisionTextDualEncoderModel,
        ViTConfig,
        ViTImageProcessorPil,
    )

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "dog", "husky", "##s", "chair"]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)}, model_max_length=24)
    text = BertConfig(**TOWER, vocab_size=len(words), max_position_embeddings=24)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        ViTConfig(**VISION), text, projection_dim=16
    )
    torch.manual_seed(2)
    return _saved(
        folder,
        VisionTextDualEncoderModel(config),
        tokenizer,
        ViTImageProcessorPil(size={"height": 32, "width": 32}),
    )


KINDS = {"clip": clip, "siglip": siglip, "dual": dual}


@functools.cache
def folder(kind: str) -> Path:
    """The files of one kind, made once a test run."""
    made = tempfile.TemporaryDirectory(prefix=f"tiny-{kind}-")
    _KEPT.append(made)
    return KINDS[kind](Path(made.name))


@functools.cache
def encoder(kind: str) -> Encoder:
    return load_encoder(str(folder(kind)), "cpu")


@functools.cache
def text_files(kind: str) -> TextEncoderFiles:
    return made_once(f"{kind}-text", lambda: export_text_encoder(encoder(kind)))


@functools.cache
def image_files(kind: str) -> ImageEncoderFiles:
    return made_once(f"{kind}-image", lambda: export_image_encoder(encoder(kind)))


T = TypeVar("T")


def made_once(name: str, make: Callable[[], T]) -> T:
    """Made by whichever of the run's processes needs it first; the others wait, which costs less than to trace a tower."""
    if KEPT_EXPORTS not in os.environ:
        return make()
    path = Path(os.environ[KEPT_EXPORTS], f"{name}.pickle")
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            fresh = path.with_suffix(".new")
            fresh.write_bytes(pickle.dumps(make()))
            fresh.replace(path)
    made: T = pickle.loads(path.read_bytes())
    return made


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with some noise."""
    random = np.random.default_rng([seed, width, height])
    rough = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((width, height))
    noisy = np.asarray(rough).astype(int) + random.integers(-20, 21, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def _saved(folder: Path, model, tokenizer, processor) -> Path:
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
