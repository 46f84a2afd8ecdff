"""training.py: which checkpoint is kept."""
from training import Progress


def test_ties_go_to_the_next_measure_and_then_to_the_later_update():
    progress = Progress()
    # an untrained reader, then one that comes nearer without an exact match, then equals
    kept = [progress.count_measures(em, f1) for em, f1 in
            [(0, 0), (0, 3.5), (0, 2), (0, 3.5), (10, 1), (10, 0.5), (9, 50)]]
    assert kept == [True, True, False, True, True, False, False]
    assert progress.best == (10, 1)
