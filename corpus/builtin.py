"""A built-in corpus for a first run without network: Python's standard library."""

import ast
import inspect
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(sysconfig.get_paths()["stdlib"])
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"}
SHORTEST_DOCSTRING = 200
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def builtin_files() -> Iterator[tuple[str, int]]:
    """Yield the library's files, sorted, and their sizes."""
    for path in sorted(ROOT.rglob("*.py")):
        place = path.relative_to(ROOT)
        if not LEFT_OUT & set(place.parts) and not place.parts[0].startswith(("config-", "ensurepip")):
            yield str(path), path.stat().st_size


def builtin_texts(path: str) -> Iterator[tuple[str, str, str, str]]:
    """Yield (text, source, place, split key) of a file: the code (`code`), and its docstrings or topics (`en`).

    Code and docstrings of a file share a split key, so that no docstring is in both splits.
    """
    place = str(Path(path).relative_to(ROOT))
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return  # the library has a few files in other encodings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", (SyntaxWarning, DeprecationWarning))  # invalid escapes in old code
        nodes = list(ast.walk(ast.parse(text)))
    if place.startswith("pydoc_data"):
        for node in nodes:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
                topics: dict[str, str] = ast.literal_eval(node.value)
                for name, topic in sorted(topics.items()):
                    yield topic, "en", f"{place}:{name}", f"{place}:{name}"
    elif text.strip():
        yield text, "code", place, place
        for node in nodes:
            doc = inspect.cleandoc(ast.get_docstring(node) or "") if isinstance(node, DOCUMENTED) else ""
            if len(doc) > SHORTEST_DOCSTRING:
                yield doc + "\n", "en", f"{place}:{getattr(node, 'name', 'module')}", place
