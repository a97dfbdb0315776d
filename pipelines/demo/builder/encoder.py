"""The world's own CLIP: a small vision-text dual encoder in transformers' format, trained on rendered icons.

One designer's drawings of the concepts are held out from all of its training: accuracy on them is the
honest figure for how well names and pictures meet.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.demo.builder.icons import DESIGNERS, DrawnConcept
from pipelines.demo.builder.render import SIZE, Pixels, fast_bfloat16, make_pool, vary
from pipelines.zoo.networks import to_input

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import VisionTextDualEncoderModel

HELD_OUT = "ri"
PROMPT = "a photo of a {}"

_TEMPLATES = (
    "{}", "a {}", "the {}", "a photo of a {}", "a photo of the {}", "a picture of a {}",
    "an icon of a {}", "a drawing of a {}", "an image of a {}",
)  # fmt: skip
_MAX_TOKENS = 24
_DIMENSIONS = 128
# BERT's 0.02 is made for 768 dimensions: at 96, all texts start out equal and the towers collapse.
_TEXT_INIT = 0.1
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True, slots=True)
class Effort:
    """How long the encoder learns: ``rounds`` freshly rendered pools, ``steps`` batches in all.

    For the share ``warm_up`` of the steps both towers learn towards a free table of one vector per name: from
    scratch, the two collapse before either has anything to tell the other.
    """

    rounds: int
    steps: int
    per_concept: int
    per_other: int
    batch: int = 192
    vision_rate: float = 2e-3
    text_rate: float = 1e-3
    warm_up: float = 0.5


FULL = Effort(rounds=8, steps=1600, per_concept=96, per_other=16)
QUICK = Effort(rounds=1, steps=12, per_concept=4, per_other=1, batch=32)


def tokenizer_json(names: Sequence[str]) -> dict[str, Any]:
    """A WordPiece tokenizer with every word of ``names`` and of the prompts whole, and letters for the rest."""
    words = sorted({word for text in (*names, *_TEMPLATES) for word in _words(text)})
    letters = "abcdefghijklmnopqrstuvwxyz0123456789'-"
    vocabulary = dict.fromkeys((*_SPECIAL, *letters, *(f"##{letter}" for letter in letters), *words))
    special = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
        for i, token in enumerate(_SPECIAL)
    ]  # fmt: skip
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": {
            "type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [_special(2), {"Sequence": {"id": "A", "type_id": 0}}, _special(3)],
            "pair": [
                _special(2), {"Sequence": {"id": "A", "type_id": 0}}, _special(3),
                {"Sequence": {"id": "B", "type_id": 1}}, _special(3, 1),
            ],
            "special_tokens": {
                token: {"id": token, "ids": [_SPECIAL.index(token)], "tokens": [token]} for token in ("[CLS]", "[SEP]")
            },
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": {token: i for i, token in enumerate(vocabulary)},
        },
    }  # fmt: skip


def _special(token: int, kind: int = 0) -> dict[str, Any]:
    return {"SpecialToken": {"id": _SPECIAL[token], "type_id": kind}}


def _words(text: str) -> list[str]:
    from tokenizers.pre_tokenizers import BertPreTokenizer

    return [word for word, _ in BertPreTokenizer().pre_tokenize_str(text.lower().replace("{}", " "))]


def _build(vocabulary: int) -> VisionTextDualEncoderModel:
    from transformers import BertConfig, VisionTextDualEncoderConfig, VisionTextDualEncoderModel
    from transformers.models.timm_wrapper import TimmWrapperConfig

    shape = {
        "layers": [1, 1, 1, 1], "channels": [32, 64, 128, 192], "stem_width": 16, "stem_type": "deep",
        "avg_down": True,
    }  # fmt: skip
    vision = TimmWrapperConfig(architecture="resnet18", model_args=shape, do_pooling=True)
    text = BertConfig(
        vocab_size=vocabulary, hidden_size=96, num_hidden_layers=2, num_attention_heads=4, intermediate_size=192,
        max_position_embeddings=_MAX_TOKENS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        pad_token_id=0, initializer_range=_TEXT_INIT,
    )  # fmt: skip
    config = VisionTextDualEncoderConfig(
        vision_config=vision.to_dict() | {"hidden_size": 192},
        text_config=text.to_dict(),
        projection_dim=_DIMENSIONS,
    )
    return VisionTextDualEncoderModel(config)


class _Names:
    """Every name that the encoder hears, as token ids, for every template."""

    def __init__(self, tokenizer: Tokenizer, names: Sequence[Sequence[str]], device: str) -> None:
        self._tokenizer = tokenizer
        self._names = names
        self._device = device

    def say(self, which: Sequence[int], rng: np.random.Generator) -> dict[str, torch.Tensor]:
        """The names of some entries, each by one of its synonyms, in templates chosen by chance."""
        texts = []
        for index in which:
            spellings = self._names[index]
            spelling = spellings[int(rng.integers(len(spellings)))] if rng.random() < 0.4 else spellings[0]
            texts.append(_TEMPLATES[int(rng.integers(len(_TEMPLATES)))].format(spelling))
        return tokens(self._tokenizer, texts, self._device)


def tokens(tokenizer: Tokenizer, texts: Sequence[str], device: str) -> dict[str, torch.Tensor]:
    """Token ids and attention mask of some texts, padded to the longest."""
    import torch

    encodings = tokenizer.encode_batch(list(texts))
    length = max(len(encoding.ids) for encoding in encodings)
    ids = torch.zeros((len(texts), length), dtype=torch.long)
    attention = torch.zeros((len(texts), length), dtype=torch.long)
    for row, encoding in enumerate(encodings):
        ids[row, : len(encoding.ids)] = torch.tensor(encoding.ids)
        attention[row, : len(encoding.ids)] = 1
    return {"input_ids": ids.to(device), "attention_mask": attention.to(device)}


def train(
    concepts: Sequence[DrawnConcept],
    others: Sequence[DrawnConcept],
    *,
    effort: Effort,
    seed: int,
    device: str,
    say: Callable[[str], None],
) -> tuple[VisionTextDualEncoderModel, dict[str, Any]]:
    """Train the dual encoder; returns the model (float32, evaluation mode) and its tokenizer's JSON.

    The loss is CLIP's, symmetric, over the distinct names in a batch (pictures of the same thing share their
    name as the positive), plus the same against the names of superclasses.
    """
    import torch
    from tokenizers import Tokenizer

    torch.manual_seed(seed)
    rng = np.random.default_rng((seed, 1))
    kinds = sorted({kind for drawn in concepts for kind in drawn.concept.superclasses})
    things = [*concepts, *others]
    names = [(thing.concept.name, *thing.concept.synonyms) for thing in things] + [(kind,) for kind in kinds]
    tokenizer_data = tokenizer_json([name for spellings in names for name in spellings])
    tokenizer = Tokenizer.from_str(json.dumps(tokenizer_data))
    lexicon = _Names(tokenizer, names, device)
    kind_targets = torch.zeros(len(things), len(kinds), device=device)
    for row, thing in enumerate(things):
        for kind in thing.concept.superclasses:
            kind_targets[row, kinds.index(kind)] = 1 / len(thing.concept.superclasses)

    model = _build(tokenizer.get_vocab_size())
    torch.nn.Module.to(model, device)
    torch.nn.Module.to(model.vision_model, memory_format=torch.channels_last)
    vision = [*model.vision_model.parameters(), *model.visual_projection.parameters()]
    text = [*model.text_model.parameters(), *model.text_projection.parameters(), model.logit_scale]
    table = torch.nn.Parameter(torch.randn(len(names), _DIMENSIONS, device=device) / _DIMENSIONS**0.5)
    optimiser = torch.optim.AdamW(
        [{"params": vision}, {"params": text}, {"params": [table]}], weight_decay=0.02
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser,
        max_lr=[effort.vision_rate, effort.text_rate, 3e-3],
        total_steps=effort.steps,
        pct_start=0.1,
    )
    started = time.monotonic()
    pools = _pools(concepts, others, effort, seed)
    bfloat16 = fast_bfloat16(device)
    model.train()
    for step in range(effort.steps):
        pixels, labels = next(pools)
        picked, inverse = np.unique(labels, return_inverse=True)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bfloat16):
            images = _image_embeddings(model, to_input(vary(pixels, rng), device))
        heard = [*picked.tolist(), *range(len(things), len(names))]
        texts = _text_embeddings(model, lexicon.say(heard, rng))
        scale = model.logit_scale.exp().clamp(max=100.0)
        loss = torch.zeros((), device=device)
        if step < effort.warm_up * effort.steps:
            places = torch.nn.functional.normalize(table[heard], dim=-1)
            loss = torch.nn.functional.cross_entropy(
                scale * texts @ places.T, torch.arange(len(heard), device=device)
            )
            texts = places
        logits = scale * images.float() @ texts.T
        concept, by_kind = logits[:, : len(picked)], logits[:, len(picked) :]
        index = torch.from_numpy(inverse).to(device)
        loss = loss + _symmetric(concept, torch.nn.functional.one_hot(index, len(picked)).float())
        target = kind_targets[torch.from_numpy(labels).to(device)]
        known = target.sum(1) > 0
        if bool(known.any()):
            loss = loss + 0.3 * _symmetric(by_kind[known], target[known])
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimiser.step()
        schedule.step()
        if step % 50 == 49 or step + 1 == effort.steps:
            minutes = (time.monotonic() - started) / 60
            right = (concept.argmax(1) == index).float().mean().item()
            say(
                f"encoder: step {step + 1}/{effort.steps}, loss {loss.item():.3f}, batch {right:.0%}, {minutes:.1f} min"
            )
    torch.nn.Module.to(model, "cpu")
    return model.eval(), tokenizer_data


def _pools(
    concepts: Sequence[DrawnConcept], others: Sequence[DrawnConcept], effort: Effort, seed: int
) -> Iterator[tuple[Pixels, np.ndarray[tuple[int], np.dtype[np.int64]]]]:
    """Endless batches (pixels, class numbers); the pictures are rendered afresh every ``steps / rounds`` steps."""
    rng = np.random.default_rng((seed, 2))
    seen = [designer for designer in DESIGNERS if designer != HELD_OUT]
    known = [drawn for drawn in concepts if any(designer in seen for designer in drawn.drawings)]
    numbers = np.array([i for i, drawn in enumerate(concepts) if drawn in known])
    each_round = max(1, effort.steps // effort.rounds)
    for turn in range(10**9):
        main = make_pool(known, seen, effort.per_concept, seed + 7919 * turn)
        beside = make_pool(others, DESIGNERS, effort.per_other, seed + 7919 * turn + 1)
        pixels = np.concatenate([main.pixels, beside.pixels])
        labels = np.concatenate([numbers[main.classes], beside.classes + len(concepts)])
        order = rng.permutation(len(labels))
        for start in range(0, each_round * effort.batch, effort.batch):
            chosen = order[np.arange(start, start + effort.batch) % len(order)]
            yield pixels[chosen], labels[chosen]


def _symmetric(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """CLIP's loss for n pictures x m names with soft targets: pictures find names, names find pictures."""
    across = -(targets * logits.log_softmax(1)).sum(1).mean()
    columns = targets.sum(0)
    present = columns > 0
    share = targets[:, present] / columns[present]
    down = -(share * logits[:, present].log_softmax(0)).sum(0).mean()
    return (across + down) / 2


def _image_embeddings(model: VisionTextDualEncoderModel, pixels: torch.Tensor) -> torch.Tensor:
    from torch.nn.functional import normalize

    embeddings: torch.Tensor = normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)
    return embeddings


def _text_embeddings(model: VisionTextDualEncoderModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    from torch.nn.functional import normalize

    embeddings: torch.Tensor = normalize(model.get_text_features(**batch).pooler_output, dim=-1)
    return embeddings


def embed_images(model: VisionTextDualEncoderModel, pixels: Pixels, batch: int = 256) -> torch.Tensor:
    """L2-normalised embeddings of pictures, n x 128."""
    import torch

    with torch.inference_mode():
        parts = [
            _image_embeddings(model, to_input(pixels[i : i + batch], "cpu"))
            for i in range(0, len(pixels), batch)
        ]
        return torch.cat(parts).float()


def zero_shot(
    model: VisionTextDualEncoderModel,
    tokenizer_data: dict[str, Any],
    concepts: Sequence[DrawnConcept],
    *,
    designers: Sequence[str],
    per_class: int,
    seed: int,
) -> float:
    """Top-1 accuracy over all concept names, on fresh pictures of some designers' drawings."""
    import torch
    from tokenizers import Tokenizer

    numbers = [
        i for i, drawn in enumerate(concepts) if any(designer in designers for designer in drawn.drawings)
    ]
    if not numbers:
        return float("nan")
    drawn = [concepts[i] for i in numbers]
    pool = make_pool(drawn, designers, per_class, seed + 104729)
    tokenizer = Tokenizer.from_str(json.dumps(tokenizer_data))
    with torch.inference_mode():
        texts = _text_embeddings(model, tokens(tokenizer, [PROMPT.format(c.name) for c in concepts], "cpu"))
        guess = (embed_images(model, pool.pixels) @ texts.T).argmax(1).numpy()
    return float((guess == np.array(numbers)[pool.classes]).mean())


def save(model: VisionTextDualEncoderModel, tokenizer_data: dict[str, Any], folder: Path) -> None:
    """Write the encoder as transformers would: weights in half precision, to be loaded as float32."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = model.config.to_dict()
    config |= {"architectures": ["VisionTextDualEncoderModel"], "dtype": "float32"}
    for part in ("vision_config", "text_config"):
        config[part].pop("_name_or_path", None)
        config[part].pop("dtype", None)
    model.config.architectures = ["VisionTextDualEncoderModel"]
    tensors = {
        name: value.half().contiguous() if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", config)
    _write_json(folder / "tokenizer.json", tokenizer_data)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast", "processor_class": "VisionTextDualEncoderProcessor",
            "model_max_length": _MAX_TOKENS, "model_input_names": ["input_ids", "attention_mask"],
            "cls_token": "[CLS]", "mask_token": "[MASK]", "pad_token": "[PAD]", "sep_token": "[SEP]",
            "unk_token": "[UNK]",
        },
    )  # fmt: skip
    _write_json(
        folder / "processor_config.json",
        {
            "processor_class": "VisionTextDualEncoderProcessor",
            "image_processor": {
                "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True,
                "size": {"shortest_edge": SIZE}, "resample": 3, "do_center_crop": True,
                "crop_size": {"height": SIZE, "width": SIZE}, "do_rescale": True, "rescale_factor": 1 / 255,
                "do_normalize": True, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
            },
        },
    )  # fmt: skip


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
