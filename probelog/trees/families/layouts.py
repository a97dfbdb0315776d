"""Which models can be compared: the names and shapes of their tensors, as exact as they must be.

- The head is left out: a child often has one of another size.
- A prefix that all tensors have in common (``module.``, ``vit.``) is left out, so a wrapped model is like a bare one.
- Where most tensors lie in numbered blocks, the shapes of the others (embeddings of positions, tokens and patches, the
  stem) and those of tables of positions may differ. Such a tensor is compared among the models only that have it in
  the shape which most have; in the others it is zero, which leaves it out of their distances.

Whatever else differs, a renamed or a fused tensor, makes another family: sketches hang on positions, so that one of a
fused tensor holds nothing of its parts' sketches.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]

# The stem of a head's tensors at the top level of a network: nothing inside a numbered block is a head.
_HEAD = re.compile(
    r"(?:[^.\d][^.]*\.)*?(?:head|heads|head_dist|classifier|fc|logits|last_linear|score)"
    r"(?:\.(?:fc|linear|head|dense|out_proj|\d+))*\.(?:weight|bias)"
)
_BLOCK = re.compile(r"(?:^|\.)\d+\.")
_POSITIONS = re.compile(r"relative_position|rel_pos|pos_embed|position_embedding|attn_mask|rotary|rope")


@dataclass(frozen=True, slots=True)
class Layout:
    """Tensors without the head, in order of their names: ``names`` without a common prefix, and ``shapes``.

    ``loose``: those whose shape the family does not depend on; ``sketched``: those that have a sketch.
    """

    key: str
    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    loose: tuple[bool, ...]
    sketched: tuple[bool, ...]


def is_head(tensor: str) -> bool:
    """Whether a tensor belongs to the head, by its name."""
    return _HEAD.fullmatch(tensor) is not None


def layout_of(names: Sequence[str], shapes: Sequence[Shape], floating: Sequence[bool]) -> Layout:
    """The layout of a model's tensors without the head, given in order of their names."""
    prefix = _common_prefix(names)
    bare = tuple(name[prefix:] for name in names)
    inside = [_BLOCK.search(name) is not None for name in bare]
    blocks = 2 * sum(inside) > len(names)
    loose = tuple(
        blocks and (not block or _POSITIONS.search(name) is not None)
        for name, block in zip(bare, inside, strict=True)
    )
    digest = hashlib.blake2b(digest_size=8)
    for name, shape, free in zip(bare, shapes, loose, strict=True):
        dimensions = "any" if free else ",".join(map(str, shape))
        digest.update(f"{len(name)}:{name}:{dimensions};".encode("utf-8", "surrogatepass"))
    sketched = tuple(len(shape) > 1 and number for shape, number in zip(shapes, floating, strict=True))
    return Layout(digest.hexdigest(), bare, tuple(shapes), loose, sketched)


def _common_prefix(names: Sequence[str]) -> int:
    """The length of what all names begin with, in whole parts; numbered blocks are no prefix."""
    if len(names) < 2:
        return 0
    first, last = names[0], names[-1]  # sorted
    length = 0
    while (dot := first.find(".", length)) > 0 and last.startswith(first[: dot + 1]):
        if first[length:dot].isdigit():
            break
        length = dot + 1
    return length
