"""Make up the data that several benchmarks use."""
import numpy as np


def draw_points(rng, centres, count):
    """Return `count` vectors of length 1, each near one of the centres."""
    noise = rng.standard_normal((count, centres.shape[1]), np.float32)
    points = centres[rng.integers(len(centres), size=count)] + noise
    return points / np.linalg.norm(points, axis=1, keepdims=True)
