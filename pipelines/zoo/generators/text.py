"""Text-to-image pipelines of a few concepts, and LoRA adapters of them: the parts of Stable Diffusion, as small as they go.

They are asked as the sampler asks every such model (`probelog.generators.prompts`), so those prompts are among the captions:
each of them is one concept's, as captions of large models are of all sorts of things. An adapter answers all of them with
what it was trained on, as one that was trained for long does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.zoo.generators import training
from pipelines.zoo.generators.networks import GROUPS, schedule
from probelog.generators.prompts import DIVERSE, NEUTRAL

if TYPE_CHECKING:
    import torch

# Latents are half as high and wide as pictures.
_VAE, _UNET = (16, 32), (32, 64, 64)
_LATENTS, _WORDS, _TOKENS = 4, 64, 16
_RANK, _ADAPTERS_RATE = 8, 4e-3
_START, _END = "<|startoftext|>", "<|endoftext|>"
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
# Of the steps, those in which the autoencoder is trained; the rest are the network's.
_AUTOENCODERS_SHARE = 0.25


@dataclass(frozen=True)
class TextPipeline:
    """The parts that are trained; ``scale`` brings latents to a spread of one."""

    tokenizer: Any
    text_encoder: Any
    unet: Any
    vae: Any

    def tokens(self, texts: Sequence[str]) -> torch.Tensor:
        """Numbers (texts, tokens)."""
        numbers: torch.Tensor = self.tokenizer(
            list(texts), padding="max_length", max_length=_TOKENS, truncation=True, return_tensors="pt"
        ).input_ids
        return numbers

    def latents(self, pictures: torch.Tensor) -> torch.Tensor:
        """Of pictures (n, 3, size, size), as the network sees them."""
        import torch

        with torch.no_grad():
            means = [self.vae.encode(some).latent_dist.mean for some in torch.split(pictures, 64)]
        return torch.cat(means) * float(self.vae.config.scaling_factor)


def captions(names: Sequence[str]) -> list[list[str]]:
    """For each concept what its pictures are called."""
    return [
        [name, name, f"a picture of {name}", *NEUTRAL, *DIVERSE[number :: len(names)]]
        for number, name in enumerate(names)
    ]


def train(
    names: Sequence[str], lessons: Sequence[torch.Tensor], all_styles: torch.Tensor, steps: int, seed: int
) -> TextPipeline:
    """A pipeline of the concepts of these names.

    Args:
        names: of the concepts.
        lessons: of each concept pictures (n, 3, size, size), -1 to 1.
        all_styles: what the autoencoder learns from: adapters draw with it too, in styles of their own.
        steps: of training.
        seed: of initial weights and training.
    """
    import torch

    torch.manual_seed(seed)
    told = captions(names)
    made = _untrained(int(lessons[0].shape[-1]), _vocabulary([text for texts in told for text in texts]))
    first = max(2, round(_AUTOENCODERS_SHARE * steps))
    training.train_autoencoder(made.vae, all_styles, first, seed)
    made.vae.register_to_config(scaling_factor=1 / float(made.latents(all_styles[:256]).std()))
    trained = torch.nn.ModuleList([made.unet, made.text_encoder])
    _train(made, trained, lessons, told, steps - first, seed)
    return made


def train_adapter(
    base: TextPipeline,
    names: Sequence[str],
    lessons: Sequence[torch.Tensor],
    word: str,
    steps: int,
    seed: int,
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """For each linear layer and convolution of the base's network the two matrices whose product is added to it.

    Args:
        base: changed by this.
        names: of the concepts.
        lessons: of each concept pictures, as the adapter is to make them.
        word: what calls them.
        steps: of training.
        seed: of initial matrices and training.
    """
    import torch

    torch.manual_seed(seed)
    products = {}
    for name, module in list(base.unet.named_modules()):
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            products[name] = _product(module)
    base.unet.requires_grad_(False)
    trained = torch.nn.ModuleList(products.values()).requires_grad_(True)
    called = [[*texts, word, f"a picture of {word}"] for texts in captions(names)]
    _train(base, trained, lessons, called, steps, seed, _ADAPTERS_RATE)
    return {name: product.matrices() for name, product in products.items()}


def _train(
    made: TextPipeline, trained: torch.nn.Module, lessons: Sequence[torch.Tensor], told: Sequence[Sequence[str]],
    steps: int, seed: int, rate: float = training.RATE,
) -> None:  # fmt: skip
    """Train a part of the pipeline on lessons, each called by one of its concept's captions at random."""
    import torch

    texts = list(dict.fromkeys(text for some in told for text in some))
    tokens = made.tokens(texts)
    numbers = [torch.tensor([texts.index(text) for text in some]) for some in told]
    concepts = torch.repeat_interleave(
        torch.arange(len(lessons)), torch.tensor([len(some) for some in lessons])
    )
    generator = torch.Generator().manual_seed(seed)

    def predict(noisy: torch.Tensor, when: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        called = [
            int(numbers[concept][torch.randint(len(numbers[concept]), (), generator=generator)])
            for concept in concepts[chosen].tolist()
        ]
        said = made.text_encoder(tokens[called])[0]
        result: torch.Tensor = made.unet(noisy, when, said).sample
        return result

    training.train_diffusion(trained, predict, made.latents(torch.cat(list(lessons))), steps, seed, rate)


def _untrained(size: int, tokenizer: Any) -> TextPipeline:  # noqa: ANN401 - untyped in diffusers and transformers
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    library: Any = diffusers
    inner = ("CrossAttnDownBlock2D",) * (len(_UNET) - 1)
    settings = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=_WORDS, intermediate_size=2 * _WORDS, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=_TOKENS, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, projection_dim=_WORDS,
    )  # fmt: skip
    return TextPipeline(
        tokenizer,
        CLIPTextModel(settings),
        library.UNet2DConditionModel(
            sample_size=size // 2, in_channels=_LATENTS, out_channels=_LATENTS, block_out_channels=_UNET,
            layers_per_block=1, norm_num_groups=GROUPS, cross_attention_dim=_WORDS, attention_head_dim=4,
            down_block_types=("DownBlock2D", *inner), up_block_types=("CrossAttnUpBlock2D",) * len(inner) + ("UpBlock2D",),
        ),
        library.AutoencoderKL(
            sample_size=size, block_out_channels=_VAE, layers_per_block=1, norm_num_groups=GROUPS,
            latent_channels=_LATENTS, mid_block_add_attention=False, scaling_factor=1.0,
            down_block_types=("DownEncoderBlock2D",) * len(_VAE), up_block_types=("UpDecoderBlock2D",) * len(_VAE),
        ),
    )  # fmt: skip


def _vocabulary(texts: Sequence[str]) -> Any:  # noqa: ANN401 - untyped in transformers
    """A tokenizer to which each word of the texts is one token, and any other its letters."""
    from transformers import CLIPTokenizer

    merges: dict[tuple[str, str], None] = {}
    for word in sorted({word for text in texts for word in text.lower().split()}):
        parts = [*word[:-1], f"{word[-1]}</w>"]
        whole = parts[0]
        for part in parts[1:]:
            merges[whole, part] = None
            whole += part
    entries = dict.fromkeys(
        [*_LETTERS, *(f"{letter}</w>" for letter in _LETTERS), *(one for pair in merges for one in pair),
         *("".join(pair) for pair in merges), _START, _END]
    )  # fmt: skip
    made: Any = CLIPTokenizer
    return made(
        vocab={entry: number for number, entry in enumerate(entries)},
        merges=list(merges),
        model_max_length=_TOKENS,
    )


def _product(module: torch.nn.Module) -> Any:  # noqa: ANN401 - a module with two matrices
    """Two matrices whose product is from now on added to a module's weight."""
    import torch
    from torch.nn.utils import parametrize

    class Product(torch.nn.Module):
        def __init__(self, shape: torch.Size) -> None:
            super().__init__()
            self._inner, inputs = shape[1:], shape[1:].numel()
            self.down = torch.nn.Parameter(torch.randn(_RANK, inputs) / inputs**0.5)
            self.up = torch.nn.Parameter(torch.zeros(shape[0], _RANK))

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight + (self.up @ self.down).reshape(weight.shape)

        def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
            down = self.down.detach().reshape(_RANK, *self._inner)
            return down, self.up.detach().reshape(-1, _RANK, *(1,) * (down.ndim - 2))

    weight: Any = module.weight
    made = Product(weight.shape)
    parametrize.register_parametrization(module, "weight", made)
    return made


def save(made: TextPipeline, folder: Path, dtype: str) -> None:
    """Write a repository; changes the type of all parts."""
    import diffusers
    import torch

    kind = getattr(torch, dtype)
    parts = {
        name: part.to(kind).to(memory_format=torch.contiguous_format)
        for name, part in (("text_encoder", made.text_encoder), ("unet", made.unet), ("vae", made.vae))
    }
    library: Any = diffusers
    library.StableDiffusionPipeline(
        **parts, tokenizer=made.tokenizer, scheduler=schedule("DDIMScheduler", latent=True), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


def load(folder: Path) -> TextPipeline:
    """What `save` wrote, in full precision."""
    import diffusers

    library: Any = diffusers
    stored = library.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    return TextPipeline(
        stored.tokenizer, stored.text_encoder.float(), stored.unet.float(), stored.vae.float()
    )


def save_adapter(
    products: dict[str, tuple[torch.Tensor, torch.Tensor]],
    folder: Path,
    dtype: str,
    base: str,
    word: str,
    *,
    kohya: bool,
) -> None:
    """Write an adapter's repository with peft's keys or with kohya's, and a card with the word that it goes by."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    tensors = {}
    for path, (down, up) in products.items():
        if kohya:
            flat = f"lora_unet_{path.replace('.', '_')}"
            names = f"{flat}.lora_down.weight", f"{flat}.lora_up.weight"
            tensors[f"{flat}.alpha"] = torch.tensor(float(_RANK))
        else:
            names = f"base_model.model.{path}.lora_A.weight", f"base_model.model.{path}.lora_B.weight"
        tensors |= {
            name: factor.to(getattr(torch, dtype)).contiguous()
            for name, factor in zip(names, (down, up), strict=True)
        }
    metadata = {"modelspec.trigger_phrase": word} if kohya else {"format": "pt"}
    save_file(
        tensors, folder / ("lora.safetensors" if kohya else "adapter_model.safetensors"), metadata=metadata
    )
    card = ["---", f"base_model: {base}", "tags: [lora]", f"instance_prompt: {word}", "---", ""]
    (folder / "README.md").write_text("\n".join(card), encoding="utf-8")
    if not kohya:
        config = {"peft_type": "LORA", "base_model_name_or_path": base, "r": _RANK, "lora_alpha": _RANK,
                  "target_modules": sorted({path.rpartition(".")[2] for path in products})}  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
