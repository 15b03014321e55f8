"""`dilformer NAME ...`: one command for all entry points, each of which is also `python -m dilformer_jax.NAME`."""

import importlib
import sys

COMMANDS = {
    "train": "trains a network, validates, and goes on by itself where it was stopped",
    "evaluate": "measures a trained network, or another method, over a set of pairs",
    "compare": "makes one table and one figure of several methods that were evaluated",
    "register": "registers two images and writes the moved image and the transform",
    "apply": "carries images, labels and points through transforms that were saved",
    "learn2reg": "writes a submission to a Learn2Reg challenge, or checks one as the organisers will",
    "info": "says what a weights file is: network, grid, data and licence, figures, whether it is whole",
    "export": "writes a trained network's parameters to files that need no JAX to read",
    "prepare": "prepares a public data set, or files of your own, for training and evaluation",
    "doctor": "looks at versions, devices and settings, forecasts memory, and tests itself",
}


def main() -> None:
    """Hands sys.argv to the entry point named by its first argument."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(_help())
        return
    if name not in COMMANDS:
        print(f"dilformer has no command {name!r}; it has {', '.join(COMMANDS)}.", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"dilformer {name}", *sys.argv[2:]]
    importlib.import_module(f"dilformer_jax.{name}").main()


def _help() -> str:
    lines = [f"  {name:<10}{purpose}" for name, purpose in COMMANDS.items()]
    return "\n".join(["usage: dilformer COMMAND ...", "", *lines, "", "dilformer COMMAND --help tells its options."])


if __name__ == "__main__":
    main()
