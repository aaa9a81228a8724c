"""Download the published FineWeb shards and their tokenizer to where `train_gpt.py` looks for them.

    python data/fetch_fineweb.py                        # 80 training shards, about 16 GB
    python data/fetch_fineweb.py --train-shards 1       # enough to try things out
    python data/fetch_fineweb.py --source copy/of/hub   # from a folder laid out like the dataset repository

Run it again after an interruption: a file half done is continued, and files are kept that came from the same source
and dataset and are as they came; manifest.json beside the shards says which those are. A file appears under its own
name only after its size, header and token ids were checked. Where the tokenizer is another than the one that
kg_data.py is for, a knowledge-graph blob for it is put beside the shards.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, cast

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which an isolated start (python -I) leaves out
from knowledge_graph import KG_BLOB, write_blob
from prepared_folder import MANIFEST, shard_files
from shards import ArgumentParser, DataError, atomic_file, read_tokens, run_command, say
from tokenizer import Tokenizer
from tqdm import tqdm

REPOSITORY = "willdepueoai/parameter-golf"
DATASET = "fineweb10B_sp1024"
HUB_FOLDER = PurePosixPath("datasets")
HUB_MANIFEST = HUB_FOLDER / "manifest.json"
DEFAULT_TRAIN_SHARDS = 80
STAGING = ".fetch-partial"
DATA_FOLDER = Path(__file__).resolve().parent
# operating-system errors of this machine rather than of the network
LOCAL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO)


class Source(Protocol):
    """Where published files come from."""

    @property
    def name(self) -> str:
        """The source by a name that stays: it tells which files came from it."""
        ...

    def fetch(self, file: PurePosixPath, folder: Path) -> Path:
        """Bring `file` (path inside the source) somewhere into `folder`; returns its path there.

        Raises DataError if the source does not have it or cannot give it, OSError where the local disk fails.
        """
        ...


@dataclass(frozen=True)
class FolderSource:
    """A local folder laid out like the dataset repository."""

    root: Path

    @property
    def name(self) -> str:
        """Path of the folder."""
        return str(self.root)

    def fetch(self, file: PurePosixPath, folder: Path) -> Path:
        """Copy the file. Raises as `Source.fetch`."""
        origin = self.root / file
        if not origin.is_file():
            raise DataError(f"{self.name}: has no file {file}; give a folder laid out like {REPOSITORY}")
        copy = folder / file
        copy.parent.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copyfile(origin, copy))


@dataclass(frozen=True)
class HubSource:
    """A dataset repository on the Hugging Face hub; an interrupted download continues where it stopped."""

    repository: str

    @property
    def name(self) -> str:
        """The repository, owner/name."""
        return self.repository

    def fetch(self, file: PurePosixPath, folder: Path) -> Path:
        """Download the file. Raises as `Source.fetch`."""
        try:
            import huggingface_hub
            from huggingface_hub import errors, utils
        except ImportError as error:
            raise DataError(
                "huggingface_hub is missing; install it with: pip install huggingface_hub"
            ) from error
        utils.logging.set_verbosity_error()  # its retries are no news; what finally fails is reported below
        if not sys.stderr.isatty():
            utils.disable_progress_bars()
        hub_errors = (
            OSError,
            RuntimeError,
            errors.EntryNotFoundError,
            errors.HFValidationError,
            getattr(errors, "XetDownloadError", RuntimeError),
            # the HTTP library underneath differs by version; the base class of its errors is one of these
            *cast("tuple[type[Exception], ...]", errors.HfHubHTTPError.__bases__),
        )
        try:
            path = huggingface_hub.hf_hub_download(
                self.repository, str(file), repo_type="dataset", local_dir=folder
            )
        except hub_errors as error:
            if isinstance(error, OSError) and error.errno in LOCAL_ERRNOS:
                raise
            raise DataError(self._explain(file, error)) from error
        return Path(path)

    def _explain(self, file: PurePosixPath, error: BaseException) -> str:
        from huggingface_hub import errors

        if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
            return f"{self.name}: no such dataset repository on the hub, or no access to it; check --source"
        if isinstance(error, errors.EntryNotFoundError) and not isinstance(
            error, errors.LocalEntryNotFoundError
        ):
            return f"{self.name}: has no file {file}; check --source and --dataset"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return f"{self.name}: {file} cannot be downloaded ({reason}); check the network, then run this again"


def open_source(name: str) -> Source:
    """The local folder of this name, or else the hub repository. Raises DataError if it can be neither."""
    if Path(name).is_dir():
        return FolderSource(Path(name).absolute())
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        return HubSource(name)
    raise DataError(f"--source {name}: neither an existing folder nor a hub repository such as {REPOSITORY}")


def fingerprint(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as the manifest lists them."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


@dataclass
class Fetcher:
    """Brings the files of one dataset of one source to their places, and counts what it did.

    `files` are those that have come so far, by name: the part of the manifest that decides what is kept.
    """

    source: Source
    dataset: str
    folder: Path  # of the shards and of the manifest
    tokenizer_path: Path
    fetched: int = 0
    kept: int = 0
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def recall(self) -> None:
        """Take over what the folder's manifest says of this source and dataset, if anything.

        Raises DataError for a folder that data/prepare.py made.
        """
        try:
            manifest = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
            if "splits" in manifest:
                raise DataError(f"{self.folder}: holds data of data/prepare.py; choose another --data-path")
            if (manifest["source"], manifest["dataset"]) == (self.source.name, self.dataset):
                self.files = dict(manifest["files"])
        except (OSError, ValueError, KeyError, TypeError):  # then nothing is known of what is there
            return

    def bring_tokenizer(self, file: PurePosixPath) -> Tokenizer:
        """The tokenizer, brought as `bring` does; if it is a new one, nothing is known of the shards any more."""
        before = self.files.get(self.tokenizer_path.name)
        self.bring(file, self.tokenizer_path, Tokenizer.load)
        after = self.files[self.tokenizer_path.name]
        if after != before:
            self.files = {self.tokenizer_path.name: after}
        return Tokenizer.load(self.tokenizer_path)

    def bring(self, file: PurePosixPath, target: Path, check: Callable[[Path], object]) -> None:
        """Make `target` a checked copy of `file`, unless it is one already.

        `check(path)` raises DataError for a file that cannot be used; one just fetched is deleted then. Raises as
        `Source.fetch`.
        """
        if self._is_known(target) and _passes(check, target):
            self.kept += 1
            return
        staging = target.parent / STAGING
        staging.mkdir(parents=True, exist_ok=True)
        arrived = self.source.fetch(file, staging)
        try:
            check(arrived)
        except DataError as error:
            arrived.unlink()
            raise DataError(
                f"{self.source.name}: {file} arrived damaged: {error}; run this again to fetch it once more"
            ) from error
        self.files[target.name] = fingerprint(arrived)
        arrived.replace(target)
        self.fetched += 1

    def _is_known(self, path: Path) -> bool:
        entry = self.files.get(path.name)
        return entry is not None and path.is_file() and fingerprint(path) == entry

    def strangers(self, wanted: Iterable[str] = ()) -> list[Path]:
        """Shards in the folder that are neither known nor `wanted`."""
        known = {*wanted, *self.files}
        return [path for path in shard_files(self.folder) if path.name not in known]

    def write_manifest(self, tokenizer: Tokenizer) -> None:
        """Say in the folder what is there, for the next call of this program and for the training run.

        The tokenizer is that of the shards only when none is left of what was there before.
        """
        manifest = {"source": self.source.name, "dataset": self.dataset, "files": dict(sorted(self.files.items()))}
        if not self.strangers():
            manifest |= {"tokenizer_hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size}
        with atomic_file(self.folder / MANIFEST) as file:
            file.write(json.dumps(manifest, indent=1).encode("utf-8") + b"\n")


def _passes(check: Callable[[Path], object], path: Path) -> bool:
    try:
        check(path)
    except DataError:
        return False
    return True


@dataclass(frozen=True)
class Published:
    """What the source's manifest says about one dataset: shard counts, and where the tokenizer lies."""

    name: str
    train_shards: int
    val_shards: int
    tokenizer: PurePosixPath

    @classmethod
    def find(cls, manifest: Any, dataset: str) -> Published:
        """Look a dataset up in the parsed manifest. Raises DataError if it is not there or damaged."""
        try:
            datasets = {entry["name"]: entry for entry in manifest["datasets"]}
            tokenizers = {entry["name"]: entry for entry in manifest["tokenizers"]}
            if dataset not in datasets:
                raise DataError(f"the source has no dataset {dataset!r}, only {', '.join(sorted(datasets))}")
            entry = datasets[dataset]
            stats, used = entry["stats"], tokenizers[entry["tokenizer_name"]]
            if not used.get("model_path"):
                readable = sorted(n for n, e in datasets.items() if tokenizers[e["tokenizer_name"]].get("model_path"))
                raise DataError(
                    f"{dataset} is tokens of {entry['tokenizer_name']!r}, which is no SentencePiece model (the source "
                    f"lists {', '.join(sorted(used))} of it); train_gpt.py reads: {', '.join(readable) or 'none'}"
                )
            model = HUB_FOLDER / used["model_path"]
            published = cls(dataset, int(stats["files_train"]), int(stats["files_val"]), model)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{HUB_MANIFEST} of the source is not as expected ({error!r}); check --source"
            ) from error
        if ".." in model.parts or model.is_absolute():
            raise DataError(f"{HUB_MANIFEST} of the source names a tokenizer outside it: {model}")
        return published

    def shard(self, split: str, index: int) -> PurePosixPath:
        """Path of one shard in the source."""
        return HUB_FOLDER / "datasets" / self.name / f"fineweb_{split}_{index:06d}.bin"


def read_published(source: Source, dataset: str, folder: Path) -> Published:
    """Fetch the source's manifest and look `dataset` up in it. Raises DataError, and as `Source.fetch`."""
    staging = folder / STAGING
    staging.mkdir(parents=True, exist_ok=True)
    path = source.fetch(HUB_MANIFEST, staging)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        path.unlink()
        raise DataError(f"{source.name}: {HUB_MANIFEST} is no JSON ({error}); check --source") from error
    return Published.find(manifest, dataset)


def choose_train_shards(wanted: int | None, published: Published) -> int:
    """How many training shards to bring. Raises DataError if fewer are published than asked for."""
    if wanted is None:
        return min(DEFAULT_TRAIN_SHARDS, published.train_shards)
    if not 0 <= wanted <= published.train_shards:
        raise DataError(
            f"--train-shards {wanted}: {published.name} has {published.train_shards}; ask for 0 to that many"
        )
    return wanted


def fetch(
    source: Source,
    dataset: str = DATASET,
    train_shards: int | None = None,
    data_path: Path | None = None,
    tokenizer_path: Path | None = None,
) -> Fetcher:
    """Bring the tokenizer, every validation shard and `train_shards` training shards (default 80).

    Places default to `datasets/{dataset}/` and `tokenizers/` beside this program. Returns the counts of files
    fetched and kept. Raises DataError for anything missing or damaged and OSError where the disk refuses.
    """
    data_path = data_path or DATA_FOLDER / "datasets" / dataset
    published = read_published(source, dataset, data_path)
    num_train = choose_train_shards(train_shards, published)
    shards = [published.shard("val", index) for index in range(published.val_shards)]
    shards += [published.shard("train", index) for index in range(num_train)]
    tokenizer_path = tokenizer_path or DATA_FOLDER / "tokenizers" / published.tokenizer.name
    fetcher = Fetcher(source, dataset, data_path, tokenizer_path)
    fetcher.recall()
    tokenizer = fetcher.bring_tokenizer(published.tokenizer)
    if strangers := fetcher.strangers(shard.name for shard in shards):
        raise DataError(
            f"{strangers[0]}: not a shard of {dataset} that was fetched here from {source.name}; it would be read "
            f"along, so move it elsewhere ({len(strangers)} such)"
        )

    def check_shard(path: Path) -> None:
        tokens = read_tokens(path)
        if tokens.size and tokens.max() >= tokenizer.vocab_size:
            raise DataError(f"token {tokens.max()} is beyond the {tokenizer.vocab_size} pieces of {tokenizer_path}")

    fetcher.write_manifest(tokenizer)
    for shard in tqdm(shards, desc="shards", unit="file", disable=None):
        fetcher.bring(shard, data_path / shard.name, check_shard)
        fetcher.write_manifest(tokenizer)
    for folder in {data_path, tokenizer_path.parent}:
        shutil.rmtree(folder / STAGING, ignore_errors=True)
    return fetcher


def run(options: Namespace) -> None:
    """What the command line asks for. Raises as `fetch`."""
    source = open_source(options.source)
    fetcher = fetch(source, options.dataset, options.train_shards, options.data_path, options.tokenizer_path)
    say(
        f"{source.name}: {options.dataset} is complete, {fetcher.fetched} files fetched, {fetcher.kept} kept"
    )
    if message := write_blob(Tokenizer.load(fetcher.tokenizer_path), fetcher.folder / KG_BLOB):
        say(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (2 after an error, with one line on stderr)."""
    parser = ArgumentParser(
        prog="fetch_fineweb.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--train-shards", type=int, metavar="N", help=f"training shards (default {DEFAULT_TRAIN_SHARDS})"
    )
    parser.add_argument("--source", default=REPOSITORY, help="hub repository or folder (default %(default)s)")
    parser.add_argument("--dataset", default=DATASET, help="dataset of the source (default %(default)s)")
    parser.add_argument(
        "--data-path", type=Path, metavar="DIR", help="place of the shards (default data/datasets/DATASET)"
    )
    parser.add_argument(
        "--tokenizer-path", type=Path, metavar="FILE", help="place of the model (default in data/tokenizers)"
    )
    return run_command(lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
