"""The command line of every command: all that is wrong with it is reported at once, before torch is imported.

Hydra stops at the first problem, and at a sweep's bad point when its turn comes. Here its own loader applies every
override and every value of a sweep on its own first. A launcher or sweeper of another package is checked again by the
command's own `main`.
"""

import argparse
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from itertools import islice, product
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict, read_write
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from conf.schema import SCHEMAS, ConfigError, register, similar_keys, to_config, unknown_keys
from conf.text import as_hydra_reads
from data.config import TRAINING_ONLY
from launch.config import RankError, is_user_error
from launch.environment import VARIABLES, joined_environment
from launch.sweep import merge_problems
from tracking.logs import escape_unprintable, printable, quiet_pipe
from training.preflight import preflight_problems

CONF = Path(__file__).parent.resolve()
HYDRA_ERRORS = (HydraException, OmegaConfBaseException, YAMLError)
NO_CONFIG = ("hydra_help", "shell_completion", "experimental_rerun")  # flags of Hydra's that check no configuration
MOST_POINTS = 100  # of a sweep, that are composed before Hydra does it
HERE = ("jobs", "basic")  # launchers that start ranks on this machine, or where `launcher` in the config decides


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
            line = CommandLine(args, command)
            if problems := line.problems():
                # Each rank reports its own wrong variables; the rest is the same for all.
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
    """Report an error that the user can fix, or a rank's, and exit with 1; a sweep's point raises it.

    For the body of a command's `main` too, outside of which Hydra prints lines of its own.
    """
    try:
        yield
    except Exception as error:
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


def _print_errors(messages: list[str]) -> None:
    for message in messages:
        message = re.sub(r"(://[^/@\s]*:)[^/@\s]*@", r"\1***@", message)  # the password of an address
        print(f"error: {printable(message)}", file=sys.stderr)


def data_settings(hydra: Any) -> str:
    """Return the settings of a command line that decide which tokens there are, as another command takes them."""
    folders = [f"--config-dir={s.path}" for s in hydra.runtime.config_sources if s.provider == "command-line"]
    folders += [o for o in hydra.overrides.hydra if o.startswith("hydra.searchpath=")]
    typed = [o for o in (o.lstrip("+") for o in hydra.overrides.task) if o.startswith("data.")]
    typed = [o for o in typed if re.split("[.=]", o)[1] not in TRAINING_ONLY]
    plain = [re.sub(r"='((?!null$)[^'\\,[\]{}()$]+)'$", r"=\1", o) for o in typed]  # which is text without quotes too
    return shlex.join([*folders, f"data={hydra.runtime.choices['data']}", *plain])


def checked(cfg: DictConfig) -> Any:
    """Return a composed configuration as its checked dataclass; raise `ConfigError` with all that is wrong with it."""
    return to_config(cfg, preflight_problems)


class CommandLine:
    """The arguments of a command, the configurations that Hydra makes of them, and what is wrong with them.

    Hydra's loader is used as it uses it itself: the public `compose` has no `--config-dir`, and composes anew for every
    value.
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
        """Return the command's configuration under overrides, and Hydra's own."""
        groups = tuple(override.input_line or "" for override in overrides if self._chooses(override))
        if groups not in self.composed:
            lines = [*self.search_path, *groups]
            self.composed[groups] = self.loader.load_configuration(self.config_name, lines, RunMode.RUN)
        cfg = deepcopy(self.composed[groups])
        self.loader._apply_overrides_to_config([o for o in overrides if not self._chooses(o)], cfg)
        with read_write(cfg), open_dict(cfg):
            cfg.hydra.job.update(num=0, id="0")  # for what is named after a sweep's points
            HydraConfig.instance().set_config(cfg)
            hydra = cfg.pop("hydra")
        return cfg, hydra

    def problems(self) -> list[str]:
        """Return everything that is wrong with the command line."""
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
        fixed = self._sound(sorted(fixed, key=self._chooses, reverse=True), wrong)
        cfg, hydra = self.configure(fixed)
        wrong += unknown_keys(cfg)
        folders = [o for o in overrides if o.key_or_group in ("hydra.run.dir", "hydra.sweep.dir")]
        remedy = "must be a folder; checkpoint.path takes an address for checkpoints"
        wrong += [f"{o.key_or_group} ({o.value()}) {remedy}" for o in folders if "://" in str(o.value())]
        many = self.args.multirun or hydra.mode is RunMode.MULTIRUN
        params = hydra.sweeper.get("params") or {} if many else {}
        swept = {key: self.parser.parse_override(f"{key}={value}") for key, value in params.items()}
        swept |= {override.get_key_element(): override for override in overrides}  # the last of a key counts
        varied = [self._split(override) for override in swept.values() if override.is_sweep_override()]
        if varied and not many:
            wrong.append(f"{varied[0][0].key_or_group} has several values; add -m to run one after another")
        elif many and joined_environment(os.environ):
            wrong.append("a sweep starts its ranks itself; run python train.py -m ... without torchrun or srun")
        for values in varied:
            for value in values:
                self._sound([value], wrong, beside=fixed)
        yield from wrong
        if not (wrong or self.args.help or self.args.cfg or self.args.info):
            points = islice(map(list, product(*varied)), MOST_POINTS)  # the launcher checks all
            yield from self._point_problems(fixed, list(points))

    def _sound(
        self, overrides: Sequence[Override], wrong: list[str], beside: Sequence[Override] = ()
    ) -> list[Override]:
        """Return the overrides that can be applied, and add to `wrong` why the others cannot be."""
        sound: list[Override] = []
        with suppress(*HYDRA_ERRORS, ValueError):
            self.configure([*beside, *overrides])
            return list(overrides)
        for override in overrides:
            try:
                self.configure([*beside, *sound, override])
                sound.append(override)
            except (*HYDRA_ERRORS, ValueError) as error:
                wrong.append(self._refusal(override, error))
        return sound

    def _refusal(self, override: Override, error: Exception) -> str:
        cause = _cause(error)
        if not isinstance(cause, (ConfigAttributeError, ConfigKeyError)):
            return f"{override.input_line}: {_message(error).removeprefix(f'{override.key_or_group}: ')}"
        meant = " or ".join(similar_keys(override.key_or_group, SCHEMAS[self.command]))
        return f"{override.key_or_group} is not a setting" + (f"; did you mean {meant}?" if meant else "")

    def _chooses(self, override: Override) -> bool:
        """Return whether an override chooses an option of a group, rather than a value."""
        key, name = override.key_or_group, self.config_name
        if key not in self.options:
            self.options[key] = [] if "." in key else self.loader.get_group_options(key, None, name, self.search_path)
        return bool(self.options[key]) and not isinstance(override.value(), dict)

    def _split(self, override: Override) -> list[Override]:
        """Return an override for each of its values; for the ends of an interval."""
        value = override.value()
        values = [value.start, value.end] if isinstance(value, IntervalSweep) else override.sweep_string_iterator()
        return [self.parser.parse_override(f"{override.get_key_element()}={value}") for value in values]

    def _point_problems(self, fixed: list[Override], points: list[list[Override]]) -> Iterator[str]:
        """Yield what is wrong with points of a sweep, and where."""
        problems: dict[str, list[str]] = {}
        for point in points:
            cfg, hydra = self.configure([*fixed, *point])
            try:
                _ = checked(cfg) if hydra.runtime.choices.get("hydra/launcher") in HERE else to_config(cfg)
            except ConfigError as error:
                for problem in str(error).splitlines():
                    problems.setdefault(problem, []).append(" ".join(override.input_line or "" for override in point))
        yield from merge_problems(problems, len(points))


def _cause(error: BaseException) -> BaseException:
    return error if error.__cause__ is None else _cause(error.__cause__)


def _message(error: BaseException) -> str:
    """Return the innermost message of an error of Hydra's, in one line, with the key that it is about."""
    cause = _cause(error)
    text = " ".join(re.split(r"\n +full_key|\nConfig search path", str(cause))[0].split())
    key = getattr(cause, "full_key", None)
    return f"{key}: {text}" if key and key not in text else text
