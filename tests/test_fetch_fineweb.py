"""data/fetch_fineweb.py against a local folder, and against a small HTTP server in place of the hub."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath

import fetch_fineweb
import pytest
import shards
from shards import DataError
from support import assert_refused
from tokenizer import Tokenizer, train_tokenizer

import kg_data

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import build_kg

SCRIPT = Path(fetch_fineweb.__file__)
DATASET = fetch_fineweb.DATASET
NUM_TRAIN = 3
NUM_FILES = 1 + 1 + NUM_TRAIN  # tokenizer, validation shard, training shards
SHARDS = PurePosixPath("datasets/datasets") / DATASET


@pytest.fixture(scope="session")
def model() -> bytes:
    return train_tokenizer(["a small text to train a tokenizer on"] * 3, 300).model


@pytest.fixture
def hub(tmp_path: Path, model: bytes) -> Path:
    """A folder laid out like the dataset repository."""
    root = tmp_path / "hub"
    (root / SHARDS).mkdir(parents=True)
    (root / "datasets/tokenizers").mkdir()
    (root / "datasets/tokenizers/fineweb_1024_bpe.model").write_bytes(model)
    shards.write_shard(root / SHARDS / "fineweb_val_000000.bin", range(1, 200))
    for index in range(NUM_TRAIN):
        shards.write_shard(root / SHARDS / f"fineweb_train_{index:06d}.bin", [1, 5 + index] * 300)
    manifest = {
        "datasets": [
            {
                "name": DATASET,
                "stats": {"files_train": NUM_TRAIN, "files_val": 1},
                "tokenizer_name": "sp1024",
            },
            {"name": "other", "stats": {"files_train": 0, "files_val": 0}, "tokenizer_name": "sp1024"},
        ],
        "tokenizers": [
            {"name": "sp1024", "model_path": "tokenizers/fineweb_1024_bpe.model", "vocab_path": None}
        ],
    }
    (root / "datasets/manifest.json").write_text(json.dumps(manifest))
    return root


class Place:
    """Where a test lets the files go."""

    def __init__(self, root: Path) -> None:
        self.data_path = root / "got" / "shards"
        self.tokenizer_path = root / "got" / "tokenizers" / "fineweb_1024_bpe.model"

    def argv(self, source: object, *more: str) -> list[str]:
        places = ["--data-path", str(self.data_path), "--tokenizer-path", str(self.tokenizer_path)]
        return ["--source", str(source), *places, *more]

    def fetch(self, source: fetch_fineweb.Source) -> fetch_fineweb.Fetcher:
        return fetch_fineweb.fetch(source, data_path=self.data_path, tokenizer_path=self.tokenizer_path)

    def assert_complete(self, hub: Path) -> None:
        published = {path.name: path.read_bytes() for path in (hub / SHARDS).iterdir()}
        arrived = {path.name: path.read_bytes() for path in self.data_path.iterdir()}
        manifest = json.loads(arrived.pop("manifest.json"))
        assert arrived == published
        model = hub / "datasets/tokenizers/fineweb_1024_bpe.model"
        assert self.tokenizer_path.read_bytes() == model.read_bytes()
        assert [path.name for path in self.tokenizer_path.parent.iterdir()] == [model.name]
        files = {name: hashlib.sha256(content).hexdigest() for name, content in published.items()}
        files[model.name] = hashlib.sha256(model.read_bytes()).hexdigest()
        assert {name: entry["sha256"] for name, entry in manifest["files"].items()} == files
        assert manifest["dataset"] == DATASET
        assert manifest["tokenizer_hash"] == Tokenizer.load(model).hash


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


class CountingSource:
    """A folder that remembers what it was asked for; shard `fail_at` stops half way, as if killed."""

    def __init__(self, root: Path, fail_at: int | None = None) -> None:
        self.folder = fetch_fineweb.FolderSource(root)
        self.name = str(root)
        self.asked: list[str] = []
        self.fatal = f"fineweb_train_{fail_at:06d}.bin" if fail_at is not None else ""

    def fetch(self, file: PurePosixPath, folder: Path) -> Path:
        self.asked.append(file.name)
        copy = self.folder.fetch(file, folder)
        if file.name == self.fatal:
            copy.write_bytes(copy.read_bytes()[:700])
            raise KeyboardInterrupt
        return copy


def test_everything_arrives_unchanged(place: Place, hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch_fineweb.main(place.argv(hub)) == 0
    place.assert_complete(hub)
    assert f"{NUM_FILES} files fetched, 0 kept" in capsys.readouterr().out


def test_another_tokenizer_gets_its_own_knowledge_graph_blob(
    place: Place, hub: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too few pieces to make one: said, and nothing else is lost. Enough: made. The right one already: silence."""
    assert fetch_fineweb.main(place.argv(hub)) == 0
    assert "KG_ENABLED=0" in capsys.readouterr().out
    words = " ".join(word for word, _ in build_kg.read_words(build_kg.KG_WORDS)[:3000])
    larger = train_tokenizer([words] * 3, 1024).model
    (hub / "datasets/tokenizers/fineweb_1024_bpe.model").write_bytes(larger)
    for path in (hub / SHARDS).iterdir():
        path.touch()
    place.tokenizer_path.unlink()
    assert fetch_fineweb.main(place.argv(hub)) == 0
    blob_path = place.data_path / "kg_blob.txt"
    assert f"KG_PATH={blob_path}" in capsys.readouterr().out
    blob = kg_data.read_blob(str(blob_path))
    assert len(kg_data.decode(Tokenizer.load(place.tokenizer_path).pieces, blob)) == kg_data.COUNT
    blob_path.unlink()
    monkeypatch.setattr(kg_data.decode, "__defaults__", (blob,))
    assert fetch_fineweb.main(place.argv(hub)) == 0
    assert "KG_" not in capsys.readouterr().out
    assert not blob_path.exists()


def test_whole_files_are_not_fetched_again(place: Place, hub: Path) -> None:
    place.fetch(CountingSource(hub))
    again = CountingSource(hub)
    fetcher = place.fetch(again)
    assert (fetcher.fetched, fetcher.kept) == (0, NUM_FILES)
    assert again.asked == ["manifest.json"]


def test_an_interrupted_run_continues_with_what_is_missing(place: Place, hub: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        place.fetch(CountingSource(hub, fail_at=1))
    # nothing half-done has a shard's name where the training program looks
    assert sorted(path.name for path in place.data_path.glob("*.bin")) == [
        "fineweb_train_000000.bin",
        "fineweb_val_000000.bin",
    ]
    again = CountingSource(hub)
    fetcher = place.fetch(again)
    assert (fetcher.fetched, fetcher.kept) == (2, 3)
    place.assert_complete(hub)


def test_a_file_damaged_later_is_replaced_alone(place: Place, hub: Path) -> None:
    place.fetch(CountingSource(hub))
    victim = place.data_path / "fineweb_train_000001.bin"
    victim.write_bytes(victim.read_bytes()[:-6])
    again = CountingSource(hub)
    assert place.fetch(again).fetched == 1
    assert again.asked == ["manifest.json", victim.name]
    place.assert_complete(hub)


def test_a_kept_file_is_what_came(place: Place, hub: Path) -> None:
    """A shard with a whole header is not enough: a shorter one, one of other tokens, one whose origin nobody knows."""
    place.fetch(CountingSource(hub))
    shards.write_shard(place.data_path / "fineweb_val_000000.bin", range(1, 20))
    shards.write_shard(place.data_path / "fineweb_train_000001.bin", [1, 4] * 300)
    again = CountingSource(hub)
    place.fetch(again)
    assert again.asked == ["manifest.json", "fineweb_val_000000.bin", "fineweb_train_000001.bin"]
    place.assert_complete(hub)
    (place.data_path / "manifest.json").unlink()
    assert place.fetch(CountingSource(hub)).fetched == NUM_FILES


@pytest.mark.parametrize("change", ["dataset", "source", "tokenizer"])
def test_shards_of_something_else_are_replaced(place: Place, hub: Path, change: str) -> None:
    """The names are the same; until the last is replaced nobody is told that they are of the new tokenizer."""
    place.fetch(CountingSource(hub))
    source, dataset = hub, DATASET
    if change == "dataset":
        dataset = "second"
        shutil.copytree(hub / SHARDS, hub / SHARDS.parent / dataset)
        manifest = json.loads((hub / "datasets/manifest.json").read_text())
        manifest["datasets"].append(manifest["datasets"][0] | {"name": dataset})
        edit_manifest(hub, manifest)
    elif change == "source":
        source = Path(shutil.copytree(hub, hub.parent / "mirror"))
    else:
        other = train_tokenizer(["other words make another tokenizer"] * 3, 300).model
        (hub / "datasets/tokenizers/fineweb_1024_bpe.model").write_bytes(other)
        place.tokenizer_path.unlink()
    arguments = dict(dataset=dataset, data_path=place.data_path, tokenizer_path=place.tokenizer_path)
    with pytest.raises(KeyboardInterrupt):
        fetch_fineweb.fetch(CountingSource(source, fail_at=1), **arguments)  # pyright: ignore[reportArgumentType]
    assert "tokenizer_hash" not in json.loads((place.data_path / "manifest.json").read_text())
    fetcher = fetch_fineweb.fetch(CountingSource(source), **arguments)  # pyright: ignore[reportArgumentType]
    assert (fetcher.fetched, fetcher.kept) == (2, 3)
    assert json.loads((place.data_path / "manifest.json").read_text())["dataset"] == dataset


def test_shards_that_would_be_read_along_are_refused(
    place: Place, hub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Left by another dataset that had more of them; those that came from this one before are fine."""
    assert fetch_fineweb.main(place.argv(hub)) == 0
    assert fetch_fineweb.main(place.argv(hub, "--train-shards", "1")) == 0
    stranger = place.data_path / "fineweb_train_000007.bin"
    shards.write_shard(stranger, [1, 2])
    assert_refused(capsys, fetch_fineweb.main, place.argv(hub), str(stranger), "move it")


def test_a_folder_of_prepared_text_is_not_fetched_into(
    place: Place, hub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place.data_path.mkdir(parents=True)
    (place.data_path / "manifest.json").write_text('{"splits": {}}')
    assert_refused(capsys, fetch_fineweb.main, place.argv(hub), str(place.data_path), "--data-path")


def test_datasets_without_a_sentencepiece_model_are_told_apart(
    place: Place, hub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((hub / "datasets/manifest.json").read_text())
    manifest["datasets"].append(manifest["datasets"][0] | {"name": "raw", "tokenizer_name": "pure_byte"})
    manifest["tokenizers"].append({"name": "pure_byte", "kind": "byte", "vocab_size": 260})
    edit_manifest(hub, manifest)
    argv = place.argv(hub, "--dataset", "raw")
    assert_refused(capsys, fetch_fineweb.main, argv, "raw", "pure_byte", "no SentencePiece model", DATASET)


@pytest.mark.parametrize("wanted", [0, 2])
def test_number_of_training_shards(place: Place, hub: Path, wanted: int) -> None:
    assert fetch_fineweb.main(place.argv(hub, "--train-shards", str(wanted))) == 0
    assert len(list(place.data_path.glob("fineweb_train_*.bin"))) == wanted
    assert len(list(place.data_path.glob("fineweb_val_*.bin"))) == 1


def test_default_is_eighty_shards_or_all(hub: Path) -> None:
    manifest = json.loads((hub / "datasets/manifest.json").read_text())
    published = fetch_fineweb.Published.find(manifest, DATASET)
    assert fetch_fineweb.choose_train_shards(None, published) == NUM_TRAIN
    manifest["datasets"][0]["stats"]["files_train"] = 195
    published = fetch_fineweb.Published.find(manifest, DATASET)
    assert fetch_fineweb.choose_train_shards(None, published) == 80


def test_default_places_are_those_of_the_training_program(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = hub.parent / "repository"
    monkeypatch.setattr(fetch_fineweb, "DATA_FOLDER", repository / "data")
    fetch_fineweb.fetch(fetch_fineweb.FolderSource(hub))
    assert (repository / "data/datasets/fineweb10B_sp1024/fineweb_val_000000.bin").is_file()
    assert (repository / "data/tokenizers/fineweb_1024_bpe.model").is_file()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("file", "spoil", "words"),
    [
        ("train_000001", truncate, ["truncated", "run this again"]),
        ("train_000001", lambda path: path.write_bytes(b"<html>busy</html>" * 99), ["not a token shard"]),
        ("train_000001", lambda path: path.write_bytes(b""), ["too few"]),
        ("train_000001", lambda path: shards.write_shard(path, [1, 5000]), ["token 5000", "pieces"]),
        ("val_000000", truncate, ["truncated"]),
        ("val_000000", Path.unlink, ["has no file datasets/datasets/", "val_000000"]),
    ],
)
def test_a_damaged_download_never_takes_its_place(
    place: Place, hub: Path, capsys: pytest.CaptureFixture[str], file: str, spoil, words: list[str]
) -> None:
    path = hub / SHARDS / f"fineweb_{file}.bin"
    good = path.read_bytes()
    spoil(path)
    assert_refused(capsys, fetch_fineweb.main, place.argv(hub), str(hub), path.name, *words)
    assert not list(place.data_path.rglob(path.name))  # nor stays where the next run would trust it
    path.write_bytes(good)
    assert fetch_fineweb.main(place.argv(hub)) == 0
    place.assert_complete(hub)


def edit_manifest(hub: Path, content: object) -> None:
    (hub / "datasets/manifest.json").write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize(
    ("spoil", "extra", "words"),
    [
        (lambda hub: edit_manifest(hub, "{"), [], ["manifest.json", "JSON"]),
        (lambda hub: edit_manifest(hub, []), [], ["manifest.json", "not as expected"]),
        (lambda hub: edit_manifest(hub, {"datasets": [{}], "tokenizers": []}), [], ["not as expected"]),
        (lambda hub: (hub / "datasets/manifest.json").unlink(), [], ["has no file datasets/manifest.json"]),
        (lambda hub: truncate(hub / "datasets/tokenizers/fineweb_1024_bpe.model"), [], ["SentencePiece"]),
        (lambda _: None, ["--dataset", "fineweb10B_sp9"], ["fineweb10B_sp9", DATASET]),
        (lambda _: None, ["--train-shards", "4"], ["--train-shards 4", "has 3"]),
        (lambda _: None, ["--train-shards", "-1"], ["--train-shards -1"]),
        (lambda _: None, ["--train-shards", "all"], ["--train-shards"]),
    ],
)
def test_unusable_sources_and_options_are_named(
    place: Place, hub: Path, capsys: pytest.CaptureFixture[str], spoil, extra: list[str], words: list[str]
) -> None:
    spoil(hub)
    assert_refused(capsys, fetch_fineweb.main, place.argv(hub, *extra), *words)
    assert not list(place.data_path.glob("*.bin"))
    assert not place.tokenizer_path.exists()


def test_a_tokenizer_outside_the_source_is_refused(hub: Path) -> None:
    manifest = json.loads((hub / "datasets/manifest.json").read_text())
    manifest["tokenizers"][0]["model_path"] = "../../secret.model"
    with pytest.raises(DataError, match="outside"):
        fetch_fineweb.Published.find(manifest, DATASET)


def test_a_source_that_is_neither_folder_nor_repository(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused(capsys, fetch_fineweb.main, place.argv("./no/such/folder"), "--source ./no/such/folder", "neither")


def test_a_full_disk_is_named(
    place: Place, hub: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = shutil.copyfile

    def fail_for_shards(origin: Path, copy: Path) -> Path:
        if origin.suffix == ".bin":
            raise OSError(errno.ENOSPC, "No space left on device", str(copy))
        return Path(real(origin, copy))

    monkeypatch.setattr(shutil, "copyfile", fail_for_shards)
    assert_refused(capsys, fetch_fineweb.main, place.argv(hub), "No space left on device", "free some space")
    assert not list(place.data_path.glob("*.bin"))


# --- the hub ------------------------------------------------------------------------------------------------


def hub_errors() -> list[tuple[BaseException, list[str]]]:
    from huggingface_hub import errors

    transport_error = errors.HfHubHTTPError.__bases__[0]
    return [
        (errors.LocalEntryNotFoundError("no connection\nand more"), ["no connection)", "check the network"]),
        (transport_error("connection reset"), ["connection reset", "check the network"]),
        (errors.OfflineModeIsEnabled("offline mode is on"), ["offline mode is on"]),
        (errors.EntryNotFoundError("404"), ["has no file datasets/manifest.json"]),
        (errors.HFValidationError("bad name"), ["no such dataset repository"]),
        (RuntimeError("xet gave up"), ["xet gave up", "check the network"]),
        (OSError(errno.ENOSPC, "No space left on device"), ["No space left", "free some space"]),
    ]


@pytest.mark.parametrize("number", range(7))
def test_failures_of_the_hub_are_one_line(
    place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    import huggingface_hub

    error, words = hub_errors()[number]

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    assert_refused(capsys, fetch_fineweb.main, place.argv("someone/something"), *words)


class HubHandler(BaseHTTPRequestHandler):
    """The part of the hub's protocol that a download uses; the first answer for `cut` stops half way."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        server = self.server
        assert isinstance(server, HubServer)
        prefix = "/datasets/someone/copy/resolve/main/"
        path = server.root / self.path.removeprefix(prefix)
        if not self.path.startswith(prefix) or not path.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            server.got.append(path.name)
            if path.name == server.cut and server.got.count(path.name) == 1:
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
            else:
                self.wfile.write(content)


class HubServer(ThreadingHTTPServer):
    """Serves a folder as the dataset repository someone/copy and remembers the name of each file got."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.root = root
        self.cut = ""
        self.got: list[str] = []


@pytest.fixture
def hub_server(hub: Path) -> Iterator[HubServer]:
    server = HubServer(hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def run_program(argv: list[str], server: HubServer, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, str(SCRIPT), *argv]
    return subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=120)


def test_download_through_huggingface_hub(
    place: Place, hub: Path, hub_server: HubServer, tmp_path: Path
) -> None:
    argv = place.argv("someone/copy")
    first = run_program(argv, hub_server, tmp_path)
    assert (first.returncode, first.stderr) == (0, "")
    place.assert_complete(hub)
    hub_server.got.clear()
    (place.data_path / "fineweb_train_000002.bin").unlink()
    second = run_program(argv, hub_server, tmp_path)
    assert (second.returncode, second.stderr) == (0, "")
    assert hub_server.got == ["manifest.json", "fineweb_train_000002.bin"]
    place.assert_complete(hub)


def test_a_dropped_connection_costs_at_most_another_run(
    place: Place, hub: Path, hub_server: HubServer, tmp_path: Path
) -> None:
    hub_server.cut = "fineweb_val_000000.bin"
    result = run_program(place.argv("someone/copy"), hub_server, tmp_path)
    if result.returncode:  # older versions of the hub's library do not try again by themselves
        assert result.returncode == 2
        assert result.stderr.startswith("error: someone/copy: datasets/datasets/")
        assert result.stderr.count("\n") == 1
        assert not (place.data_path / hub_server.cut).exists()
        result = run_program(place.argv("someone/copy"), hub_server, tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert hub_server.got.count(hub_server.cut) == 2
    place.assert_complete(hub)


def test_a_file_missing_on_the_hub(place: Place, hub: Path, hub_server: HubServer, tmp_path: Path) -> None:
    (hub / SHARDS / "fineweb_train_000001.bin").unlink()
    result = run_program(place.argv("someone/copy"), hub_server, tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: someone/copy: has no file datasets/datasets/")
    assert result.stderr.count("\n") == 1
