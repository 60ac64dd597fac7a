"""Apply a trained model to photos: one forward pass each."""

import sys

from fastnst import cli

EPILOG = """\
examples:
  fastnst stylize --model checkpoints/wave/model.safetensors --input photo.jpg --output out.jpg
  fastnst stylize --model checkpoints/wave/model.safetensors --input photos/ 'more/*.png' --output stylized/"""


def main(argv=None) -> int:
    p = cli.parser("stylize", __doc__, EPILOG)
    p.add_argument("--model", required=True, metavar="FILE", help="a model.safetensors that `fastnst train` wrote")
    p.add_argument("--input", required=True, nargs="+", metavar="PHOTO|FOLDER|GLOB", help="what to stylize; folders are searched recursively")
    p.add_argument("--output", required=True, metavar="FILE|FOLDER", help="a file for one photo, else a folder; the suffix chooses the format")
    p.add_argument("--short-side", type=int, metavar="N", help="scale so that the short side has N pixels (default: the photo's size)")
    p.add_argument("--quality", type=int, default=95, choices=range(1, 101), metavar="1-100", help="of JPEG and WebP (default: 95)")
    p.add_argument("--overwrite", action="store_true", help="replace outputs that exist")
    args = p.parse_args(argv)
    if args.short_side is not None and args.short_side < 1:
        p.error(f"--short-side: got {args.short_side}, need 1 or more")

    from fastnst.image import ImageSize
    from fastnst.runtime import StopRequest, keep_freed_memory
    from fastnst.stylize import Stylizer, plan_jobs

    jobs = plan_jobs(args.input, args.output)
    stylizer = Stylizer.from_file(args.model, args.device)
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
                bar.write(f"error: {error}", file=sys.stderr)
            bar.update()
        done = bar.n - len(failures)
    print(f"{done} of {len(jobs)} stylized" + (f", {len(failures)} failed" if failures else "") + f"; output: {args.output}")
    return stop.exit_code or (1 if failures else 0)


if __name__ == "__main__":
    sys.exit(cli.run(main))
