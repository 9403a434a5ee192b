"""Wall time of the steps of a growth."""

from time import perf_counter


class Laps(dict[str, float]):
    """Name of a step -> seconds so far; every moment since ``start`` counts for one step."""

    def __init__(self) -> None:
        super().__init__()
        self.start()

    def start(self) -> None:
        """Leave out the time since the end of the previous step."""
        self._last = perf_counter()

    def end(self, name: str) -> None:
        """Add the time since the end of the previous step to a step."""
        now = perf_counter()
        self[name] = self.get(name, 0.0) + now - self._last
        self._last = now
