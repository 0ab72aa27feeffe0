"""The network. ``build_model`` is the one place where configuration becomes arguments."""

import utils  # noqa: F401  # before PyTorch, see there

# isort: split
import torch
from yacs.config import CfgNode

from manopth import HandPair, TwoHandLayer
from models.backbone import Backbone, load_imagenet
from models.confidence import ConfidenceHead, PresenceHead
from models.criterion import DIRCriterion
from models.dir import DIR, DenseHeads
from models.hand_head import HandHead
from models.initial_regressor import InitialRegressor
from models.initialisation import initialise
from models.preprocessing import Preprocessing
from models.refinement import STAGE_VARIANTS, MapFusion
from utils.errors import UserError
from utils.hand import LEFT, TIP_VERTICES

__all__ = ['DIR', 'DIRCriterion', 'build_criterion', 'build_model', 'dense_size']


def build_model(cfg: CfgNode, hand_models: HandPair, *, pretrained: bool | None = None) -> DIR:
    """Build DIR from ``cfg`` with newly initialised weights.

    pretrained: overrides MODEL.PRETRAINED; False where a checkpoint will be loaded anyway.
    Raises UserError for an unknown MODEL.BACKBONE or MODEL.STAGE_VARIANT, and if the ImageNet weights cannot be loaded.
    """
    m = cfg.MODEL
    backbone = Backbone(m.BACKBONE)
    tips = [list(TIP_VERTICES), list(TIP_VERTICES)]
    tips[LEFT][2] = m.LEFT_MIDDLE_TIP
    c1, c2, c3, c4 = backbone.channels
    before = {16: 0, 8: 1, 4: 2}[m.FIRST_STRIDE]  # levels of the neck
    coarser, skips = [c4, *[m.MAP_CHANNELS] * 3], [c3, c2, c1]
    neck = [MapFusion(a, b, channels=m.MAP_CHANNELS) for a, b in list(zip(coarser, skips))[:before]]
    if m.STAGE_VARIANT not in STAGE_VARIANTS:
        raise UserError(f'MODEL.STAGE_VARIANT is {m.STAGE_VARIANT!r}; it must be one of {", ".join(STAGE_VARIANTS)}.')
    stages = [
        STAGE_VARIANTS[m.STAGE_VARIANT](
            previous,
            skip,
            channels=m.MAP_CHANNELS,
            radius=m.BONE_RADIUS[index],
            projection=m.PROJECTION,
            tokens=m.TOKEN_CHANNELS,
            features=m.JOINT_FEATURES,
            graph=m.INTERACTION in ('both', 'graph'),
            graph_layers=m.GRAPH_LAYERS,
            graph_skip=m.GRAPH_SKIP,
            transformer=m.INTERACTION in ('both', 'transformer'),
            enhances=m.ENHANCE_LAST or index < m.STAGES - 1,
        )
        for index, (previous, skip) in enumerate(list(zip(coarser, skips))[before : before + m.STAGES])
    ]
    last_channels = m.MAP_CHANNELS if stages or neck else c4
    with torch.random.fork_rng(devices=[]):  # with and without these heads, all else starts from the same weights
        presence_head = PresenceHead(last_channels) if m.PRESENCE else None
        confidence_head = ConfidenceHead(last_channels, m.TOKEN_CHANNELS) if m.CONFIDENCE else None
    model = DIR(
        hands=hand_models,
        preprocess=Preprocessing(m.IMAGE_SIZE),
        backbone=backbone,
        initial_regressor=InitialRegressor(c4, attention_channels=m.ATTENTION_CHANNELS or None),
        hand_head=HandHead(TwoHandLayer(hand_models, tip_vertices=tips), root_joint=cfg.ROOT_JOINT),
        neck=neck,
        stages=stages,
        dense_heads=DenseHeads(last_channels, m.DENSE_CHANNELS or m.MAP_CHANNELS) if m.DENSE_HEADS else None,
        presence_head=presence_head,
        confidence_head=confidence_head,
        detach=m.DETACH,
    )
    initialise(model, m.INIT)
    if m.PRETRAINED if pretrained is None else pretrained:
        load_imagenet(backbone, m.BACKBONE, m.BACKBONE_WEIGHTS)
    return model


def dense_size(cfg: CfgNode) -> int:
    """Side of the last map of the network that ``cfg`` describes, which is the side of its dense heads' outputs."""
    levels = {16: 0, 8: 1, 4: 2}[cfg.MODEL.FIRST_STRIDE] + cfg.MODEL.STAGES  # each doubles the side
    return cfg.MODEL.IMAGE_SIZE // 32 << levels


def build_criterion(cfg: CfgNode, hand_models: HandPair) -> DIRCriterion:
    """Build the training objective from ``cfg``."""
    weights = {name.lower(): value for name, value in cfg.LOSS.WEIGHT.items()}
    return DIRCriterion(
        hand_models,
        weights=weights,
        stage_weights=cfg.LOSS.STAGE_WEIGHT,
        root_joint=cfg.ROOT_JOINT,
        lovasz_on_probabilities=cfg.LOSS.LOVASZ_INPUT == 'probabilities',
        scale_to_truth=cfg.LOSS.SCALE_TO_TRUTH,
    )
