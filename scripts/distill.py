"""Make vgg19_slim, the loss network inside the package, from VGG-19 weights and a folder of photos. Only needed for a loss network of your own."""

import sys
from pathlib import Path

from fastnst import cli

EPILOG = """\
examples:
  fastnst distill --config distill --set teacher.vgg19=vgg19.safetensors --set data.content=photos/

The package's own took about 75 minutes on one CPU core: 3,500 steps on 1,260 photos; the default of 12,000 steps is for a GPU.
The same command again resumes. The result is RUN_DIR/vgg19_slim.safetensors; use it with
  --set loss.network=vgg19_slim --set loss.weights=RUN_DIR/vgg19_slim.safetensors"""


def main(argv=None) -> int:
    p = cli.parser("distill", __doc__, EPILOG)
    cli.add_config_flags(p, "distill")
    p.add_argument("--run-dir", type=Path, default=Path("runs/distill"), metavar="FOLDER", help="where weights, state and logs go (default: runs/distill)")
    args = p.parse_args(argv)

    from fastnst.config import load_config
    from fastnst.distill import DistillConfig, distill
    from fastnst.runtime import StopRequest, keep_freed_memory, resolve_device

    config = load_config(DistillConfig, cli.find_config(args.config), args.set)
    keep_freed_memory()

    def report(progress):
        losses = "  ".join(f"{name.removeprefix('loss/')} {value:.3g}" for name, value in progress.losses.items())
        bar.to(progress.step, progress.steps, losses or None, first=progress.step)
        if progress.validation:
            errors = "  ".join(f"{name.removeprefix('validation')[1:]} {value:.3g}" for name, value in progress.validation.items())
            bar.say(f"step {progress.step:,}: validation {errors}")

    with StopRequest() as stop, cli.Bar() as bar:
        weights = distill(config, args.run_dir, resolve_device(args.device), report, stop)
    print(f"{'stopped, saved' if stop() else 'done'}: {weights}" if weights.exists() else "stopped before the first step: nothing to save")
    return stop.exit_code


if __name__ == "__main__":
    sys.exit(cli.run(main))
