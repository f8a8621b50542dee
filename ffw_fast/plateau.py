"""When a value has stopped to fall: the one rule behind the heads' fits and the published temperature schedule."""

from dataclasses import dataclass


@dataclass
class Plateau:
    """Counts how often in a row a value failed to fall below ``(1 - threshold)`` times the best one.

    Attributes:
        threshold: relative improvement that counts as one.
        patience: how many failures in a row are borne; one more is a plateau.
        best: lowest value so far that counted as an improvement.
        failures: failures since then.
    """

    threshold: float
    patience: int
    best: float = float("inf")
    failures: int = 0

    def reached(self, value: float) -> bool:
        """Take in the next value; true if it ends more than ``patience`` failures in a row."""
        if value <= (1 - self.threshold) * self.best:
            self.best, self.failures = value, 0
        else:
            self.failures += 1
        return self.failures > self.patience
