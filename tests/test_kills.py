"""The short form of tests/kills.py."""

import kills
import pytest


def test_fifty_trials_combine_every_setting_with_every_signal():
    trials = [kills.trial(number) for number in range(50)]
    assert len({(each.setting, each.signal) for each in trials}) == 50
    assert kills.trial(7).random.random() == kills.trial(7).random.random()


@pytest.mark.slow  # each trial trains three epochs in processes of its own
def test_killed_runs_resume_to_the_same_bits(tmp_path, capsys):
    table = tmp_path / 'kills.md'
    assert kills.main(['--out', str(tmp_path), '--first', '1', '--count', '2', '--results', str(table)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == '2 of 2 kills: resumed run equal to the bit'
    assert table.read_text().count('equal to the bit') == 2
