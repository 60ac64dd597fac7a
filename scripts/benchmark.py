"""Measure ours against the published, side by side on this machine: speed, and what comes out."""

import importlib
import sys

from fastnst import cli

EPILOG = """\
examples:
  fastnst benchmark --training
  fastnst benchmark --training --help

Each part has flags of its own, which its own help tells."""
PARTS = {"--inference": "benchmark_inference", "--training": "benchmark_training", "--recipes": "benchmark_recipes"}


def main(argv=None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    for flag, part in PARTS.items():
        if flag in argv:
            argv.remove(flag)
            return importlib.import_module(f"fastnst.scripts.{part}").main(argv)
    p = cli.parser("benchmark", __doc__, EPILOG)
    parts = p.add_mutually_exclusive_group(required=True)
    for flag, part in PARTS.items():
        parts.add_argument(flag, action="store_true", help=importlib.import_module(f"fastnst.scripts.{part}").__doc__)
    p.parse_args(argv)
    return 2


if __name__ == "__main__":
    sys.exit(cli.run(main))
