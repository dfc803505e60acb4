"""Command lines: all errors are reported at once, before torch is imported.

Hydra stops at the first error, and finds an error in a sweep only when it reaches the point. So Hydra's loader is used
here to try every override, and every value of a sweep, separately first. With a launcher or sweeper of another package,
`main` checks again.

Text, for prompts, paths and names, is literal, where Hydra's grammar would read `name=007` as a number, `prompt=Hello,
world` as two values and `${x}` as an interpolation. It still applies to null, to a value in quotes, to commas with -m,
to `[a,b]` for a list, and to `${key}` in `name`. YAML files are not affected.
"""

import argparse
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import is_dataclass
from functools import partial, wraps
from itertools import islice, product
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from hydra import main as hydra_main
from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, Quote, QuotedString
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict, read_write
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from conf.schema import SCHEMAS, register, similar_keys, to_config, unknown_keys
from data.config import TRAINING_ONLY
from launch.config import RankError, is_user_error
from launch.environment import VARIABLES, joined_environment, set_library_defaults
from launch.sweep import tried
from tracking.logs import escape_unprintable, printable, quiet_pipe, without_secrets
from training.preflight import preflight_problems

CONF = Path(__file__).parent.resolve()
HYDRA_ERRORS = (HydraException, OmegaConfBaseException, YAMLError)
NO_CONFIG = ("hydra_help", "shell_completion", "experimental_rerun")  # Hydra flags that need no valid configuration
MOST_POINTS = 100  # of a sweep, composed here before Hydra does it
HERE = ("jobs", "basic")  # launchers for which this machine, or the `launcher` group, decides what can run
QUOTED = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
ITEM = re.compile(rf"\s*({QUOTED}|\[(?:{QUOTED}|[^\]])*\]|[^,]*?)\s*,", re.DOTALL)
SWEEP = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag)\(.*\)", re.DOTALL)
UNREADABLE = object()


@quiet_pipe()
def run(work: Callable[[Any], Any], command: str) -> None:
    """Run a function of a checked configuration as a command; it exits with 2 after all errors in the command line."""

    @hydra_main(version_base="1.3", config_path="conf", config_name=command)
    @wraps(work)  # Hydra finds `conf` beside it
    def main(cfg: DictConfig) -> Any:
        with report_user_errors():
            return work(checked(cfg))

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # raise errors instead of printing them
    set_library_defaults()
    escape_unprintable()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # was SIG_DFL during imports
    try:
        register()
        args = get_args_parser().parse_intermixed_args()
        flags = [argument for argument in sys.argv[1:] if argument not in args.overrides]
        sys.argv[1:] = [*flags, *args.overrides]  # Hydra needs flags first
        if not any(getattr(args, flag) for flag in NO_CONFIG):
            line = CommandLine(args, command)
            if problems := line.problems():
                # Each rank reports errors in its environment variables; rank 0 reports the rest.
                is_first = joined_environment(os.environ).get("RANK", "0") == "0"
                _print_errors([problem for problem in problems if is_first or problem.startswith(VARIABLES)])
                sys.exit(2)
            sys.argv[1:] = [*flags, *line.arguments]
        main()
    except HYDRA_ERRORS as error:
        _print_errors([_message(error)])
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        _exit_with(error)


@contextmanager
def report_user_errors() -> Iterator[None]:
    """Print user errors and rank failures and exit with 1; in a sweep, raise them.

    Hydra prints lines of its own for an exception that leaves `main`.
    """
    try:
        yield
    except Exception as error:
        if HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN:
            raise
        _exit_with(error)


def _exit_with(error: Exception) -> None:
    """Print an error and exit with 1; raise it if it is a bug."""
    if isinstance(error, RankError):  # already formatted, with a traceback
        print(without_secrets(str(error)), file=sys.stderr)
    elif is_user_error(error):
        _print_errors(str(error).splitlines())
    else:
        raise error
    sys.exit(1)


def _print_errors(messages: list[str]) -> None:
    for message in messages:
        print(f"error: {printable(without_secrets(message))}", file=sys.stderr)


def data_settings(hydra: Any) -> str:
    """Return the command-line arguments that select the corpus, for use with another command."""
    folders = [f"--config-dir={s.path}" for s in hydra.runtime.config_sources if s.provider == "command-line"]
    folders += [o for o in hydra.overrides.hydra if o.startswith("hydra.searchpath=")]
    typed = [o for o in (o.lstrip("+") for o in hydra.overrides.task) if o.startswith("data.")]
    typed = [o for o in typed if re.split("[.=]", o)[1] not in TRAINING_ONLY]
    plain = [re.sub(r"='((?!null$)[^'\\,[\]{}()$]+)'$", r"=\1", o) for o in typed]  # drop quotes that are not needed
    return shlex.join([*folders, f"data={hydra.runtime.choices['data']}", *plain])


def checked(cfg: DictConfig) -> Any:
    """Return a composed configuration as its checked dataclass; raise `ConfigError` with all errors."""
    return to_config(cfg, preflight_problems)


class CommandLine:
    """The arguments of a command and the errors in them.

    Uses Hydra's internal loader: the public `compose` has no `--config-dir`, and recomposes for every value.
    """

    def __init__(self, args: argparse.Namespace, command: str) -> None:
        self.args, self.command, self.config_name = args, command, args.config_name or command
        self.arguments = [as_hydra_reads(argument, command, sweep=args.multirun) for argument in args.overrides]
        self.search_path = [argument for argument in self.arguments if argument.startswith("hydra.searchpath=")]
        version.setbase("1.3")
        setup_globals()
        path = create_config_search_path(str((CONF.parent / (args.config_path or CONF)).resolve()))
        if args.config_dir is not None:
            folder = f"file://{os.path.abspath(args.config_dir)}"
            path.prepend("command-line", folder, SearchPathQuery(provider="schema"))
        self.loader = ConfigLoaderImpl(config_search_path=path)
        self.parser = OverridesParser.create(config_loader=self.loader)
        self.composed: dict[tuple[str, ...], DictConfig] = {}
        self.options: dict[str, list[str]] = {}

    def configure(self, overrides: Sequence[Override]) -> tuple[DictConfig, DictConfig]:
        """Compose with overrides; return the command's configuration and Hydra's."""
        groups = tuple(override.input_line or "" for override in overrides if self._chooses(override))
        if groups not in self.composed:
            lines = [*self.search_path, *groups]
            self.composed[groups] = self.loader.load_configuration(self.config_name, lines, RunMode.RUN)
        cfg = deepcopy(self.composed[groups])
        self.loader._apply_overrides_to_config([o for o in overrides if not self._chooses(o)], cfg)
        with read_write(cfg), open_dict(cfg):
            cfg.hydra.job.update(num=0, id="0")  # for interpolations of a sweep
            HydraConfig.instance().set_config(cfg)
            hydra = cfg.pop("hydra")
        return cfg, hydra

    def problems(self) -> list[str]:
        """Return all errors in the command line."""
        if not Path(self.args.config_dir or CONF).is_dir():
            return [f"--config-dir ({self.args.config_dir}) is not a folder"]
        try:
            return list(dict.fromkeys(self._problems()))
        except HYDRA_ERRORS as error:
            return [_message(error)]
        finally:
            HydraConfig.instance().cfg = None

    def _problems(self) -> Iterator[str]:
        overrides: list[Override] = []
        wrong: list[str] = []
        for argument in self.arguments:
            try:
                overrides.append(self.parser.parse_override(argument))
            except HydraException:
                meant = " or ".join(f"{path.parent.name}={argument}" for path in CONF.glob(f"*/{argument}.yaml"))
                hint = f"did you mean {meant}?" if meant else "keys not of ASCII letters, digits, _ and - need YAML"
                wrong.append(f"{argument} must be key=value; {hint}")
        fixed = [override for override in overrides if not override.is_sweep_override()]
        fixed = self._valid(sorted(fixed, key=self._chooses, reverse=True), wrong)
        cfg, hydra = self.configure(fixed)
        wrong += unknown_keys(cfg)
        folders = [o for o in overrides if o.key_or_group in ("hydra.run.dir", "hydra.sweep.dir")]
        remedy = "must be a folder; checkpoint.path takes an address for checkpoints"
        wrong += [f"{o.key_or_group} ({o.value()}) {remedy}" for o in folders if "://" in str(o.value())]
        many = self.args.multirun or hydra.mode is RunMode.MULTIRUN
        params = hydra.sweeper.get("params") or {} if many else {}
        swept = {key: self.parser.parse_override(f"{key}={value}") for key, value in params.items()}
        swept |= {override.get_key_element(): override for override in overrides}  # the last one wins
        varied = [self._split(override) for override in swept.values() if override.is_sweep_override()]
        if varied and not many:
            wrong.append(f"{varied[0][0].key_or_group} has several values; add -m to run one after another")
        elif many and joined_environment(os.environ):
            wrong.append("a sweep starts its ranks itself; run python train.py -m ... without torchrun or srun")
        for values in varied:
            for value in values:
                self._valid([value], wrong, base=fixed)
        yield from wrong
        if wrong or self.args.help or self.args.cfg or self.args.info:
            return

        def check(point: Sequence[Override]) -> None:
            cfg, hydra = self.configure([*fixed, *point])
            _ = checked(cfg) if hydra.runtime.choices.get("hydra/launcher") in HERE else to_config(cfg)

        points = list(islice(product(*varied), MOST_POINTS))  # the launcher checks all
        labels = [" ".join(override.input_line or "" for override in point) for point in points]
        yield from tried(zip(labels, (partial(check, point) for point in points), strict=True), len(points))[1]

    def _valid(self, overrides: Sequence[Override], wrong: list[str], base: Sequence[Override] = ()) -> list[Override]:
        """Return the overrides that can be applied on top of `base`; add errors of the others to `wrong`."""
        try:
            self.configure([*base, *overrides])
            return list(overrides)
        except (*HYDRA_ERRORS, ValueError) as error:
            if len(overrides) == 1:
                wrong.append(self._describe(overrides[0], error))
                return []
        valid: list[Override] = []
        for override in overrides:
            valid += self._valid([override], wrong, base=[*base, *valid])
        return valid

    def _describe(self, override: Override, error: Exception) -> str:
        cause, key = _cause(error), override.key_or_group
        if "is not a ListConfig" in str(cause):
            return f"{key} ({override.value()}) must be a list, such as [{override.value()}]"
        if not isinstance(cause, (ConfigAttributeError, ConfigKeyError)):
            return f"{override.input_line}: {_message(error).removeprefix(f'{override.key_or_group}: ')}"
        meant = " or ".join(similar_keys(override.key_or_group, SCHEMAS[self.command]))
        return f"{override.key_or_group} is not a setting" + (f"; did you mean {meant}?" if meant else "")

    def _chooses(self, override: Override) -> bool:
        """Return whether an override selects a config group option rather than a value."""
        key, name = override.key_or_group, self.config_name
        if key not in self.options:
            self.options[key] = [] if "." in key else self.loader.get_group_options(key, None, name, self.search_path)
        return bool(self.options[key]) and not isinstance(override.value(), dict)

    def _split(self, override: Override) -> list[Override]:
        """Return an override per value, or one for each end of an interval."""
        value = override.value()
        values = [value.start, value.end] if isinstance(value, IntervalSweep) else override.sweep_string_iterator()
        return [self.parser.parse_override(f"{override.get_key_element()}={value}") for value in values]


def _cause(error: BaseException) -> BaseException:
    return error if error.__cause__ is None else _cause(error.__cause__)


def _message(error: BaseException) -> str:
    """Return the root cause of a Hydra error as one line, with its key."""
    cause = _cause(error)
    text = " ".join(re.split(r"\n +full_key|\nConfig search path", str(cause))[0].split())
    key = getattr(cause, "full_key", None)
    return f"{key}: {text}" if key and key not in text else text


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
