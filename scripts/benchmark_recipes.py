"""Train recipes on the same paintings, photos and seeds, for as many photos, and judge their networks by one loss."""

import json
import re
import sys
from pathlib import Path

from fastnst import cli

EPILOG = """\
examples:
  fastnst benchmark --recipes own pytorch_examples --set train.steps=2000 --content photos/ --held-out others/ --style paintings/ --output recipes/
  fastnst benchmark --recipes own own+loss.grid_weight=0 own+train.optimizer=adam+train.learning_rate.initial=1e-3 ... --set network.width=16

A recipe is a training config, changed by each +KEY=VALUE behind it. The painting's size and the loss (network, layers, weights, strength) are those
of the first for all; total variation, grid, spectrum and stability are each recipe's own. Runs are kept in --output: the same command goes on where it
stopped, and with more seeds or recipes trains what is missing. Writes recipes.md, recipes.json and a sheet for each painting."""


def main(argv=None) -> int:
    p = cli.parser("benchmark --recipes", __doc__, EPILOG)
    p.usage = "fastnst benchmark --recipes CONFIG[+KEY=VALUE...] [CONFIG...] --style PAINTING... --content FOLDER --held-out FOLDER --output FOLDER [options]"
    p.add_argument("recipes", nargs="+", metavar="CONFIG[+KEY=VALUE...]", help="the first one's loss is that of all")
    p.add_argument("--style", nargs="+", required=True, type=Path, metavar="PAINTING|FOLDER", help="paintings, or folders of them")
    p.add_argument("--content", required=True, type=Path, metavar="FOLDER", help="photos to train on")
    p.add_argument("--held-out", required=True, type=Path, metavar="FOLDER", help="photos to judge on, not trained on")
    p.add_argument("--seeds", nargs="+", type=cli.whole(0, 2**31), default=[0, 1, 2], metavar="N", help="of weights, photos and crops (default: 0 1 2)")
    p.add_argument("--sizes", nargs="+", type=cli.whole(32, 8192), default=[256], metavar="PX", help="sides of the squares judged (default: 256)")
    p.add_argument("--photos", type=cli.whole(1, 100_000), default=24, metavar="N", help="how many to judge on (default: 24)")
    p.add_argument("--judge", action="append", default=[], metavar="NETWORK[=WEIGHTS]", help="a neutral judge, such as squeezenet1_1; may be repeated (default: none)")
    cli.add_set_flag(p, "override any key of all recipes")
    p.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="where runs and report go")
    args = p.parse_args(argv)
    for flag in ("recipes", "seeds", "sizes", "judge"):
        setattr(args, flag, list(dict.fromkeys(getattr(args, flag))))

    from fastnst.benchmark_recipes import Contest, markdown
    from fastnst.files import write_text
    from fastnst.judges import load_judge
    from fastnst.runtime import StopRequest, keep_freed_memory, resolve_device
    from fastnst.train import train
    from fastnst.training import TrainingDiverged
    from fastnst.yardstick import machine

    device = resolve_device(args.device)
    keep_freed_memory()
    paintings = _paintings(args)
    configs = {name: [_config(name, args, painting) for painting in paintings] for name in args.recipes}  # all is checked before the first is trained
    firsts = configs[args.recipes[0]]
    seen = {name: config.train.steps * config.train.batch_size for name, (config, *_) in configs.items()}
    if len(set(seen.values())) > 1:
        told = ", ".join(f"{name}: {count:,}" for name, count in seen.items())
        raise ValueError(f"the recipes see different numbers of photos ({told}): give --set train.steps=N, or +train.steps=N, so that steps x batch_size are equal")
    photos, judges = _held_out(args), [load_judge(judge, device) for judge in cli.judges(args.judge)]
    contest = Contest(args.output / "runs", photos, args.sizes, judges, device)
    runs, folders, diverged = [], {}, []
    plan = [(index, name, seed) for seed in args.seeds for index in range(len(paintings)) for name in configs]
    with StopRequest() as stop, cli.progress_bar(len(plan), unit="run") as bar:
        for index, name, seed in plan:
            bar.set_postfix_str(f"{name}, {paintings[index].stem}, seed {seed}", refresh=False)
            try:
                found = contest.run(name, configs[name][index], seed, firsts[index], train, stop)
            except TrainingDiverged as error:
                diverged.append(f"{name}, {paintings[index].stem}, seed {seed}: {error}")
                cli.say(bar, f"error: {diverged[-1]}")
                bar.update()
                continue
            if found is None:
                print(f"stopped; the runs made so far are in {args.output}, the same command goes on from there")
                return stop.exit_code
            folder, figures = found
            runs += [{"recipe": name, "style": paintings[index].stem, "seed": seed, **of_size} for of_size in figures]
            folders.setdefault(paintings[index].stem, {}).setdefault(name, folder)
            bar.update()
    if not runs:
        raise ValueError(f"every run diverged; the first: {diverged[0]}")
    changes = f"; --set {' '.join(args.set)}" if args.set else ""
    head = f"{next(iter(seen.values())):,} photos seen, seeds {', '.join(map(str, args.seeds))}, judged on {len(photos)} held-out photos, on {machine(device)}{changes}."
    _sheets(args.output, folders)
    for file, text in (("recipes.json", json.dumps({"head": head, "diverged": diverged, "runs": runs}, indent=1)), ("recipes.md", markdown(runs, head, args.recipes, diverged))):
        write_text(args.output / file, text)
    print(args.output / "recipes.md")
    return 1 if diverged else 0


def _paintings(args):
    from fastnst.picture import find_images, open_rgb

    found = list(dict.fromkeys(path for given in args.style for path in (sorted(find_images(given)) if given.is_dir() else [given])))
    if not found:
        raise ValueError(f"--style: no picture in {', '.join(map(str, args.style))}")
    for index, painting in enumerate(found):
        open_rgb(painting)
        if same := [other for other in found[:index] if other.stem == painting.stem]:
            raise ValueError(f"--style: {same[0]} and {painting} have the same name, which results are told apart by; rename one")
    for flag, folder in (("--content", args.content), ("--held-out", args.held_out)):
        if args.output.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"--output {args.output} lies inside of {flag} {folder}: its pictures would be taken for photos")
    return found


def _config(recipe, args, painting):
    """The recipe's config for a painting, with the loss of the first recipe."""
    from fastnst.benchmark_recipes import OWN_TERMS, share_loss
    from fastnst.config import ConfigError, load_config, validate_config
    from fastnst.data import list_photos
    from fastnst.task import TrainConfig

    def load(text):
        name, *changes = re.split(r"\+(?=[\w.]+=)", text)
        given = [cli.path_override(*pair) for pair in (("style.image", painting), ("data.content", args.content), ("data.validation", args.held_out))]
        try:
            return load_config(TrainConfig, cli.find_config(name), [*given, *args.set, *changes]), changes
        except (ConfigError, FileNotFoundError) as error:
            raise ValueError(f"recipe {text}: {error}") from error

    (config, changes), (first, _) = load(recipe), load(args.recipes[0])
    for change in changes if recipe != args.recipes[0] else ():
        section, _, key = change.partition("=")[0].partition(".")
        if section == "style" or (section == "loss" and key not in OWN_TERMS):
            raise ValueError(f"recipe {recipe}: {section}.{key} is the first recipe's for all; change it there, or with --set")
    found = config.model_dump() | {"loss": share_loss(config.loss.model_dump(), first.loss.model_dump()), "style": first.style.model_dump()}
    config = validate_config(TrainConfig, found, source=f"recipe {recipe}")
    list_photos(config.data)
    return config


def _held_out(args):
    from fastnst.picture import find_images

    paths = sorted(find_images(args.held_out))
    return paths[:: max(1, len(paths) // args.photos)][: args.photos]


def _sheets(output, folders):
    """Photos and what each recipe's first network made of them, a sheet for each painting."""
    from fastnst.picture import open_rgb, save_picture
    from fastnst.sheet import contact_sheet

    for painting, of_recipe in folders.items():
        shown = [("photo", next(iter(of_recipe.values()))), *(("stylized", folder) for folder in of_recipe.values())]
        rows = [[open_rgb(path)[0] for path in sorted(folder.glob(f"{kind}_*.png"))] for kind, folder in shown]
        save_picture(contact_sheet(rows, ["photo", *of_recipe], height=256), output / f"sheet_{painting}.jpg", quality=90)


if __name__ == "__main__":
    sys.exit(cli.run(main))
