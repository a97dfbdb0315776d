import collections
import hashlib
import io
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from probelog.errors import SchemaVersionError, StoreError, UsageError
from probelog.probes import probe_set
from probelog.probes.probe_set import COMMON, ProbeSet, common_probes, make_probe_set, subset
from probelog.probes.selection import THUMBNAIL_SIDE, Selection
from probelog.probes.sources import LeftOut, ProbeReport
from probelog.storage.store import Store
from tests.probelog.encoders.test_decoding import bomb, encoded
from tests.support.hub.tiny_hub import environment_for, serving
from tests.support.paths import BENCH as SHARED_BENCH
from tests.support.worlds import tiny_encoders
from tests.support.worlds.tiny_encoders import photo

BENCH = SHARED_BENCH / "probes" / "other-classes.parquet"


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture
def encoder():
    return tiny_encoders.encoder("clip")


@pytest.fixture
def pictures(tmp_path):
    """Ten photographs in nested folders."""
    folder = tmp_path / "pictures"
    for number in range(10):
        path = folder / ("deep/er" if number % 2 else ".") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(photo(20 + number, 30, seed=number)))
    return folder


def contents(found: ProbeSet) -> list[str]:
    return [hashlib.sha256(found.image_bytes(index)).hexdigest() for index in range(found.count)]


def hub_table(images: list[bytes | None]) -> pa.Table:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [None if data is None else {"bytes": data, "path": "x.png"} for data in images]
    return pa.table({"image": pa.array(rows, kind), "label": pa.array(range(len(images)))})


# Making and opening


def test_a_set_holds_what_was_chosen(pictures, store, encoder):
    made = make_probe_set(str(pictures), 6, 0, store, encoder)
    found = ProbeSet.open(store, made.hash)
    assert found.count == len(found) == 6
    files = {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in pictures.rglob("*.png")}
    facts = found.facts().to_pylist()
    assert [row["sha256"] for row in facts] == contents(found)
    for index, row in enumerate(facts):
        original = Image.open(files[row["sha256"]])
        assert row["id"] == index
        assert pictures / row["name"] == files[row["sha256"]]
        assert (row["width"], row["height"]) == original.size
        np.testing.assert_array_equal(np.asarray(found.image(index)), np.asarray(original))
    embeddings = found.embeddings(encoder.digest)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(embeddings, encoder.embed_images(found.images()), atol=1e-5)
    thumbnails = [Image.open(io.BytesIO(data)) for data in found.thumbnails()]
    assert len(thumbnails) == 6
    assert max(max(image.size) for image in thumbnails) <= THUMBNAIL_SIDE


def test_open_by_the_first_digits_and_after_a_journey(pictures, store, encoder):
    made = make_probe_set(str(pictures), 4, 0, store, encoder)
    travelled = pickle.loads(pickle.dumps(ProbeSet.open(store, made.hash[:16])))
    assert travelled.hash == made.hash
    assert contents(travelled) == contents(made)


def test_indices(pictures, store, encoder):
    found = make_probe_set(str(pictures), 4, 0, store, encoder)
    sizes = [image.size for image in found.images()]
    assert [image.size for image in found.images(np.array([3, 0]))] == [sizes[3], sizes[0]]
    for wrong in (-1, 4):
        with pytest.raises(IndexError, match="0 to 3"):
            found.image(wrong)


def test_images_lie_in_parts(pictures, store, encoder, monkeypatch):
    whole = make_probe_set(str(pictures), None, 0, store, encoder)
    monkeypatch.setattr(probe_set, "_PART_BYTES", 5000)
    other = Store(store.path("other"))
    parts = make_probe_set(str(pictures), None, 0, other, encoder)
    names = [name for name in other.names("probes", ".parquet") if "images-" in name]
    assert len(names) > 2
    assert parts.hash == whole.hash
    assert contents(parts) == contents(whole)


def test_a_set_on_an_object_store(pictures, encoder, monkeypatch):
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name, value in (("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "x"), ("REGION", "us-east-1")):
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        import boto3

        boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket="probes")
        store = Store("s3://probes/here")
        made = make_probe_set(str(pictures), 5, 0, store, encoder)
        found = ProbeSet.open(store, made.hash)
        assert len(list(found.images())) == 5
        assert found.embeddings(encoder.digest).shape == (5, encoder.dimension)
    finally:
        server.stop()


# The choice


def test_the_choice_depends_on_contents_and_seed_alone(pictures, tmp_path, store, encoder):
    shuffled = tmp_path / "shuffled"
    shuffled.mkdir()
    paths = sorted(pictures.rglob("*.png"))
    random.Random(1).shuffle(paths)
    for number, path in enumerate(paths):
        (shuffled / f"{number:02}.bin").write_bytes(path.read_bytes())
    pq.write_table(hub_table([path.read_bytes() for path in paths[::-1]]), tmp_path / "images.parquet")
    sources = (pictures, shuffled, tmp_path / "images.parquet")
    sets = [make_probe_set(str(source), 6, 3, store, encoder) for source in sources]
    assert len({found.hash for found in sets}) == 1
    assert make_probe_set(str(pictures), 6, 4, store, encoder).hash != sets[0].hash


def test_a_larger_set_extends_a_smaller_one(pictures, store, encoder):
    whole = contents(make_probe_set(str(pictures), None, 0, store, encoder))
    assert len(whole) == 10
    for count in (1, 4, 10):
        assert contents(make_probe_set(str(pictures), count, 0, store, encoder)) == whole[:count]


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(12)), count=st.integers(1, 8))
def test_one_pass_finds_the_smallest_keys_in_any_order(tmp_path_factory, order, count):
    images = [encoded(photo(8, 8, seed=number)) for number in range(8)]
    images += [images[0], encoded(photo(8, 8, seed=1), "BMP"), encoded(photo(8, 8, seed=2), "BMP"), b"broken"]

    def chosen(sequence):
        spool = tmp_path_factory.mktemp("spool")
        selection = Selection(0, count, spool)
        for number in sequence:
            selection.offer(f"{number}", images[number])
        found, reports = selection.result()
        assert len(list(spool.iterdir())) == 2 * len(found)
        return [item.sha256 for item in found], [report.reason for report in reports]

    assert chosen(order) == chosen(range(12))
    assert len(chosen(order)[0]) == count


# What is left out


def test_what_is_left_out_is_reported(pictures, tmp_path, store, encoder):
    (pictures / "again.png").write_bytes((pictures / "0.png").read_bytes())
    (pictures / "again.bmp").write_bytes(encoded(Image.open(pictures / "2.png"), "BMP"))
    (pictures / "cut.jpg").write_bytes(encoded(photo(64, 64), "JPEG")[:-300])
    (pictures / "bomb.png").write_bytes(bomb())
    (pictures / "notes.txt").write_text("no image")
    (pictures / "empty.png").touch()
    (pictures / "fake.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(20))
    (pictures / ".hidden.png").write_bytes(encoded(photo(5, 5)))
    (tmp_path / "secret.png").write_bytes(encoded(photo(50, 50, seed=99)))
    (pictures / "link.png").symlink_to(tmp_path / "secret.png")
    (pictures / "loop.png").symlink_to(pictures / "loop.png")
    (pictures / "inside.png").symlink_to(pictures / "4.png")
    (pictures / "loop").symlink_to(pictures)
    os.mkfifo(pictures / "pipe.png")
    found = make_probe_set(str(pictures), None, 0, store, encoder)
    assert found.count == 10
    reasons = {report.source: report.reason for report in found.left_out}
    assert reasons.pop("again.bmp", None) or reasons.pop("2.png", None) is LeftOut.DUPLICATE
    assert reasons == {
        "again.png": LeftOut.DUPLICATE,
        "bomb.png": LeftOut.TOO_LARGE,
        "cut.jpg": LeftOut.UNREADABLE,
        "empty.png": LeftOut.NOT_AN_IMAGE,
        "fake.png": LeftOut.UNREADABLE,
        "inside.png": LeftOut.DUPLICATE,
        "link.png": LeftOut.OUTSIDE,
        "notes.txt": LeftOut.NOT_AN_IMAGE,
    }
    assert found.left_out_counts == collections.Counter(report.reason for report in found.left_out)
    assert ProbeReport("again.png", LeftOut.DUPLICATE, "same file as 0.png") in found.left_out


def test_every_kind_of_image_is_taken(tmp_path, store, encoder):
    folder = tmp_path / "kinds"
    folder.mkdir()
    kinds = [("L", "PNG"), ("RGBA", "PNG"), ("P", "GIF"), ("CMYK", "JPEG"), ("CMYK", "TIFF"), ("1", "BMP")]
    for seed, (mode, kind) in enumerate([*kinds, ("RGB", "WEBP")]):
        (folder / f"{mode}.{kind}").write_bytes(encoded(photo(40, 30, seed).convert(mode), kind))
    deep = Image.fromarray(np.asarray(photo(40, 30).convert("L")).astype(np.uint16) * 250)
    (folder / "deep").write_bytes(encoded(deep))
    found = make_probe_set(str(folder), None, 0, store, encoder)
    assert found.left_out == []
    assert found.count == 8
    assert {picture.mode for picture in found.images()} == {"RGB"}


@pytest.mark.skipif(sys.platform == "win32", reason="names that are not UTF-8")
def test_odd_names(tmp_path, store, encoder):
    folder = tmp_path / "odd"
    folder.mkdir()
    names = [b"\xff\xfe.png", "猫 ä\n'.png".encode(), b"#1?%20.png", b"-n"]
    for number, name in enumerate(names):
        Path(os.fsdecode(bytes(folder) + b"/" + name)).write_bytes(encoded(photo(9, 9, seed=number)))
    found = make_probe_set(str(folder), None, 0, store, encoder)
    assert found.count == 4
    assert {"猫 ä\n'.png", "#1?%20.png", "-n"} < set(found.facts()["name"].to_pylist())


def test_too_few_images_say_why(pictures, store, encoder):
    (pictures / "again.png").write_bytes((pictures / "0.png").read_bytes())
    with pytest.raises(
        UsageError, match=r"10 usable images of 11 found, 11 needed \(left out: 1 duplicate\)"
    ):
        make_probe_set(str(pictures), 11, 0, store, encoder)
    assert store.names("probes") == []


# Parquet


@pytest.mark.parametrize(
    "table",
    [
        hub_table,
        lambda images: pa.table(
            {"picture": hub_table(images)["image"], "image_id": pa.array(range(len(images)))}
        ),
        lambda images: pa.table(
            {"data": pa.array(images, pa.large_binary()), "n": pa.array(range(len(images)))}
        ),
        lambda images: pa.table({"image": pa.array(images, pa.binary_view())}),
        lambda images: pa.table(
            {
                "image": pa.array(
                    [data and {"bytes": data, "path": "a.png"} for data in images],
                    pa.struct([("bytes", pa.binary_view()), ("path", pa.large_string())]),
                ),
                "tags": pa.array([["a"]] * len(images), pa.list_view(pa.string())),
            }
        ),
        lambda images: pa.table(
            {"image": pa.array(images, pa.binary()), "mask": pa.array(images, pa.binary())}
        ),
    ],
)
def test_image_columns_are_found(tmp_path, store, encoder, table):
    images = [encoded(photo(9, 9, seed=number)) for number in range(5)]
    made = table([*images[:2], None, *images[2:]])
    rows = None if "view" in str(made.schema) else 2  # pyarrow 26 cannot cut views into row groups
    pq.write_table(made, tmp_path / "some.parquet", row_group_size=rows)
    found = make_probe_set(str(tmp_path / "some.parquet"), None, 0, store, encoder)
    assert set(found.facts()["sha256"].to_pylist()) == {hashlib.sha256(data).hexdigest() for data in images}
    assert found.left_out_counts == {LeftOut.NO_BYTES: 1}
    assert [report.source for report in found.left_out] == ["some.parquet#2"]


def test_patterns_and_folders_of_parquet(tmp_path, store, encoder):
    folder = tmp_path / "data"
    folder.mkdir()
    for part in range(3):
        images = [encoded(photo(9, 9, seed=10 * part + number)) for number in range(4)]
        pq.write_table(hub_table(images), folder / f"train-{part}.parquet")
    (folder / "README.md").write_text("about")
    pattern = make_probe_set(str(folder / "train-*.parquet"), None, 0, store, encoder)
    whole = make_probe_set(str(folder), None, 0, store, encoder)
    assert pattern.count == 12
    assert pattern.hash == whole.hash


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b"PAR1 but not really PAR1"),
        lambda path: path.write_bytes(b""),
        lambda path: pq.write_table(pa.table({"text": ["a"]}), path),
        lambda path: pq.write_table(pa.table({"a": [b"x"], "b": [b"y"]}), path),
    ],
)
def test_parquet_without_images(tmp_path, store, encoder, write):
    write(tmp_path / "bad.parquet")
    with pytest.raises(UsageError, match=r"bad\.parquet"):
        make_probe_set(str(tmp_path / "bad.parquet"), 1, 0, store, encoder)


@pytest.mark.parametrize("source", ["/nowhere/at/all", "nothing-*.parquet", ""])
def test_no_such_source(source, store, encoder):
    with pytest.raises(UsageError, match="no such folder"):
        make_probe_set(source, 1, 0, store, encoder)


def test_a_set_of_no_images_is_refused(pictures, store, encoder):
    with pytest.raises(UsageError, match="at least one"):
        make_probe_set(str(pictures), 0, 0, store, encoder)


# Resuming


class Tell(list):
    def __call__(self, what, done, total):
        self.append((what, done, total))


def test_a_second_run_does_nothing(pictures, store, encoder):
    first, second = Tell(), Tell()
    made = make_probe_set(str(pictures), 4, 0, store, encoder, first)
    before = {name: store.read(name) for name in store.names("probes")}
    again = make_probe_set(str(pictures), 4, 0, store, encoder, second)
    assert again.hash == made.hash
    assert first[-1] == ("embeddings", 4, 4)
    assert second == []
    assert {name: store.read(name) for name in store.names("probes")} == before


def test_a_changed_source_is_read_again(pictures, store, encoder):
    made = make_probe_set(str(pictures), None, 0, store, encoder)
    (pictures / "0.png").write_bytes(encoded(photo(77, 7)))
    assert make_probe_set(str(pictures), None, 0, store, encoder).hash != made.hash


class KilledError(BaseException):
    pass


@pytest.mark.parametrize("what", ["images", "embeddings"])
def test_a_killed_run_leaves_no_set_and_is_finished_by_the_next(pictures, store, encoder, what):
    def kill(stage, done, total):
        if stage == what:
            raise KilledError

    with pytest.raises(KilledError):
        make_probe_set(str(pictures), 4, 0, store, encoder, kill)
    for name in store.names("probes"):
        with pytest.raises(UsageError, match="interrupted"):
            ProbeSet.open(store, name.split("/")[1])
    assert make_probe_set(str(pictures), 4, 0, store, encoder).embeddings(encoder.digest).shape[0] == 4


def test_another_encoder_is_added(pictures, store, encoder):
    made = make_probe_set(str(pictures), 4, 0, store, encoder)
    other = tiny_encoders.encoder("siglip")
    with pytest.raises(UsageError, match="no embeddings by encoder"):
        made.embeddings(other.digest)
    again = make_probe_set(str(pictures), 4, 0, store, other)
    assert again.hash == made.hash
    assert again.embeddings(other.digest).shape == (4, other.dimension)
    assert made.has_embeddings(encoder.digest)
    assert made.has_embeddings(other.digest)


# Damage


def test_damaged_files_are_noticed(pictures, store, encoder):
    made = make_probe_set(str(pictures), 4, 0, store, encoder)
    reads = {"images-": lambda s: s.image(0), "thumbnails": lambda s: s.thumbnails()}
    reads["embeddings-"] = lambda s: s.embeddings(encoder.digest)
    for name in store.names(f"probes/{made.hash[:16]}", ".parquet"):
        read = next(read for start, read in reads.items() if Path(name).name.startswith(start))
        data = store.read(name)
        store.write(name, data[:100] + b"?" + data[101:])
        with pytest.raises(StoreError, match="SHA-256"):
            read(ProbeSet.open(store, made.hash))
        store.delete(name)
        with pytest.raises(StoreError, match="missing"):
            read(ProbeSet.open(store, made.hash))
        store.write(name, data)
        read(ProbeSet.open(store, made.hash))


def test_manifests_of_another_make_are_refused(pictures, store, encoder):
    made = make_probe_set(str(pictures), 4, 0, store, encoder)
    name = f"probes/{made.hash[:16]}/manifest.json"
    manifest = store.read_json(name)
    for change, error in (({"version": 99}, SchemaVersionError), ({"kind": "other"}, StoreError)):
        store.write_json(name, manifest | change)
        with pytest.raises(error):
            ProbeSet.open(store, made.hash)
    with pytest.raises(UsageError, match="no probe set"):
        ProbeSet.open(store, "0" * 64)


# Subsets

KNOWN = [4, 28, 32, 42, 50, 51, 57, 87, 95, 97]

arguments = {
    "probe_set_hash": st.text("0123456789abcdef", min_size=1, max_size=64),
    "repo": st.text(min_size=1, max_size=20),
    "sha": st.text("0123456789abcdef", max_size=40),
    "seed": st.integers(-(2**70), 2**70),
    "n": st.integers(1, 300),
}


@given(**arguments, fraction=st.floats(0.0001, 1.0))
def test_a_subset_is_ascending_and_of_the_size_asked_for(probe_set_hash, repo, sha, seed, n, fraction):
    found = subset(probe_set_hash, repo, sha, seed, fraction, n)
    assert found.dtype == np.int32
    assert len(found) == max(1, round(fraction * n))
    assert (np.diff(found) > 0).all()
    assert found[0] >= 0
    assert found[-1] < n
    np.testing.assert_array_equal(found, subset(probe_set_hash, repo, sha, seed, fraction, n))


@given(**arguments, fractions=st.tuples(st.floats(0.0001, 1.0), st.floats(0.0001, 1.0)))
def test_smaller_fractions_lie_within_larger_ones(probe_set_hash, repo, sha, seed, n, fractions):
    small, large = (subset(probe_set_hash, repo, sha, seed, fraction, n) for fraction in sorted(fractions))
    assert set(small.tolist()) <= set(large.tolist())


@given(n=st.integers(1, 500))
def test_the_whole_fraction_takes_every_probe(n):
    np.testing.assert_array_equal(subset("set", "a/b", "sha", 0, 1.0, n), np.arange(n))


def test_subsets_never_change():
    """A store says of each model which probes it saw; models that are added to it should share theirs with the others."""
    assert subset("ab" * 32, "owner/name", "cd" * 20, 7, 0.1, 100).tolist() == KNOWN


def test_every_argument_matters():
    base = ("set", "a/b", "sha", 0)
    others = [
        ("tes", "a/b", "sha", 0),
        ("set", "a/c", "sha", 0),
        ("set", "a/b", "sah", 0),
        ("set", "a/b", "sha", 1),
    ]
    seen = {tuple(subset(*key, 0.5, 200).tolist()) for key in [base, *others]}
    assert len(seen) == 5


def test_most_probes_are_common_and_the_rest_are_drawn_evenly_and_independently():
    """2,000 models at a fifth of 200 probes: 30 are everybody's; counts per probe and per pair of the others as for fair draws."""
    n, models, size, common = 200, 2000, 40, 30
    seen = np.zeros((models, n), bool)
    for model in range(models):
        seen[model, subset("set", f"owner/{model}", "sha", 0, size / n, n)] = True
    assert (seen.sum(0) == models).sum() == common
    others, own = seen[:, seen.sum(0) < models], size - common
    rest = others.shape[1]
    expected = models * own / rest
    chi_square = float(((others.sum(0) - expected) ** 2 / (expected * (1 - own / rest))).sum())
    assert abs(chi_square - rest) < 5 * (2 * rest) ** 0.5
    pairs = (others.T.astype(int) @ others.astype(int))[np.triu_indices(rest, 1)]
    pair_rate = own * (own - 1) / (rest * (rest - 1))
    assert abs(pairs.mean() - models * pair_rate) < 1e-9
    assert abs(pairs.var() / (models * pair_rate) - 1) < 0.1


@given(n=st.integers(1, 300), fraction=st.floats(0.0001, 1.0), seed=st.integers(0, 9))
def test_what_models_have_in_common_depends_on_set_and_seed_alone(n, fraction, seed):
    common = set(common_probes("set", seed, fraction, n).tolist())
    assert len(common) == int(COMMON * max(1, round(fraction * n)))
    for model in "abc":
        assert common <= set(subset("set", model, "sha", seed, fraction, n).tolist())


def test_other_sets_and_seeds_have_others_in_common():
    assert len({tuple(common_probes(*key, 0.1, 400)) for key in [("set", 0), ("set", 1), ("tes", 0)]}) == 3


@pytest.mark.parametrize(("fraction", "n"), [(0.0, 10), (-1.0, 10), (1.1, 10), (float("nan"), 10), (0.5, 0)])
def test_meaningless_subsets_are_refused(fraction, n):
    with pytest.raises(UsageError):
        subset("set", "a/b", "sha", 0, fraction, n)


def test_bench_probes(store):
    if not BENCH.is_file():
        pytest.skip(f"bench data missing: {BENCH}")
    encoder = tiny_encoders.encoder("clip")
    found = make_probe_set(str(BENCH), 50, 0, store, encoder)
    assert found.count == 50
    assert found.left_out == []
    assert {image.size for image in found.images()} == {(64, 64)}


# The Hub, over a real socket

_READ = """
import hashlib, sys
from probelog.errors import ProbeLogError
from probelog.probes.sources import candidates, source_files
for source in sys.argv[1:]:
    try:
        print(*sorted(hashlib.sha256(data).hexdigest() for _, data in candidates(source_files(source)[0])))
    except ProbeLogError as error:
        print(type(error).__name__, error)
"""


def read_elsewhere(endpoint: str, home: Path, *sources: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", _READ, *sources],
        env=environment_for(endpoint, home),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().split("\n")


def test_parquet_from_the_hub(tmp_path):
    data = tmp_path / "repository" / "data"
    data.mkdir(parents=True)
    images = [encoded(photo(9, 9, seed=number)) for number in range(8)]
    pq.write_table(hub_table(images[:4]), data / "train-0.parquet")
    pq.write_table(hub_table(images[4:]), data / "train-1.parquet")
    (data / "test.parquet").write_bytes(b"not asked for")
    with serving(tmp_path / "repository", "datasets") as endpoint:
        found, missing = read_elsewhere(
            endpoint,
            tmp_path,
            "hf://datasets/owner/name/data/train-*.parquet",
            "hf://datasets/owner/name/other/*.parquet",
        )
    assert found.split() == sorted(hashlib.sha256(image).hexdigest() for image in images)
    assert missing.startswith("UsageError")


def test_a_hub_that_cannot_be_reached(tmp_path):
    [answer] = read_elsewhere("http://127.0.0.1:9", tmp_path, "hf://datasets/owner/name/*.parquet")
    assert answer.startswith("ProbeLogError")
    assert "Set HF_ENDPOINT" in answer
