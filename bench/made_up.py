"""Make up the data that several benchmarks use."""
import math

import numpy as np


def draw_points(rng, centres, count):
    """Return `count` vectors of length 1, each near one of the centres."""
    noise = rng.standard_normal((count, centres.shape[1]), np.float32)
    points = centres[rng.integers(len(centres), size=count)] + noise
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def lognormal_of(mean, spread):
    """Return (mu, sigma) of the log-normal distribution with this mean and a standard deviation of
    `spread` times the mean.
    """
    sigma = math.sqrt(math.log(1 + spread ** 2))
    return math.log(mean) - sigma ** 2 / 2, sigma
