"""Judge models: how many iterations of the reference one pass is worth, how much faster it is, and what other loss networks say. Needs fastnst[evaluate]."""

import importlib.util
import json
import sys
from pathlib import Path

from fastnst import cli

EPILOG = """\
examples:
  fastnst evaluate --model wave starry_night --content held_out/ --style paintings/ --output report/
  fastnst evaluate --model runs/mine/model.safetensors --content held_out/ --style mine.jpg --output report/ --sizes 256 --photos 10 --iterations 100
  fastnst evaluate ... --judge squeezenet1_1 --judge vgg16=vgg16.pth --set loss.weights=vgg19.safetensors

Writes report.md, report.json, curves.png and a contact sheet for each size. The optimizer's runs are kept in --cache: the same command
goes on where it stopped, and another model of the same painting and loss is judged in minutes."""


def main(argv=None) -> int:
    p = cli.parser("evaluate", __doc__, EPILOG)
    p.add_argument("--model", required=True, nargs="+", metavar="MODEL", help="model files, or names of styles that come with the project")
    p.add_argument("--content", required=True, type=Path, metavar="FOLDER", help="photos that the models were not trained on")
    p.add_argument("--style", type=Path, metavar="PAINTING|FOLDER", help="the painting, or a folder that holds each model's painting under its name in the recipe (default: the model's own folder)")
    p.add_argument("--sizes", nargs="+", type=int, default=[256, 512, 1024], metavar="PX", help="sides of the squares judged (default: 256 512 1024)")
    p.add_argument("--photos", type=int, default=50, metavar="N", help="how many of the photos (default: 50)")
    p.add_argument("--iterations", type=int, default=500, metavar="N", help="of L-BFGS on each photo (default: 500; on a CPU start with 50)")
    p.add_argument("--judge", action="append", default=[], metavar="NETWORK[=WEIGHTS]", help="a further judge beside vgg19_slim; may be repeated")
    cli.add_set_flag(p, "override the models' recipes; loss.weights=FILE where the loss network's file lies elsewhere here")
    p.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="the report's folder")
    p.add_argument("--cache", type=Path, metavar="FOLDER", help="the optimizer's runs, to be shared by reports (default: OUTPUT/optimizer_runs)")
    p.add_argument("--overwrite", action="store_true", help="replace a report that exists; the optimizer's runs are kept")
    args = p.parse_args(argv)
    for module in ("matplotlib", "skimage"):
        if importlib.util.find_spec(module) is None:
            raise ValueError(f"{module} is not installed, needed for the report: pip install 'fastnst[evaluate]'")

    from fastnst import report
    from fastnst.config import validate_config
    from fastnst.evaluate import EvaluateConfig, evaluate
    from fastnst.files import check_output, write_text
    from fastnst.optimize import DescentConfig, OptimizeConfig, optimize_image
    from fastnst.picture import ImageSize, save_picture
    from fastnst.runtime import StopRequest, keep_freed_memory, resolve_device

    if (args.output / "report.json").exists() and not args.overwrite:
        raise FileExistsError(f"--output: {args.output / 'report.json'} exists already; use --overwrite to replace it, keeping the optimizer's runs")
    cache = args.cache or args.output / "optimizer_runs"
    if any(folder.resolve().is_relative_to(args.content.resolve()) for folder in (args.output, cache)):
        raise ValueError(f"--output and --cache must lie outside of --content {args.content}: their pictures would be judged as photos")
    asked = {"sizes": args.sizes, "photos": args.photos, "iterations": args.iterations, "judges": cli.judges(["vgg19_slim", *args.judge])}
    config = validate_config(EvaluateConfig, asked, source="--judge, --sizes, --photos or --iterations")
    shipped = cli.shipped_styles()
    models = [shipped.get(model, Path(model)) for model in args.model]
    for given, model in zip(args.model, models):
        if not model.is_file():
            raise FileNotFoundError(f"--model: no file {given}, and no style of that name comes along; there are: {', '.join(shipped)}")
    for name in ("report.md", "report.json", "curves.png", *(f"sheet_{size}.jpg" for size in args.sizes)):
        check_output(args.output / name, [*models, *([args.style] if args.style else [])], overwrite=True)
    device = resolve_device(args.device)
    keep_freed_memory()

    def optimize(content, style, loss_network, loss, start, iterations, watch, should_stop):
        descent = DescentConfig(init=start, steps=iterations, log_every=1, clamp=True)
        config = OptimizeConfig(content=ImageSize(), style=ImageSize(), loss=loss, optimize=descent)
        return optimize_image(content, style, loss_network, config, watch, should_stop)

    with StopRequest() as stop, cli.Bar("kpx") as bar:

        def show(progress):
            bar.to(progress.done, progress.total, progress.message)

        evaluation = evaluate(models, args.content, config, optimize, cache, args.style, args.set, device, show, stop)
    if evaluation is None:
        print(f"stopped; the optimizer's runs made so far are in {cache}, the same command goes on from there")
        return stop.exit_code
    found = evaluation.findings
    report.curves(found, args.output / "curves.png")
    for size, rows in evaluation.pictures.items():
        save_picture(report.sheet(rows, height=min(size, 384)), args.output / f"sheet_{size}.jpg", quality=90)
    for name, text in (("report.md", report.markdown(found)), ("report.json", json.dumps(found, indent=1))):  # the last one marks a whole report
        write_text(args.output / name, text)
    for reason in found["unreadable"]:
        print(f"skipped {reason}", file=sys.stderr)
    for size, at_size in found["sizes"].items():
        for label, of_model in at_size["models"].items():
            worth = {start: report.iterations(of_start["worth_quartiles"][1], config.iterations) for start, of_start in of_model["optimizer"].items()}
            print(f"{label}, {size} px: worth {worth['content']} iterations of L-BFGS from the content image, {worth['noise']} from noise")
    print(args.output / "report.md")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
