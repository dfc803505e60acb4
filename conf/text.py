"""Literal text on the command line, for prompts, paths and names.

Hydra's grammar would read `name=007` as a number, `prompt=Hello, world` as two values and `${x}` as an interpolation.
It still applies to null, to a value in quotes, to commas with -m, to `[a,b]` for a list, and to `${key}` in `name`.
YAML files are not affected.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from conf.schema import SCHEMAS

QUOTED = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
ITEM = re.compile(rf"\s*({QUOTED}|\[(?:{QUOTED}|[^\]])*\]|[^,]*?)\s*,", re.DOTALL)
SWEEP = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag)\(.*\)", re.DOTALL)
UNREADABLE = object()


def as_hydra_reads(argument: str, command: str, *, sweep: bool) -> str:
    """Return an argument, quoted for Hydra's grammar where necessary."""
    key, equal, value = argument.partition("=")
    plain_key = key.lstrip("+")
    kind, metadata, in_dict = _field(command, plain_key)
    is_text = kind in (str, list[str], Any) and "number" not in metadata
    if equal and is_text and not (sweep and SWEEP.fullmatch(value)):
        items = ITEM.findall(value + ",") if sweep else [value]
        value = ",".join(_text(item, kind is not str, metadata, refers=plain_key == "name") for item in items)
    elif equal and (_read(value) is UNREADABLE or (is_dataclass(kind) and isinstance(_read(value), bool))):
        value = _quote(value)  # dry_run=true selects a config group option
    return ("++" if in_dict and key == plain_key else "") + key + equal + value


def _field(command: str, key: str) -> tuple[Any, Mapping[str, Any], bool]:
    """Return a setting's type without None, its metadata, and whether it is in a dict."""
    kind: Any = SCHEMAS[command]
    metadata, in_dict = {}, False
    for part in key.split("."):
        if (found := getattr(kind, "__dataclass_fields__", {}).get(part)) is not None:
            kind, metadata = found.type, found.metadata
        elif get_origin(kind) is dict:
            kind = get_args(kind)[1]
        elif kind is not Any:
            return None, {}, in_dict
        if get_origin(kind) is UnionType:
            kind = next(option for option in get_args(kind) if option is not NoneType)
        in_dict = in_dict or get_origin(kind) is dict
    return kind, metadata, in_dict


def _text(item: str, may_be_list: bool, metadata: Mapping[str, Any], refers: bool) -> str:
    """Return text, or a list of texts, such that Hydra reads it literally."""
    if may_be_list and item.startswith("[") and item.endswith("]"):
        items = ITEM.findall(item[1:-1] + ",") if item[1:-1].strip() else []
        return f"[{','.join(_text(text, False, metadata, refers) for text in items)}]"
    value = _read(item)
    if value is None or (may_be_list and isinstance(value, dict)):
        return item
    quoted = isinstance(value, str) and re.fullmatch(QUOTED, item, re.DOTALL)
    text = value if quoted else item
    if text.startswith("~/") and "prose" not in metadata:
        text = os.path.expanduser(text)
    if text == value and not quoted and ("${" not in text or refers):
        return text
    return _quote(text if refers else re.sub(r"(\\*)\$\{", r"\1\1\\${", text))  # OmegaConf's escape of ${


def _read(value: str) -> Any:
    try:
        return OverridesParser.create().parse_override(f"x={value}").value()
    except HydraException:
        return UNREADABLE


def _quote(text: str) -> str:
    return QuotedString(text, Quote.single).with_quotes()
