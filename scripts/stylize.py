"""Apply a trained model to photos, videos or a camera: one forward pass each."""

import sys
import time

from fastnst import cli

EPILOG = """\
examples:
  fastnst stylize --style wave --input photo.jpg --output out.jpg
  fastnst stylize --model checkpoints/mine/model.safetensors --input photos/ 'more/*.png' --output stylized/
  fastnst stylize --style wave --input clip.mp4 --output out.mp4 --stabilize
  fastnst stylize --style wave --input photo.jpg --output out.jpg --keep-colors --opacity 0.8
  fastnst stylize --style wave --input photo.jpg --output out.jpg --mask background.png
  fastnst stylize --style wave --camera 0 --short-side 360
  torchrun --nproc-per-node=4 scripts/stylize.py --style wave --input photos/ --output stylized/   # a folder over four GPUs"""


def main(argv=None) -> int:
    p = cli.parser("stylize", __doc__, EPILOG)
    which = cli.add_model_flags(p, ", or an .onnx of `fastnst export`")
    which.add_argument("--list-styles", action="store_true", help="name the styles that come with the project, and stop")
    source = p.add_mutually_exclusive_group()
    source.add_argument("--input", nargs="+", metavar="PHOTO|FOLDER|GLOB|VIDEO", help="what to stylize; folders are searched recursively")
    source.add_argument("--camera", metavar="N|DEVICE|URL", help="stylize a camera live, on a page of this machine")
    p.add_argument("--output", metavar="FILE|FOLDER", help="a file for one photo or video, else a folder; the suffix chooses the format (photos: .jpg .png .webp .bmp .tif; others read become .png in a folder)")
    p.add_argument("--opacity", type=cli.number(0, 1), default=1.0, metavar="0-1", help="of the stylized picture over the photo: 0.7 leaves 0.3 of the photo (default: 1)")
    p.add_argument("--keep-colors", action="store_true", help="the photo's colors stay, the style's light, dark and strokes come in")
    p.add_argument("--mask", metavar="FILE", help="where the style goes, a picture scaled to each photo: white takes it, black leaves the photo; of one with transparency, what is opaque takes it")
    p.add_argument("--grain", type=cli.number(0, 1), metavar="0-1", help="for flat parts, such as skies and what is overexposed, which without any become plain or show JPEG's blocks: deviation in shares of the photo's contrast (default: 0.03; 0, none, for videos and cameras, where it stays in its place while things move)")
    p.add_argument("--short-side", type=cli.whole(1, 65_535), metavar="N", help="scale so that the short side has N pixels (default: the photo's size); strokes keep theirs, so they look larger on a smaller picture")
    p.add_argument("--quality", type=cli.whole(1, 100), default=95, metavar="1-100", help="of JPEG and WebP (default: 95)")
    existing = p.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace outputs that exist")
    existing.add_argument("--skip-existing", action="store_true", help="go on where an interrupted run stopped: photos, videos and numbered pictures whose output exists are not made again")
    p.add_argument("--engine", default="auto", metavar="auto|native|openvino|onnxruntime|torch", help="what computes (auto: the one measured fastest of those installed)")
    p.add_argument("--precision", default="auto", metavar="auto|float32|bfloat16|float16|int8", help="auto: the fastest of at least 45 dB against float32 on photos. int8 (CPU with OpenVINO): faster; about 50 dB on photos, down to 33 on text and other things on plain ground")
    p.add_argument("--tile", default="auto", metavar="auto|off|ROWS", help="strip by strip: auto where memory is short, off never, ROWS always in strips of so many rows; the same result but for rounding")
    video = p.add_argument_group("video and camera (pip install 'fastnst[video]')")
    video.add_argument("--stabilize", action="store_true", help="less flicker: blend frames along the motion")
    video.add_argument("--codec", default="auto", help="h264, hevc, av1, vp9 or an encoder of FFmpeg (auto: H.264, VP9 in .webm)")
    video.add_argument("--crf", type=cli.whole(0, 63), metavar="0-63", help="constant rate factor of the codec: lower is better and larger (default: 18 for H.264)")
    video.add_argument("--preset", help="speed against size, in the encoder's words, such as veryfast or slow")
    video.add_argument("--frames-per-second", type=frames_per_second, metavar="N", help="of numbered pictures (default: 25)")
    video.add_argument("--port", type=cli.whole(0, 65_535), default=8765, help="of the camera's page (default: 8765)")
    args = p.parse_args(argv)
    if args.list_styles:
        for name, path in cli.shipped_styles().items():
            print(f"{name:16} {path}")
        return 0
    if not args.camera and not (args.input and args.output):
        p.error("--input and --output are needed, or --camera")

    from fastnst.blend import Blend, read_mask
    from fastnst.engine import load_engine, load_network
    from fastnst.grain import GRAIN
    from fastnst.ranks import join_ranks
    from fastnst.runtime import StopRequest
    from fastnst.stylize import Stylizer

    with join_ranks(args.device) as (ranks, device), StopRequest(repeats=ranks.size > 1) as stop:
        network = load_network(args.model or cli.find_style(args.style))
        moving = args.camera or is_clip(args.input, args.output)
        grain = args.grain if args.grain is not None else 0.0 if moving else GRAIN
        stylizer = Stylizer(load_engine(network, device, args.engine, args.precision), args.tile, grain=grain)
        blend = Blend(args.opacity, args.keep_colors, None if args.mask is None else read_mask(args.mask))
        if moving:
            if args.mask and args.output:
                spare(args.mask, args.output)
            return (camera if args.camera else clip)(args, stylizer, finishing(args, blend), stop)
        stylizer.blend = blend
        return photos(args, stylizer, ranks, stop)


def spare(mask, output) -> None:
    """Raise ``ValueError`` where a video or numbered pictures would be written over the mask."""
    from pathlib import Path

    from fastnst.files import check_output
    from fastnst.video_input import is_numbered, numbered_files

    for path in [file for _, file in numbered_files(Path(output))] if is_numbered(output) else [output]:
        check_output(path, [mask], overwrite=True)


def finishing(args, blend):
    """What happens to a stylized frame: first it is made steady, then blended with its own photo, which does not flicker. None: nothing."""
    from fastnst.motion import Stabilizer

    steady = Stabilizer() if args.stabilize else None
    if steady is None and not blend:
        return None

    def finish(content, stylized):
        stylized = steady(content, stylized) if steady else stylized
        return blend.pictures(content[None], stylized[None])[0] if blend else stylized

    return finish


def frames_per_second(text):
    """A rate above 0: 25, 12.5 or 30000/1001."""
    from argparse import ArgumentTypeError
    from fractions import Fraction

    try:
        rate = Fraction(text)
    except (ValueError, ZeroDivisionError):
        rate = 0
    if rate <= 0:
        raise ArgumentTypeError(f"got {text}, need a number above 0, such as 25 or 30000/1001")
    return rate


def is_clip(inputs, output) -> bool:
    """Whether a video, a GIF, numbered pictures or a folder is to become a video or numbered pictures; raises where half of it is."""
    from pathlib import Path

    from fastnst.video_input import is_video

    moving = [name for name in inputs if is_video(name) or Path(name).is_dir()]
    if is_video(output) and len(inputs) == 1 and moving:
        return True
    wrong = [name for name in [*inputs, output] if is_video(name) and not name.lower().endswith(".gif")]
    if wrong:
        raise ValueError(f"{wrong[0]} is a video or numbered pictures: give one --input that moves, and a video or numbered pictures as --output")
    return False


def photos(args, stylizer, ranks, stop) -> int:
    """Every photo that --input names, shared out over the processes of torchrun."""
    from fastnst.jobs import plan_jobs
    from fastnst.picture import ImageSize
    from fastnst.stylize import stylize_files

    planned = plan_jobs(args.input, args.output, args.mask)
    mine = planned[ranks.rank :: ranks.size]
    jobs, failures, done = [], 0, 0
    with cli.progress_bar(len(mine), unit="photo", shown=ranks.main) as bar:
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
        shown = time.monotonic()

        def strip_done(part):
            nonlocal shown
            if stop():
                raise KeyboardInterrupt(stop.exit_code)  # a large picture takes minutes: nothing of it is written
            bar.set_postfix_str(f"{part:.0%} of this one", refresh=False)
            if time.monotonic() - shown > bar.mininterval:
                shown = time.monotonic()
                bar.refresh()

        for result in stylize_files(stylizer, jobs, size, args.quality, strip_done, stop):
            if result.error is not None:
                failures += 1
                cli.say(bar, f"error: {result.error}")
            done += result.error is None
            bar.update()
    skipped = len(mine) - len(jobs) if args.skip_existing else 0
    done, failures, skipped = map(sum, zip(*ranks.gather((done, failures, skipped))))
    if ranks.main:
        parts = [f"{done} of {len(planned)} stylized", *([f"{skipped} there already"] if skipped else []), *([f"{failures} failed"] if failures else [])]
        print(f"{', '.join(parts)}; output: {args.output}")
    return stop.exit_code or (1 if failures else 0)


def clip(args, stylizer, finish, stop) -> int:
    """One video, or numbered pictures, into another."""
    from pathlib import Path

    from fastnst.picture import ImageSize
    from fastnst.streaming import stylize_video
    from fastnst.video_output import Encoding

    if args.skip_existing and Path(args.output).exists():
        print(f"there already: {args.output}")
        return 0
    with cli.Bar("frame") as bar:
        stylizer.notice = bar.say
        found = stylize_video(
            args.input[0],
            args.output,
            stylizer,
            size=ImageSize(short_side=args.short_side),
            batch_size=min(8, stylizer.engine.batch),
            finish=finish,
            encoding=Encoding(codec=args.codec, quality=args.crf, preset=args.preset),
            picture_quality=args.quality,
            pictures_per_second=args.frames_per_second,
            overwrite=args.overwrite,
            skip_existing=args.skip_existing,
            finish_in_order=args.stabilize,
            on_progress=lambda progress: bar.to(progress.done + progress.there, progress.total),
            say=bar.say,
            should_stop=stop,
        )
    broken = f", {found.broken} broken ones left out" if found.broken else ""
    there = f", {found.there} there already" if found.there else ""
    print(f"{found.done} frames{' (stopped)' if stop() else ''}{there}{broken}, {found.frames_per_second:.1f} a second; output: {args.output}")
    if found.missing and not stop():
        cli.say(None, f"error: {args.input[0]} ends early, {float(found.missing):.1f} s before what it says; is it cut off?")
    return stop.exit_code or (1 if found.broken or found.missing else 0)


def camera(args, stylizer, finish, stop) -> int:
    """A camera live on a page, recorded where --output is given."""
    from fastnst.picture import ImageSize
    from fastnst.preview_page import PreviewPage
    from fastnst.streaming import stylize_live
    from fastnst.video_output import Encoding

    with PreviewPage(args.port) as page:
        print(f"{page.url} shows it; Ctrl-C ends it", flush=True)
        found = stylize_live(
            args.camera,
            stylizer,
            lambda pixels, progress: page.show(pixels, f"{progress.frames_per_second:.1f} frames/s, {progress.dropped} dropped"),
            size=ImageSize(short_side=args.short_side),
            target=args.output,
            finish=finish,
            encoding=Encoding(codec=args.codec, quality=args.crf, preset=args.preset),
            picture_quality=args.quality,
            overwrite=args.overwrite,
            say=lambda message: cli.say(None, message),
            should_stop=stop,
        )
    print(f"{found.shown} frames shown, {found.dropped} dropped" + (f"; output: {args.output}" if args.output else ""))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
