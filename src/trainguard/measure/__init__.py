"""Measures what a command would run, without running any of it (spec/lock.md).

    measurement = measure(["python", "train.py"], cwd=Path.cwd(), env=dict(os.environ), cache=home.cache)
    measurement.distributions["torch"].version, measurement.digest

One host, one moment. Nothing here judges: a measurement is compared with a lock in `appraise/environment.py`. What
could not be measured stands in `Measurement.notes`, and a note is never green.
"""

from trainguard.measure.environment import measure

__all__ = ["measure"]
