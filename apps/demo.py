"""Reconstruct both hands in your own images and videos: meshes, positions and overlays.

    python apps/demo.py INPUT [INPUT ...] [--model CHECKPOINT] [--box X Y W H | --boxes FILE.json | --detect]
        [--refine-box] [--track on|off] [--smooth off|online|offline] [--fill] [--focal PX] [--principal CX CY]
        [--export npz glb bvh] [--out DIR] [--batch N] [--frames N] [KEY VALUE ...]
    python apps/demo.py --camera 0 --serve 8000        # watch at http://localhost:8000

INPUT: images, folders, patterns ('shots/*.png') or videos. CHECKPOINT: a file or a run folder; by default the network
that is shipped with the code, trained on synthetic hands (docs/model_card.md). The network expects both hands in the
centre of its crop, so pass a box around both hands in pixels (x and y of the upper left corner, width, height): one for
all inputs (--box), one for each (--boxes, {"name.jpg": [x, y, w, h], ...}; several boxes yield several pairs of hands),
or let a detector find them (--detect; where it finds fewer than two hands, the network places the box). Without any of
these, the whole image is used. --refine-box crops again around the predicted hands and predicts a second time, which
corrects boxes that are off. In a video, the box follows the hands; where they are lost, they are looked for as in the
first frame, and frames without hands are gaps in the files.

Each image gets a folder DIR/NAME with overlay.jpg, side.jpg, above.jpg, crop.jpg, left.obj, right.obj, hands.glb
(camera axes, metres) and hands.json (MANO parameters, camera, offset, joints); a video gets overlay.mp4, joints.csv,
hands.jsonl and video.json. --export adds files for other programs: npz (MANO in axis-angle), glb (animated, of videos;
images have one) and bvh (a skeleton per hand). docs/formats.md describes them all. The focal length is --focal (pixels
of the whole image), or the EXIF value, or else assumed to be the longer side; distances are proportional to it. A rerun
skips finished inputs; a stop signal (Ctrl-C, TERM, HUP, USR1) ends the command at the next frame with exit code 128 +
its number. Pass names that begin with a dash as ./-name.
"""

import argparse
import glob
import math
import os
import signal
import sys
from contextlib import ExitStack
from itertools import takewhile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault('OPENCV_LOG_LEVEL', 'SILENT')  # unreadable files are reported in one sentence instead

from inference import load_reconstructor
from inference.boxes import Boxes, BoxesFile
from inference.detector import MODEL as DETECTOR_MODEL
from inference.detector import HandDetector
from inference.engine import ENGINES
from inference.job import Job, Outcome, Settings
from inference.live_view import LiveView
from inference.media import find_inputs
from inference.motion import FORMATS
from models.checkpoint import SHIPPED
from utils.config import add_flag, default_config, flatten, refuse_pairs
from utils.distributed import keep_freed_memory
from utils.errors import UserError, printable, user_facing
from utils.ownership import owned
from utils.stopping import Stopped, StopRequest


@user_facing
def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    stop = StopRequest()
    inputs = find_inputs(args.inputs)
    settings = Settings(**{name: getattr(args, name) for name in Settings._fields})
    with owned(settings.out), ExitStack() as at_end:
        boxes, detector = choose_boxes(args), open_detector(args, at_end)
        if args.model == SHIPPED:
            print(f'network: {SHIPPED.name}, trained on synthetic images of stand-in hands (docs/model_card.md)')
        reconstruct = load_reconstructor(args.model, device=args.device, engine=args.engine, overrides=args.keys)
        print(f'computed by {reconstruct.engine.description}')
        reconstruct.batch_size = args.batch
        if reconstruct.device.type == 'cpu':
            keep_freed_memory()
        job = Job(reconstruct, boxes, settings, Outcome(), stop, open_view(args, at_end), detector)
        print_left_out('neither image nor video', inputs.others)
        print_left_out('hidden, or of the operating system', inputs.system)
        job.run(inputs, args.camera)
        code = job.outcome.finish(settings.out)
    if stop.number is None or (args.camera is not None and stop.number == signal.SIGINT):  # how a recording ends
        return code
    raise Stopped(stop.number)


def print_left_out(reason: str, files: list[Path]) -> None:
    if files:
        more = f' and {len(files) - 5} more' if len(files) > 5 else ''
        print(f'left out, {reason}: {", ".join(printable(path.name) for path in files[:5])}{more}')


def choose_boxes(args: argparse.Namespace) -> Boxes:
    if args.boxes:
        return BoxesFile(Path(args.boxes))
    return lambda source, image: [args.box]


def open_detector(args: argparse.Namespace, at_end: ExitStack) -> HandDetector | None:
    if not args.detect:
        return None
    detector = HandDetector(args.detector)
    at_end.callback(detector.close)
    return detector


def open_view(args: argparse.Namespace, at_end: ExitStack) -> LiveView | None:
    if args.serve is None:
        return None
    view = LiveView(args.serve)
    at_end.callback(view.close)
    print(f'watch at {view.address}')
    return view


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('inputs', nargs='*', metavar='INPUT', help='image, folder, pattern or video; KEY VALUE last')
    help_model = 'file, or a run folder (its best.pth); default: the network that is shipped with the code'
    parser.add_argument('--model', metavar='CHECKPOINT', default=SHIPPED, help=help_model)
    parser.add_argument('--camera', type=int, metavar='N', help='a camera, until Ctrl-C or --frames')
    where = parser.add_mutually_exclusive_group()
    where.add_argument('--box', type=float, nargs=4, metavar=('X', 'Y', 'W', 'H'), help='both hands, in every input')
    where.add_argument('--boxes', metavar='FILE.json', help='both hands, by input')
    where.add_argument('--detect', action='store_true', help='find the hands (requirements-demo.txt, misc/README.md)')
    parser.add_argument('--detector', metavar='FILE', help='its model (default: misc/hand_landmarker.task)')
    add_flag(parser, '--refine-box', action='store_true', help='predict again from a crop around the predicted hands')
    parser.add_argument(
        '--track',
        choices=('on', 'off'),
        default='on',
        help='on: the box follows the hands through a video; off: one box, or the detector, for all frames '
        '(default: %(default)s)',
    )
    parser.add_argument(
        '--smooth',
        choices=('off', 'online', 'offline'),
        default='off',
        help='steady the hands of a video and give them one shape: online by earlier frames, offline by all '
        '(default: %(default)s)',
    )
    parser.add_argument('--fill', action='store_true', help='interpolate the hands in gaps of up to a second')
    parser.add_argument('--focal', type=float, metavar='PX', help='focal length (default: EXIF, or the longer side)')
    parser.add_argument('--principal', type=float, nargs=2, metavar=('CX', 'CY'), help='default: the centre')
    parser.add_argument(
        '--export', nargs='+', default=[], metavar='FORMAT', help=f'further files: {", ".join(FORMATS)}'
    )
    parser.add_argument('--out', type=Path, default='output/pictures', metavar='DIR', help='default: %(default)s')
    parser.add_argument('--batch', type=int, default=8, metavar='N', help='crops at a time (default: %(default)s)')
    parser.add_argument('--frames', type=int, metavar='N', help='process only the first N frames of each video')
    parser.add_argument('--serve', type=int, metavar='PORT', help='show videos and cameras at http://localhost:PORT')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda or cuda:N (default: %(default)s)')
    parser.add_argument(
        '--engine', choices=ENGINES, default='auto', help='auto: ONNX Runtime on a CPU, once apps/export.py has run'
    )
    args = parser.parse_intermixed_args(argv)
    separate_formats(args)
    # File names may look like keys, so only known keys begin the KEY VALUE pairs.
    keys = flatten(default_config())
    first = next((number for number, word in enumerate(args.inputs) if word in keys), len(args.inputs))
    args.inputs, args.keys = args.inputs[:first], args.inputs[first:]
    refuse_pairs(args.keys, {'DEVICE': '--device', 'OUTPUT_DIR': '--out', 'EVAL.BATCH_SIZE': '--batch'})
    if not args.inputs and args.camera is None:
        raise UserError('No input: name images, folders or videos, or pass --camera 0.')
    if args.camera is not None and (args.smooth == 'offline' or args.fill):
        raise UserError('A camera cannot be read twice: --smooth offline and --fill need a file. Use --smooth online.')
    for name in ('batch', 'frames', 'focal'):
        value = getattr(args, name)
        if value is not None and not 0 < value < float('inf'):
            raise UserError(f'--{name} is {value:g}; it must be above 0.')
    if not all(map(math.isfinite, args.principal or ())):
        raise UserError(f'--principal is {" ".join(map(str, args.principal))}; both must be finite numbers of pixels.')
    if args.detector and not args.detect:
        raise UserError('--detector FILE needs --detect, which looks for the hands with it.')
    args.detector = args.detector or DETECTOR_MODEL
    return args


def separate_formats(args: argparse.Namespace) -> None:
    """Return the words after the formats of --export to the inputs: options with several values swallow them."""
    formats = list(takewhile(FORMATS.__contains__, args.export))
    rest = args.export[len(formats) :]
    if args.export and not (formats and (not rest or is_input_or_key(rest[0]))):
        raise UserError(
            f'--export {printable(rest[0])} is unknown; pass some of {", ".join(FORMATS)}, separated by spaces.'
        )
    args.inputs = [*args.inputs, *rest]
    args.export = tuple(name for name in FORMATS if name in formats)


def is_input_or_key(word: str) -> bool:
    return glob.has_magic(word) or os.path.lexists(word) or word in flatten(default_config())


if __name__ == '__main__':
    sys.exit(main())
