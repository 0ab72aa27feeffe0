"""Measure speed and memory on this machine, as ratios within one run; writes Markdown tables and JSON.

    python benchmarks/run.py [--only NAME ...] [--out FOLDER] [--batch 8] [--repeats 7] [--threads N] [--busy]
        [--cfg FILE] [KEY VALUE ...]

Every measurement alternates its contestants, so that a slower machine slows all of them, and reports median and
quartiles. Times of different runs are not comparable; ratios to the yardstick of the same run are: the bare ResNet-50
for the network, decoding a JPEG for the loader. Weights are random, hands stand-ins, data synthetic. A busy machine is
refused, unless --busy is given; tables measured beside other processes say so.

On a CPU, all contestants keep freed memory, as the commands do (utils.distributed.keep_freed_memory). What that brings
is not the network's, so forward, step and latency are measured a second time with the C library's defaults, for all
contestants alike, in a process of their own: the last two columns.

  forward       the network, eager, batch norms folded, as in the demo, exported, ONNX Runtime (requirements-export.txt)
  projection    joint features drawn along the bones: contracted, against the 2,560-channel map and its convolution
  step          a training step, and its peak of memory (in a process of its own)
  throughput    samples/s of inference and training over batch size, precision and --compile; memory; on CUDA the share
                of the card's measured bfloat16 matrix rate
  latency       one image: eager, folded, exported, ONNX Runtime; from an image to hands, and to all files
  loader        one worker: folder, packed, masks as bits, one JPEG per sample; and decoding a JPEG
  opening       a packed split of 400,000 samples
  augmentation  labels, warp, blur, colour, noise, and targets read or drawn, on the device
  waiting       share of a training epoch spent waiting for data
  preparation   frames/s of dataset/interhand.py in one process
  annotations   reading annotation files of 1.36 million frames: time and memory (writes 0.9 GB, then removes it)
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import utils  # noqa: F401  # before PyTorch, see there

# isort: split
import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torchvision import __version__ as torchvision_version
from yacs.config import CfgNode

from dataset import interhand, open_split
from dataset import packed as pack
from dataset.batch import build_batch_maker
from dataset.loader import training_loader
from dataset.prepare import pack as pack_command
from dataset.prepare import split as preparation
from dataset.prepare.frames import FramePreparer
from dataset.prepare.raw import RawSplit
from dataset.prepare.skips import Skipped
from dataset.synthetic import synthesize
from dataset.vertex_colours import canonical_colours
from inference import export
from inference.files import reduced, write_image_files
from inference.folding import fold_batch_norms, for_inference, replace_convolutions
from inference.reconstruct import Reconstructor, cut_crop
from models import DIR, build_criterion, build_model
from models.backbone import Backbone
from models.bone_projection import ProjectedConvolution, bone_weights, draw
from models.checkpoint import to_device
from models.criterion import objective
from models.hands import load_hands
from models.trainer import Trainer, recompute_as_configured
from utils.config import add_config_arguments, load_config, split_off_pairs
from utils.distributed import choose_device, keep_freed_memory, torch_threads, usable_cores
from utils.errors import UserError, user_facing
from utils.files import write_atomically, write_json
from utils.stopping import output_of, saying_kept
from utils.training import autocast, build_optimizer, compiled, set_float32_precision

SYNTHETIC_FRAMES = 320  # of the loader's data set
REAL_FRAMES = 1_361_062  # of InterHand2.6M's train split, 5 fps
PACKED_SAMPLES = 400_000
FORMS = {  # of a training step
    'DIR': (),
    'DIR, TRAIN.RECOMPUTE_NORMS': ('TRAIN.RECOMPUTE_NORMS', 'true'),
    'DIR, TRAIN.CHECKPOINT': ('TRAIN.CHECKPOINT', 'true'),
}
PEAKS = ('nothing', 'ResNet-50', *FORMS)
DRAWN = ('DATASET.TARGETS', 'render')


class Setting(NamedTuple):
    """Settings of all measurements."""

    device: torch.device
    files: list[str | Path]  # of the configuration
    opts: list[str]
    batch: int
    repeats: int
    compile: bool
    work: Path  # temporary folder
    default_allocator: bool = False  # the C library's own settings

    def config(self, *words: str) -> CfgNode:
        return load_config(self.files, ['MANO.SOURCE', 'standin', 'MODEL.PRETRAINED', 'false', *self.opts, *words])

    def words(self) -> list[str]:
        """The command line that yields the same configuration, threads, batch and allocator."""
        threads = ['--threads', str(torch.get_num_threads()), '--batch', str(self.batch)]
        allocator = ['--default-allocator'] * self.default_allocator
        return [*threads, *allocator, *(word for path in self.files for word in ('--cfg', str(path))), *self.opts]


class Row(NamedTuple):
    what: str
    value: float  # the median
    unit: str
    low: float | None = None  # quartiles
    high: float | None = None
    ratio: float | None = None  # to the table's yardstick
    default: float | None = None  # the median with the C library's own handling of freed memory
    default_ratio: float | None = None


class Table(NamedTuple):
    title: str
    yardstick: str | None
    rows: list[Row]
    note: str = ''


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


def in_turn(
    contestants: dict[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of every repetition of each contestant, after a warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for round_ in range(repeats + 1):
        for name, run in contestants.items():
            _wait(device)
            begin = clock()
            run()
            _wait(device)
            if round_:
                seconds[name].append(clock() - begin)
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize()


def rows_of(seconds: dict[str, list[float]], yardstick: str | None = None, *, per: int = 1) -> list[Row]:
    """Milliseconds, divided by ``per``, and ratios of medians."""
    rows = []
    for name, times in seconds.items():
        low, middle, high = (1e3 * value / per for value in np.percentile(times, (25, 50, 75)))
        ratio = statistics.median(times) / statistics.median(seconds[yardstick]) if yardstick else None
        rows.append(Row(name, middle, 'ms', low, high, ratio))
    return rows


def make_network(setting: Setting, *words: str) -> DIR:
    torch.manual_seed(0)
    cfg = setting.config('MODEL.INIT', 'identity', *words)
    return to_device(build_model(cfg, load_hands('standin')), setting.device)


def make_images(setting: Setting, batch: int) -> Tensor:
    size = setting.config().MODEL.IMAGE_SIZE
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(setting.device)


def inference_forms(model: DIR, setting: Setting) -> dict[str, Callable[[Tensor], object]]:
    """The exact forms in which the network can run."""
    folded = fold_batch_norms(model)
    forms: dict[str, Callable[[Tensor], object]] = {'DIR, eager': model, 'DIR, batch norms folded': folded}
    if setting.compile:
        forms['DIR, folded and compiled'] = compiled(folded, setting.device)
    if setting.device.type == 'cpu':
        forms['last estimate, as in apps/demo.py'] = fastest = for_inference(model)
        replace_convolutions(fastest)
        program = None
        for name, kind in export.FORMATS.items():
            try:
                export.require_packages(name, kind)
            except UserError:
                continue
            path = setting.work / kind.file
            if not path.exists():  # it serves any batch size
                with export.exporter(name):
                    program = program or export.trace(for_inference(model), setting.config().MODEL.IMAGE_SIZE)
                    path.write_bytes(kind.convert(program, list(export.outputs_of(setting.config()))))
            forms[f'last estimate, {name}'] = kind.load(path)
    return forms


# ---------------------------------------------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def forward(setting: Setting) -> Table:
    images, model = make_images(setting, setting.batch), make_network(setting).eval()
    bare = to_device(Backbone('resnet50'), setting.device).eval()
    runs = {'ResNet-50': bare} | inference_forms(model, setting)
    seconds = in_turn({name: partial(run, images) for name, run in runs.items()}, setting.repeats, setting.device)
    return Table(
        f'Forward, batch {setting.batch}',
        'ResNet-50',
        rows_of(seconds, 'ResNet-50'),
        "The last-estimate forms omit what only training needs (dense heads, the last stage's output map).",
    )


@torch.no_grad()
def latency(setting: Setting) -> Table:
    images, model = make_images(setting, 1), make_network(setting).eval()
    runs: dict[str, Callable[[], object]] = {
        name: partial(run, images) for name, run in inference_forms(model, setting).items()
    }
    image = (255 * torch.rand(256, 256, 3)).byte().numpy()
    reconstruct = Reconstructor(model, device=setting.device)

    def all_files():
        write_image_files(
            setting.work / 'image',
            reduced(image),
            cut_crop(image).image,
            reconstruct([image]).cpu().one(0),
            reconstruct.hand_models,
        )

    runs |= {
        'image to hands in metres': lambda: reconstruct([image]),
        'the same, with all files of apps/demo.py': all_files,
    }
    return Table('One image', 'DIR, eager', rows_of(in_turn(runs, setting.repeats, setting.device), 'DIR, eager'))


def projection(setting: Setting) -> Table:
    """Both stages' projections with gradients, against convolving the explicit map."""
    cfg, rows = setting.config(), []
    features, first = cfg.MODEL.JOINT_FEATURES, cfg.MODEL.IMAGE_SIZE // cfg.MODEL.FIRST_STRIDE
    for stage, radius in enumerate(cfg.MODEL.BONE_RADIUS[:2]):
        size = first << stage
        torch.manual_seed(0)
        layer = ProjectedConvolution(features, cfg.MODEL.MAP_CHANNELS, radius=radius)
        layer = layer.to(setting.device)
        uv = torch.rand(setting.batch, 2, 21, 2, device=setting.device) - 0.5
        tokens = torch.randn(setting.batch, 2, 21, features, device=setting.device, requires_grad=True)

        def contracted(layer=layer, uv=uv, tokens=tokens, size=size):
            layer(uv, tokens, size=size).sum().backward()

        def drawn(layer=layer, uv=uv, tokens=tokens, size=size):
            projected = draw(bone_weights(uv, size=size, radius=layer.radius), tokens[:, :, layer.ends])
            F.conv2d(projected, layer.as_conv_weight(layer.weight), layer.bias, padding=1).sum().backward()

        names = [f'stage {stage + 1}, {form}' for form in ('2,560-channel map', 'contracted')]
        seconds = in_turn(dict(zip(names, (drawn, contracted))), setting.repeats, setting.device)
        rows += rows_of(seconds, names[0])
    return Table('Projecting joint features back, forward and backward', '2,560-channel map', rows)


class SyntheticStep(NamedTuple):
    """A training step on one synthetic batch, without loader."""

    network: Callable[[], None]
    bare: Callable[[], None]
    network_loss: Callable[[], Tensor]  # the forward half
    bare_loss: Callable[[], Tensor]


def synthetic_step(setting: Setting, batch: int, *words: str, compile: bool = False) -> SyntheticStep:
    cfg = setting.config(*words)
    hand_models, device = load_hands('standin'), setting.device
    model, bare = make_network(setting, *words), to_device(Backbone('resnet50'), device)
    recompute_as_configured(model, cfg)
    criterion, images = build_criterion(cfg, hand_models).to(device), make_images(setting, batch)
    optimizer, bare_optimizer = build_optimizer(model, cfg), build_optimizer(bare, cfg)
    called = compiled(model, device) if compile else model
    target = synthetic_target(setting, batch)

    def network_loss() -> Tensor:
        with autocast(cfg.TRAIN.PRECISION, device):
            output = called(images)
        return objective(criterion(output, target))

    def bare_loss() -> Tensor:
        with autocast(cfg.TRAIN.PRECISION, device):
            features = bare(images)[-1]
        return features.float().square().mean()

    def network() -> None:
        optimizer.zero_grad(set_to_none=True)
        network_loss().backward()
        optimizer.step()

    def alone() -> None:
        bare_optimizer.zero_grad(set_to_none=True)
        bare_loss().backward()
        bare_optimizer.step()

    return SyntheticStep(network, alone, network_loss, bare_loss)


def synthetic_target(setting: Setting, batch: int):
    cfg = synthetic_config(setting, 'packed', 'TRAIN.BATCH_SIZE', '4', 'TRAIN.WORKERS', '0')
    loader, _ = training_loader(cfg)
    make_batch = build_batch_maker(cfg, load_hands('standin'), for_losses=True).to(setting.device)
    target = make_batch(next(iter(loader))).target
    return target.map(lambda values: values.repeat(-(-batch // 4), *[1] * (values.ndim - 1))[:batch])


def step(setting: Setting) -> Table:
    steps = {name: synthetic_step(setting, setting.batch, *words) for name, words in FORMS.items()}
    contestants: dict[str, Callable[[], object]] = {'ResNet-50': steps['DIR'].bare}
    contestants |= {name: each.network for name, each in steps.items()}
    rows = rows_of(in_turn(contestants, setting.repeats, setting.device), 'ResNet-50')
    losses = {'ResNet-50': steps['DIR'].bare_loss, **{name: each.network_loss for name, each in steps.items()}}
    for name, loss in losses.items():
        rows.append(Row(f'kept for the backward pass, {name}', kept_bytes(loss) / setting.batch / 1e6, 'MB a sample'))
    del steps, contestants, losses, loss
    if setting.device.type == 'cuda':
        torch.cuda.empty_cache()  # for the processes below
    for name in PEAKS:
        words = ['--peak', name, '--data', synthetic_data(setting), *setting.words()]
        rows.append(Row(f'peak memory, {name}', float(measured_apart(words)), 'GB'))
    return Table(
        f'Training step (AdamW), batch {setting.batch}',
        'ResNet-50',
        rows,
        '"nothing": the program with network, optimizer and data, before any step.',
    )


def kept_bytes(forward: Callable[[], object]) -> int:
    """Bytes that are allocated in ``forward`` and held by what it returns: what the backward pass will read."""
    cuda = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda], profile_memory=True) as profiler:
        held = forward()
    events = profiler.key_averages()
    del held
    return sum(event.self_cpu_memory_usage + event.self_device_memory_usage for event in events)


def _peak_memory() -> float:
    """Peak memory of this process in GB; getrusage would include the parent's."""
    return int(next(line for line in _lines('/proc/self/status') if line.startswith('VmHWM')).split()[1]) * 1024 / 1e9


def print_peak(setting: Setting, what: str) -> None:
    """Peak memory of three steps, in a process of its own."""
    training = synthetic_step(setting, setting.batch, *FORMS.get(what, ()))
    for _ in range(3 if what != 'nothing' else 0):
        (training.bare if what == 'ResNet-50' else training.network)()
    if setting.device.type == 'cuda':
        print(torch.cuda.max_memory_allocated() / 1e9)
    else:
        print(_peak_memory())


def throughput(setting: Setting) -> Table:
    """Samples per second; on CUDA also memory, and the achieved share of the matrix rate."""
    cuda = setting.device.type == 'cuda'
    batches = (1, 8, 32, 64, 128) if cuda else (1, setting.batch)
    precisions = ('float32', 'tf32', 'bfloat16') if cuda else ('float32',)
    rows, rate = [], matrix_rate(setting) if cuda else None
    if rate:
        rows.append(Row('bfloat16 matrix product 8192', rate / 1e12, 'TFLOP/s'))
    for precision in precisions:
        set_float32_precision(precision)
        for compile in (False, True) if setting.compile else (False,):
            for batch in batches:
                rows += _throughput(setting, batch, precision, compile, rate)
    set_float32_precision('float32')
    return Table('Throughput', None, rows)


def _throughput(setting: Setting, batch: int, precision: str, compile: bool, rate: float | None) -> list[Row]:
    model, images = make_network(setting).eval(), make_images(setting, batch)
    called = compiled(fold_batch_norms(model), setting.device) if compile else fold_batch_norms(model)

    @torch.no_grad()
    def infer() -> None:
        with autocast(precision, setting.device):
            called(images)

    rows, name = [], f'batch {batch}, {precision}{", compiled" if compile else ""}'
    forms = {'inference': infer}
    if batch > 1:
        forms['training'] = synthetic_step(setting, batch, 'TRAIN.PRECISION', precision, compile=compile).network
    flops = products(model, images)
    for form, run in forms.items():
        if setting.device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats()
        times = in_turn({form: run}, setting.repeats, setting.device)[form]
        low, middle, high = (batch / value for value in np.percentile(times, (75, 50, 25)))
        rows.append(Row(f'{form}, {name}', middle, 'samples/s', low, high))
        if rate:
            work = flops * (3 if form == 'training' else 1) / statistics.median(times)
            rows.append(Row(f'{form}, {name}: share of the matrix rate', 100 * work / rate, '%'))
            rows.append(Row(f'{form}, {name}: peak memory', torch.cuda.max_memory_allocated() / 1e9, 'GB'))
    return rows


@torch.no_grad()
def products(model: nn.Module, images: Tensor) -> float:
    """Floating-point operations of the matrix products and convolutions of one forward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops()


def matrix_rate(setting: Setting, size: int = 8192) -> float:
    """Measured operations per second of a large bfloat16 product."""
    a, b = (torch.randn(size, size, device=setting.device, dtype=torch.bfloat16) for _ in range(2))
    times = in_turn({'product': lambda: a @ b}, max(setting.repeats, 10), setting.device)['product']
    return 2 * size**3 / statistics.median(times)


# ---------------------------------------------------------------------------------------------------------------------
# The data pipeline
# ---------------------------------------------------------------------------------------------------------------------


def synthetic_data(setting: Setting) -> Path:
    """A synthetic data set in the forms folder, packed, bits and bare; created once."""
    if not (setting.work / 'bare').exists():
        raw, folder = setting.work / 'raw', setting.work / 'folder'
        _run(synthesize.main, '--save_path', raw, '--frames', SYNTHETIC_FRAMES, '0', '0')
        with torch_threads(1):  # the command sets it permanently
            _run(interhand.main, '--data_path', raw, '--save_path', folder, '--workers', 1, 'MANO.SOURCE', 'standin')
        for name, more in (('packed', ()), ('bits', ('--masks', 'bits')), ('bare', ('--no-targets',))):
            _run(pack_command.main, '--data_path', folder, '--save_path', setting.work / name, '--workers', 1, *more)
    return setting.work


def _run(main: Callable, *words: object) -> None:
    if main([str(word) for word in words]):
        raise UserError(f'The benchmark cannot create its data: {main.__module__} failed (its output is above).')


def synthetic_config(setting: Setting, form: str, *words: str) -> CfgNode:
    return setting.config('DATASET.PATH', str(synthetic_data(setting) / form), *words)


def loader(setting: Setting) -> Table:
    forms = {
        'folder, three JPEGs': ('folder',),
        'folder, targets drawn: one JPEG': ('folder', *DRAWN),
        'packed, three JPEGs': ('packed',),
        'packed, masks as bits': ('bits',),
        'packed, targets drawn: one JPEG': ('bare', *DRAWN),
    }
    loaders = {
        title: training_loader(synthetic_config(setting, *words, 'TRAIN.WORKERS', '1'))
        for title, words in forms.items()
    }

    def epoch(form: str) -> None:
        batches, sampler = loaders[form]
        sampler.start_at(sampler.epoch + 1)
        for _ in batches:
            pass

    seconds = in_turn({form: partial(epoch, form) for form in forms}, setting.repeats, torch.device('cpu'))
    rows = []
    for title in forms:
        count = loaders[title][1].steps * setting.config().TRAIN.BATCH_SIZE
        low, middle, high = (count / value for value in np.percentile(seconds[title], (75, 50, 25)))
        rows.append(Row(title, middle, 'samples/s', low, high))
    for kind in ('img', 'mask', 'dense'):
        content = np.frombuffer((synthetic_data(setting) / f'folder/train/{kind}/5.jpg').read_bytes(), np.uint8)
        decode = in_turn({kind: partial(cv2.imdecode, content, cv2.IMREAD_COLOR)}, 200, torch.device('cpu'))
        title = f'decoding a JPEG ({kind}, {len(content) / 1000:.0f} kB)'
        rows += [row._replace(what=title) for row in rows_of(decode)]
    return Table('Loader, one worker', None, rows)


def opening(setting: Setting) -> Table:
    """A packed split of zeros: its files are sparse, but opening it and reading labels is real."""
    folder = setting.work / 'large' / 'train'
    folder.mkdir(parents=True, exist_ok=True)
    np.lib.format.open_memmap(folder / pack.LABELS, 'w+', pack.record_type(), (PACKED_SAMPLES,)).flush()
    with open(folder / pack.SAMPLES, 'wb') as file:
        file.truncate(PACKED_SAMPLES * 20_000)
    files = {name: {'bytes': (folder / name).stat().st_size, 'sha256': ''} for name in (pack.LABELS, pack.SAMPLES)}
    write_json(
        folder / pack.MANIFEST,
        {'format': pack.FORMAT, 'samples': PACKED_SAMPLES, 'mask': 'jpeg', 'dense': True, 'files': files},
    )

    def open_and_read() -> None:
        open_split(folder.parent, 'train').labels(PACKED_SAMPLES // 2)

    seconds = in_turn(
        {f'open {PACKED_SAMPLES:,} samples, read one': open_and_read}, setting.repeats, torch.device('cpu')
    )
    return Table('Opening a packed split', None, rows_of(seconds))


def augmentation(setting: Setting) -> Table:
    """Batches for the losses, against batches with targets of the image's size, as evaluation makes them."""
    makers: dict[str, Callable[[], object]] = {}
    forms = {
        'targets read': ('packed',),
        'targets drawn': ('bare', *DRAWN),
        'targets drawn, no dense maps': ('bare', *DRAWN, 'LOSS.WEIGHT.DENSE', '0'),
    }
    for title, words in forms.items():
        cfg = synthetic_config(setting, *words, 'TRAIN.WORKERS', '0')
        samples = next(iter(training_loader(cfg)[0]))
        for size, for_losses in (("of the image's size", False), ("of the dense heads' size", True)):
            maker = build_batch_maker(cfg, load_hands('standin'), for_losses=for_losses).to(setting.device)
            makers[f'{title}, {size}'] = partial(maker, samples)
    cpu = setting.device.type == 'cpu'
    clock = time.process_time if cpu else time.perf_counter
    with torch_threads(1):
        seconds = in_turn(makers, setting.repeats, setting.device, clock=clock)
    return Table(
        f'Labels, augmentation and targets on {setting.device.type}, a sample (batch {cfg.TRAIN.BATCH_SIZE}'
        f'{", time of one core" if cpu else ""})',
        None,
        rows_of(seconds, per=cfg.TRAIN.BATCH_SIZE),
        'Time of one core excludes what other processes use, but a busy machine raises it, too.' if cpu else '',
    )


def waiting(setting: Setting) -> Table:
    """An epoch of real training steps on the synthetic data set, timed by its parts."""
    cfg = synthetic_config(
        setting,
        'bare',
        *DRAWN,
        'OUTPUT_DIR',
        str(setting.work / 'run'),
        'TRAIN.BATCH_SIZE',
        '64' if setting.device.type == 'cuda' else str(setting.batch),
        'TRAIN.PRECISION',
        'bfloat16' if setting.device.type == 'cuda' else 'float32',
    )
    hands = load_hands('standin')
    (loader, sampler), make_batch = (
        training_loader(cfg),
        build_batch_maker(cfg, hands, for_losses=True).to(setting.device),
    )
    trainer = Trainer(cfg, hands, setting.device)
    trainer.train()
    waited, steps = 0.0, 0
    batches = iter(loader)
    next(batches)
    begin = time.perf_counter()
    for _ in range(min(sampler.steps - 1, setting.repeats)):
        asked = time.perf_counter()
        samples = next(batches)
        waited += time.perf_counter() - asked
        batch = make_batch(samples)
        trainer.step([(batch.image, batch.target)], number=steps, count=1, rate=cfg.TRAIN.LR)
        steps += 1
    share = 100 * waited / (time.perf_counter() - begin)
    return Table(
        'Waiting for data',
        None,
        [Row(f'{cfg.TRAIN.WORKERS} workers, {steps} steps of {cfg.TRAIN.BATCH_SIZE}, of the time', share, '%')],
    )


def prepare(setting: Setting) -> Table:
    """Everything done for a frame, including reading and writing; the hand models are loaded already."""
    split, models = RawSplit(synthetic_data(setting) / 'raw', 'train'), load_hands('standin')
    preparer = FramePreparer(models, canonical_colours(models))
    rates = []
    with torch_threads(1):
        for number in range(setting.repeats):
            out = setting.work / f'prepared{number}'
            begin = time.perf_counter()
            preparation.prepare_split(split, out, {}, lambda chunks: map(preparer, chunks))
            frames = json.loads((out / 'train/preparation.json').read_text())['kept']
            rates.append(frames / (time.perf_counter() - begin))
    low, middle, high = np.percentile(rates, (25, 50, 75))
    return Table('Preparation, one core', None, [Row(f'{frames} frames', middle, 'frames/s', low, high)])


def annotations(setting: Setting) -> Table:
    root = setting.work / 'annotations'
    measured_apart(['--frames', REAL_FRAMES, '--out', root], script=ROOT / 'benchmarks/synthetic_annotations.py')
    frames, seconds, peak = map(float, measured_apart(['--peak', 'annotations', '--data', root]).split())
    return Table(
        f'Annotation files of {REAL_FRAMES:,} frames, one process',
        None,
        [Row(f'choose {frames:,.0f} frames', seconds, 's'), Row('peak memory', peak, 'GB')],
    )


def measured_apart(words: Sequence[object], *, script: str | Path = __file__) -> str:
    """Run this or another script in a process of its own -> its output. Raises UserError if it fails."""
    try:
        return output_of([sys.executable, str(script), *map(str, words)])
    except RuntimeError as error:
        raise UserError(f'A measurement in a process of its own failed ({error}).') from None


def print_annotations(root: Path) -> None:
    split, skipped = RawSplit(root, 'train'), Skipped()
    begin = time.perf_counter()
    frames = preparation.select(split, skipped)
    seconds = time.perf_counter() - begin
    print(len(frames), seconds, _peak_memory())


# ---------------------------------------------------------------------------------------------------------------------
# The machine
# ---------------------------------------------------------------------------------------------------------------------

QUIET_S, MOST_OTHERS = 2.0, 0.1  # s of listening before the first measurement; cores that others may use


class OtherProcesses:
    """How many cores the processes outside this one's group use, from Linux's counters; None where there are none."""

    def __init__(self, proc: str = '/proc'):
        self.proc = Path(proc)
        self.before = self._seconds()

    def cores(self) -> float | None:
        """On average since the last call."""
        before, self.before = self.before, self._seconds()
        if before is None or self.before is None:
            return None
        busy, own, at = (now - then for now, then in zip(self.before, before))
        return max(busy - own, 0.0) / at if at else 0.0

    def _seconds(self) -> tuple[float, float, float] | None:
        """Busy seconds of all cores, of this process's group, and the time."""
        ticks, group, busy, own = os.sysconf('SC_CLK_TCK'), os.getpgrp(), None, 0
        for line in _lines(self.proc / 'stat'):
            if line.startswith('cpu '):
                user, nice, system, _, _, *interrupts = map(int, line.split()[1:8])
                busy = user + nice + system + sum(interrupts)
        if busy is None:
            return None
        for path in self.proc.glob('[0-9]*/stat'):
            # Fields behind the name: 2 is the group; 11 to 14 user and system time, of ended children too.
            fields = ' '.join(_lines(path)).rpartition(')')[2].split()
            if len(fields) > 14 and int(fields[2]) == group:
                own += sum(map(int, fields[11:15]))
        return busy / ticks, own / ticks, time.monotonic()


def refuse_busy_machine(others: OtherProcesses) -> None:
    """Raises UserError if other processes use the machine."""
    time.sleep(QUIET_S)
    cores = others.cores()
    if cores is not None and cores > MOST_OTHERS:
        raise UserError(
            f'Other processes use {cores:.1f} of {usable_cores()} cores, so the figures would mean little. End them, '
            'or pass --busy to measure anyway.'
        )


def with_default_allocator(table: Table, name: str, setting: Setting) -> Table:
    """Measure again in a process that leaves the C library's allocator alone -> the table with both."""
    folder = setting.work / f'default-{name}'
    words = ['--only', name, '--busy', '--out', folder, '--repeats', setting.repeats]
    words += [*['--compile'] * setting.compile, *setting._replace(default_allocator=True).words()]
    measured_apart(words)
    [again] = json.loads((folder / 'benchmark.json').read_text())['tables']
    found = {row['what']: row for row in again['rows']}
    rows = [
        row._replace(default=found[row.what]['value'], default_ratio=found[row.what]['ratio'])
        if row.what in found
        else row
        for row in table.rows
    ]
    return table._replace(rows=rows)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------

WITH_BOTH_ALLOCATORS = ('forward', 'step', 'latency')

MEASUREMENTS = {
    'forward': forward,
    'projection': projection,
    'step': step,
    'throughput': throughput,
    'latency': latency,
    'loader': loader,
    'opening': opening,
    'augmentation': augmentation,
    'waiting': waiting,
    'preparation': prepare,
    'annotations': annotations,
}


def machine(setting: Setting) -> dict:
    """The machine, and the options that choose what is measured."""
    cpu = next(
        (line.split(':')[1].strip() for line in _lines('/proc/cpuinfo') if line.startswith('model name')),
        platform.processor(),
    )
    cuda = setting.device.type == 'cuda'
    return {
        'device': torch.cuda.get_device_name() if cuda else cpu,
        'cpu': cpu,
        'cores': usable_cores(),
        'options': ' '.join(setting.words()),
        'threads': torch.get_num_threads(),
        'load': os.getloadavg()[0],
        'python': platform.python_version(),
        'torch': torch.__version__,
        'torchvision': torchvision_version,
        'opencv': cv2.__version__,
        'cuda': torch.version.cuda if cuda else None,
    }


def _lines(path: str | Path) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def as_markdown(about: dict, tables: list[Table]) -> str:
    text = ['# Benchmark', '', *(f'- {key}: {value}' for key, value in about.items() if value is not None)]
    for table in tables:
        both = any(row.default is not None for row in table.rows)
        head = ['what', 'median', 'quartiles', 'unit'] + ([f'ratio to {table.yardstick}'] if table.yardstick else [])
        head += ['median, default allocator', 'ratio'] if both else []
        text += ['', f'## {table.title}', '', f'| {" | ".join(head)} |', f'|---|{"---:|" * (len(head) - 1)}']
        for row in table.rows:
            spread = '' if row.low is None else f'{row.low:.4g} – {row.high:.4g}'
            ratio = [] if not table.yardstick else ['' if row.ratio is None else f'{row.ratio:.2f}']
            if both:
                ratio.append('' if row.default is None else f'{row.default:.4g}')
                ratio.append('' if row.default_ratio is None else f'{row.default_ratio:.2f}')
            text.append(f'| {" | ".join([row.what, f"{row.value:.4g}", spread, row.unit, *ratio])} |')
        text += ['', table.note] if table.note else []
    return '\n'.join(text) + '\n'


@user_facing
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='+', default=[], metavar='NAME', help=', '.join(MEASUREMENTS))
    parser.add_argument('--out', metavar='FOLDER', help='output folder of benchmark.md and benchmark.json')
    parser.add_argument('--batch', type=int, default=8, help='samples (default: %(default)s)')
    parser.add_argument('--repeats', type=int, default=7, help='after one warm-up (default: %(default)s)')
    parser.add_argument('--threads', type=int, help="PyTorch's threads (default: its own choice)")
    parser.add_argument('--busy', action='store_true', help='measure beside other processes')
    parser.add_argument('--compile', action='store_true', help='measure torch.compile too, which takes minutes')
    parser.add_argument('--data', help=argparse.SUPPRESS)  # both for processes that measure their own memory
    parser.add_argument('--peak', help=argparse.SUPPRESS)
    parser.add_argument('--default-allocator', action='store_true', help=argparse.SUPPRESS)
    add_config_arguments(parser)
    args = parser.parse_intermixed_args(argv)
    names, keys = split_off_pairs(args.only)
    if unknown := [name for name in names if name not in MEASUREMENTS]:
        raise UserError(f"--only: '{unknown[0]}' is not a measurement; choose from {', '.join(MEASUREMENTS)}.")
    for name in ('batch', 'repeats', 'threads'):
        if (number := getattr(args, name)) is not None and number < 1:
            raise UserError(f'--{name} is {number}; it must be at least 1.')
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.peak == 'annotations':
        print_annotations(Path(args.data))
        return 0
    opts = [*keys, *args.opts]
    device = choose_device(load_config(args.cfg, opts).DEVICE)
    on_cpu = device.type == 'cpu'
    if on_cpu and not args.default_allocator:
        keep_freed_memory()  # as the commands themselves do
    others = OtherProcesses()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(args.data or work)
        setting = Setting(
            device, args.cfg or [], opts, args.batch, args.repeats, args.compile, folder, args.default_allocator
        )
        if args.peak:
            print_peak(setting, args.peak)
            return 0
        if not args.busy:
            refuse_busy_machine(others)
        about, tables = machine(setting), []
        with saying_kept(f'The tables printed above are in {args.out}.' if args.out else 'No figures were written.'):
            for name in names or MEASUREMENTS:
                print(f'{name} ...', file=sys.stderr, flush=True)
                others.cores()
                table = MEASUREMENTS[name](setting)
                if on_cpu and not args.default_allocator and name in WITH_BOTH_ALLOCATORS:
                    table = with_default_allocator(table, name, setting)
                if (cores := others.cores()) and cores > MOST_OTHERS:
                    note = f'**Busy: other processes used {cores:.1f} cores meanwhile.**'
                    table = table._replace(note=f'{table.note} {note}'.strip())
                tables.append(table)
                print(as_markdown({}, tables[-1:]).partition('\n')[2], flush=True)
                if args.out:
                    write_tables(Path(args.out), about, tables)
    if args.out:
        print(f'written: {Path(args.out) / "benchmark.md"}, benchmark.json')
    return 0


def write_tables(folder: Path, about: dict, tables: list[Table]) -> None:
    """benchmark.md and benchmark.json, after every measurement."""
    write_atomically(folder / 'benchmark.md', as_markdown(about, tables).encode())
    content = [table._asdict() | {'rows': [row._asdict() for row in table.rows]} for table in tables]
    write_json(folder / 'benchmark.json', {'machine': about, 'tables': content})


if __name__ == '__main__':
    sys.exit(main())
