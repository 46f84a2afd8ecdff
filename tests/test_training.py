"""training/loop.py: which checkpoint is kept, the schedule."""
import torch

from training.loop import Progress, make_optimizer


def test_ties_go_to_the_next_measure_and_then_to_the_later_update():
    progress = Progress()
    # an untrained reader, then one that comes nearer without an exact match, then equals
    kept = [progress.keep_best((em, f1), "") for em, f1 in
            [(0, 0), (0, 3.5), (0, 2), (0, 3.5), (10, 1), (10, 0.5), (9, 50)]]
    assert kept == [True, True, False, True, True, False, False]
    assert progress.best == (10, 1)


def test_the_schedule_warms_up_and_decays_linearly():
    for warmup, shares in ((2, [0, 0.5, 1, 0.75, 0.5, 0.25, 0, 0]), (0, [1, 0.5, 0])):
        updates = 6 if warmup else 2
        _, scheduler = make_optimizer(torch.nn.Linear(2, 1), 1e-3, 0.01, 1e-8, warmup, updates)
        found = []
        for _ in shares:
            found += scheduler.get_last_lr()
            scheduler.optimizer.step()
            scheduler.step()
        assert found == [1e-3 * share for share in shares]
