"""Apply a trained model to photos: one forward pass each."""

import sys

from fastnst import cli

EPILOG = """\
examples:
  fastnst stylize --style wave --input photo.jpg --output out.jpg
  fastnst stylize --model checkpoints/wave/model.safetensors --input photos/ 'more/*.png' --output stylized/"""


def main(argv=None) -> int:
    p = cli.parser("stylize", __doc__, EPILOG)
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", metavar="FILE", help="a model.safetensors that `fastnst train` wrote")
    which.add_argument("--style", metavar="NAME", help="a style that comes with the project")
    which.add_argument("--list-styles", action="store_true", help="name the styles that come with the project, and stop")
    p.add_argument("--input", nargs="+", metavar="PHOTO|FOLDER|GLOB", help="what to stylize; folders are searched recursively")
    p.add_argument("--output", metavar="FILE|FOLDER", help="a file for one photo, else a folder; the suffix chooses the format")
    p.add_argument("--short-side", type=int, metavar="N", help="scale so that the short side has N pixels (default: the photo's size)")
    p.add_argument("--quality", type=int, default=95, choices=range(1, 101), metavar="1-100", help="of JPEG and WebP (default: 95)")
    p.add_argument("--overwrite", action="store_true", help="replace outputs that exist")
    args = p.parse_args(argv)
    if args.list_styles:
        for name, path in cli.shipped_styles().items():
            print(f"{name:16} {path}")
        return 0
    if not args.input or not args.output:
        p.error("--input and --output are needed")
    if args.short_side is not None and args.short_side < 1:
        p.error(f"--short-side: got {args.short_side}, need 1 or more")

    from fastnst.picture import ImageSize
    from fastnst.runtime import StopRequest, keep_freed_memory
    from fastnst.stylize import Stylizer, plan_jobs

    model = args.model or cli.find_style(args.style)
    jobs = plan_jobs(args.input, args.output)
    stylizer = Stylizer.from_file(model, args.device)
    keep_freed_memory()
    failures = []
    with StopRequest() as stop, cli.progress_bar(len(jobs), unit="photo") as bar:
        for job in jobs:
            if stop():
                break
            try:
                if job.target.exists() and not args.overwrite:
                    raise FileExistsError(f"{job.source}: {job.target} exists already; use --overwrite to replace it")
                stylizer.stylize_file(job.source, job.target, ImageSize(short_side=args.short_side), args.quality)
            except (OSError, ValueError) as error:
                failures.append(error)
                cli.say(bar, f"error: {error}")
            bar.update()
        done = bar.n - len(failures)
    print(f"{done} of {len(jobs)} stylized" + (f", {len(failures)} failed" if failures else "") + f"; output: {args.output}")
    return stop.exit_code or (1 if failures else 0)


if __name__ == "__main__":
    sys.exit(cli.run(main))
