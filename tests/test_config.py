import argparse
import re
from pathlib import Path

import pytest
from yacs.config import CfgNode

import train
from dataset.prepared import InterHandDataset
from inference.detector import MODEL
from models import build_criterion, build_model
from models.checkpoint import to_plain
from models.hands import load_hands
from utils.config import (
    CHECKOUT,
    CHOICES,
    MAY_BE_EMPTY,
    NAMES,
    RANGES,
    RENAMED,
    Range,
    add_config_arguments,
    default_config,
    flatten,
    load_config,
    numbers_and_pairs,
    refuse_pairs,
)
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
    with pytest.raises(UserError, match=f"a.yaml, line 1: '{key}' is not a configuration key"):
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
        ('TRAIN.EPOCHS', '0123'),  # octal for YAML 1.1, a mistake for Python
        ('TRAIN.EPOCHS', '1:30'),  # 90 for YAML 1.1
        ('TRAIN.EPOCHS', '9' * 5000),
        ('SEED', '1.0'),
        ('SEED', 'None'),
        ('TRAIN.LR', '5,4'),
        ('MODEL.BONE_RADIUS', '3'),
        ('MODEL.BONE_RADIUS', '[1, [2]]'),
        ('MODEL.BONE_RADIUS', "['a', 'b']"),
    ],
)
def test_a_value_of_another_type_is_refused(tmp_path, key, text):
    expected = 'true or false' if key == 'TRAIN.DECAY_ALL' else '(a|text) '
    with pytest.raises(UserError, match=f'the command line: {key} must be {expected}') as refused:
        load_config(None, [key, text])
    assert len(str(refused.value)) < 250
    with pytest.raises(UserError, match=f'{key} must be '):
        load_config(write(tmp_path / 'a.yaml', f'{key}: {text}\n'))


# A folder may have any name: none of these is a number, a date, a time, a truth value or nothing.
FOLDERS = (
    '2024_01_15 20240115_123000 1.10 1e3 0x10 3#a 0123 0o17 1_000 12:30:00 2024-01-15 2024-01-15T10:00:00Z None null ~ '
    'True true no off .inf nan +1 007 1,5 5e-4 =x <<'
)


@pytest.mark.parametrize('name', FOLDERS.split())
@pytest.mark.parametrize(
    'key', ['OUTPUT_DIR', 'DATASET.PATH', 'DATASET.COLOURS', 'MANO.PATH', 'MODEL.BACKBONE_WEIGHTS']
)
def test_text_stays_as_typed(tmp_path, key, name):
    assert flatten(load_config(None, [key, name]))[key] == name
    for typed in (name, f"'{name}'", f'"{name}"'):  # YAML's own quotes are not part of the value
        file = write(tmp_path / 'a.yaml', f'{key}: {typed}\n')
        assert flatten(load_config(file))[key] == name


@pytest.mark.parametrize(
    'name', ["'my run'", '"x"', '[1]', '(1, 2)', '{a: 1}', ' padded ', '#1', '&a', '!x', 'é', 'n\udce4']
)
def test_text_on_the_command_line_is_not_yaml(name):
    assert name == load_config(None, ['OUTPUT_DIR', name]).OUTPUT_DIR


@pytest.mark.parametrize(
    'text, said', [('', 'empty'), ('"a\\0b"', 'no file name can'), (r'"\ud800"', 'no file name can')]
)
@pytest.mark.parametrize('key', ['OUTPUT_DIR', 'DATASET.PATH', 'MANO.PATH', 'MODEL.BACKBONE'])
def test_text_that_can_be_no_name_is_refused(tmp_path, key, text, said):
    with pytest.raises(UserError, match=f'{key} is.* {said}'):
        load_config(write(tmp_path / 'a.yaml', f'{key}: {text}\n'))


def test_text_of_a_checkpoint_must_be_text():
    for value in (20240115, None, True, ['a']):
        with pytest.raises(UserError, match='the checkpoint: OUTPUT_DIR must be text'):
            load_config(base={'OUTPUT_DIR': value})


@pytest.mark.parametrize(
    'typed, names',
    [
        ('[2024_01_15, 1e3]', ['2024_01_15', '1e3']),
        ('2024_01_15', '2024_01_15'),
        ('[0123]', '0123'),
        ('["a, b", c]', ['a, b', 'c']),
        ('[None, ~]', ['None', '~']),
        ('a b', 'a b'),
    ],
)
def test_several_names_stay_as_typed(tmp_path, typed, names):
    assert names == load_config(None, ['DATASET.PATH', typed]).DATASET.PATH
    file = write(tmp_path / 'a.yaml', f'DATASET.PATH: {typed}\n')
    assert names == load_config(file).DATASET.PATH
    assert load_config(file, ['DATASET.PATH', 'one']).DATASET.PATH == 'one'
    assert names == load_config(base={'DATASET': {'PATH': names}}).DATASET.PATH
    parts = load_config(None, ['TRAIN.INIT_FROM', 'x', 'TRAIN.INIT_WITHOUT', typed]).TRAIN.INIT_WITHOUT
    assert parts == (names if isinstance(names, list) else [names])


@pytest.mark.parametrize('typed', ['[a, [b]]', '[a, {b: c}]', '[]'])
def test_names_that_are_no_list_of_names(tmp_path, typed):
    with pytest.raises(UserError, match='DATASET.PATH'):
        load_config(write(tmp_path / 'a.yaml', f'DATASET.PATH: {typed}\n'))
    for value in ([1], [None], [['a']], 5):
        with pytest.raises(UserError, match='DATASET.PATH must be a name or a list of names'):
            load_config(base={'DATASET': {'PATH': value}})


def test_a_later_pair_overrides_an_earlier_one():
    assert load_config(None, ['SEED', '1', 'SEED', '2']).SEED == 2


@pytest.mark.parametrize(
    'content, key, line',
    [
        ('TRAIN:\n  LR: 1e-3\nMODEL:\n  STAGES: 1\nTRAIN:\n  EPOCHS: 7\n', 'TRAIN', 5),
        ('SEED: 1\n# again\nSEED: 1\n', 'SEED', 3),
        ('TRAIN:\n  LR: 1\n  EPOCHS: 2\n  LR: 2\n', 'TRAIN.LR', 4),
        ('TRAIN: {LR: 1, "LR": 2}\n', 'TRAIN.LR', 1),
        ('LOSS:\n  WEIGHT:\n    EDGE: 1\n  WEIGHT:\n    OFFSET: 2\n', 'LOSS.WEIGHT', 4),
        ('TRAIN.LR: 1\nTRAIN:\n  LR: 2\n', 'TRAIN.LR', 3),
        ('X:\n  Y: 1\nX: 2\n', 'X', 3),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_its_line(tmp_path, content, key, line):
    with pytest.raises(UserError, match=f"a.yaml, line {line}: '{key}' stands in line [0-9] already"):
        load_config(write(tmp_path / 'a.yaml', content))


def test_sections_may_be_dotted_and_empty(tmp_path):
    cfg = load_config(write(tmp_path / 'a.yaml', 'TRAIN.LR: 1\nTRAIN:\n  EPOCHS: 2\nMODEL:\nLOSS.WEIGHT:\n'))
    assert (cfg.TRAIN.LR, cfg.TRAIN.EPOCHS) == (1.0, 2)


def test_every_key_that_holds_a_number_has_a_range():
    default = flatten(default_config())
    numeric = {key for key, value in default.items() if type(value) in (int, float, list)}
    assert set(RANGES) == numeric - set(CHOICES) - set(NAMES) and set(CHOICES) <= set(default)
    for key, allowed in RANGES.items():
        assert -2 < allowed.low < allowed.high < 10**10
        assert all(value in allowed for value in (default[key] if isinstance(default[key], list) else [default[key]]))
    assert {key for key in MAY_BE_EMPTY if default[key] == ''} == set(MAY_BE_EMPTY)


@pytest.mark.parametrize('key', RANGES)
def test_a_number_that_cannot_be_meant_is_refused_by_key(tmp_path, key):
    low, high, low_open, high_open = RANGES[key]
    kind = type(flatten(default_config())[key])
    whole = kind is int
    a_little = 1 if whole else 1e-3
    words = [repr(low if low_open else low - a_little), repr(high if high_open else high + a_little * 1000), '-1e400']
    words += ['9' * 400] if whole else ['nan', '-nan', 'inf', '-inf', '1e400', 'NaN', '9' * 400]
    for word in words[: 2 if whole else None]:
        text = f'[1, 2, {word}]' if kind is list else word
        with pytest.raises(
            UserError, match=f'{key} (is|has the entry) .*; it must be {re.escape(str(RANGES[key]))}'
        ) as refused:
            load_config(None, [key, text])
        assert len(str(refused.value)) < 250
        with pytest.raises(UserError, match=key):
            load_config(write(tmp_path / 'a.yaml', f'{key}: {text}\n'))
    with pytest.raises(UserError, match=key):
        load_config(base={key: float('nan')})


def test_the_ends_of_a_range():
    assert 0 in Range(0, 1) and 1 in Range(0, 1) and 0 not in Range(0, 1, low_open=True)
    assert 1 not in Range(0, 1, high_open=True) and float('nan') not in Range(0, 1)
    assert (
        str(Range(0, 1, True, True)) == 'above 0 and below 1'
        and str(Range(-1, 5000)) == 'at least -1 and at most 5,000'
    )
    assert load_config(None, ['SEED', str(2**32 - 1)]).SEED == 2**32 - 1


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
        ('TRAIN: [1, 2', 'not valid YAML .line 1: '),
        ('a: b: c', 'not valid YAML .line 1: '),
        ('- 1\n- 2\n', 'must hold KEY: VALUE'),
        ('just words', 'must hold KEY: VALUE'),
        ('TRAIN: 5\n', "'TRAIN' is not a configuration key"),
        ('TRAIN:\n\tLR: 1\n', 'line 2: .*Indent with spaces'),
        (
            'SEED: 1\nOUTPUT_DIR: !!python/object/apply:os.system [echo]\n',
            'line 2: the tag .*python.* is not supported',
        ),
        ('OUTPUT_DIR: !env HOME\n', 'line 1: the tag !env is not supported'),
        ('SEED: !!int "3"\n', 'line 1: the tag .* is not supported'),
        ('TRAIN: &train {LR: 1}\n', 'line 1: anchors and aliases'),
        ('SEED: *seed\n', 'line 1: anchors and aliases'),
        ('TRAIN:\n  <<: {LR: 1}\n', "'TRAIN.<<.LR' is not a configuration key"),
        ('? [a, b]\n: 1\n', 'a key must be a word'),
        ('OUTPUT_DIR: [a, b]\n', 'OUTPUT_DIR must be text'),
        ('MODEL.BONE_RADIUS: [[1, 2]]\n', 'must be a list of single values'),
        ('SEED: {a: 1}\n', "'SEED.a' is not a configuration key"),
        ('SEED: 1\n---\nSEED: 2\n', 'not valid YAML .line 2: '),
        ('A: ' + '[' * 5000, 'line 1: a configuration is nested at most'),
        ('{' * 60000, 'line 1: a configuration is nested at most'),
        ('[\n' * 30000, 'line 18: a configuration is nested at most'),
        ('{A: ' * 5000, 'line 1: a configuration is nested at most'),
        ('"\\Uffffffff": 1\n', 'not valid YAML'),
        ('%YAML ' + '9' * 5000 + '.1\n---\n', 'not valid YAML'),
        ('SEED: 1\x07\n', 'not valid YAML'),
        ('? ' + 'A' * 60000 + '\n: 1\n', 'is not a configuration key'),
        ('# ' + 'a' * 70000, 'longer than 65,536 bytes'),
    ],
)
def test_files_that_are_not_configurations(tmp_path, content, said):
    with pytest.raises(UserError, match=said) as refused:
        load_config(write(tmp_path / 'bad.yaml', content))
    assert 'bad.yaml' in str(refused.value) and '\n' not in str(refused.value)


@pytest.mark.parametrize(
    'content',
    [
        'TRAIN:\n  LR: 0.5\nOUTPUT_DIR: ä\n'.encode('utf-8-sig'),
        'TRAIN:\n  LR: 0.5\nOUTPUT_DIR: ä\n'.encode('utf-16'),
        'TRAIN:\r\n  LR: 0.5\r\nOUTPUT_DIR: ä\r\n'.encode(),
        'TRAIN:\r  LR: 0.5\rOUTPUT_DIR: ä\r'.encode(),
        b'--- # start\nTRAIN: {LR: 0.5}\nOUTPUT_DIR: "\\u00e4"\n...\n',
    ],
)
def test_files_as_editors_save_them(tmp_path, content):
    (tmp_path / 'a.yaml').write_bytes(content)
    cfg = load_config(tmp_path / 'a.yaml')
    assert (cfg.TRAIN.LR, cfg.OUTPUT_DIR) == (0.5, 'ä')


def test_a_file_in_latin_1_is_refused_with_the_line(tmp_path):
    (tmp_path / 'a.yaml').write_bytes('SEED: 1\nOUTPUT_DIR: ä\n'.encode('latin1'))
    with pytest.raises(UserError, match=r'line 2: a byte that is not UTF-8.. Save it as UTF-8'):
        load_config(tmp_path / 'a.yaml')


def test_defaults_that_are_files_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    add_config_arguments(parser, default='configs/dir_interhand.yaml')
    args = parser.parse_args([])
    assert load_config(args.cfg).OUTPUT_DIR == './output/dir_interhand'
    assert Path(MODEL) == CHECKOUT / 'misc/hand_landmarker.task'
    with pytest.raises(UserError, match=re.escape(f'{CHECKOUT}/misc/mano/MANO_LEFT.pkl is missing')):
        load_hands()
    (tmp_path / 'misc/mano').mkdir(parents=True)  # the working folder comes first
    with pytest.raises(UserError, match=re.escape(f'{tmp_path}/misc/mano/MANO_LEFT.pkl is missing')):
        load_hands()


def test_a_missing_relative_path_is_reported_with_the_folder_it_was_looked_for_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(f'configs/demo.yaml does not exist in {tmp_path}')):
        load_config('configs/demo.yaml')
    with pytest.raises(UserError, match=re.escape(f'{tmp_path}/models/mano/MANO_LEFT.pkl is missing')):
        load_hands(path='models/mano')
    with pytest.raises(UserError, match=re.escape(f'{tmp_path}/data/train does not exist')):
        InterHandDataset('./data', 'train')


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
    default = str(ROOT / 'configs/demo.yaml')
    assert vars(parser.parse_args([])) == {'cfg': default, 'opts': []}
    given = parser.parse_args(['--cfg', 'x.yaml', 'SEED', '1'])
    assert (given.cfg, given.opts) == (['x.yaml'], ['SEED', '1'])
    again = parser.parse_intermixed_args(['--cfg', 'x.yaml', 'SEED', '1', '--cfg', 'y.yaml', 'TRAIN.LR', '1'])
    assert (again.cfg, again.opts) == (['x.yaml', 'y.yaml'], ['SEED', '1', 'TRAIN.LR', '1'])
    assert parser.parse_args([]).cfg == default  # one use does not leak into the next


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


def test_weights_of_a_checkpoints_data_sets_do_not_bind_other_data():
    trained = to_plain(load_config(None, ['DATASET.PATH', '[a, b]', 'DATASET.WEIGHTS', '[3, 1]']))
    assert load_config(None, ['DATASET.PATH', 'c'], base=trained).DATASET.WEIGHTS == []
    assert load_config(None, ['DATASET.PATH', '[c, d]'], base=trained).DATASET.WEIGHTS == [3, 1]
    with pytest.raises(UserError, match=r'DATASET\.WEIGHTS has 3 entries for 1 sets'):
        load_config(None, ['DATASET.PATH', 'c', 'DATASET.WEIGHTS', '[1, 1, 1]'], base=trained)


@pytest.mark.parametrize('key', ['TRAIN.CHECKPOINT', 'TRAIN.RECOMPUTE_NORMS'])
def test_a_compiled_network_recomputes_as_it_likes(key):
    with pytest.raises(UserError, match=rf'TRAIN\.COMPILE cannot be combined with {key}'):
        load_config(None, ['TRAIN.COMPILE', 'true', key, 'true'])


def test_keys_that_a_command_sets_itself_are_refused():
    refuse_pairs(['DEVICE', 'OUTPUT_DIR'], {'OUTPUT_DIR': '--out'})
    with pytest.raises(UserError, match='OUTPUT_DIR cannot be set by a KEY VALUE pair here: --out sets it'):
        refuse_pairs(['DEVICE', 'cpu', 'OUTPUT_DIR', 'x'], {'OUTPUT_DIR': '--out'})


def test_numbers_of_an_option_end_where_keys_begin():
    assert numbers_and_pairs(['1', '2', 'TRAIN.EPOCHS', '4'], int, '--seeds') == ([1, 2], ['TRAIN.EPOCHS', '4'])
    assert numbers_and_pairs(['1.5'], float, '--enlarge') == ([1.5], [])
    for words, kind, message in ((['1.5'], int, "--seeds takes whole numbers, not '1.5'"), (['x'], float, 'numbers')):
        with pytest.raises(UserError, match=message):
            numbers_and_pairs(words, kind, '--seeds')
