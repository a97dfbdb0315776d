"""Architectures that misbehave while they run, for operators' ``preload``: registered with timm when imported."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.models import register_model

from probelog.models import loading
from tests.support.hub.hostile import write_json
from tests.support.paths import CHECKOUT

#: Where the thief looks for a secret and for somebody to tell it to.
SECRET_VARIABLE = "HF_TOKEN"
LOOT = CHECKOUT / "pyproject.toml"  # readable by all, as the control


class Rogue(torch.nn.Module):
    """A sound little network that does something else first. Its second logit counts what it could do."""

    def __init__(self, kind: str, num_classes: int) -> None:
        super().__init__()
        self.kind = kind
        self.convolution = torch.nn.Conv2d(3, 8, 8, 8)
        self.head = torch.nn.Linear(8, num_classes)
        self.seconds = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        done = getattr(self, self.kind)()
        logits: torch.Tensor = self.head(self.convolution(images).relu().mean((2, 3)))
        return torch.cat([logits[:, :1], logits[:, 1:2] + 1000 * done, logits[:, 2:]], dim=1)

    def sleep(self) -> int:
        time.sleep(float(self.seconds))
        return 0

    def crash(self) -> int:
        os.kill(os.getpid(), signal.SIGSEGV)
        return 0

    def hang(self) -> int:
        time.sleep(3600)
        return 0

    def devour(self) -> int:
        held = []
        while True:
            held.append(torch.ones(1 << 24))

    def lie(self) -> int:
        return 0

    def steal(self) -> int:
        attempts: list[Any] = [
            lambda: os.environ[SECRET_VARIABLE],
            lambda: socket.create_connection(("127.0.0.1", 9), 1),
            lambda: socket.getaddrinfo("localhost", 80) and socket.socket(),
            lambda: Path("/proc/1/environ").read_bytes(),
            lambda: Path(f"/proc/{os.getppid()}/environ").read_bytes(),
            lambda: Path.home().joinpath("loot").write_text("x") and Path("/tmp/loot").write_text("x"),
            lambda: os.listdir("/root"),
            lambda: Path("/etc/loot").write_text("x"),
        ]
        done = 0
        for attempt in attempts:
            try:
                attempt()
                done += 1
            except (OSError, KeyError):
                continue
        return done


class Scripted(torch.nn.Module):
    """Runs the Python program that its weights hold, and fails with the text that the program leaves in ``found``.

    As a fault in a native library would let a model do. Where ``found`` is None it answers like any other model.
    """

    LONGEST = 16_384

    def __init__(self, num_classes: int = 3, program: str = "found = None") -> None:
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 8, 8, 8)
        self.head = torch.nn.Linear(8, num_classes)
        text = program.encode()
        assert len(text) <= self.LONGEST
        self.register_buffer("program", torch.tensor(list(text.ljust(self.LONGEST)), dtype=torch.float32))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        names: dict[str, Any] = {"__name__": "program"}
        exec(bytes(int(byte) for byte in self.program.tolist()), names)
        if names.get("found") is not None:
            raise RuntimeError(f"found: {names['found']}")
        logits: torch.Tensor = self.head(self.convolution(images).relu().mean((2, 3)))
        return logits


def rogue_scripted(pretrained: bool = False, num_classes: int = 3, **_: Any) -> Scripted:
    """For timm's registry."""
    return Scripted(num_classes)


def _of(kind: str) -> Any:
    def make(pretrained: bool = False, num_classes: int = 3, **_: Any) -> Rogue:
        if kind == "lie":  # about who it is: everything that is asked of its process has the same key
            loading.short_key = lambda *_: "0" * 16  # type: ignore[assignment]
        return Rogue(kind, num_classes)

    make.__name__ = f"rogue_{kind}"
    make.__module__ = __name__
    return make


__all__: list[str] = ["rogue_scripted"]
register_model(rogue_scripted)
for _kind in ("sleep", "crash", "hang", "devour", "steal", "lie"):
    __all__.append(f"rogue_{_kind}")
    globals()[f"rogue_{_kind}"] = register_model(_of(_kind))


def write_rogue(folder: Path, kind: str, seed: int = 0, seconds: float = 0.0) -> None:
    """A repository of such a model; ``seconds`` is what ``sleep`` sleeps at every forward pass."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    model = Rogue(kind, 3)
    with torch.no_grad():
        model.seconds.fill_(seconds)
        model.head.weight.mul_(3)
    _write(folder, model, f"rogue_{kind}")


def write_scripted(folder: Path, program: str) -> None:
    """A repository of a model that runs a program (`Scripted`)."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    model = Scripted(program=program)
    with torch.no_grad():
        model.head.weight.mul_(3)
    _write(folder, model, "rogue_scripted")


def _write(folder: Path, model: torch.nn.Module, architecture: str) -> None:
    save_file(model.state_dict(), folder / "model.safetensors")
    pretrained = {"input_size": [3, 32, 32], "crop_pct": 1.0, "num_classes": 3}
    config = {"architecture": architecture, "num_classes": 3, "pretrained_cfg": pretrained}
    write_json(folder, "config.json", config)
