import argparse
import re
from pathlib import Path

import pytest
from yacs.config import CfgNode

import train
from models import build_criterion, build_model
from utils.config import RENAMED, add_config_arguments, default_config, flatten, load_config
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def write(path, text):
    path.write_text(text)
    return path


def test_defaults_are_the_published_recipe():
    cfg = load_config()
    assert (cfg.ROOT_JOINT, cfg.TRAIN.LR, cfg.TRAIN.EPOCHS, cfg.TRAIN.BATCH_SIZE, cfg.MODEL.IMAGE_SIZE) == (
        0,
        5e-4,
        50,
        64,
        256,
    )
    assert cfg.MODEL.INIT == 'published' and cfg.LOSS.LOVASZ_INPUT == 'logits' and cfg.TRAIN.DECAY_ALL


def test_every_key_has_a_comment():
    source = (ROOT / 'utils/config.py').read_text().splitlines()
    lines = {match[1]: line for line in source if (match := re.match(r'_C\.([A-Z_.]+) = ', line))}
    plain = {key: line for key, line in lines.items() if 'CfgNode()' not in line}
    assert plain.keys() == flatten(load_config()).keys()
    bare = {key for key, line in plain.items() if '#' not in line}
    assert bare <= {'LOSS.WEIGHT.VERTEX_UV', 'LOSS.WEIGHT.VERTEX_XYZ'}  # each follows its twin


def test_keys_that_may_change_on_resuming_exist():
    assert set(train.FREE_KEYS) <= flatten(load_config()).keys()
    assert not {'SEED', 'TRAIN.LR', 'TRAIN.BATCH_SIZE', 'MODEL.STAGES', 'ROOT_JOINT'} & set(train.FREE_KEYS)


SHIPPED = sorted((ROOT / 'configs').rglob('*.yaml'))


@pytest.mark.parametrize('file', SHIPPED, ids=lambda path: path.name)
def test_every_shipped_file_loads_and_holds_only_differences(file):
    cfg, default = flatten(load_config(file)), flatten(load_config())
    keys = set(re.findall(r'^ *([A-Z_]+): *\S', file.read_text(), re.M))
    changed = {key.rpartition('.')[2] for key in cfg if cfg[key] != default[key]}
    assert keys - {'OUTPUT_DIR'} == changed - {'OUTPUT_DIR'}


def test_runs_of_shipped_files_never_share_a_folder():
    folders = [load_config(file).OUTPUT_DIR for file in SHIPPED]
    assert len(SHIPPED) > 12 and len(set(folders)) == len(folders)
    assert load_config(ROOT / 'configs/dir_interhand.yaml').OUTPUT_DIR == load_config().OUTPUT_DIR


@pytest.mark.parametrize('file', sorted((ROOT / 'configs/ablations').glob('*.yaml')), ids=lambda path: path.stem)
def test_an_ablation_is_one_key_and_its_claim(file, standin):
    cfg, main = flatten(load_config(file)), flatten(load_config(ROOT / 'configs/dir_interhand.yaml'))
    assert len([key for key in cfg if cfg[key] != main[key] and key != 'OUTPUT_DIR']) == 1
    assert file.read_text().startswith('# Claim')
    small = load_config([ROOT / 'configs/demo.yaml', file], ['MODEL.IMAGE_SIZE', '64', 'MODEL.MAP_CHANNELS', '16'])
    build_model(small, standin)  # and it can be built


def test_later_files_override_earlier_ones(tmp_path):
    a, b = write(tmp_path / 'a.yaml', 'SEED: 1\nTRAIN:\n  LR: 0.1\n'), write(tmp_path / 'b.yaml', 'SEED: 2\n')
    cfg = load_config([a, b])
    assert (cfg.SEED, cfg.TRAIN.LR, cfg.OUTPUT_DIR) == (2, 0.1, './output/a+b')
    assert load_config([b, a]).SEED == 1
    assert load_config([a, b], ['OUTPUT_DIR', 'x']).OUTPUT_DIR == 'x'


def test_the_paper_era_recipe():
    cfg = load_config(ROOT / 'configs/dir_interhand_mcp.yaml')
    assert cfg.ROOT_JOINT == 9 and cfg.TRAIN.LR == 3e-4 and cfg.LOSS.SCALE_TO_TRUTH


def test_loss_keys_are_the_criterions_terms(standin):
    criterion = build_criterion(load_config(), standin)
    assert {name.upper() for name in criterion.weights} == load_config().LOSS.WEIGHT.keys()


def test_a_file_overrides_the_base_and_the_command_line_both(tmp_path):
    file = write(tmp_path / 'a.yaml', 'TRAIN:\n  LR: 0.2\n  EPOCHS: 3\n')
    base = {'TRAIN': {'LR': 0.1, 'EPOCHS': 2, 'WORKERS': 7}, 'SEED': 5}
    cfg = load_config(file, ['TRAIN.EPOCHS', '4'], base=base)
    assert (cfg.SEED, cfg.TRAIN.WORKERS, cfg.TRAIN.LR, cfg.TRAIN.EPOCHS) == (5, 7, 0.2, 4)
    assert load_config().TRAIN.EPOCHS == 50  # the defaults are unchanged


def test_configuration_is_frozen_and_defaults_are_copies():
    with pytest.raises(AttributeError):
        load_config().TRAIN.LR = 1.0
    default_config().TRAIN.LR = 1.0
    assert load_config().TRAIN.LR == 5e-4


@pytest.mark.parametrize(
    'key, text, value',
    [
        ('TRAIN.LR', '5e-4', 5e-4),
        ('TRAIN.LR', '1', 1.0),
        ('TRAIN.DECAY_ALL', 'false', False),
        ('TRAIN.DECAY_ALL', 'True', True),
        ('MODEL.DETACH', 'FALSE', False),
        ('TRAIN.EPOCHS', '7', 7),
        ('OUTPUT_DIR', '2024', '2024'),
        ('OUTPUT_DIR', './a b', './a b'),
        ('DEVICE', 'cuda:1', 'cuda:1'),
        ('MODEL.BONE_RADIUS', '[1, 2]', [1.0, 2.0]),
        ('MODEL.BONE_RADIUS', '(1,2,3)', [1.0, 2.0, 3.0]),
    ],
)
def test_values_on_the_command_line_are_converted_to_the_keys_type(key, text, value):
    result = flatten(load_config(None, [key, text]))[key]
    assert result == value and type(result) is type(value)


@pytest.mark.parametrize('text, value', [('5e-4', 5e-4), ('1', 1.0), ('1.0e-3', 1e-3), ('"2"', 2.0)])
def test_yaml_numbers_become_floats(tmp_path, text, value):
    cfg = load_config(write(tmp_path / 'a.yaml', f'TRAIN:\n  LR: {text}\n'))
    assert value == cfg.TRAIN.LR and type(cfg.TRAIN.LR) is float


@pytest.mark.parametrize(
    'key, near',
    [
        ('TRAIN.BATCHSIZE', 'TRAIN.BATCH_SIZE'),
        ('train.lr', 'TRAIN.LR'),
        ('MODEL.STAGE', 'MODEL.STAGES'),
        ('SEEDS', 'SEED'),
        ('LR', 'TRAIN.LR'),
        ('nonsense', ''),
        ('TRAIN', ''),
    ],
)
def test_an_unknown_key_names_the_nearest(tmp_path, key, near):
    with pytest.raises(UserError, match=f"command line: '{key}' is not a configuration key; the nearest is '{near}"):
        load_config(None, [key, '1'])
    file = write(tmp_path / 'a.yaml', f'{key}: 1\n')
    with pytest.raises(UserError, match=f"a.yaml: '{key}' is not a configuration key"):
        load_config(file)


def test_an_unknown_key_of_a_checkpoint_is_attributed_to_it():
    with pytest.raises(UserError, match="the checkpoint: .*'TRAIN.OLD'"):
        load_config(base={'TRAIN': {'OLD': 1}})


@pytest.mark.parametrize(
    'key, text',
    [
        ('TRAIN.EPOCHS', '1.5'),
        ('TRAIN.EPOCHS', 'many'),
        ('TRAIN.EPOCHS', 'true'),
        ('TRAIN.LR', 'fast'),
        ('TRAIN.LR', 'true'),
        ('TRAIN.DECAY_ALL', '1'),
        ('MODEL.BONE_RADIUS', '3'),
        ('MODEL.BONE_RADIUS', "['a', 'b']"),
        ('OUTPUT_DIR', 'true'),
        ('OUTPUT_DIR', '[1]'),
    ],
)
def test_a_value_of_another_type_is_refused(key, text):
    with pytest.raises(UserError, match=f'{key} must be a '):
        load_config(None, [key, text])


@pytest.mark.parametrize(
    'key, text',
    [
        ('ROOT_JOINT', '3'),
        ('MODEL.STAGES', '4'),
        ('MODEL.INTERACTION', 'some'),
        ('MODEL.PROJECTION', 'lines'),
        ('MODEL.INIT', 'zero'),
        ('LOSS.LOVASZ_INPUT', 'scores'),
        ('MANO.SOURCE', 'smplx'),
        ('TRAIN.BATCH_SIZE', '0'),
        ('EVAL.BATCH_SIZE', '-1'),
        ('TRAIN.EPOCHS', '0'),
        ('TRAIN.WORKERS', '-1'),
        ('MODEL.IMAGE_SIZE', '100'),
        ('MODEL.IMAGE_SIZE', '0'),
        ('MODEL.BONE_RADIUS', '[1]'),
    ],
)
def test_a_value_out_of_range_is_refused_by_key(key, text):
    with pytest.raises(UserError, match=key):
        load_config(None, [key, text])


def test_choices_are_listed():
    with pytest.raises(UserError, match="MODEL.PROJECTION is 'lines'; it must be one of bones, joints, none"):
        load_config(None, ['MODEL.PROJECTION', 'lines'])


def test_a_key_without_a_value_is_refused():
    with pytest.raises(UserError, match="'TRAIN.LR' has no value"):
        load_config(None, ['SEED', '1', 'TRAIN.LR'])


@pytest.mark.parametrize(
    'content, said',
    [
        ('TRAIN: [1, 2', 'not valid YAML'),
        ('a: b: c', 'not valid YAML'),
        ('- 1\n- 2\n', 'must hold KEY: VALUE'),
        ('just words', 'must hold KEY: VALUE'),
        ('TRAIN: 5\n', "'TRAIN' is not a configuration key"),
    ],
)
def test_files_that_are_not_configurations(tmp_path, content, said):
    with pytest.raises(UserError, match=said) as refused:
        load_config(write(tmp_path / 'bad.yaml', content))
    assert 'bad.yaml' in str(refused.value) and '\n' not in str(refused.value)


def test_missing_binary_and_folder_files(tmp_path):
    with pytest.raises(UserError, match=r'missing.yaml does not exist'):
        load_config(tmp_path / 'missing.yaml')
    (tmp_path / 'image.yaml').write_bytes(b'\xff\xd8\xff\xe0' * 10)
    with pytest.raises(UserError, match=r'image.yaml is not valid YAML'):
        load_config(tmp_path / 'image.yaml')
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        load_config(tmp_path)


def test_an_empty_file_changes_nothing(tmp_path):
    cfg = load_config(write(tmp_path / 'a.yaml', '# nothing\n'))
    assert cfg == load_config(None, ['OUTPUT_DIR', './output/a'])  # except where its runs go


def test_flatten_names_every_leaf():
    node = CfgNode({'A': 1, 'B': {'C': 2, 'D': {'E': [3]}}})
    assert flatten(node) == {'A': 1, 'B.C': 2, 'B.D.E': [3]}


def test_scripts_take_a_file_and_pairs():
    parser = argparse.ArgumentParser()
    add_config_arguments(parser, default='configs/demo.yaml')
    assert vars(parser.parse_args([])) == {'cfg': 'configs/demo.yaml', 'opts': []}
    given = parser.parse_args(['--cfg', 'x.yaml', 'SEED', '1'])
    assert (given.cfg, given.opts) == (['x.yaml'], ['SEED', '1'])
    again = parser.parse_intermixed_args(['--cfg', 'x.yaml', 'SEED', '1', '--cfg', 'y.yaml', 'TRAIN.LR', '1'])
    assert (again.cfg, again.opts) == (['x.yaml', 'y.yaml'], ['SEED', '1', 'TRAIN.LR', '1'])
    assert parser.parse_args([]).cfg == 'configs/demo.yaml'  # one use does not leak into the next


def test_checkpoint_with_keys_of_an_earlier_version_still_loads():
    old = {'LOSS': {'JOINT_UV': 3.0, 'EDGE': 0.25, 'LOVASZ_INPUT': 'probabilities'}, 'MODEL': {'WEIGHTS': 'a.pth'}}
    cfg = load_config(base=old)
    assert (cfg.LOSS.WEIGHT.JOINT_UV, cfg.LOSS.WEIGHT.EDGE, cfg.LOSS.WEIGHT.OFFSET) == (3.0, 0.25, 10.0)
    assert cfg.LOSS.LOVASZ_INPUT == 'probabilities' and cfg.MODEL.BACKBONE_WEIGHTS == 'a.pth'


@pytest.mark.parametrize('old', RENAMED)
def test_a_user_who_types_an_old_key_learns_its_new_name(old):
    assert RENAMED[old] in flatten(default_config()) and old not in flatten(default_config())
    with pytest.raises(UserError, match=f'{old} is now called {RENAMED[old]}'):
        load_config(None, [old, '1'])
