"""The way into every command: check what was typed, then run, then tell errors as sentences.

Hydra reports the first problem it meets, and a sweep's bad point when its turn comes. Here every
override and every point is checked before `hydra.main` starts and before torch is imported.
"""

import errno
import os
import shlex
import shutil
import sys
import typing
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_origin

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from conf.schema import SCHEMAS, ConfigError, did_you_mean, register, to_config
from corpus.config import DataError
from data.config import TRAINING_ONLY
from launch.config import LauncherConfig, RankError, Where
from launch.ranks import VARIABLES, joined_environment
from model.config import ModelError
from parallel.config import ParallelError
from training.config import CheckpointError, TrainingError


class SweepError(Exception):
    """Points of a sweep that did not come to their end, told as a sentence for the user."""


CONF = Path(__file__).parent.resolve()
USER_ERRORS = (ConfigError, DataError, ModelError, ParallelError, CheckpointError, TrainingError, SweepError)
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
# Other configs than ours, or nothing that composes one: Hydra's own business
HYDRA_ONLY = ("hydra_help", "version", "shell_completion", "info", "experimental_rerun")
ELSEWHERE = ("config_path", "config_name", "config_dir")


def run(main: Callable[[], Any], config_name: str) -> None:
    """Run a `hydra.main` function as a command; a wrong command line is told in full, with exit code 2."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    register()
    sys.argv[1:] = [_as_addition(_as_option(argument), config_name) for argument in sys.argv[1:]]
    problems = list(command_line_problems(sys.argv[1:], config_name))
    if problems:
        is_first = joined_environment(os.environ).get("RANK", "0") == "0"
        # What is wrong with a rank's own variables is said by that rank, because the first may have right ones.
        _say([problem for problem in problems if is_first or problem.startswith(VARIABLES)])
        sys.exit(2)
    args = get_args_parser().parse_args()
    if args.help:
        try:
            print(_help(args.overrides, config_name), flush=True)
        except BrokenPipeError:  # `| head` has seen enough; Python would say so once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    try:
        with report_user_errors():
            main()
    except KeyboardInterrupt:
        sys.exit(130)


def data_settings(hydra: Any, *keys: str) -> str:
    """Give the data settings of a command, from Hydra's configuration, as typed for another command.

    They are those of `keys`, or all but those that training alone reads.
    """
    typed = [o for o in (o.removeprefix("+") for o in hydra.overrides.task) if o.startswith("data.")]
    named = [(o, o.removeprefix("data.").partition("=")[0]) for o in typed]
    typed = [o for o, key in named if (f"data.{key}" in keys if keys else key.split(".")[0] not in TRAINING_ONLY)]
    return shlex.join([f"data={hydra.runtime.choices['data']}", *typed])


def _as_option(argument: str) -> str:
    """Quote a group's option that Hydra would take for a truth value, as in dry_run=true."""
    key, _, value = argument.partition("=")
    is_option = value in ("true", "false") and (CONF / key / f"{value}.yaml").exists()
    return f"{key}='{value}'" if is_option else argument


def _as_addition(argument: str, config_name: str) -> str:
    """Let the keys of a dictionary that is the user's, such as data.mix.code=0.5, be set without Hydra's plus."""
    key = argument.partition("=")[0]
    return f"+{argument}" if _in_dictionary(SCHEMAS[config_name], key) else argument


def _type_of(schema: Any, key: str) -> Any:
    """Give the type of what a dotted key names in a schema, or of the last on the way there that it knows."""
    for part in key.split("."):
        if get_origin(schema) is dict or part not in getattr(schema, "__dataclass_fields__", {}):
            break
        schema = schema.__dataclass_fields__[part].type
    return schema


def _in_dictionary(schema: Any, key: str) -> bool:
    """Say whether a dotted key is a dictionary of a schema, or in one."""
    return get_origin(_type_of(schema, key)) is dict


def _help(overrides: list[str], config_name: str) -> str:
    """Give the groups and the whole configuration; Hydra's own help takes a second to find them."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        parsed = OverridesParser.create().parse_overrides(overrides)
        cfg = compose(config_name, overrides=[o.input_line or "" for o in parsed if not o.is_sweep_override()])
    groups = sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name[0] != "_")
    options = {group: sorted(path.stem for path in (CONF / group).glob("*.yaml")) for group in groups}
    used = {group: names for group, names in options.items() if config_name == "train" or group in cfg}
    lines = [f"{group}: {' '.join(names)}" for group, names in used.items()]
    return "\n".join(
        [
            f"python {config_name}.py [group=option] [key=value] ...   (-m: lists of values; --hydra-help: more flags)",
            "\n== groups (group=option) ==",
            *lines,
            "\n== configuration (key=value) ==",
            OmegaConf.to_yaml(cfg),
        ]
    )


@contextmanager
def report_user_errors() -> Iterator[None]:
    """Tell an error that the user can mend as a sentence, and exit with code 1; others keep their traceback.

    For the body of a command's `main`: outside it, Hydra has already written lines of its own.
    """
    try:
        yield
    except RankError as error:
        print(error, file=sys.stderr)
        sys.exit(1)
    except (*USER_ERRORS, OSError) as error:
        if not is_user_error(error):
            raise
        _say(sentence(error).splitlines())
        sys.exit(1)


def is_user_error(error: BaseException) -> bool:
    """Say whether an error is one that the user can mend."""
    return isinstance(error, USER_ERRORS) or (isinstance(error, OSError) and error.errno in DISK_ERRORS)


def sentence(error: BaseException) -> str:
    """Tell an error that the user can mend."""
    if not isinstance(error, OSError):
        return str(error)
    where = f" ({error.filename})" if error.filename else ""
    return f"{os.strerror(error.errno or 0)}{where}; nothing that was complete before is lost"


def _say(sentences: list[str]) -> None:
    for sentence in sentences:
        print(f"error: {sentence}", file=sys.stderr)


def command_line_problems(argv: list[str], config_name: str) -> Iterator[str]:
    """Everything that is wrong with a command line, one sentence each."""
    args = get_args_parser().parse_args(argv)
    if any(getattr(args, flag, None) for flag in HYDRA_ONLY + ELSEWHERE):
        return
    words = [word for word in args.overrides if "=" not in word and not word.startswith("~")]
    try:
        overrides = OverridesParser.create().parse_overrides([o for o in args.overrides if o not in words])
    except HydraException as error:
        reason = _first_line(error).split(" See https")[0]
        yield f"the command line cannot be read: {reason}; quote such a value twice, as in 'key=\"a (b), c\"'"
        return
    wrong = [_no_value(word, config_name) for word in words]
    wrong += [problem for override in overrides for problem in override_problems(override, config_name)]
    if wrong:
        yield from wrong
        return
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield from _point_problems(overrides, args, config_name)


def _no_value(word: str, config_name: str) -> str:
    """Say that a word sets nothing, and of which groups it is an option."""
    groups = sorted(path.parent.name for path in CONF.glob("*/*.yaml") if path.stem == word)
    meant = " or ".join(f"{group}={word}" for group in groups if _has_group(group, config_name))
    return f"{word} is no key=value; did you mean {meant}?" if meant else f"{word} is no key=value"


def _has_group(group: str, config_name: str) -> bool:
    return config_name == "train" or group in SCHEMAS[config_name].__dataclass_fields__


def _point_problems(overrides: list[Override], args: Any, config_name: str) -> Iterator[str]:
    """Compose every point of the command line and check it as the command itself would."""
    fixed = [o.input_line or "" for o in overrides if not o.is_sweep_override()]
    # What the groups choose is composed once for all points that choose it.
    composed = cache(lambda *groups: _composed(config_name, [*fixed, *groups]))
    settled = {o.get_key_element(): o for o in [*_params(composed(), args), *overrides]}  # the last of a key
    varied = [override for override in settled.values() if override.is_sweep_override()]
    points = _points(varied)
    problems: dict[str, list[str]] = {}  # and the points that have it
    for point in points:
        groups = [part for part in point if _names_group(part)]
        base = composed(*groups)
        try:
            if isinstance(base, ConfigError):
                raise base
            cfg, many = base[0], _is_many(base, args)
            if many and joined_environment(os.environ):
                yield "a sweep starts its ranks itself: python train.py -m ..., without torchrun or srun"
                return
            if varied and not many:
                yield f"{varied[0].key_or_group} has several values; add -m to run one after another"
                return
            if args.help or args.cfg:
                continue
            values = [part for part in point if part not in groups and not part.startswith("hydra.")]
            config = to_config(_with_values(cfg, values))
            is_job = many and config_name in ("train", "prepare_data") and not OmegaConf.select(cfg, "dry_run.enabled")
            found = list(_launcher_problems(config.launcher)) if is_job else []
        except ConfigError as error:
            found = str(error).splitlines()
        for problem in found:
            problems.setdefault(problem, []).append(" ".join(point))
    yield from told_once(problems, len(points))
    times = Counter(map(" ".join, points))
    yield from (f"{label} is asked for {n} times; name each value once" for label, n in times.items() if n > 1)


def told_once(problems: dict[str, list[str]], n_points: int) -> Iterator[str]:
    """Tell every problem once, and at which points it is, unless at all."""
    for problem, labels in problems.items():
        others = f" and {len(labels) - 1} other points" if len(labels) > 1 else ""
        yield problem if len(labels) == n_points else f"{problem} (at {labels[0]}{others})"


Composed = tuple[DictConfig, DictConfig] | ConfigError  # the command's configuration and Hydra's, or why there is none


def _composed(config_name: str, overrides: list[str]) -> Composed:
    try:
        cfg = compose(config_name, overrides=overrides, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        return ConfigError(_with_key(error))
    hydra_cfg = cfg.hydra
    with read_write(cfg), open_dict(cfg):
        del cfg["hydra"]
    return cfg, hydra_cfg


def _is_many(composed: Composed, args: Any) -> bool:
    """Say whether a command line asks for a sweep, in which every point is a job."""
    return args.multirun or (not isinstance(composed, ConfigError) and str(composed[1].mode) == "RunMode.MULTIRUN")


def _params(base: Composed, args: Any) -> list[Override]:
    """Give what the configuration itself sweeps over, in hydra.sweeper.params."""
    if isinstance(base, ConfigError) or not _is_many(base, args):
        return []
    params = base[1].sweeper.get("params") or {}
    return OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items()])


def _names_group(override: str) -> bool:
    key = override.partition("=")[0]
    return "/" in key or (CONF / key).is_dir()


def _with_values(cfg: DictConfig, values: list[str]) -> DictConfig:
    """Give a composed configuration with values set in it as Hydra sets them; raises `ConfigError`."""
    cfg = deepcopy(cfg)
    try:
        ConfigLoaderImpl._apply_overrides_to_config([_parsed(value) for value in values], cfg)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_with_key(error)) from None
    return cfg


@cache
def _parsed(override: str) -> Override:
    return OverridesParser.create().parse_override(override)


def _points(overrides: list[Override]) -> list[list[str]]:
    """Give the overrides of every point; of a search, the corners of the space in which it moves."""
    lines = []
    for override in overrides:
        value = override.value()
        if isinstance(value, IntervalSweep):
            lines.append(f"{override.get_key_element()}={value.start},{value.end}")
        else:
            lines.append(override.input_line or "")
    discrete = OverridesParser.create().parse_overrides(lines)
    return [list(point) for batch in BasicSweeper.split_arguments(discrete, None) for point in batch]


def _launcher_problems(launcher: LauncherConfig) -> Iterator[str]:
    if find_spec("submitit") is None:
        yield f"launcher={launcher.where.value} needs submitit: python -m pip install -r requirements.txt"
    if launcher.where is Where.slurm and shutil.which("sbatch") is None:
        yield "launcher=slurm: there is no sbatch on this machine; log in where jobs are submitted"


def override_problems(override: Override, config_name: str) -> Iterator[str]:
    """What is wrong with one override: its group option, its key, or the type of its value."""
    key = override.key_or_group
    if key == "hydra/sweeper" and override.value() == "optuna" and find_spec("optuna") is None:
        yield "hydra/sweeper=optuna needs Optuna: python -m pip install -r requirements-search.txt"
    if key in ("hydra/launcher", "hydra/sweeper"):
        Plugins.instance()  # finds those that are installed
        known = [name.removesuffix(".yaml") for name in ConfigStore.instance().list(key)]
        if override.value() not in known:
            yield f"{key}={override.value()} is not installed; choose from {', '.join(known)}"
    if key.split(".")[0] == "hydra" or key.startswith("hydra/"):
        return
    options = sorted(path.stem for path in (CONF / key).glob("*.yaml")) if "." not in key else []
    values = _values(override)
    if options:
        for value in map(str, values):
            if value == "None":
                yield f"{key}=null: this group needs an option; choose from {', '.join(options)}"
            elif value not in options and not override.is_delete():
                yield f"{key}={value}: there is no such option; {did_you_mean(value, options)}"
            elif (override.is_add() or override.is_force_add()) and _has_group(key, config_name):
                yield f"{override.input_line}: leave out the +, as in {key}={value}"
        return
    schema = SCHEMAS[config_name]
    yield from (_unknown(schema, key, config_name) or ())
    if not override.is_delete() and not _unknown(schema, key, config_name):
        for value in values:
            yield from _type_problem(schema, key, value)


def _values(override: Override) -> list[Any]:
    """Give all the values of an override; of an interval, its ends."""
    value = override.value()
    if isinstance(value, IntervalSweep):
        return [value.start, value.end]
    return list(override.sweep_iterator()) if override.is_sweep_override() else [value]


def _unknown(schema: type, key: str, config_name: str) -> list[str]:
    """A sentence if a dotted key leads nowhere in a schema."""
    prefix = ""
    if _in_dictionary(schema, key):
        return []
    for part in key.split("."):
        if typing.get_origin(schema) is dict:
            return []  # any key is one
        known = list(getattr(schema, "__dataclass_fields__", {}))
        if part not in known:
            groups = sorted(p.name for p in CONF.iterdir() if p.is_dir() and p.name[0] != "_") if not prefix else []
            choices = known + [group for group in groups if group not in known and config_name == "train"]
            return [f"{prefix}{part} is not a setting; {did_you_mean(part, choices)}"]
        prefix += f"{part}."
        schema = schema.__dataclass_fields__[part].type  # type: ignore[attr-defined]
    return []


def _type_problem(schema: type, key: str, value: Any) -> Iterator[str]:
    if isinstance(value, str | int | float) and get_origin(_type_of(schema, key)) is list:
        yield f"{key} ({value}) must be a list, as in {key}=[{value}]"
        return
    nested: Any = value
    for part in reversed(key.split(".")):
        nested = {part: nested}
    try:
        OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.create(nested))
    except OmegaConfBaseException as error:
        yield f"{key} ({value}): {_first_line(error)}"


def _innermost(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _with_key(error: BaseException) -> str:
    """The innermost message after the key that it is about."""
    key = getattr(_innermost(error), "full_key", None)
    return f"{key}: {_first_line(error)}" if key else _first_line(error)


def _first_line(error: BaseException) -> str:
    """The innermost message of a chain, without Hydra's continuation lines."""
    error = _innermost(error)
    return " ".join(str(error).split("\n    full_key")[0].split())
