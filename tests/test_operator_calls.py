"""The number of operators of a training step, which one CPU thread launches: on a GPU it limits small steps."""

import torch
from tiny import TINY, made_target
from torch.utils._python_dispatch import TorchDispatchMode

from models import build_criterion, build_model
from models.criterion import objective
from utils.config import load_config

# A few per cent above what was reached: 707, 98 and 960. Convolutions with their norms and activations are more than
# half of them; the rest is ours to keep small.
LIMITS = {'forward': 728, 'criterion': 101, 'backward': 985}
NO_LAUNCH = ('_unsafe_view', 'empty', 'empty_strided', 'new_empty_strided')


class OperatorCalls(TorchDispatchMode):
    """Count the operators that run, but for views and allocations."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        aliases = [result.alias_info for result in operator._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        self.count += not is_view and operator._schema.name.removeprefix('aten::') not in NO_LAUNCH
        return operator(*args, **(kwargs or {}))


def test_a_step_of_the_published_network_launches_few_operators(standin):
    """Channels and image are small, which changes no operator."""
    cfg = load_config(None, [*TINY, 'MODEL.BACKBONE', 'resnet50', 'MODEL.GRAPH_LAYERS', '4'])
    model, criterion = build_model(cfg, standin).train(), build_criterion(cfg, standin)
    image, target, counts = torch.randn(2, 3, 64, 64), made_target(2), {}
    with OperatorCalls() as calls:
        output = model(image)
    counts['forward'] = calls.count
    with OperatorCalls() as calls:
        loss = objective(criterion(output, target))
    counts['criterion'] = calls.count
    with OperatorCalls() as calls:
        loss.backward()
    counts['backward'] = calls.count
    assert {part: count for part, count in counts.items() if count > LIMITS[part]} == {}, counts
    assert all(count > 0.9 * LIMITS[part] for part, count in counts.items()), f'lower the limits: {counts}'
