"""The two things that `tests/benchmarks/probing.py` compares with, each in a process of its own.

    python -m tests.benchmarks.forward_passes pure SPEC.json     forward passes on tensors that lie in memory
    python -m tests.benchmarks.forward_passes loop SPEC.json     the loop that people write

Both print one JSON object on the last line.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Models are taken in groups whose inputs need no more memory than this.
_GROUP_BYTES = 2_000_000_000


def pure(spec: dict[str, Any]) -> dict[str, Any]:
    """Forward passes of all models, nothing else timed.

    Shared out over ``processes`` of one thread each that begin at the same time and take one model after the
    other; ``wall`` is their busy time divided by their number, as if none ever waited for the last one. The same
    once more in one process with all threads.
    """
    import torch

    from probelog.models.loading import load_classifier
    from probelog.probes.probe_set import ProbeSet
    from probelog.storage.store import Store

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that no pool of threads exists when processes are forked
    decoded = list(ProbeSet.open(Store(spec["store"]), spec["probe_set"]).images())
    pixels: dict[str, Any] = {}
    found = {"wall": 0.0, "cpu": 0.0, "one_process_wall": 0.0, "one_process_cpu": 0.0}
    group: list[tuple[Any, Any, int]] = []
    for number, model in enumerate(spec["models"]):
        classifier = load_classifier(model["folder"])
        recipe = classifier.recipe
        if recipe.geometry_key not in pixels:
            pixels[recipe.geometry_key] = recipe.geometry(decoded)
        chosen = torch.from_numpy(pixels[recipe.geometry_key][model["probes"]])
        group.append((classifier, recipe.normalise(chosen), model["batch_size"]))
        last = number + 1 == len(spec["models"])
        if last or sum(tensor.nbytes for _, tensor, _ in group) > _GROUP_BYTES:
            wall, cpu = _passes(group, spec["processes"], 1)
            found["wall"] += wall / spec["processes"]
            found["cpu"] += cpu
            wall, cpu = _passes(group, 1, threads)
            found["one_process_wall"] += wall
            found["one_process_cpu"] += cpu
            group = []
    return found | {"threads": threads}


def _passes(group: list[tuple[Any, Any, int]], processes: int, threads: int) -> tuple[float, float]:
    """Busy wall and processor seconds of all processes together."""
    context = multiprocessing.get_context("fork")  # models and inputs are shared, not copied
    taken, results = context.Value("i", 0), context.Queue()
    barrier = context.Barrier(processes)

    def work() -> None:
        import torch

        torch.set_num_threads(threads)
        barrier.wait()
        begun, cpu = time.perf_counter(), _cpu(resource.RUSAGE_SELF)
        while True:
            with taken.get_lock():
                mine = taken.value
                taken.value += 1
            if mine >= len(group):
                break
            classifier, tensor, batch_size = group[mine]
            with torch.inference_mode():
                for start in range(0, len(tensor), batch_size):
                    classifier.forward(tensor[start : start + batch_size])
        results.put((time.perf_counter() - begun, _cpu(resource.RUSAGE_SELF) - cpu))

    workers = [context.Process(target=work) for _ in range(processes)]
    for worker in workers:
        worker.start()
    measured = [results.get() for _ in workers]
    for worker in workers:
        worker.join()
    return sum(wall for wall, _ in measured), sum(cpu for _, cpu in measured)


def loop(spec: dict[str, Any]) -> dict[str, Any]:
    """What people write: every model from its folder by its library, every probe from its file, in batches."""
    from PIL import Image

    begun, cpu = time.perf_counter(), _cpu(resource.RUSAGE_SELF)
    files = sorted(Path(spec["files"]).iterdir())
    for folder in spec["folders"]:
        run = _timm(folder) if _is_timm(folder) else _transformers(folder)
        for start in range(0, len(files), spec["batch_size"]):
            run([Image.open(file).convert("RGB") for file in files[start : start + spec["batch_size"]]])
    return {
        "wall": time.perf_counter() - begun,
        "cpu": _cpu(resource.RUSAGE_SELF) - cpu,
        "models": len(spec["folders"]),
    }


def _is_timm(folder: str) -> bool:
    return "architecture" in json.loads((Path(folder) / "config.json").read_text())


def _timm(folder: str) -> Callable[[list[Any]], Any]:
    import timm
    import torch

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).float().eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)

    @torch.inference_mode()
    def run(images: list[Any]) -> Any:
        return model(torch.stack([transform(image) for image in images])).numpy()

    return run


def _transformers(folder: str) -> Callable[[list[Any]], Any]:
    import torch
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    # Some are stored in half precision, which would meet float32 pixels.
    model = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoImageProcessor.from_pretrained(folder)

    @torch.inference_mode()
    def run(images: list[Any]) -> Any:
        return model(**processor(images, return_tensors="pt")).logits.numpy()

    return run


def _cpu(who: int) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    print(json.dumps({"pure": pure, "loop": loop}[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()))))
