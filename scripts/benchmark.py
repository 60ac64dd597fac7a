"""Measure fastnst against pytorch/examples' fast_neural_style on this machine."""

import importlib
import sys

from fastnst import cli

EPILOG = """\
examples:
  fastnst benchmark --inference --style wave
  fastnst benchmark --training --also lean
  fastnst benchmark --recipes own pytorch_examples --set train.steps=2000 --style paintings/ --content photos/ --held-out others/ --output recipes/

Flags of a part: fastnst benchmark --inference --help, and likewise."""
PARTS = {"--inference": "benchmark_inference", "--training": "benchmark_training", "--recipes": "benchmark_recipes"}


def main(argv=None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    for flag, part in PARTS.items():
        if flag in argv:
            argv.remove(flag)
            return importlib.import_module(f"fastnst.scripts.{part}").main(argv)
    p = cli.parser("benchmark", __doc__, EPILOG, device=False)
    p.usage = "fastnst benchmark (--inference | --training | --recipes) [flags of that part]"
    parts = p.add_mutually_exclusive_group(required=True)
    for flag, part in PARTS.items():
        parts.add_argument(flag, action="store_true", help=importlib.import_module(f"fastnst.scripts.{part}").__doc__)
    p.parse_args(argv)
    return 2


if __name__ == "__main__":
    sys.exit(cli.run(main))
