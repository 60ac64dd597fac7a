"""Train a style network: fit one network to one painting, on a folder of photos."""

import shlex
import sys
from pathlib import Path

from fastnst import cli

EPILOG = """\
examples:
  fastnst train --config wave --content photos/ --style wave.jpg
  fastnst train --config wave --content photos/ --style wave.jpg --set train.steps=10000 --set data.crop_size=128

The same command again resumes an interrupted run exactly. Watch it with: tensorboard --logdir checkpoints"""


def main(argv=None) -> int:
    p = cli.parser("train", __doc__, EPILOG)
    cli.add_config_flags(p)
    p.add_argument("--content", metavar="FOLDER", help="folder of photos; short for --set data.content=FOLDER")
    p.add_argument("--style", metavar="PAINTING", help="the style image; short for --set style.image=PAINTING")
    p.add_argument("--run-dir", type=Path, metavar="FOLDER", help="where model, state and logs go (default: checkpoints/<name of the config>)")
    p.add_argument("--dry-run", action="store_true", help="print the complete config and what would happen, and stop")
    args = p.parse_args(argv)

    from fastnst.config import load_config, to_yaml
    from fastnst.runtime import StopRequest, keep_freed_memory, resolve_device
    from fastnst.train import TrainConfig, TrainingDiverged, plan, train

    path = cli.find_config(args.config)
    paths = [f"{key}={value}" for key, value in (("data.content", args.content), ("style.image", args.style)) if value]
    config = load_config(TrainConfig, path, [*paths, *args.set])
    run_dir = args.run_dir or Path("checkpoints") / path.stem
    device = resolve_device(args.device)
    if args.dry_run:
        print(to_yaml(config))
        print(plan(config, run_dir, device))
        return 0

    keep_freed_memory()
    bar = None

    def report(progress):
        nonlocal bar
        bar = bar or cli.progress_bar(progress.steps, progress.step)
        if progress.message:
            cli.say(bar, progress.message)
        if progress.validation:
            terms = "  ".join(f"{name.removeprefix('validation/')} {value:.4g}" for name, value in progress.validation.items() if "_" not in name)
            cli.say(bar, f"step {progress.step:,}: validation {terms}")
        if progress.losses:
            bar.set_postfix_str(f"loss {progress.losses['loss/total']:.4g}, {progress.photos_per_second:.1f} photos/s", refresh=False)
        bar.update(progress.step - bar.n)

    try:
        with StopRequest() as stop:
            result = train(config, run_dir, device, report, stop)
    except TrainingDiverged as error:
        diverged = error
    else:
        diverged = None
    finally:
        if bar is not None:
            bar.close()
    if diverged is not None:
        print(f"error: {diverged}", file=sys.stderr)
        return 1
    if result.unreadable:
        print(f"{len(result.unreadable)} photos could not be read and were skipped:", *sorted(result.unreadable), sep="\n  ")
    if not result.finished:
        where = f"saved in {run_dir}; the same command goes on from there" if result.step else "before the first: nothing to save"
        print(f"stopped at step {result.step:,} of {config.train.steps:,}, {where}")
        return stop.exit_code
    print(f"done: {result.step:,} steps, {result.seconds:.0f} s in this run\nmodel: {result.model}")
    model, logs = shlex.quote(str(result.model)), shlex.quote(str(run_dir.parent))
    print(f"apply it: fastnst stylize --model {model} --input PHOTO --output OUT.jpg\nwatch it: tensorboard --logdir {logs}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
