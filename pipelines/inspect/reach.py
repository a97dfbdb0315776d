"""What a job needs outside of its own process, tried in seconds: the Hub with its token, the store, the encoder, GPUs.

Each function says in a sentence what it found, or raises what is wrong with what to do about it.
"""

from __future__ import annotations

import datetime as dt
import errno
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from cluster.runtime.scratch import scratch_folder
from cluster.runtime.session import is_local, session
from pipelines.config.model import Config
from pipelines.crawl.stage import Catalogue, hub_endpoint, is_crawled
from pipelines.inspect.counting import most_probes
from pipelines.job.job import Job
from pipelines.sample.library import missing_library
from probelog.encoders.torch_encoder import load_encoder
from probelog.errors import ConflictError, ProbeLogError, StoreError, UsageError
from probelog.generators.layout import LEAST_PICTURES
from probelog.hub.client import HubClient, HubError, HubRefusalError, HubResponse, Retry, chunks
from probelog.hub.rate_limit import HUB_LIMITS, WINDOW_SECONDS, hub_account
from probelog.probes.probe_set import find_probe_set
from probelog.probes.sources import HUB, source_files
from probelog.sandbox.generators import GeneratorProcess, generator_server
from probelog.sandbox.spec import GeneratorSpec
from probelog.storage.layout import INDEX, POINTER
from probelog.storage.store import Store

Try = Callable[[Config], str]

# One more time at once, then the answer is no: whoever asks sits in front of it.
QUICK = Retry(
    attempts=2,
    first_wait=0.5,
    connect_timeout=5.0,
    read_timeout=10.0,
    throttled=1,
    longest_penalty=5.0,
    api_timeout=20.0,
)
# Minutes of a wrong clock change no result; a signature of an object store does not bear more.
_CLOCK_SECONDS = 300.0
_SMALL_FILE = 1 << 20
_GPU_SECONDS = 120.0
_SAMPLE_SECONDS = 60.0


def hub_lists(config: Config) -> str:
    """One page of the Hub's listing, with the token where there is one."""
    with HubClient(hub_endpoint(), retry=QUICK) as client:
        return f"{client.endpoint} answers, {len(_page(client, config))} models on its first page"


def hub_sends(config: Config) -> str:
    """One small file out of a repository, wherever the Hub's storage is."""
    with HubClient(hub_endpoint(), retry=QUICK) as client:
        for item in _page(client, config):
            names = [file.get("rfilename") for file in item.get("siblings") or [] if isinstance(file, dict)]
            if "config.json" in names and item.get("gated") in (None, False):
                repo = str(item["id"])
                started = time.monotonic()
                url = f"{client.endpoint}/{quote(repo)}/resolve/main/config.json"
                size = client.call("file", url, lambda answer: sum(map(len, _body(answer, client.retry))))
                return f"{size:,} bytes of {repo} in {time.monotonic() - started:.1f} s"
    return "no model of the first page has a config.json: nothing was downloaded"


def hub_limits(config: Config) -> str:
    """How often the Hub may be asked, by what it grants to such an account."""
    with_token = bool(os.environ.get("HF_TOKEN"))
    account = hub_account(hub_endpoint(), with_token=with_token)
    if account is None:
        return "no limit is kept at this address"
    limits = ", ".join(f"{count:,.0f} {kind} requests" for kind, count in HUB_LIMITS[account].items())
    hint = "" if with_token else "; HF_TOKEN raises it"
    return f"{limits} in {WINDOW_SECONDS / 60:.0f} minutes ({account}){hint}"


def hub_has_model(kind: str, word: str) -> bool:
    """Whether the Hub lists a model with a tag of some kind."""
    query = {"filter": f"license:{word}"} if kind == "license" else {kind: word}
    with HubClient(hub_endpoint(), retry=QUICK) as client:
        return bool(client.json("/api/models", {"limit": 1, **query}).value)


def catalogue_is_new_enough(config: Config) -> str:
    """The catalogue that a full run without --refresh would publish, beside the live index.

    Raises:
        UsageError: it is older than nightly runs whose models are live, and would drop them.
    """
    from pipelines.publish.release import LiveIndex, refuse_older_listing

    job, endpoint = Job.of(config), hub_endpoint()
    if not is_crawled(job, endpoint) or not job.store.child(INDEX).exists(POINTER):
        return "nothing to compare"
    finished = Catalogue.open(job, endpoint).finished
    refuse_older_listing(finished, LiveIndex.open(job.store.child(INDEX)))
    return f"listed {finished}"


def is_folder(encoder: str) -> bool:
    """Whether an encoder is meant to be a folder, not a repository on the Hub."""
    folder = Path(encoder).expanduser()
    return folder.is_absolute() or encoder.startswith((".", "~")) or encoder.count("/") > 1 or folder.is_dir()


def nearest(folder: Path) -> Path:
    """A folder, or the first above it that is there."""
    return next(each for each in [folder, *folder.absolute().parents] if each.exists())


def is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder, by making one without a name: root's rights do not tell (a share that gives it none).

    One that is full can be written, some other time.
    """
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError as error:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)


def store_keeps(config: Config) -> str:
    """Read, write, conditional put and delete; a folder that is not there yet could be made.

    Raises:
        StoreError: one of them fails.
    """
    store = Store(config.store)
    if store.is_local:
        folder = nearest(Path(store.root))
        if not is_writable(folder):
            raise StoreError(
                f"{folder} is not a folder that can be written: name another, or change its owner"
            )
        if not Path(store.root).is_dir():
            return f"{store.root} does not exist yet and can be made in {folder}"
    store.child(INDEX).exists(POINTER)
    # A name that no listing shows, should the process die here.
    name = f".tmp-check-{secrets.token_hex(8)}"
    started = time.monotonic()
    try:
        store.write(name, b"1")
        if store.read(name) != b"1":
            raise StoreError(f"{store.uri} gives other bytes than were written: use another store")
        if not store.is_local:  # where a lock keeps them, and stays
            check_conditions(store, name, b"1")
    finally:
        store.delete(name)
    kinds = "write, read and delete" if store.is_local else "write, read, conditional put and delete"
    return f"{store.uri}: {kinds} in {time.monotonic() - started:.1f} s"


def check_conditions(store: Store, name: str, content: bytes) -> None:
    """Puts on conditions, of which one must be refused, to an object with some content.

    Raises:
        StoreError: the store does not keep them.
    """
    kept = not store.create(name, b"0")
    if kept:
        store.swap(name, b"2", content)
        try:
            store.swap(name, b"3", content)
            kept = False
        except ConflictError:
            pass
    if not kept:
        raise StoreError(
            f"{store.uri} does not keep conditions on puts (If-Match, If-None-Match): two publishers could overwrite each "
            "other; use a store that does"
        )


def store_clock(config: Config) -> str:
    """The store's clock beside this machine's.

    Raises:
        ProbeLogError: they differ by minutes.
    """
    store = Store(config.store)
    if store.is_local and not Path(store.root).is_dir():
        return "the store does not exist yet"
    behind = (dt.datetime.now(dt.UTC) - store.time()).total_seconds()
    if abs(behind) > _CLOCK_SECONDS:
        raise ProbeLogError(
            f"this machine's clock is {abs(behind):,.0f} s {'ahead of' if behind > 0 else 'behind'} the store's: set it "
            "by NTP"
        )
    return f"{abs(behind):.0f} s from the store's"


def encoder_is_there(config: Config) -> str:
    """The encoder's folder with its files, or its repository on the Hub, with weights that are loaded.

    Raises:
        UsageError: it is missing, gated, or has no safetensors.
    """
    source = config.encoder
    folder = Path(source).expanduser()
    if is_folder(source):
        if not (folder / "config.json").is_file():
            raise UsageError(f"{source} is no folder with a config.json, and no Hub id (OWNER/NAME)")
        if not any(folder.glob("*.safetensors")):
            raise UsageError(f"{source} has no model.safetensors: weights in other formats are not loaded")
        return f"{source} is a folder with an encoder's files"
    name, _, revision = source.partition("@")
    with HubClient(hub_endpoint(), retry=QUICK) as client:
        page = f"/api/models/{quote(name)}" + (f"/revision/{quote(revision, safe='')}" if revision else "")
        try:
            facts = client.json(page).value
        except HubRefusalError as error:
            if error.status in (401, 403, 404):
                raise UsageError(
                    f"{client.endpoint} has no {source} that this token opens ({error.status}): check the name, and HF_TOKEN "
                    "for what is gated or private"
                ) from error
            raise
    files = (
        [file.get("rfilename", "") for file in facts.get("siblings") or []] if isinstance(facts, dict) else []
    )
    if not any(str(file).endswith(".safetensors") for file in files):
        raise UsageError(f"{source} has no safetensors: weights in other formats are not loaded")
    return f"{source} is on the Hub"


def probes_are_there(config: Config) -> str:
    """The source of probes, and whether it has as many images as are asked for.

    Raises:
        UsageError: there are none, or fewer.
    """
    files, _ = source_files(config.probes)
    if not files:
        raise UsageError(f"{config.probes} holds no image and no Parquet file")
    store = Store(config.store)
    if not store.is_local or Path(store.root).is_dir():
        made = find_probe_set(config.probes, config.probe_count, config.seed, store)
        if made is not None:
            return f"made before: {made.count:,} images"
    count = most_probes(files)
    if count is not None and config.probe_count is not None and count < config.probe_count:
        raise UsageError(
            f"{config.probes} has at most {count:,} images, fewer than probe_count ({config.probe_count:,}): set it to "
            'that or less, or to "none" for all'
        )
    shown = "many" if count is None else f"at most {count:,}"
    return (
        f"{shown} images in {len(files):,} {'files on the Hub' if config.probes.startswith(HUB) else 'files'}"
    )


def workers_fit(config: Config) -> str:
    """The CPUs and GPUs that one worker asks for, on this machine where Ray is to run here.

    Raises:
        UsageError: there are fewer: no worker would ever start.
    """
    gpus, cpus = config.gpus_per_worker, config.cpus_per_worker
    if gpus > 1 and gpus != int(gpus):
        raise UsageError(f"gpus_per_worker: {gpus:g} of a GPU: above one Ray gives whole ones only")
    if not is_local(config.ray_address):
        return "as the cluster has them: `probelog-index doctor` asks it"
    own_gpus = len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()])
    own_cpus = os.cpu_count() or 1
    if gpus > own_gpus:
        raise UsageError(
            f"gpus_per_worker: {gpus:g} of a GPU each, but this machine has {own_gpus or 'none'}: set gpus_per_worker to 0, "
            "or ray_address (RAY_ADDRESS) to a cluster that has them"
        )
    if cpus > own_cpus:
        raise UsageError(
            f"cpus_per_worker: {cpus:g} CPUs each, but this machine has {own_cpus}: ask for fewer"
        )
    return f"{own_cpus} CPUs and {own_gpus or 'no'} GPUs on this machine"


def encoder_embeds(config: Config) -> str:
    """Load the encoder, downloading it where it is on the Hub, and embed a text."""
    encoder = load_encoder(config.encoder)
    return f"{config.encoder}: {encoder.dimension} dimensions"


def generators_are_sampled(config: Config) -> str:
    """Have a small gallery sampled in a process of a generator's, which has the libraries of all of them.

    Raises:
        ProbeLogError: a library is missing or cannot be loaded, or the process does not do it.
    """
    if (missing := missing_library()) is not None:
        raise UsageError(missing)
    scratch = scratch_folder(config.scratch)
    started = time.monotonic()
    process = GeneratorProcess(generator_server(scratch, config.preload), GeneratorSpec())
    with tempfile.TemporaryDirectory(prefix="doctor-", dir=scratch) as folder:
        for number in range(LEAST_PICTURES):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(Path(folder, f"{number}.png"))
        try:
            loaded = process.load(Path(folder), "doctor/gallery", "0" * 40, _SAMPLE_SECONDS)
            count = len(process.sample(range(loaded.available or 0), _SAMPLE_SECONDS).pixels)
            process.release()
        finally:
            process.close()
    return f"{count} pictures came out of a confined process, in {time.monotonic() - started:.1f} s with its libraries"


def disk_has_room(config: Config) -> str:
    """Room in the scratch folder for preprocessed probes and for the models that are downloaded at a time.

    Raises:
        UsageError: there is less than the preprocessed probes may take.
    """
    folder = scratch_folder(config.scratch)
    free = shutil.disk_usage(folder).free
    if free < config.cache_bytes:
        raise UsageError(
            f"{folder} has {free / 1e9:,.1f} GB free, and preprocessed probes may take {config.cache_bytes / 1e9:,.1f} GB: "
            "make room, set scratch to another disk, or lower cache_bytes"
        )
    flying = config.in_flight * (config.workers or os.cpu_count() or 1)
    return (
        f"{folder} has {free / 1e9:,.1f} GB free: {config.cache_bytes / 1e9:,.1f} GB for preprocessed probes, the rest for "
        f"up to {flying} downloads at a time"
    )


def ray_has_room(config: Config) -> str:
    """Ray, and whether one of its nodes has the CPUs and GPUs that a worker asks for.

    Raises:
        ProbeLogError: it cannot be reached or started, or no node has them.
    """
    import ray

    with session(config.ray_address):
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fitting = [
        node
        for node in nodes
        if node.get("CPU", 0) >= config.cpus_per_worker and node.get("GPU", 0) >= config.gpus_per_worker
    ]
    cpus, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    held = f"{len(nodes)} nodes with {cpus:g} CPUs and {gpus:g} GPUs"
    if not fitting:
        raise ProbeLogError(
            f"{held}, none of them with {config.cpus_per_worker:g} CPUs and {config.gpus_per_worker:g} GPUs for one worker: "
            "ask for less (cpus_per_worker, gpus_per_worker), or add such nodes; where an autoscaler brings them when the job "
            "starts, this is as it should be"
        )
    return held


def gpus_compute(config: Config) -> str:
    """Compute on a GPU where workers have some.

    Raises:
        ProbeLogError: torch does not reach one.
    """
    if not config.gpus_per_worker:
        return "not used (gpus_per_worker is 0)"
    import ray

    with session(config.ray_address):
        task = ray.remote(num_cpus=0, num_gpus=config.gpus_per_worker, max_retries=0)(_computed)
        try:
            return str(ray.get(task.remote(), timeout=_GPU_SECONDS))
        except ray.exceptions.GetTimeoutError as error:
            raise ProbeLogError(
                f"no GPU was free within {_GPU_SECONDS:.0f} s: other jobs have them, or no node has any"
            ) from error
        except ray.exceptions.RayError as error:
            raise ProbeLogError(
                f"torch does not compute on a GPU there ({str(error).strip().splitlines()[-1][:300]}): check the driver "
                "(nvidia-smi) and that torch was installed for it (deploy/install.sh cuda)"
            ) from error


def _computed() -> str:
    import torch

    device = torch.cuda.current_device()
    assert float(torch.ones(8, device="cuda").sum()) == 8
    return f"{torch.cuda.get_device_name(device)}, {torch.cuda.mem_get_info(device)[1] / 1e9:,.0f} GB"


def _page(client: HubClient, config: Config) -> list[dict[str, Any]]:
    query: dict[str, Any] = {"limit": 5, "expand": ["siblings", "gated"]}
    if config.filters.pipeline_tag is not None:
        query["pipeline_tag"] = config.filters.pipeline_tag
    try:
        items = client.json("/api/models", query).value
    except HubRefusalError as error:
        if error.bad_token:
            raise UsageError(
                f"{client.endpoint} does not know HF_TOKEN: make a new one, or unset it"
            ) from error
        raise
    if not isinstance(items, list):
        raise HubError(f"{client.endpoint} lists no models: check HF_ENDPOINT")
    return [item for item in items if isinstance(item, dict) and isinstance(item.get("id"), str)]


def _body(answer: HubResponse, retry: Retry) -> list[bytes]:
    if answer.response.status_code != 200:
        raise answer.refusal()
    pieces, size = [], 0
    for piece in chunks(answer, retry, compressed=True):
        pieces.append(piece)
        size += len(piece)
        if size > _SMALL_FILE:
            raise HubError(f"{answer.url} is larger than a configuration is")
    return pieces
