"""Apply a trained model to photos: one forward pass each."""

import sys

from fastnst import cli

EPILOG = """\
examples:
  fastnst stylize --style wave --input photo.jpg --output out.jpg
  fastnst stylize --model checkpoints/wave/model.safetensors --input photos/ 'more/*.png' --output stylized/
  torchrun --nproc-per-node=4 scripts/stylize.py --style wave --input photos/ --output stylized/   # a folder over four GPUs"""


def main(argv=None) -> int:
    p = cli.parser("stylize", __doc__, EPILOG)
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", metavar="FILE", help="a model.safetensors that `fastnst train` wrote, or an .onnx of `fastnst export`")
    which.add_argument("--style", metavar="NAME", help="a style that comes with the project")
    which.add_argument("--list-styles", action="store_true", help="name the styles that come with the project, and stop")
    p.add_argument("--input", nargs="+", metavar="PHOTO|FOLDER|GLOB", help="what to stylize; folders are searched recursively")
    p.add_argument("--output", metavar="FILE|FOLDER", help="a file for one photo, else a folder; the suffix chooses the format")
    p.add_argument("--short-side", type=int, metavar="N", help="scale so that the short side has N pixels (default: the photo's size)")
    p.add_argument("--quality", type=int, default=95, choices=range(1, 101), metavar="1-100", help="of JPEG and WebP (default: 95)")
    existing = p.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace outputs that exist")
    existing.add_argument("--skip-existing", action="store_true", help="go on where an interrupted run stopped: outputs that exist are not made again")
    p.add_argument("--engine", default="auto", metavar="auto|openvino|onnxruntime|torch", help="what computes (auto: the fastest that is installed)")
    p.add_argument("--precision", default="auto", metavar="auto|float32|bfloat16|float16", help="auto: the fastest that the eye cannot tell from float32")
    p.add_argument("--tile", default="auto", metavar="auto|off|ROWS", help="strip by strip, with the same result: where memory is short, never, or always")
    args = p.parse_args(argv)
    if args.list_styles:
        for name, path in cli.shipped_styles().items():
            print(f"{name:16} {path}")
        return 0
    if not args.input or not args.output:
        p.error("--input and --output are needed")
    if args.short_side is not None and args.short_side < 1:
        p.error(f"--short-side: got {args.short_side}, need 1 or more")

    from PIL import Image

    from fastnst.engine import load_engine
    from fastnst.jobs import plan_jobs
    from fastnst.picture import ImageSize
    from fastnst.runtime import Ranks, StopRequest
    from fastnst.stylize import Stylizer, load_network, stylize_files

    Image.MAX_IMAGE_PIXELS = 2**29  # Pillow warns from 89 megapixels on; strips take more
    planned = plan_jobs(args.input, args.output)
    with Ranks() as ranks, StopRequest() as stop:
        network = load_network(args.model or cli.find_style(args.style))
        stylizer = Stylizer(load_engine(network, ranks.device(args.device), args.engine, args.precision), args.tile)
        mine = planned[ranks.rank :: ranks.count]
        jobs, failures = [], 0
        with cli.progress_bar(len(mine), unit="photo", shown=ranks.rank == 0) as bar:
            stylizer.notice = lambda message: cli.say(bar, message)
            for job in mine:
                if not job.target.exists() or args.overwrite:
                    jobs.append(job)
                    continue
                bar.update()
                if not args.skip_existing:
                    failures += 1
                    cli.say(bar, f"error: {job.source}: {job.target} exists already; use --overwrite to replace it, or --skip-existing")
            size = ImageSize(short_side=args.short_side)
            done = 0
            for result in stylize_files(stylizer, jobs, size, args.quality, lambda part: bar.set_postfix_str(f"{part:.0%} of this one"), stop):
                if result.error is not None:
                    failures += 1
                    cli.say(bar, f"error: {result.error}")
                done += result.error is None
                bar.update()
        done, failures, skipped = ranks.sum(done, failures, (len(mine) - len(jobs)) if args.skip_existing else 0)
    if ranks.rank == 0:
        parts = [f"{done} of {len(planned)} stylized", *([f"{skipped} there already"] if skipped else []), *([f"{failures} failed"] if failures else [])]
        print(f"{', '.join(parts)}; output: {args.output}")
    return stop.exit_code or (1 if failures else 0)


if __name__ == "__main__":
    sys.exit(cli.run(main))
