"""Convert checkpoints: the published form to ours and back, ours to safetensors and back.

    python apps/convert_checkpoint.py DIR.pth checkpoint/dir_interhand.pth [KEY VALUE ...]
    python apps/convert_checkpoint.py checkpoint/dir_interhand.pth DIR.pth --reverse
    python apps/convert_checkpoint.py output/dir_interhand/best.pth dir.safetensors
    python apps/convert_checkpoint.py dir.safetensors dir.pth
    python apps/convert_checkpoint.py output/dir_interhand/best.pth dir.safetensors --half

The published file contains the hand model's arrays, ours does not: converting between the two needs the hand files that
the network was trained on (MANO.PATH). A safetensors file holds the network, its configuration and its record, but no
optimizer state. Every round trip is exact to the bit. ``--half`` is not: it stores weights as float16, those beyond its
range as float32, in half the space; the network still computes in float32. ``--model`` of all commands accepts each of
these files.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import published
from models.checkpoint import (
    REST,
    TRAINING_STATE,
    in_half_precision,
    load_model,
    read_checkpoint,
    read_content,
    save_checkpoint,
    write_checkpoint,
)
from utils.errors import UserError, user_facing
from utils.hand import PUBLISHED_LEFT_MIDDLE_TIP
from utils.safetensors_file import SUFFIX
from utils.tensor_files import write_tensors


@user_facing
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--src', metavar='FILE', help='the checkpoint to convert; same as the first argument')
    parser.add_argument('--dst', metavar='FILE', help='the file to write; same as the second argument')
    parser.add_argument('--reverse', action='store_true', help='convert ours to the published form')
    parser.add_argument('--half', action='store_true', help='store the weights in half precision')
    parser.add_argument(
        'opts', nargs='*', metavar='SRC DST KEY VALUE', help='files, then configuration keys, e.g. MANO.PATH DIR'
    )
    args = parser.parse_intermixed_args(argv)
    given = iter(args.opts)
    src, dst = args.src or next(given, None), args.dst or next(given, None)
    if src is None or dst is None:
        raise UserError('Pass the checkpoint to convert and the file to write.')
    overrides = list(given)
    if args.half and args.reverse:
        raise UserError('The published form holds float32: leave --half or --reverse out.')
    if args.reverse:
        to_published_form(src, dst, overrides)
    elif args.half:
        to_other_format(src, dst, overrides, half=True)
    elif Path(src).suffix == SUFFIX or (Path(dst).suffix == SUFFIX and not published.is_published(read_content(src))):
        to_other_format(src, dst, overrides)
    else:
        to_our_form(src, dst, overrides)
    return 0


def to_other_format(src: str, dst: str, overrides: list[str], *, half: bool = False) -> None:
    """Convert between .pth and .safetensors; the configuration stays as it is."""
    if overrides:
        raise UserError(f'{src} has its own configuration, which conversion keeps: leave {overrides[0]} out.')
    content = read_checkpoint(src)
    left_out = [key for key in TRAINING_STATE if key in content]
    if half:
        content |= {key: in_half_precision(content[key]) for key in ('model', REST) if key in content}
    write_checkpoint(dst, {key: value for key, value in content.items() if key not in left_out})
    without = f', without its training state ({", ".join(left_out)})' if left_out else ''
    print(f'{dst}: the network of {src}{without}, hand model {content["hand_model"]}')


def to_our_form(src: str, dst: str, overrides: list[str]) -> None:
    content = read_content(src)
    if not published.is_published(content):
        raise UserError(f"{src} does not have the published form {{'net': ...}}; use --reverse to convert ours to it.")
    model, cfg, rest = published.load_published(content, path=src, overrides=overrides)
    hand_model = model.hands.identity
    save_checkpoint(dst, model=model, cfg=cfg, hand_model=hand_model, **{REST: rest})
    names = list(content['net'])
    dropped = Counter(filter(None, map(published.why_dropped, names)))
    print(f'{src}: {len(names)} names, {len(names) - dropped.total()} used once each, {dropped.total()} dropped:')
    print(*(f'{count:>6}  {reason}' for reason, count in dropped.most_common()), sep='\n')
    print(
        f'{dst}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, hand model {hand_model}, root '
        f'joint {cfg.ROOT_JOINT}, left middle fingertip at vertex {cfg.MODEL.LEFT_MIDDLE_TIP}'
    )


def to_published_form(src: str, dst: str, overrides: list[str]) -> None:
    if Path(dst).suffix == SUFFIX:
        raise UserError(f'{dst}: the published form is a .pth file. Choose another name.')
    model, cfg, content = load_model(src, overrides)
    rest = content.get(REST)
    net = published.whole_published(model.state_dict(), cfg, rest)
    write_tensors(dst, {'net': net})
    print(f'{dst}: {len(net)} names, including the licensed arrays of the hand model: do not redistribute it.')
    if rest is None:
        print('Parts that the published network never runs are set to zero.')
    if cfg.MODEL.LEFT_MIDDLE_TIP != PUBLISHED_LEFT_MIDDLE_TIP:
        print(
            f'The left middle fingertip is vertex {cfg.MODEL.LEFT_MIDDLE_TIP} in this network and '
            f'{PUBLISHED_LEFT_MIDDLE_TIP} in the published code, whose prediction of that joint differs by millimetres.'
        )


if __name__ == '__main__':
    sys.exit(main())
