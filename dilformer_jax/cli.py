"""The command line shared by every entry point: what a user can mend ends in one sentence and exit code 2."""

import argparse
import difflib
import re
import runpy
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags  # type: ignore[import-untyped]

from dilformer_jax.io import bundle, executables
from dilformer_jax.io.headers import Reading
from dilformer_jax.io.volumes import BadInput

if TYPE_CHECKING:
    from dilformer_jax.registration.refine import Refinement

MOST_LABELS = 100_000  # that can be asked for; no atlas has as many
# Of registration, beside networks.
METHODS = ("identity", "affine", "syn")
KINDS = {int: "a whole number", float: "a number", bool: "true or false", tuple: "a tuple", ConfigDict: "a dictionary"}


class Arguments(argparse.ArgumentParser):
    """An argument parser that raises BadInput, in one sentence, where argparse would print the usage and exit."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown:
            options = [option for action in self._actions for option in action.option_strings]
            hint = _closest(unknown[1].partition("=")[0], options)
            raise BadInput(f"{self.prog} knows no {unknown[1]}{hint}; see {self.prog} --help.")
        raise BadInput(f"{self.prog}: {message}; see {self.prog} --help.")


def add_method(parser: argparse.ArgumentParser) -> None:
    """The options of which `registration.methods.chosen` makes a method, those of its refinement among them."""
    parser.add_argument("--workdir", type=Path, help="a training run, taken at its best checkpoint")
    parser.add_argument(
        "--weights", type=_network, metavar="default|BUNDLE", help="those that ship, or a bundle that `export` wrote"
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        help="doing nothing (with --preset or --refine, refinement alone), an affine map, or ANTs' SyN",
    )
    parser.add_argument(
        "--syn-iterations", type=int, nargs="+", metavar="N", help="of SyN on its levels, coarse to fine (160 80 40)"
    )
    add_smoothness(parser)
    add_refinement(parser, "none")


def add_smoothness(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--smoothness",
        type=float,
        metavar="S",
        help="of a network that was trained for several: its regulariser's weight, times the usual one (1); --refine "
        "has a weight of its own",
    )


def add_refinement(parser: argparse.ArgumentParser, default: str) -> None:
    """The options of which `refinement` makes a Refinement."""
    parser.add_argument(
        "--preset",
        choices=("fast", "default", "best"),
        help=f"how much to refine ({default}): fast is the network alone",
    )
    parser.add_argument(
        "--refine", type=int, metavar="N", help="steps of instance optimisation at the finest level, for the preset's"
    )
    parser.add_argument(
        "--similarity",
        choices=("auto", "lncc", "mind", "nmi"),
        help="what refining makes alike: lncc for one contrast, mind or nmi for two; auto looks at the pair",
    )


def refinement(options: argparse.Namespace, *, network: bool, default_preset: str | None = None) -> "Refinement | None":
    """Returns the refinement that the command line describes, or None; by `default_preset` if it says nothing of it.

    Raises BadInput as `registration.refine.from_options` does.
    """
    from dilformer_jax.registration.refine import from_options  # with JAX, for which --help need not wait

    given = {} if options.similarity is None else {"similarity": options.similarity}
    return from_options(
        options.preset,
        options.refine,
        network=network,
        default_preset=default_preset,
        option="--{}".format,
        **given,
    )


def _network(text: str) -> str:
    if text == bundle.NONE:
        raise argparse.ArgumentTypeError(
            "none is no network; leave it out and give --method identity (with --preset default: refinement alone)"
        )
    return text


def add_reading(parser: argparse.ArgumentParser, *, pairs: bool = True) -> None:
    """The options of which `reading` makes a Reading, and for `pairs` --assume-same-grid for labels and their image."""
    parser.add_argument("--prefer", choices=("sform", "qform"), help="which holds where a header's two places differ")
    parser.add_argument(
        "--assume-affine",
        nargs="?",
        const="RAS",
        type=str.upper,
        metavar="AXES",
        help="how the axes of images run whose headers do not say (RAS): header's voxel sizes, middle at the origin",
    )
    parser.add_argument("--frame", type=int, metavar="N", help="which frame of 4-D images to read, counted from 0")
    parser.add_argument(
        "--nan", choices=("error", "zero"), default="error", help="refuse NaN and infinite voxels (error), or read 0"
    )
    if pairs:
        parser.add_argument(
            "--assume-same-grid",
            action="store_true",
            help="labels lie where their image lies, whatever their header says",
        )


def reading(options: argparse.Namespace) -> Reading:
    """How the command line wants images to be read. Raises BadInput for letters that are no axes."""
    return Reading(options.prefer, options.assume_affine, options.frame, options.nan)


def label_list(text: str) -> tuple[int, ...]:
    """'21-34,41' as label ids, for `add_argument(type=...)`."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not (last.isdecimal() and int(first) <= int(last))):
            raise argparse.ArgumentTypeError(f"{text!r} is no list of labels such as 21-34,41 (at {part.strip()!r})")
        more = range(int(first), int(last or first) + 1)
        if len(more) + len(found) > MOST_LABELS:
            raise argparse.ArgumentTypeError(f"{text!r} names more than {MOST_LABELS:,} labels (at {part.strip()!r})")
        found.extend(more)
    return tuple(dict.fromkeys(found))


def shard(text: str) -> tuple[int, int]:
    """'2/4' as the second of four parts, for `add_argument(type=...)`."""
    first, slash, last = text.partition("/")
    if not (slash and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"{text!r} is no part of a whole such as 1/4")
    return int(first), int(last)


def run(main: Callable[[ConfigDict, Path], None], argv: Sequence[str] | None = None) -> None:
    """Runs main(config, workdir) on `--config FILE.py[:ARGUMENT] --workdir DIR --config.key=value ...`.

    `argv` (sys.argv unless given) begins with the program's name. The config is locked. main's docstring is the help.
    What main compiles is kept for the next time; see `io.executables`.
    """
    with one_sentence():
        config, workdir = _experiment(list(sys.argv if argv is None else argv), main.__doc__ or "")
        executables.keep()
        main(config, workdir)


def run_arguments(
    main: Callable[[argparse.Namespace], None], parser: Arguments, argv: Sequence[str] | None = None
) -> None:
    """Runs main(arguments) on what `parser` makes of `argv`; the rest is as in `run`."""
    with one_sentence():
        arguments = parser.parse_args(list(sys.argv if argv is None else argv)[1:])
        executables.keep()
        main(arguments)


@contextmanager
def one_sentence() -> Iterator[None]:
    """Turns BadInput into its sentence on stderr and exit code 2, and Ctrl-C into exit code 130."""
    try:
        yield
    except BadInput as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        sys.exit(130)


def _experiment(argv: list[str], description: str) -> tuple[ConfigDict, Path]:
    parser = Arguments(
        Path(argv[0]).name,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="--config.KEY=VALUE changes a value of the configuration, for example --config.total_steps=100",
    )
    parser.add_argument("--config", required=True, metavar="FILE.py[:ARGUMENT]", help="configuration of the experiment")
    parser.add_argument("--workdir", required=True, type=Path, help="folder for checkpoints, metrics and figures")
    known, overrides = parser.parse_known_args(argv[1:])
    if known.workdir.exists() and not known.workdir.is_dir():
        raise BadInput(f"--workdir {known.workdir} is a file; give a folder.")
    return overridden(parser, load_config(known.config), overrides, known.config), known.workdir


def load_config(source: str) -> ConfigDict:
    """What get_config() of 'FILE.py' returns, or get_config('ARGUMENT') of 'FILE.py:ARGUMENT'. Raises BadInput."""
    name, _, argument = source.partition(":")
    path = Path(name)
    if not path.is_file():
        raise BadInput(f"config file {path} does not exist; give a Python file such as configs/demo.py.")
    try:
        get_config = runpy.run_path(str(path), run_name="config").get("get_config")
        config = get_config(argument) if get_config and argument else get_config and get_config()
    except BadInput:
        raise
    # A configuration is a program: anything may happen in it.
    except Exception as error:
        raise BadInput(f"config {source} fails with {type(error).__name__} ({error}); mend it.") from error
    if not isinstance(config, ConfigDict):
        raise BadInput(f"config file {path} has no get_config() that returns a ConfigDict; add one.")
    return config


def overridden(parser: Arguments, config: ConfigDict, overrides: list[str], source: str) -> ConfigDict:
    """The config, locked, with `--config.key=value` set. Raises BadInput for any other of the `overrides`."""
    for argument in overrides:
        match = re.match(r"--?(?:no)?config\.([^=]+)", argument)
        if match:
            _check_key(config, match[1], source)
        elif argument.startswith("-") and not re.match(r"-\d", argument):
            parser.error(f"unrecognized arguments: {argument}")
    # Not flags.FLAGS, which all of the process shares and which takes every flag only once.
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=[parser.prog, *overrides])
        unexpected = values([parser.prog, *overrides])[1:]
    except flags.IllegalFlagValueError as error:
        match = re.match(r"flag --config\.([^=]+)=(.*?): ", str(error), re.DOTALL)
        if not match:
            raise BadInput(f"{parser.prog}: {error}; see {parser.prog} --help.") from error
        raise BadInput(f"--config.{match[1]}={match[2]} is not {_kind(config, match[1])}; mend the value.") from error
    except (flags.Error, AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise BadInput(f"{parser.prog} {' '.join(overrides)}: {error}; mend the value.") from error
    if unexpected:
        raise BadInput(f"{parser.prog} takes no argument {unexpected[0]!r}; see {parser.prog} --help.")
    return values["config"].value


def _check_key(config: ConfigDict, key: str, source: str) -> None:
    """ml_collections would raise a bare AttributeError or KeyError."""
    place: Any = config
    kind: type = ConfigDict
    # An index such as widths[0] is left to ml_collections.
    for part in key.partition("[")[0].split("."):
        if not isinstance(place, ConfigDict) or part not in place:
            raise BadInput(f"{source} has no key {key!r}{_closest(key, _keys(config))}; mend --config.{key}.")
        kind, place = place.get_type(part), place[part]
    if kind is type(None):
        raise BadInput(f"--config.{key} cannot be set on the command line, being None in {source}; set it there.")


def _keys(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    for name in config:
        yield prefix + name
        if isinstance(config[name], ConfigDict):
            yield from _keys(config[name], f"{prefix}{name}.")


def _kind(config: ConfigDict, key: str) -> str:
    holder, _, name = key.rpartition(".")
    place: Any = config
    for part in holder.split(".") if holder else ():
        place = place[part]
    kind = place.get_type(name)
    return KINDS.get(kind, f"of type {kind.__name__}")


def _closest(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(known), 1, 0.0)
    return f" (the closest is {found[0]})" if found else ""
