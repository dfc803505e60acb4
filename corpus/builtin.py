"""Real text that every machine with Python has: the standard library, for a first run without a network."""

import ast
import inspect
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from corpus.documents import Document

LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "__pycache__",
    "ensurepip",
}
SHORTEST_DOCSTRING = 200


def builtin_documents() -> Iterator[Document]:
    """Yield the library's sources (`code`), and its docstrings and language reference (`en`).

    What comes from one file has one key, so that a docstring is never held out from its own source.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        if LEFT_OUT & set(place.parts) or place.parts[0].startswith("config-"):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few files are there to be in another encoding
        if place.parts[0] == "pydoc_data":
            yield from _topics(text, str(place))
        elif text.strip():
            yield Document(text, "code", str(place), key=str(place))
            yield from _docstrings(text, str(place))


def _parse(text: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", (SyntaxWarning, DeprecationWarning))  # about escapes in old code
        return ast.parse(text)


def _docstrings(text: str, place: str) -> Iterator[Document]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(_parse(text)):
        if isinstance(node, kinds) and len(doc := inspect.cleandoc(ast.get_docstring(node) or "")) > SHORTEST_DOCSTRING:
            yield Document(doc + "\n", "en", f"{place}:{getattr(node, 'name', 'module')}", key=place)


def _topics(text: str, place: str) -> Iterator[Document]:
    for node in ast.walk(_parse(text)):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics: dict[str, str] = ast.literal_eval(node.value)
            for name, topic in sorted(topics.items()):
                yield Document(topic, "en", f"{place}:{name}", key=f"{place}:{name}")
