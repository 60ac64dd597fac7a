"""Means and variances of channels, of samples put together. Numpy only."""

import numpy as np


class Moments:
    """Of what was added so far."""

    def __init__(self) -> None:
        self.count, self.mean, self._squares = 0, np.zeros(1), np.zeros(1)

    def add(self, count: int, mean: np.ndarray, variance: np.ndarray) -> None:
        """Chan, Golub and LeVeque 1979: means and sums of squared differences of two samples make those of both."""
        difference, total = mean.astype(np.float64) - self.mean, self.count + count
        self._squares = self._squares + variance.astype(np.float64) * count + difference**2 * (self.count * count / total)
        self.mean, self.count = self.mean + difference * (count / total), total

    @property
    def variance(self) -> np.ndarray:
        return self._squares / self.count
