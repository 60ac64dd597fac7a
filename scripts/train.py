"""Train a style network: fit one network to one painting, on a folder of photos."""

import sys
import traceback
from pathlib import Path

from fastnst import cli

EPILOG = """\
examples:
  fastnst train --content photos/ --style painting.jpg --run-dir checkpoints/mine
  fastnst train --content photos/ --style painting.jpg --run-dir checkpoints/strong --set loss.strength=7 --set train.steps=4000
  fastnst train --config wave --content photos/ --style wave.jpg --run-dir checkpoints/my_wave   # downloads VGG-16, 528 MB
  fastnst train --config a.yaml b.yaml c.yaml --content photos/       # one after the other
  torchrun --nproc-per-node=8 scripts/train.py --config wave ...      # on 8 GPUs; on several hosts as torchrun --help says

The same command again resumes an interrupted run exactly, on any number of GPUs. Watch it with: tensorboard --logdir checkpoints"""


def main(argv=None) -> int:
    p = cli.parser("train", __doc__, EPILOG)
    cli.add_config_flags(p, "own: for your painting, no download; all: configs/", ["own"])
    p.add_argument("--content", metavar="FOLDER", help="folder of photos; short for --set data.content=FOLDER")
    p.add_argument("--style", metavar="PAINTING", help="the style image; short for --set style.image=PAINTING")
    where = "where model, state and logs go; with several configs a folder of such folders (default: checkpoints/<name of the config>)"
    p.add_argument("--run-dir", type=Path, metavar="FOLDER", help=where)
    p.add_argument("--dry-run", action="store_true", help="print the complete config and what would happen, and stop")
    p.add_argument("--check-data", action="store_true", help="read every photo, try four steps, say what was found and what the training would take, and stop")
    args = p.parse_args(argv)

    from fastnst.ranks import RankLost, join_ranks
    from fastnst.runtime import StopRequest, keep_freed_memory, resolve_device
    from fastnst.training import TrainingDiverged

    names = [Path(name).stem for name in args.config]
    several = len(names) > 1
    if len(set(names)) < len(names):
        raise ValueError(f"--config: got {', '.join(names)}, need different names, as each is the name of a folder of results; rename one")
    for name in args.config:  # one that is missing is told before the first is trained
        cli.find_config(name)
    keep_freed_memory()
    codes = {}
    try:
        with join_ranks(args.device) as (ranks, place):
            device = resolve_device(place)
            for name, config in zip(names, args.config):
                run_dir = (args.run_dir or Path("checkpoints")) / name if several or not args.run_dir else args.run_dir
                stop = StopRequest(repeats=ranks.size > 1)
                try:
                    with stop:
                        codes[name] = _one(args, config, run_dir, ranks, device, stop)
                except (ValueError, OSError, ArithmeticError, TrainingDiverged) as error:  # the same on every rank
                    codes[name] = 1 if isinstance(error, TrainingDiverged) else 2
                    if ranks.main:
                        cli.complain(f"{name}: " if several else "", error)
                except Exception:
                    if not several or ranks.size > 1:
                        raise
                    codes[name] = 2
                    traceback.print_exc()
                except KeyboardInterrupt:  # ahead of all that could be saved, or asked for twice
                    codes[name] = stop.exit_code or 130
                    print("stopped", file=sys.stderr)
                    break
                if stop():
                    break
            if several and ranks.main:
                words = {0: "done", 1: "diverged", 2: "failed"}
                print(*(f"{name}: {words.get(codes.get(name), 'stopped' if name in codes else 'not begun')}" for name in names), sep="\n")
    except RankLost as error:
        if error.here or ranks.main:
            cli.complain("", error)
        return 1
    return max(codes.values()) if stop() or not several else int(any(codes.values()))


def _one(args, name, run_dir, ranks, device, stop) -> int:
    from fastnst.config import ConfigError, load_config, to_yaml
    from fastnst.task import TrainConfig
    from fastnst.train import check_data, plan, train

    paths = [cli.path_override(key, value) for key, value in (("data.content", args.content), ("style.image", args.style)) if value]
    try:
        config = load_config(TrainConfig, cli.find_config(name), [*paths, *args.set])
    except ConfigError as error:  # both have a flag of their own
        raise ConfigError(str(error).replace("--set data.content=VALUE", "--content FOLDER").replace("--set style.image=VALUE", "--style PAINTING")) from None
    if args.dry_run:
        if ranks.main:
            print(f"{to_yaml(config)}\n{plan(config, run_dir, device)}")
        return 0

    def report(progress) -> None:
        speed = f"loss {progress.losses['loss/total']:.4g}, {progress.photos_per_second:.1f} photos/s" if progress.losses else None
        bar.to(progress.step, progress.steps, speed, first=progress.step)
        if progress.message:
            bar.say(progress.message)
        if progress.validation:
            terms = "  ".join(f"{name.removeprefix('validation/')} {value:.4g}" for name, value in progress.validation.items() if "_" not in name)
            bar.say(f"step {progress.step:,}: validation {terms}")

    with cli.Bar("photo" if args.check_data else "step") as bar:
        if args.check_data:
            result = check_data(config, run_dir, device, bar.to) if ranks.main else ""
        else:
            result = train(config, run_dir, device, report, stop, ranks)
    if ranks.main:
        print(result if args.check_data else _summary(config, run_dir, result))
    return 0 if args.check_data or result.finished else stop.exit_code or 143  # the signal may have come to another rank


def _summary(config, run_dir, result) -> str:
    unreadable = [f"  {name}" for name in sorted(result.unreadable)]
    if unreadable:
        unreadable.insert(0, f"{len(unreadable)} photos could not be read and were skipped:")
    if not result.finished:
        where = f"saved in {run_dir}; the same command goes on from there" if result.step else "before the first: nothing to save"
        return "\n".join([*unreadable, f"stopped at step {result.step:,} of {config.train.steps:,}, {where}"])
    if result.photos_per_second:
        speed = f"{result.photos_per_second:.1f} photos/s, {result.waiting:.0%} of the time waiting for photos"
        lines = [f"done: {result.step:,} steps, {result.seconds:.0f} s in this run, {speed}"]
    else:
        cosine = config.train.learning_rate.decay == "cosine"  # every rate depends on how many steps there are
        more = "a longer one, as its rate is a cosine, needs another --run-dir" if cosine else "--set train.steps=N with more of them prolongs it"
        lines = [f"finished already, at step {result.step:,}; {more}"]
    for what, terms in (("loss", result.losses), ("validation", result.validation)):
        shown = [f"{name.removeprefix(f'{what}/')} {value:.4g}" for name, value in terms.items() if name.startswith(f"{what}/")]
        lines += [f"{what}: {'  '.join(shown)}"] if shown else []
    if result.rollbacks:
        lines.append(f"rollbacks: {result.rollbacks}; TensorBoard's text `watchdog` says why")
    best = f", of step {result.best_step:,}, the best on validation" if config.train.keep == "best" and result.best_step else ""
    model, logs = cli.quoted(result.model), cli.quoted(run_dir.parent)
    lines += [f"model: {result.model}{best}", f"apply it: fastnst stylize --model {model} --input PHOTO --output OUT.jpg", f"watch it: tensorboard --logdir {logs}"]
    return "\n".join([*unreadable, *lines])


if __name__ == "__main__":
    sys.exit(cli.run(main))
