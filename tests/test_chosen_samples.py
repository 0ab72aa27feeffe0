import torch

from evaluation.samples import choose_samples


def test_worst_median_and_best_are_what_they_are_called():
    error = torch.tensor([5.0, 1, 9, 3, 7, 2, 8, 4, 6, 0])
    assert choose_samples(error, 2) == [
        ('worst', 2),
        ('worst', 6),
        ('median', 0),
        ('median', 7),
        ('best', 1),
        ('best', 9),
    ]


def test_few_samples_come_once_each_and_unknown_errors_not_at_all():
    for count in range(8):
        error = torch.cat([torch.arange(count).float(), torch.tensor([torch.nan])])
        chosen = choose_samples(error, 4)
        rows = [row for _, row in chosen]
        assert len(rows) == len(set(rows)) and count not in rows
        assert len(rows) >= min(count, 3) and (count == 0 or chosen[0] == ('worst', count - 1))
