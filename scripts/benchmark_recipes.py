"""Train recipes on the same paintings, photos and seeds, for as many photos, and judge their networks by one loss."""

import hashlib
import json
import re
import sys
import time
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

    from fastnst.benchmark_recipes import markdown
    from fastnst.files import write_text
    from fastnst.judges import load_judge
    from fastnst.runtime import StopRequest, keep_freed_memory, resolve_device
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
    judges, paths = [load_judge(judge, device) for judge in cli.judges(args.judge)], _held_out(args)
    runs, folders, diverged = [], {}, []
    plan = [(index, name, seed) for seed in args.seeds for index in range(len(paintings)) for name in configs]
    with StopRequest() as stop, cli.progress_bar(len(plan), unit="run") as bar:
        for index, name, seed in plan:
            bar.set_postfix_str(f"{name}, {paintings[index].stem}, seed {seed}")
            try:
                found = _run(args, name, configs[name][index], seed, firsts[index], judges, paths, device, stop)
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
    head = f"{next(iter(seen.values())):,} photos seen, seeds {', '.join(map(str, args.seeds))}, judged on {len(paths)} held-out photos, on {machine(device)}{changes}."
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


def _run(args, name, config, seed, first, judges, paths, device, stop):
    """The folder of one training and its figures at each size; trained and judged where it is not yet. None when stopped."""
    from fastnst.benchmark_recipes import OWN_TERMS, judge_network
    from fastnst.checkpoint import load_model
    from fastnst.config import to_yaml
    from fastnst.data import DataConfig, load_validation
    from fastnst.files import write_text
    from fastnst.image import load_image, to_pil
    from fastnst.loss_network import load_loss_network
    from fastnst.losses import PerceptualLoss, calibrate
    from fastnst.model import MODEL_NAME
    from fastnst.train import train

    config = config.model_copy(update={"train": config.train.model_copy(update={"seed": seed, "keep": "last"})})
    decides = config.model_copy(update={"data": config.data.model_copy(update={"workers": None, "cache": "auto", "cache_gb": None})})
    digest = hashlib.sha256(to_yaml(decides).encode()).hexdigest()[:10]  # so that another config is another run
    safe = re.sub(r"[^\w.-]", "_", Path(name).name)[:60]
    folder = args.output / "runs" / f"{safe}_{config.style.image.stem}_{seed}_{digest}"
    clock, kept = folder / "seconds.json", folder / "figures.json"
    by = json.loads(first.loss.model_dump_json()) | {"at": first.data.crop_size}  # the loss is calibrated at that size
    asked = {"sizes": args.sizes, "photos": [[str(path), path.stat().st_size] for path in paths], "judges": args.judge, "loss": by}
    if kept.is_file() and (read := json.loads(kept.read_text(encoding="utf-8")))["asked"] == asked:
        return folder, read["figures"]

    legs = json.loads(clock.read_text(encoding="utf-8")) if clock.is_file() else {"finished": False, "seconds": 0.0}
    if not legs["finished"]:
        began = time.monotonic()
        result = train(config, folder, device, should_stop=stop)
        legs = {"finished": result.finished, "seconds": legs["seconds"] + time.monotonic() - began}
        write_text(clock, json.dumps(legs))
        if not result.finished:
            return None
    network = load_model(folder / MODEL_NAME)[0].to(device)
    painting = load_image(config.style.image, config.style).to(device)
    loss = PerceptualLoss(load_loss_network(first.loss, first.loss.layers).to(device), first.loss, painting)

    def squares(size):
        return load_validation(paths, DataConfig(content=args.held_out, crop="center", crop_size=size))[0]

    calibrated = calibrate(loss, squares(first.data.crop_size)[:8].to(device).float() / 255)
    loss.config = calibrated.model_copy(update=dict.fromkeys(OWN_TERMS, 0.0))
    found = []
    for size in args.sizes:
        if stop():
            return None
        photos = squares(size)
        figures, pictures = judge_network(network, loss, painting, judges, photos)
        found.append({"size": size, "seconds": legs["seconds"], "figures": figures})
    for index, picture in enumerate(pictures):
        to_pil(photos[index][None].float() / 255).save(folder / f"photo_{index}.png")
        picture.save(folder / f"stylized_{index}.png")
    write_text(kept, json.dumps({"asked": asked, "figures": found}))
    return folder, found


def _sheets(output, folders):
    """Photos and what each recipe's first network made of them, a sheet for each painting."""
    from fastnst.files import atomic_write
    from fastnst.picture import open_rgb
    from fastnst.sheet import contact_sheet

    for painting, of_recipe in folders.items():
        shown = [("photo", next(iter(of_recipe.values()))), *(("stylized", folder) for folder in of_recipe.values())]
        rows = [[open_rgb(path)[0] for path in sorted(folder.glob(f"{kind}_*.png"))] for kind, folder in shown]
        with atomic_write(output / f"sheet_{painting}.jpg") as temporary:
            contact_sheet(rows, ["photo", *of_recipe], height=256).save(temporary, quality=90)


if __name__ == "__main__":
    sys.exit(cli.run(main))
