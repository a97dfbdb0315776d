"""Commands that make what a job reads: the demo, a hub, a probe set, a zoo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.options import LogOption
from probelog import logs

app = typer.Typer()


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the store and the index.")] = Path(
        "probelog-demo"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="Half of the time: without the comparison with all probes.")
    ] = False,
    log_level: LogOption = logs.LogLevel.WARNING,
) -> None:
    """Serve a small hub on this machine, index it and search the index, offline."""
    from pipelines.demo.run import run_demo

    run_demo(out, compare=not quick)


@app.command()
def hub(
    folder: Annotated[Path, typer.Argument(help="Folder of repositories: OWNER/NAME/...")],
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            help="What clients reach it by, where that is another address (a proxy, a service's name).",
        ),
    ] = None,
    log_level: LogOption = logs.LogLevel.WARNING,
) -> None:
    """Serve a folder of model repositories over the Hub's protocol."""
    from pipelines.hubserver import serve

    serve(folder, host, port, address)


@app.command()
def probes(
    source: Annotated[
        str,
        typer.Argument(help="Folder of images, Parquet with images, or hf://datasets/OWNER/NAME/PATTERN."),
    ],
    store: Annotated[str, typer.Option("--store", help="Directory, or s3://, gs:// or az://bucket/prefix.")],
    count: Annotated[
        int | None, typer.Option("-n", "--count", min=1, help="Number of probes; default: all.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Random seed.")] = 0,
    encoder: Annotated[
        str, typer.Option("--encoder", help="Hub id or folder of the text-image encoder.")
    ] = "openai/clip-vit-base-patch32",
    log_level: LogOption = logs.LogLevel.WARNING,
) -> None:
    """Make a probe set and embed it."""
    from pipelines.config.model import load_config
    from pipelines.job.job import Job
    from pipelines.probe.probe_set import ready_probes
    from probelog.encoders.torch_encoder import load_encoder

    settings = [f"probes={json.dumps(source)}", f"encoder={json.dumps(encoder)}", f"seed={seed}", "top_r=1"]
    config = load_config(None, settings, store).model_copy(update={"probe_count": count})
    probe_set = ready_probes(Job.of(config), load_encoder(encoder))
    for report in probe_set.left_out[:20]:
        typer.echo(f"left out: {report.source}: {report.reason.value} ({report.detail})", err=True)
    typer.echo(probe_set.hash)


@app.command()
def zoo(
    images: Annotated[
        str | None,
        typer.Argument(
            help="Folder with a sub-folder per class, or Parquet with images and their labels; with --forest or "
            "--generators optional, shapes or icons are drawn without it."
        ),
    ] = None,
    models: Annotated[
        int | None,
        typer.Option(
            "--models",
            help="Number of models; a later call with more adds to them. Default: 12, with --generators 48.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")] = Path("zoo"),
    seed: Annotated[int, typer.Option("--seed", min=0, help="Random seed.")] = 0,
    size: Annotated[
        int | None,
        typer.Option(
            "--size", help="Pixels, height and width; default: 64, with --forest or --generators 32."
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option("--epochs", help="Passes over a model's images; default: a fixed number of batches."),
    ] = None,
    names: Annotated[
        Path | None,
        typer.Option("--names", help="Class names, one per line, for classes that have only numbers."),
    ] = None,
    groups: Annotated[
        Path | None,
        typer.Option("--groups", help="JSON, superclass: [class names]; default: by shared last words."),
    ] = None,
    architectures: Annotated[
        str | None,
        typer.Option("--architectures", help="Comma-separated names of timm's, or `resnet` of transformers."),
    ] = None,
    probe_count: Annotated[
        int | None,
        typer.Option(
            "--probes", help="Largest number of probes; default: the remaining images, up to 4,000."
        ),
    ] = None,
    probe_classes: Annotated[
        int | None,
        typer.Option(
            "--probe-classes", help="Number of classes that no model learns; default: a fifth of 40 or more."
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="Number of models trained at the same time.")
    ] = None,
    gpus: Annotated[
        float, typer.Option("--gpus-per-model", min=0, help="Share of a GPU per model; 0 trains on CPUs.")
    ] = 0.0,
    forest: Annotated[
        bool,
        typer.Option("--forest", help="Networks made from each other in known ways, for model trees."),
    ] = False,
    generators: Annotated[
        bool,
        typer.Option(
            "--generators", help="Small diffusion models, decoders and adapters, and what each of them makes."
        ),
    ] = False,
    network_count: Annotated[
        int, typer.Option("--networks", help="Number of networks of a forest, uploaded or not.")
    ] = 150,
    log_level: LogOption = logs.LogLevel.WARNING,
) -> None:
    """Train a synthetic hub from labelled images, with its truth file."""
    from pipelines.zoo.build import ARCHITECTURES, Request, build_zoo
    from pipelines.zoo.forest import FOREST_ARCHITECTURES, ForestRequest, build_forest
    from pipelines.zoo.generators.build import GeneratorsRequest, build_generators
    from probelog.errors import UsageError

    names_of_architectures = (
        tuple(name.strip() for name in architectures.split(","))
        if architectures is not None
        else FOREST_ARCHITECTURES
        if forest
        else ARCHITECTURES
    )
    if forest and generators:
        raise UsageError("--forest and --generators are two zoos: ask for one of them")
    if generators:
        build_generators(
            GeneratorsRequest(
                out, 48 if models is None else models, seed, 32 if size is None else size, images, names
            )
        )
        return
    if forest:
        build_forest(
            ForestRequest(
                out, network_count, seed, 32 if size is None else size, names_of_architectures, images, names
            )
        )
        return
    if images is None:
        raise UsageError(
            "name a folder or Parquet of labelled images (only --forest and --generators draw their own)"
        )
    request = Request(
        images,
        out,
        12 if models is None else models,
        seed,
        64 if size is None else size,
        epochs,
        names_of_architectures,
        names,
        groups,
        probe_count,
        probe_classes,
    )
    build_zoo(request, workers=workers, gpus_per_model=gpus)
