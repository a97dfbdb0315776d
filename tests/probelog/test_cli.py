"""The analyst's command line: readable tables, stable JSON, exit statuses, and no untrusted bytes on the terminal."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import unicodedata
from pathlib import Path
from typing import NamedTuple

import pytest
from rich.cells import cell_len
from typer.testing import CliRunner

from probelog import __version__, cli
from probelog.index.schema import INDEX_VERSION
from probelog.storage.checksummed_json import sealed_json
from probelog.storage.store import Store
from probelog.trees.edges import Edge, Relation, edge_table
from tests.support.worlds.small_index import Model, SmallIndex, build
from tests.support.worlds.tiny_encoders import photo


class Ended(NamedTuple):
    status: int
    out: str
    err: str


class Run:
    """Runs the command in this process, as its entry point does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: str | Path) -> Ended:
        self._monkeypatch.setattr(sys, "argv", ["probelog", *map(str, arguments)])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        code = ended.value.code
        return Ended(code if isinstance(code, int) else 0, *self._capsys.readouterr())


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.delenv("PROBELOG_INDEX", raising=False)
    return Run(monkeypatch, capsys)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallIndex:
    return build(Store(tmp_path_factory.mktemp("small") / "index"))


@pytest.fixture
def uri(small: SmallIndex, monkeypatch: pytest.MonkeyPatch) -> str:
    return small.store.uri


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build(Store(tmp_path_factory.mktemp("words") / "index"), kind="dual", images=False).store.uri


def harmless(text: str) -> bool:
    return not any(
        unicodedata.category(char) in {"Cc", "Cf", "Co", "Cs", "Zl", "Zp"} for char in text.replace("\n", "")
    )


def test_the_table(run: Run, uri: str) -> None:
    done = run("search", "dog", "--index", uri, "-k", "1000")
    assert done.status == 0
    assert done.err.startswith("ordered by score; confidence also weighs"), "and nothing else"
    assert done.err.count("\n") == 1
    head, *rows = done.out.splitlines()
    assert re.split(r"\s{2,}", head.strip()) == [
        "#",
        "repository",
        "class",
        "declared label",
        "confidence",
        "score",
        "licence",
        "downloads",
    ]
    assert len(rows) == 32, "one line an answer: nothing is folded in a pipe"
    pets = next(row for row in rows if "anna/pets" in row and "Golden" in row)
    cells = re.split(r"\s{2,}", pets.strip())
    assert cells[1:4] == ["anna/pets (+2 copies)", "2", "Golden_Retriever"]
    assert cells[4].endswith("%")
    assert cells[6:] == ["mit", "1,200"]
    assert float(cells[5]) == pytest.approx(float(cells[5]), abs=10)
    unknown = next(row for row in rows if "[red]name[/red]" in row)
    assert unknown.rstrip().endswith("7")
    assert " -  " in unknown
    assert any("not hot dog" in row for row in rows)
    assert any("고양이" in row for row in rows)


def test_a_query_by_image_and_by_logit(run: Run, uri: str, tmp_path: Path) -> None:
    photo(40, 30).save(tmp_path / "a.png")
    photo(30, 40).save(tmp_path / "b.png")
    one = run("search", "--image", tmp_path / "a.png", "--index", uri)
    both = run("search", "--image", tmp_path / "a.png", "--image", tmp_path / "b.png", "--index", uri)
    like = run("search", "--like", "anna/pets#1", "--index", uri)
    assert [done.status for done in (one, both, like)] == [0, 0, 0]
    assert len({one.out, both.out, like.out}) == 3


def test_json_is_an_object_a_line(run: Run, uri: str, small: SmallIndex) -> None:
    done = run("search", "dog", "--index", uri, "-k", "1000", "--json")
    assert (done.status, done.err) == (0, "")
    hits = [json.loads(line) for line in done.out.splitlines()]
    assert [hit["rank"] for hit in hits] == list(range(1, 33))
    assert {"repo", "sha", "logit", "label", "score", "rank"} <= set(hits[0])
    assert [hit["score"] for hit in hits] == sorted((hit["score"] for hit in hits), reverse=True)
    hostile = next(model for model in small.models if model.repo == "eve/hostile")
    labels = {hit["logit"]: hit["label"] for hit in hits if hit["repo"] == "eve/hostile"}
    assert [labels[i] for i in range(len(labels))] == list(hostile.labels), "JSON loses nothing"
    assert done.out.isascii()


def test_nothing_found(run: Run, uri: str) -> None:
    done = run("search", "dog", "--index", uri, "--where", "false")
    assert (done.status, done.out) == (0, "nothing in this index meets the filter\n")
    done = run("search", "dog", "--index", uri, "--where", "false", "--json")
    assert (done.status, done.out) == (0, "")


def test_show(run: Run, uri: str) -> None:
    done = run("show", "anna/pets", "--index", uri)
    assert done.status == 0
    assert "1,200 downloads" in done.out
    assert "the same weights: bert/pets-copy, carl/pets-copy" in done.out
    assert "Golden_Retriever" in done.out
    summary = json.loads(run("show", "dora/hot-dog", "--index", uri, "--json", "-c", "2").out)
    assert [item["negated"] for item in summary["logits"]] == [False, True]
    assert len(summary["logits"][0]["concepts"]) == 2


def test_info(run: Run, uri: str) -> None:
    done = run("info", "--index", uri)
    assert (done.status, done.err) == (0, "")
    assert re.search(r"^models +8$", done.out, re.MULTILINE)
    assert json.loads(run("info", "--index", uri, "--json").out)["logits"] == 40


@pytest.mark.parametrize("more", [(), ("--json",)])
@pytest.mark.parametrize(
    "command",
    [
        ("search", "dog", "-k", "1000"),
        ("search", "\x1b[2Jdog\x07"),
        ("search", "--like", "eve/hostile#3", "-k", "1000"),
        ("search", "--like", "eve/hostile#\x1b[2J"),
        ("search", "--like", "eve/red#0"),
        ("search", "--like", "\x1b]0;owned\x07#1"),
        ("search", "--like", "\x9b2J\u202e"),
        ("search", "--image", "\x1b[2J\u202e.png"),
        ("search", "dog", "--where", "licence = '\x1b[2J\u202e'"),
        ("search", "dog", "--where", "\x1b[2J\x9b \u202e"),
        ("search", "dog", "--where", "\x1b[31m = 1"),
        ("show", "eve/hostile"),
        ("show", "eve/[red]name[/red]\x1b[31m"),
        ("show", "eve/[red]name[/red]\x1b[31"),
        ("show", "\x1b[2J\u202e"),
        ("info",),
    ],
)
def test_no_control_characters_get_through(
    run: Run, uri: str, command: tuple[str, ...], more: tuple[str, ...]
) -> None:
    done = run(*command, *more, "--index", uri)
    assert harmless(done.out)
    assert harmless(done.err)
    assert done.status in (0, 2)
    assert "Traceback" not in done.err


def test_markup_is_not_interpreted(run: Run, uri: str) -> None:
    shown = run("show", "eve/hostile", "--index", uri).out
    assert "[red]x[/red]" in shown
    assert "[link=http://example.org]y[/link]" in shown
    assert "\ufffd[31mred\ufffd[0m" in shown
    assert "x" * 59 + "…" in shown


def test_hostile_addresses_and_options(run: Run, tmp_path: Path) -> None:
    for arguments in (
        ("search", "dog", "--index", f"{tmp_path}/\x1b[2J\u202e"),
        ("search", "dog", "--index", "\x1b[2J://x"),
        ("search", "--\x1b[2J"),
        ("search", "dog", "-k", "\x1b[2J"),
        ("\x1b[2J",),
    ):
        done = run(*arguments)
        assert done.status == 2
        assert "\x1b" not in done.out + done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Usage: probelog"),
        (("search",), "Missing option"),
        (("search", "dog"), "PROBELOG_INDEX"),
        (("search", "dog", "--bogus"), "No such option"),
        (("bogus",), "No such command"),
        (("search", "dog", "-k", "0"), "greater than or equal to 1"),
        (("search", "dog", "-k", "many"), "integer"),
        (("show", "--index", "x"), "Missing argument"),
    ],
)
def test_wrong_usage(run: Run, arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert done.status == 2
    assert message in done.err + done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("search",), "the query is empty"),
        (("search", "--not", "dog"), "the query is empty"),
        (("search", "dog", "--not", " "), "the query is empty"),
        (("search", "dog", "--model", "anna/pets"), "--model finds models"),
        (("search", "--model", "anna/pet"), "did you mean anna/pets"),
        (("search", ""), "the query is empty"),
        (("search", "  "), "the query is empty"),
        (("search", "dog", "--where", "lisence = 'mit'"), "licence, tags"),
        (("search", "dog", "--where", ""), "the filter is empty"),
        (("search", "--like", "anna/pet#1"), "did you mean anna/pets"),
        (("search", "--image", "none.png"), "none.png: No such file"),
        (("show", "anna/pet"), "did you mean anna/pets"),
    ],
)
def test_questions_without_meaning(run: Run, uri: str, arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments, "--index", uri)
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert done.err.startswith("probelog: ")


def test_unknown_words(run: Run, words: str) -> None:
    done = run("search", "허스키", "--index", words)
    assert (done.status, done.out) == (2, "")
    assert "'허스키'" in done.err
    assert "try English" in done.err
    done = run("search", "zebra dog", "--index", words, "--json")
    assert done.status == 0
    assert done.err == "note: the text encoder does not know 'zebra'; the answer rests on the other words\n"
    assert all(json.loads(line) for line in done.out.splitlines())
    done = run("search", "--image", "a.png", "--index", words)
    assert (done.status, "cannot be searched by image" in done.err) == (2, True)


def test_the_index_comes_from_the_environment(run: Run, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROBELOG_INDEX", uri)
    assert run("search", "dog").status == 0
    assert run("info").status == 0
    monkeypatch.setenv("PROBELOG_INDEX", "/nowhere")
    assert run("search", "dog").status == 2
    assert run("search", "dog", "--index", uri).status == 0


def pointer(**changes: object) -> bytes:
    facts = {"version": 1, "generation": "x", "source": "s", "published": "p", "files": "f", "serial": 1}
    return sealed_json(facts | {"previous": [], "withdrawn": [], "retired": {}} | changes)


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (None, 2, "no published index at"),
        (b"", 1, "is damaged"),
        (b"{", 1, "is damaged"),
        (b"[]", 1, "is damaged"),
        (b"null", 1, "is damaged"),
        (b"\xff\xfe", 1, "is damaged"),
        (b"[" * 100_000, 1, "is damaged"),
        (pointer(version="x"), 1, "is damaged"),
        (pointer(version=1e400), 1, "is damaged"),
        (pointer(generation=3), 1, "is damaged"),
        (pointer(generation=""), 1, "is damaged"),
        (pointer(previous=[3]), 1, "is damaged"),
        (pointer(previous=[{"generation": "x"}]), 1, "is damaged"),
        (pointer(generation="../../x"), 1, "is not a generation's name"),
        (pointer(generation="\x1b[2J"), 1, "is not a generation's name"),
        (pointer(), 1, "publish again or roll back"),
        (pointer(version=INDEX_VERSION + 1), 1, "Upgrade ProbeLog"),
    ],
)
def test_an_index_that_cannot_be_opened(
    run: Run, tmp_path: Path, content: bytes | None, status: int, message: str
) -> None:
    store = Store(tmp_path / "index")
    store.write("observations/part.parquet", b"x")
    if content is not None:
        store.write("current.json", content)
    done = run("search", "dog", "--index", tmp_path)
    assert (done.status, done.out) == (status, "")
    assert message in done.err
    assert harmless(done.err)
    assert "Traceback" not in done.err


def test_a_generation_of_a_newer_version(run: Run, tmp_path: Path) -> None:
    build(Store(tmp_path / "index"), settings={"version": INDEX_VERSION + 1})
    done = run("search", "dog", "--index", tmp_path)
    assert done.status == 1
    assert "Upgrade ProbeLog" in done.err


def test_version(run: Run) -> None:
    assert run("--version") == Ended(0, f"probelog {__version__}\n", "")


def test_with_typers_own_runner(uri: str) -> None:
    done = CliRunner().invoke(cli.app, ["search", "dog", "--index", uri, "-k", "2"])
    assert done.exit_code == 0
    assert len(done.stdout.splitlines()) == 3
    done = CliRunner().invoke(cli.app, ["search", "--help"])
    for option in ("--index", "--image", "--like", "--where", "--json", "PROBELOG_INDEX"):
        assert option in done.stdout


# For other programs


def test_models_are_listed(run: Run, uri: str) -> None:
    done = run("models", "--index", uri, "--where", "License = 'MIT' AND downloads > 20")
    assert (done.status, done.err) == (0, "")
    assert [re.split(r"\s{2,}", line.strip()) for line in done.out.splitlines()] == [
        ["repository", "library", "architecture", "classes", "licence", "downloads"],
        ["anna/pets", "timm", "resnet18", "4", "mit", "1,200"],
    ]
    few = run("models", "--index", uri, "-k", "2", "--sort", "repo", "--json")
    assert [json.loads(line)["repo"] for line in few.out.splitlines()] == ["anna/pets", "bert/pets-copy"]
    assert few.err == "note: there are more models than these 2: raise -k, or narrow --where\n"
    assert run("models", "--index", uri, "--where", "false").out == "nothing in this index meets the filter\n"
    wrong = run("models", "--index", uri, "--sort", "download")
    assert (wrong.status, wrong.out) == (2, "")
    assert "did you mean downloads?" in wrong.err


def test_quiet_prints_names_alone(run: Run, uri: str, forest: str) -> None:
    assert run("models", "-q", "-k", "2", "--index", uri) == Ended(0, "emil/things\nanna/pets\n", "")
    found = run("search", "dog", "-q", "-k", "1000", "--index", uri)
    names = found.out.splitlines()
    assert (found.status, found.err, len(names)) == (0, "", 31), "the opposite of a logit has its name"
    assert "anna/pets#1" in names
    assert run("show", "dora/hot-dog", "-q", "--index", uri).out == "dora/hot-dog#0\n"
    assert run("search", "--model", "anna/pets", "-q", "-k", "1", "--index", uri).out.count("\n") == 1
    assert run("domain", "cat", "dog", "-q", "-k", "1", "--index", uri).out.count("\n") == 1
    assert run("tree", "a/child", "-q", "--index", forest).out.splitlines()[:2] == ["a/child", LATENT]
    assert run("licences", "-q", "--index", forest).out == "a/merge\n"


@pytest.mark.parametrize(
    "command",
    [
        ("search", "dog", "-k", "1000"),
        ("search", "--model", "anna/pets"),
        ("models",),
        ("show", "eve/hostile"),
        ("domain", "cat", "dog"),
        ("info",),
    ],
)
def test_csv_is_safe_and_complete(run: Run, uri: str, command: tuple[str, ...]) -> None:
    done = run(*command, "--format", "csv", "--index", uri)
    assert (done.status, harmless(done.out)) == (0, True)
    head, *rows = csv.reader(io.StringIO(done.out))
    assert rows
    assert {len(row) for row in rows} == {len(head)}
    if command != ("info",):
        lines = run(*command, "--format", "json", "--index", uri).out.splitlines()
        assert len(rows) == len(json.loads(lines[0])["logits"] if command[0] == "show" else lines)


def test_the_forest_as_csv(run: Run, forest: str) -> None:
    tree = run("tree", "a/child", "--format", "csv", "--index", forest).out.splitlines()
    assert tree[0].startswith("child,parent,relation,probability")
    assert len(tree) == 4
    conflicts = run("licences", "--format", "csv", "--index", forest).out.splitlines()
    assert conflicts[0] == "kind,child,parent,child_licence,parent_licence,reason,probability"
    assert conflicts[1].startswith("undeclared,a/merge,a/child,mit,mit,")


def test_a_file_of_queries(run: Run, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "names.txt"
    file.write_bytes("\ufeffdog\r\n\n  hot dog \n고양이\n".encode())
    done = run("search", "--queries", file, "-k", "3", "--index", uri)
    answers = [json.loads(line) for line in done.out.splitlines()]
    assert (done.status, [answer["query"] for answer in answers]) == (0, ["dog", "hot dog", "고양이"])
    alone = [
        json.loads(line)
        for line in run("search", "dog", "-k", "3", "--json", "--index", uri).out.splitlines()
    ]
    assert [(hit["repo"], hit["logit"]) for hit in answers[0]["hits"]] == [
        (hit["repo"], hit["logit"]) for hit in alone
    ]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"dog\ncat\n")))
    rows = [
        *csv.DictReader(
            io.StringIO(run("search", "--queries", "-", "-k", "2", "--format", "csv", "--index", uri).out)
        )
    ]
    assert [(row["query"], row["rank"]) for row in rows] == [
        ("dog", "1"),
        ("dog", "2"),
        ("cat", "1"),
        ("cat", "2"),
    ]
    mixed = run("search", "dog", "--queries", file, "--index", uri)
    assert (mixed.status, "--queries can be combined with" in mixed.err) == (2, True)


def test_a_picture_from_standard_input(
    run: Run, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo(40, 30).save(tmp_path / "a.png")
    expected = run("search", "--image", tmp_path / "a.png", "--index", uri)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((tmp_path / "a.png").read_bytes())))
    assert run("search", "--image", "-", "--index", uri) == expected
    empty = run("search", "--image", "-", "--index", uri)
    assert (empty.status, "standard input is empty" in empty.err) == (2, True)


def test_help_version_and_completion(run: Run) -> None:
    assert run("-h").out == run("--help").out
    assert "--queries" in run("search", "-h").out
    assert "--install-completion" in run("-h").out
    assert run("-V") == run("--version")
    done = subprocess.run(
        command(),
        capture_output=True,
        text=True,
        check=True,
        env={
            **os.environ,
            "_PROBELOG_COMPLETE": "complete_bash",
            "COMP_WORDS": "probelog mo",
            "COMP_CWORD": "1",
        },
    )
    assert done.stdout.split() == ["models"]


# In processes of their own


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "probelog", *arguments]


def test_a_closed_pipe_is_no_error(uri: str) -> None:
    """As in `probelog search dog --json | head -1`."""
    for more in (["--json"], []):
        process = subprocess.Popen(
            command("search", "dog", "-k", "1000", *more, "--index", uri),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 1


@pytest.mark.parametrize("module", ["typer", "lancedb", "rich.table"])
def test_an_interrupt_at_any_moment_is_one_line(uri: str, module: str) -> None:
    """While it imports what it is made of, opens an index, prints: each begins with an import."""
    code = f"""
import os, signal, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
signal.signal(signal.SIGINT, signal.default_int_handler)
from probelog.__main__ import main
main()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, "search", "dog", "--index", uri],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "probelog: interrupted\n")


def test_a_closed_standard_output_is_one_line(uri: str) -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *command("search", "dog", "--index", uri)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, "probelog: standard output is closed\n")


def test_a_pipe_in_another_encoding(uri: str) -> None:
    done = subprocess.run(
        command("search", "dog", "-k", "1000", "--index", uri),
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
    )
    assert b"???" in done.stdout
    assert done.stderr.startswith(b"ordered by score")
    assert done.stderr.count(b"\n") == 1


def test_models_like_one(run: Run, uri: str) -> None:
    done = run("search", "--model", "emil/things", "--index", uri, "-k", "3")
    assert (done.status, done.err) == (0, "")
    head, *rows = done.out.splitlines()
    assert re.split(r"\s{2,}", head.strip()) == [
        "#",
        "repository",
        "classes",
        "score",
        "licence",
        "downloads",
    ]
    assert len(rows) == 3
    found = [
        json.loads(line)
        for line in run("search", "--model", "emil/things", "--index", uri, "--json").out.splitlines()
    ]
    assert [hit["rank"] for hit in found] == list(range(1, len(found) + 1))
    assert {"repo", "sha", "score", "logits", "duplicates"} <= found[0].keys()
    none = run("search", "--model", "emil/things", "--where", "false", "--index", uri)
    assert (none.status, none.out) == (0, "no other model in this index meets the filter\n")


def test_several_names_and_a_negative(run: Run, uri: str) -> None:
    def asked(*arguments: str) -> list[tuple[str, int]]:
        done = run("search", *arguments, "--json", "-k", "1000", "--index", uri)
        assert done.status == 0
        return [(hit["repo"], hit["logit"]) for hit in map(json.loads, done.out.splitlines())]

    plain = asked("dog")
    assert asked("dog", "--not", "cat") != plain
    assert asked("dog", "husky") != plain
    mixed = asked("dog", "husky", "--like", "anna/pets#1")
    assert len(mixed) == len(plain) - 1
    assert ("anna/pets", 1) not in mixed


def test_a_terminal_of_80_columns(tmp_path: Path) -> None:
    models = [
        Model("google/vit-base-patch16-224", ("Labrador retriever", "Siberian husky"), downloads=4_123_208),
        Model("someone/" + "long-name-" * 8, ("\x1b[2Ja" * 20, "고양이" * 10), licence="x" * 50),
    ]
    build(Store(tmp_path / "ordinary"), models=models[:1])
    build(Store(tmp_path / "index"), models=models)
    for arguments in (("search", "dog"), ("show", models[1].repo)):
        shown = on_terminal(command(*arguments, "--index", str(tmp_path)), columns=80)
        plain = re.sub(r"\x1b\[[01]m", "", shown)
        assert plain != shown, "the head of the table is bold"
        start = next(i for i, line in enumerate(plain.splitlines()) if "declared label" in line)
        lines = plain.splitlines()[start:]
        assert all(harmless(line) for line in lines)
        assert max(cell_len(line.rstrip()) for line in lines) <= 80
    narrow = re.sub(
        r"\x1b\[[01]m", "", on_terminal(command("search", "dog", "--index", str(tmp_path / "ordinary")), 60)
    )
    head, *rows = narrow[narrow.index("# repository") :].splitlines()[:3]
    assert head.split() == ["#", "repository", "class", "declared", "label", "conf."]
    assert all("google/vit-base-patch16-224" in row and cell_len(row) <= 60 for row in rows)
    shown = on_terminal(command("search", "dog", "--index", str(tmp_path / "ordinary")), columns=80)
    assert "google/vit-base-patch16-224" in shown
    assert "4,123,208" in shown


def on_terminal(arguments: list[str], columns: int) -> str:
    """What a program prints on a terminal of that width."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(arguments, stdout=its, stderr=its, env={**environment, "TERM": "xterm"})
    os.close(its)
    chunks = []
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # the other end was closed
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(ours)
    assert process.wait(60) == 0
    return b"".join(chunks).decode().replace("\r\n", "\n")


# Model trees

LATENT = "latent:0123456789ab"


@pytest.fixture(scope="module")
def forest(tmp_path_factory: pytest.TempPathFactory) -> str:
    edges = [
        Edge("a/child", "a/base", Relation.FINE_TUNED, 0.915, declared=True, evidence={"distance": 0.25}),
        Edge("a/merge", "a/child", Relation.MERGE, 0.8, 0.6),
        Edge("a/merge", "b/other", Relation.MERGE, 0.7, 0.4),
        Edge("a/base", LATENT, Relation.HEAD_ONLY, 0.55, latent=True),
        Edge("c/sibling", LATENT, Relation.COPY, 0.6, latent=True),
    ]
    models = [
        Model(repo, ("cat", "dog")) for repo in ("a/base", "a/child", "a/merge", "b/other", "c/sibling")
    ]
    store = Store(tmp_path_factory.mktemp("forest") / "index")
    return build(store, models=models, images=False, edges=edge_table(edges)).store.uri


def test_a_tree_is_indented(run: Run, forest: str) -> None:
    done = run("tree", "a/child", "--index", forest)

    assert (done.status, done.err) == (0, "")
    assert [re.split(r"(?<=\S)\s{2,}", line.rstrip()) for line in done.out.splitlines()] == [
        ["model", "relation", "probability"],
        [LATENT, "not in this index"],
        ["  a/base", "head-only", "55%"],
        ["    a/child", "fine-tune", "92%", "<- asked for, declared"],
        ["      a/merge", "merge 60%", "80%"],
    ]
    whole = run("tree", LATENT, "--index", forest)
    assert "also b/other" not in whole.out
    assert "c/sibling" in run("tree", "a/base", "--index", forest).out
    merged = run("tree", "a/merge", "--index", forest).out
    assert "also b/other (merge 40%, 70%)" in merged


def test_a_tree_as_json_is_an_edge_a_line(run: Run, forest: str) -> None:
    done = run("tree", "a/child", "--index", forest, "--json")

    edges = [json.loads(line) for line in done.out.splitlines()]
    assert [(edge["child"], edge["parent"]) for edge in edges] == [
        ("a/base", LATENT), ("a/child", "a/base"), ("a/merge", "a/child"),
    ]  # fmt: skip
    assert list(edges[1]) == [
        "child", "parent", "relation", "probability", "weight", "declared", "latent", "evidence",
    ]  # fmt: skip
    assert edges[1]["evidence"] == {"distance": 0.25}
    assert [edge["latent"] for edge in edges] == [True, False, False]


def test_trees_that_cannot_be_shown(run: Run, forest: str, uri: str) -> None:
    assert run("tree", "a/nobody", "--index", forest).status == 2
    without = run("tree", "anna/pets", "--index", uri)
    assert (without.status, without.out) == (2, "")
    assert "has no model trees" in without.err
    limited = run("tree", LATENT, "--index", forest, "--limit", "1")
    assert (limited.status, limited.err) == (0, "note: only 1 of its descendants are shown\n")


def test_answers_by_family(run: Run, forest: str) -> None:
    done = run("search", "cat", "--index", forest, "--by", "family")
    hits = [json.loads(line) for line in run("search", "cat", "--index", forest, "--by", "family", "--json").out.splitlines()]  # fmt: skip
    models = run("search", "--model", "b/other", "--index", forest, "--by", "family")

    assert {hit["root"]: hit["relatives"] for hit in hits} == {LATENT: 2, "b/other": 1}
    assert "(+2 of its family)" in done.out
    assert "of its family)" in models.out
    assert run("search", "cat", "--index", forest, "--by", "colour").status == 2


def test_show_says_where_a_model_comes_from(run: Run, forest: str) -> None:
    assert (
        f"model tree: root {LATENT}, parent a/base, depth 2\n"
        in run("show", "a/child", "--index", forest).out
    )
    assert "model tree: root of its tree\n" in run("show", "b/other", "--index", forest).out


def test_licences(run: Run, forest: str) -> None:
    done = run("licences", "--index", forest)
    rows = [json.loads(line) for line in run("licences", "--index", forest, "--json").out.splitlines()]

    assert (done.status, done.err) == (0, "")
    assert re.split(r"\s{2,}", done.out.splitlines()[1].rstrip()) == [
        "undeclared", "a/merge", "mit", "a/child", "mit", "80%",
        "the weights show that it was made from a/child, and it names no parent",
    ]  # fmt: skip
    assert [(row["kind"], row["parent"], row["probability"]) for row in rows] == [
        ("undeclared", "a/child", pytest.approx(0.8)), ("undeclared", "b/other", pytest.approx(0.7)),
    ]  # fmt: skip
    assert (
        run("licences", "--index", forest, "--kind", "notice").out == "no conflict is known in this index\n"
    )
    assert run("licences", "--index", forest, "--kind", "odd").status == 2
