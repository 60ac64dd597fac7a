"""Train recipes on the same paintings, photos and seeds, for as many photos, and judge their networks by one loss."""

import json
import re
import sys
import time
from pathlib import Path

from fastnst import cli

EPILOG = """\
examples:
  fastnst benchmark --recipes own pytorch_examples --content photos/ --held-out others/ --style paintings/ --output recipes/
  fastnst benchmark --recipes own own+train.optimizer=adam own+loss.grid_weight=0 ... --set train.steps=300 --set data.crop_size=128 --set network.width=16

A recipe is a training config, changed by each +KEY=VALUE behind it. All are trained on the loss of the first (network, layers and weights), with
terms of their own for total variation, grid and stability. Runs are kept in --output: the same command goes on where it stopped, and
with more seeds or recipes trains what is missing. Writes recipes.md, recipes.json and a sheet for each painting."""


def main(argv=None) -> int:
    p = cli.parser("benchmark --recipes", __doc__, EPILOG)
    p.add_argument("recipes", nargs="+", metavar="CONFIG[+KEY=VALUE...]", help="the first one's loss is that of all")
    p.add_argument("--style", nargs="+", required=True, type=Path, metavar="PAINTING|FOLDER", help="paintings, or folders of them")
    p.add_argument("--content", required=True, type=Path, metavar="FOLDER", help="photos to train on")
    p.add_argument("--held-out", required=True, type=Path, metavar="FOLDER", help="photos to judge on, not trained on")
    p.add_argument("--seeds", nargs="+", type=cli.whole(0, 2**31), default=[0, 1, 2], metavar="N", help="of weights, photos and crops (default: 0 1 2)")
    p.add_argument("--sizes", nargs="+", type=cli.whole(32, 8192), default=[256], metavar="PX", help="sides of the squares judged (default: 256)")
    p.add_argument("--photos", type=cli.whole(1, 100_000), default=24, metavar="N", help="how many to judge on (default: 24)")
    p.add_argument("--judge", action="append", default=[], metavar="NETWORK[=WEIGHTS]", help="a neutral judge, such as squeezenet1_1; may be repeated")
    p.add_argument("--set", action="append", default=[], metavar="KEY.SUB=VALUE", help="override any key of all recipes; may be repeated")
    p.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="where runs and report go")
    args = p.parse_args(argv)

    from fastnst.benchmark_recipes import markdown
    from fastnst.files import atomic_write
    from fastnst.picture import find_images, open_rgb
    from fastnst.runtime import StopRequest, keep_freed_memory, resolve_device
    from fastnst.sheet import contact_sheet
    from fastnst.yardstick import machine

    device = resolve_device(args.device)
    keep_freed_memory()
    paintings = [painting for given in args.style for painting in (sorted(find_images(given)) if given.is_dir() else [given])]
    configs = {name: _configs(name, args, paintings) for name in dict.fromkeys(args.recipes)}
    seen = {name: config.train.steps * config.train.batch_size for name, (config, *_) in configs.items()}
    if len(set(seen.values())) > 1:
        told = ", ".join(f"{name}: {count:,}" for name, count in seen.items())
        raise ValueError(f"the recipes see different numbers of photos ({told}): give each +train.steps=N so that steps x batch_size are equal")
    runs, pictures = [], {}
    plan = [(index, name, seed) for seed in args.seeds for index in range(len(paintings)) for name in configs]
    with StopRequest() as stop, cli.progress_bar(len(plan), unit="run") as bar:
        for index, name, seed in plan:
            bar.set_postfix_str(f"{name}, {paintings[index].stem}, seed {seed}")
            found = _run(args, name, configs[name][index], seed, configs[args.recipes[0]][index], device, stop)
            if found is None:
                print(f"stopped; the runs made so far are in {args.output}, the same command goes on from there")
                return stop.exit_code
            folder, figures = found
            runs += [{"recipe": name, "style": paintings[index].stem, "seed": seed, **of_size} for of_size in figures]
            pictures.setdefault(paintings[index], {}).setdefault(name, folder)
            bar.update()
    steps = ", ".join(f"{value:,}" for value in sorted({config.train.steps for config, *_ in configs.values()}))
    head = f"{next(iter(seen.values())):,} photos seen ({steps} steps), seeds {', '.join(map(str, args.seeds))}, on {machine(device)}; {' '.join(args.set)}"
    for painting, of_recipe in pictures.items():
        rows = [[open_rgb(folder / f"{name}_{index}.png")[0] for index in range(4) if (folder / f"{name}_{index}.png").is_file()] for name, folder in [("photo", next(iter(of_recipe.values())))]]
        rows += [[open_rgb(folder / f"stylized_{index}.png")[0] for index in range(len(rows[0]))] for folder in of_recipe.values()]
        with atomic_write(args.output / f"sheet_{painting.stem}.jpg") as temporary:
            contact_sheet(rows, ["photo", *of_recipe], height=args.sizes[-1] if len(args.sizes) == 1 else 256).save(temporary, quality=90)
    for file, text in (("recipes.json", json.dumps({"head": head, "runs": runs}, indent=1)), ("recipes.md", markdown(runs, head))):
        with atomic_write(args.output / file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(args.output / "recipes.md")
    return 0


def _configs(recipe, args, paintings):
    """The recipe's config for each painting, with the loss of the first recipe."""
    from fastnst.benchmark_recipes import share_loss
    from fastnst.config import load_config, validate_config
    from fastnst.train import TrainConfig

    def load(text, painting):
        name, *changes = re.split(r"\+(?=[\w.]+=)", text)
        given = [f"style.image={painting}", f"data.content={args.content}", f"data.validation={args.held_out}"]
        return load_config(TrainConfig, cli.find_config(name), [*given, *args.set, *changes])

    found = []
    for painting in paintings:
        config, first = load(recipe, painting).model_dump(), load(args.recipes[0], painting).model_dump()
        changed = {**config, "loss": share_loss(config["loss"], first["loss"]), "style": {**first["style"], "image": config["style"]["image"]}}
        found.append(validate_config(TrainConfig, changed, source=recipe))
    return found


def _run(args, name, config, seed, first, device, stop):
    """The folder of one training and its figures at each size; trained and judged where it is not yet. None when stopped."""
    import torch

    from fastnst.benchmark_recipes import OWN_TERMS, judge_network
    from fastnst.checkpoint import load_model
    from fastnst.config import to_yaml
    from fastnst.data import DataConfig, load_validation
    from fastnst.files import atomic_write
    from fastnst.image import load_image, to_pil
    from fastnst.judges import load_judge
    from fastnst.loss_network import LossNetworkConfig, load_loss_network
    from fastnst.losses import PerceptualLoss, calibrate
    from fastnst.picture import find_images
    from fastnst.train import train

    config = config.model_copy(update={"train": config.train.model_copy(update={"seed": seed, "keep": "last"})})
    folder = args.output / "runs" / "".join(letter if letter.isalnum() or letter in "._-+=" else "_" for letter in name) / config.style.image.stem / str(seed)
    asked = {"config": to_yaml(config), "sizes": args.sizes, "photos": args.photos, "judges": args.judge}
    kept = folder / "figures.json"
    if kept.is_file() and (read := json.loads(kept.read_text(encoding="utf-8")))["asked"] == asked:
        return folder, read["figures"]
    began = time.monotonic()
    result = train(config, folder, device, should_stop=stop)
    if not result.finished:
        return None
    seconds = time.monotonic() - began
    network, _ = load_model(result.model)
    painting = load_image(config.style.image, config.style).to(device)
    loss = PerceptualLoss(load_loss_network(first.loss, first.loss.layers).to(device), first.loss, painting)
    paths = sorted(find_images(args.held_out))
    paths = paths[:: max(1, len(paths) // args.photos)][: args.photos]

    def squares(size):
        return load_validation(paths, DataConfig(content=args.held_out, crop="center", crop_size=size))[0]

    loss.config = calibrate(loss, squares(config.data.crop_size)[:8].to(device).float() / 255).model_copy(update=dict.fromkeys(OWN_TERMS, 0.0))
    judges = [load_judge(LossNetworkConfig(network=network, weights=weights or "auto"), device) for network, _, weights in (judge.partition("=") for judge in args.judge)]
    found = []
    for size in args.sizes:
        photos = squares(size)
        figures, pictures = judge_network(network.to(device), loss, painting, judges, photos)
        found.append({"size": size, "seconds": seconds, "figures": figures})
    for index, picture in enumerate(pictures):
        to_pil(photos[index][None].float() / 255).save(folder / f"photo_{index}.png")
        picture.save(folder / f"stylized_{index}.png")
    with atomic_write(kept) as temporary:
        temporary.write_text(json.dumps({"asked": asked, "figures": found}), encoding="utf-8")
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return folder, found


if __name__ == "__main__":
    sys.exit(cli.run(main))
