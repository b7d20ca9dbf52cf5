"""How fast WattIf is: rows in memory and the fleet. Run it as `python tests/benchmark.py`."""

from __future__ import annotations

import statistics
import sys
import time
from datetime import date
from pathlib import Path
from typing import Callable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import generator

DAY = date(2024, 1, 1)
RUNS = 5


def median_seconds(work: Callable[[], object]) -> float:
    """CPU seconds of a call: the median of several."""
    seconds = []
    for _ in range(RUNS):
        started = time.process_time()
        work()
        seconds.append(time.process_time() - started)
    return statistics.median(seconds)


def main() -> None:
    """Print the two speeds."""
    meters = 1 << 18
    per_meter = median_seconds(lambda: generator.draw_fleet(0, 0, meters)) / meters
    template = generator.render_day_template(DAY, 10)
    fleet = generator.draw_fleet(0, 0, 1000)

    def stamp() -> None:
        for _ in generator.generate_smart_meter_readings_for_day(DAY, template, fleet, 0):
            pass

    rows = 8640 * len(fleet) / median_seconds(stamp)
    print(f"rows in memory, one thread: {rows / 1e6:.1f} million a second")
    print(f"fleet: {per_meter * 1e6:.2f} microseconds a meter")


if __name__ == "__main__":
    main()
