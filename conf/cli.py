"""The command line of every command: all that is wrong with it is reported at once, before torch is imported.

Hydra stops at the first problem, and at a sweep's bad point when its turn comes. Here every override and every point
is checked first, composed by Hydra from the same folders. A launcher or sweeper of another package is checked again by
the command's own `main`.
"""

import argparse
import errno
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser  # there is no public way to Hydra's own flags
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from conf.schema import SCHEMAS, ConfigError, did_you_mean, keys_named, register, to_config, to_object
from conf.text import as_hydra_reads, as_typed
from corpus.config import DataError
from data.config import TRAINING_ONLY
from launch.config import RankError
from launch.ranks import VARIABLES, joined_environment
from launch.sweep import SweepError, merge_problems
from model.config import ModelError
from parallel.config import ParallelError
from tracking.logs import escape_unprintable, printable, quiet_pipe
from training.config import CheckpointError, TrainingError
from training.preflight import preflight_problems

CONF = Path(__file__).parent.resolve()
USER_ERRORS = (ConfigError, DataError, ModelError, ParallelError, CheckpointError, TrainingError, SweepError)
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)
HYDRA_ERRORS = (HydraException, OmegaConfBaseException, YAMLError)
NO_CONFIG = ("hydra_help", "shell_completion", "experimental_rerun")  # flags of Hydra's that check no configuration
HERE = ("jobs", "basic")  # launchers that start ranks on this machine, or where `launcher` in the config decides
MEANT = {"batch_size": "global_batch_tokens or data.micro_batch_size", "learning_rate": "optimizer.lr"}


@quiet_pipe()
def run(main: Callable[[], Any], command: str) -> None:
    """Run a `hydra.main` function as a command; a wrong command line is reported in full and exits with 2."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra raises its errors, to be reported here
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle OpenMP threads sleep and leave their core to others
    escape_unprintable()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # until now it ended the process at once
    try:
        register()
        args = get_args_parser().parse_intermixed_args()
        flags = [argument for argument in sys.argv[1:] if argument not in args.overrides]
        sys.argv[1:] = [*flags, *args.overrides]  # which Hydra wants in this order
        if not any(getattr(args, flag) for flag in NO_CONFIG):
            with open_composer(args, command) as composer:
                if problems := composer.problems():
                    # Each rank reports its own wrong variables; the rest is the same for all.
                    is_first = joined_environment(os.environ).get("RANK", "0") == "0"
                    _print_errors([problem for problem in problems if is_first or problem.startswith(VARIABLES)])
                    sys.exit(2)
                if args.help:
                    print(composer.help())
                    return
                sys.argv[1:] = [*flags, *composer.arguments]
        main()
    except HYDRA_ERRORS as error:
        _print_errors([_message(error)])
        sys.exit(2)
    except (*USER_ERRORS, RankError, OSError) as error:
        _exit_with(error)
    except KeyboardInterrupt:
        sys.exit(130)


@contextmanager
def report_user_errors() -> Iterator[None]:
    """Report an error that the user can fix without a traceback and exit with 1; a sweep's point raises it.

    For the body of a command's `main`, outside of which Hydra prints lines of its own.
    """
    try:
        with quiet_pipe():
            yield
    except (*USER_ERRORS, RankError, OSError) as error:
        if HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN:
            raise
        _exit_with(error)


def _exit_with(error: Exception) -> None:
    """Print an error and exit with 1; raise it if it is a bug."""
    if isinstance(error, RankError):  # holds whole lines, a rank's traceback among them
        print(error, file=sys.stderr)
    elif is_user_error(error):
        _print_errors(str(error).splitlines())
    else:
        raise error
    sys.exit(1)


def is_user_error(error: BaseException) -> bool:
    """Return whether the user can fix an error: no traceback is shown for it."""
    return isinstance(error, USER_ERRORS) or (isinstance(error, OSError) and error.errno in DISK_ERRORS)


def _print_errors(messages: list[str]) -> None:
    for message in messages:
        message = re.sub(r"(://[^/@\s]*:)[^/@\s]*@", r"\1***@", message)  # the password of an address
        print(f"error: {printable(message)}", file=sys.stderr)


def data_settings(hydra: Any, *keys: str) -> str:
    """Return the data settings of a command line as another command takes them: `keys`, or all that preparing reads."""
    folders = [f"--config-dir={s.path}" for s in hydra.runtime.config_sources if s.provider == "command-line"]
    folders += [o for o in hydra.overrides.hydra if o.startswith("hydra.searchpath=")]
    typed = [o for o in (o.lstrip("+") for o in hydra.overrides.task) if o.startswith("data.")]
    named = [(o, o.removeprefix("data.").partition("=")[0]) for o in typed]
    typed = [o for o, key in named if (f"data.{key}" in keys if keys else key.split(".")[0] not in TRAINING_ONLY)]
    return shlex.join([*folders, f"data={hydra.runtime.choices['data']}", *map(as_typed, typed)])


def checked(cfg: DictConfig) -> Any:
    """Return a composed configuration as its checked dataclass; raise `ConfigError` with all that is wrong with it."""
    return to_config(cfg, preflight_problems)


class _ConfigDir(SearchPathPlugin):
    """Has composing search the folder of `--config-dir`, as Hydra's own command line does."""

    folder: str | None = None

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if self.folder is not None:
            search_path.append("command-line", f"file://{os.path.abspath(self.folder)}")


@contextmanager
def open_composer(args: argparse.Namespace, command: str) -> Iterator["Composer"]:
    """Open the folders of `--config-path` and `--config-dir` for composing."""
    Plugins.instance().register(_ConfigDir)
    _ConfigDir.folder = args.config_dir
    with initialize_config_dir(str((CONF.parent / (args.config_path or CONF)).resolve()), version_base="1.3"):
        _ConfigDir.folder = None  # it has been read
        try:
            yield Composer(args, command)
        finally:
            HydraConfig.instance().cfg = None


class Composer:
    """A command's configurations, composed as Hydra will compose them, and what is wrong with them."""

    def __init__(self, args: argparse.Namespace, command: str) -> None:
        self.args, self.command, self.config_name = args, command, args.config_name or command
        self.loader = GlobalHydra.instance().config_loader()
        self.parser = OverridesParser.create(config_loader=self.loader)
        self.composed: dict[tuple[str, ...], tuple[DictConfig, DictConfig]] = {}
        self.listed: dict[tuple[str, ObjectType], list[str]] = {}
        self.overrides: list[Override] = []
        self.unread: list[str] = []
        self.arguments = [as_hydra_reads(argument, command, sweep=args.multirun) for argument in args.overrides]
        for argument, typed in zip(self.arguments, args.overrides, strict=True):
            try:
                self.overrides += [self.parser.parse_override(argument)]
            except HydraException:
                self.unread.append(typed)
        self.search_path = _lines([o for o in self.overrides if o.get_key_element() == "hydra.searchpath"])

    def options(self, group: str, kind: ObjectType = ObjectType.CONFIG) -> list[str]:
        """Return the options of a group, or the groups in it, in all folders; [] if there is no such group."""
        if "." in group:
            return []
        if (group, kind) not in self.listed:
            self.listed[group, kind] = self.loader.get_group_options(group, kind, self.config_name, self.search_path)
        return self.listed[group, kind]

    def compose(self, *overrides: str) -> tuple[DictConfig, DictConfig]:
        """Return the command's configuration, and the whole with Hydra's own."""
        if overrides not in self.composed:
            whole = compose(self.config_name, overrides=[*self.search_path, *overrides], return_hydra_config=True)
            cfg = deepcopy(whole)
            with read_write(cfg), open_dict(cfg), open_dict(whole):
                del cfg["hydra"]
                whole.hydra.job.update(num=0, id="0")  # for what is named after a sweep's points
            HydraConfig.instance().set_config(whole)
            self.composed[overrides] = cfg, whole
        return self.composed[overrides]

    @cached_property
    def groups(self) -> list[str]:
        """The groups of this command, and those of the user's own."""
        choices = self.compose()[1].hydra.runtime.choices
        found = self.options("", ObjectType.GROUP)
        return sorted(g for g in found if g in choices or not (g == "hydra" or (CONF / g).is_dir()))

    def help(self) -> str:
        """Return the groups with their options, and the whole configuration."""
        fixed = _lines([o for o in self.overrides if not o.is_sweep_override()])
        options = "\n".join(f"{group}: {' '.join(self.options(group))}" for group in self.groups)
        return (
            f"python {self.command}.py [group=option] [key=value] ...   (-m: sweep; --hydra-help: other flags)\n\n"
            f"== groups (group=option) ==\n{options}\n\n"
            f"== configuration (key=value) ==\n{OmegaConf.to_yaml(self.compose(*fixed)[0])}"
        )

    def problems(self) -> list[str]:
        """Return everything that is wrong with the command line."""
        wrong: list[str] = []
        try:
            for problem in self._problems():
                wrong.append(problem)
        except HYDRA_ERRORS as error:
            wrong.append(_message(error))
        return list(dict.fromkeys(wrong))

    def _problems(self) -> Iterator[str]:
        if not Path(self.args.config_dir or CONF).is_dir():
            yield f"--config-dir ({self.args.config_dir}) is not a folder"
            return
        wrong = [self._unread_problem(argument) for argument in self.unread]
        wrong += [problem for override in self.overrides for problem in self._option_problems(override)]
        for key, value in ((o.key_or_group, str(o.value())) for o in self.overrides):
            if key in ("hydra.run.dir", "hydra.sweep.dir") and "://" in value:
                wrong.append(f"{key} ({value}) must be a folder; checkpoint.path takes an address for checkpoints")
        yield from wrong
        fixed = [o for o in self.overrides if not (o.is_sweep_override() or any(self._option_problems(o)))]
        composing = [o for o in fixed if self._is_composed(o)]
        cfg, whole = self.compose(*_lines(composing))
        many = self.args.multirun or whole.hydra.mode is RunMode.MULTIRUN
        params = whole.hydra.sweeper.get("params") or {} if many else {}
        swept = {key: self.parser.parse_override(f"{key}={value}") for key, value in params.items()}
        swept |= {o.get_key_element(): o for o in self.overrides}  # the last of a key counts
        varied = [self._split(o) for o in swept.values() if o.is_sweep_override()]
        values = [o for o in fixed if not self._is_composed(o)]
        scratch = deepcopy(cfg)
        for override in [*values, *(one for ones in varied for one in ones if not self._is_composed(one))]:
            found = self._set(scratch, override)
            wrong += found
            yield from found
        if varied and not many:
            yield f"{varied[0][0].key_or_group} has several values; add -m to run one after another"
        elif many and joined_environment(os.environ):
            yield "a sweep starts its ranks itself; run python train.py -m ... without torchrun or srun"
        elif not (wrong or self.args.help or self.args.cfg or self.args.info):
            yield from self._point_problems(composing, values, list(product(*varied)))

    def _unread_problem(self, argument: str) -> str:
        key, equal, _ = argument.partition("=")
        if key and equal:
            return f"{key}: a command line's keys are ASCII letters, digits, _ and -; set it in YAML (--config-dir)"
        meant = " or ".join(f"{group}={argument}" for group in self.groups if argument in self.options(group))
        return f"{argument} must be key=value" + (f"; did you mean {meant}?" if meant else "")

    def _option_problems(self, override: Override) -> Iterator[str]:
        """Yield what is wrong with the options that an override chooses for a group."""
        key = override.key_or_group
        if override.is_add() and key in self.compose()[1].hydra.runtime.choices:
            yield f"{override.input_line} adds a group that is there; leave out the +"
        for one in self._split(override) if self._is_group(override) and not override.is_delete() else ():
            chosen = one.value()
            for name in map(str, chosen if isinstance(chosen, list) else [chosen]):
                group, _, option = f"{key}/{name}".rpartition("/")
                if option not in self.options(group):
                    yield f"{key}={name} does not exist; {did_you_mean(option, self.options(group))}"

    def _is_group(self, override: Override) -> bool:
        return bool(self.options(override.key_or_group)) and not isinstance(override.value(), dict)

    def _is_composed(self, override: Override) -> bool:
        """Return whether an override decides what is composed, rather than a value in it."""
        is_hydra = override.key_or_group.partition(".")[0] == "hydra"
        return is_hydra or override.is_delete() or self._is_group(override)

    def _split(self, override: Override) -> list[Override]:
        """Return an override for each of its values; for the ends of an interval."""
        value = override.value()
        if not override.is_sweep_override():
            return [override]
        values = [value.start, value.end] if isinstance(value, IntervalSweep) else override.sweep_string_iterator()
        return [self.parser.parse_override(f"{override.get_key_element()}={value}") for value in values]

    def _set(self, cfg: DictConfig, override: Override) -> list[str]:
        """Set a value in a configuration; return why it cannot be."""
        key, value = override.key_or_group, override.value()
        node: Any = cfg
        parts = key.split(".")
        for n, part in enumerate(parts, 1):
            if OmegaConf.get_type(node) is dict:
                break  # its keys are the user's
            known = list(map(str, node)) if isinstance(node, DictConfig) else []
            if part not in known:
                known += [group for group in self.groups if n == 1 and group not in known]
                meant = MEANT.get(part, "") if self.command == "train" else ""
                meant = meant or " or ".join(keys_named(parts[-1], SCHEMAS[self.command]))
                hint = f"did you mean {meant}?" if meant else did_you_mean(part, known)
                return [f"{'.'.join(parts[:n])} is not a setting; {hint}"]
            node = node[part] if n < len(parts) else None
        try:
            OmegaConf.update(cfg, key, value, merge=True, force_add=True)
        except OmegaConfBaseException as error:
            return [f"{key} ({value}): {_message(error).removeprefix(f'{key}: ')}"]
        return []

    def _point_problems(
        self, composing: list[Override], values: list[Override], points: list[tuple[Override, ...]]
    ) -> Iterator[str]:
        """Yield what is wrong with every point, checked as the command checks it."""
        problems: dict[str, list[str]] = {}
        for point in points:
            base, whole = self.compose(*_lines([*composing, *filter(self._is_composed, point)]))
            cfg = deepcopy(base)
            for override in (*values, *point):
                _ = self._is_composed(override) or self._set(cfg, override)
            try:
                config = to_object(cfg)
                layout = whole.hydra.runtime.choices["hydra/launcher"] in HERE
                wrong = [*config.problems(), *(preflight_problems(config) if layout else ())]
            except ConfigError as error:
                wrong = str(error).splitlines()
            for problem in wrong:
                problems.setdefault(problem, []).append(" ".join(_lines(point)))
        yield from merge_problems(problems, len(points))


def _lines(overrides: Sequence[Override]) -> list[str]:
    return [override.input_line or "" for override in overrides]


def _message(error: BaseException) -> str:
    """Return the innermost message of an error of Hydra's, in one line, with the key that it is about."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split("\n    full_key")[0].split())
    key = getattr(error, "full_key", None)
    return f"{key}: {text}" if key and key not in text else text
