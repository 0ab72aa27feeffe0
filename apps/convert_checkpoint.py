"""Convert the published checkpoint to ours, and back.

    python apps/convert_checkpoint.py --src DIR.pth --dst checkpoint/dir_interhand.pth [KEY VALUE ...]
    python apps/convert_checkpoint.py --src checkpoint/dir_interhand.pth --dst DIR.pth --reverse

The published file contains the hand model's arrays, ours does not: both directions need the hand files that the network
was trained on (MANO.PATH). A round trip is exact to the bit. ``apps/eval_interhand.py --model`` reads both files.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from models import published
from models.checkpoint import load_model, read_tensors, save_checkpoint, write_tensors
from utils.errors import UserError, user_facing
from utils.hand import PUBLISHED_LEFT_MIDDLE_TIP


@user_facing
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--src', required=True, metavar='FILE', help='the checkpoint to convert')
    parser.add_argument('--dst', required=True, metavar='FILE', help='the file to write')
    parser.add_argument('--reverse', action='store_true', help='convert ours to the published form')
    parser.add_argument('opts', nargs='*', metavar='KEY VALUE', help='configuration keys, e.g. MANO.PATH DIR')
    args = parser.parse_intermixed_args(argv)
    convert = to_published_form if args.reverse else to_our_form
    convert(args.src, args.dst, args.opts)
    return 0


def to_our_form(src: str, dst: str, overrides: list[str]) -> None:
    content = read_tensors(src)
    if not published.is_published(content):
        raise UserError(f"{src} does not have the published form {{'net': ...}}; use --reverse to convert ours to it.")
    model, cfg, rest = published.load_published(content, path=src, overrides=overrides)
    hand_model = model.hands.identity
    save_checkpoint(dst, model=model, cfg=cfg, hand_model=hand_model, published_rest=rest)
    names = list(content['net'])
    dropped = Counter(filter(None, map(published.why_dropped, names)))
    print(f'{src}: {len(names)} names, {len(names) - dropped.total()} used once each, {dropped.total()} dropped:')
    print(*(f'{count:>6}  {reason}' for reason, count in dropped.most_common()), sep='\n')
    print(
        f'{dst}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, hand model {hand_model}, root '
        f'joint {cfg.ROOT_JOINT}, left middle fingertip at vertex {cfg.MODEL.LEFT_MIDDLE_TIP}'
    )


def to_published_form(src: str, dst: str, overrides: list[str]) -> None:
    model, cfg, content = load_model(src, overrides)
    rest = content.get('published_rest')
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
