"""Runs: what may be logged, which attempt's points count, and how a long series becomes a short one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from libs.common.clock import from_us
from libs.common.contracts.messages import LogRun, Point, RecordUsage, Series
from libs.common.errors import Conflict, Invalid, TooLarge

MOST_POINTS = 10_000
MOST_METRIC_NAMES = 1_000
MOST_PARAMS = 500
MOST_TAGS = 200
LONGEST_NAME = 250
LONGEST_VALUE = 1_000
# One answer stays under the bus's 1 MB: a point in JSON is about 90 bytes.
MOST_ANSWERED_POINTS = 8_000
DEFAULT_POINTS = 1_000
FEWEST_POINTS = 4
# An event names so many metrics; whoever wants the others asks.
METRICS_IN_EVENT = 200
OVER = frozenset({"succeeded", "failed", "cancelled", "timed_out"})

_INT64 = 2**63


# Series that are longer are spliced and thinned by the database.
LONG_SERIES = 10_000
SYSTEM = "system/"
# Usage of a running job stays as it was sampled for an hour, then every tenth second's, after a day every minute's.
THINNING = ((3600, 10), (86_400, 60))
_THIN_EVERY_S = 600


class Measured(NamedTuple):
    """One stored point of one series. A tuple, and its time a number, as a series may have millions of them."""

    attempt: int
    step: int
    value: float
    at_us: int


def check_log(entry: LogRun) -> None:
    """Raises Invalid or TooLarge unless the whole of `entry` can be kept."""
    if len(entry.points) > MOST_POINTS:
        detail = f"{len(entry.points):,} points came in one call; {MOST_POINTS:,} are allowed."
        raise TooLarge("too_many_points", detail, "Send them in several calls.")
    for point in entry.points:
        _check_point(point)
    _check_texts(entry.params, "params", MOST_PARAMS)
    _check_texts(entry.tags, "tags", MOST_TAGS)


def _check_point(point: Point) -> None:
    _check_name(point.name, "metric")
    if not math.isfinite(point.value):
        detail = f"The metric {point.name} is not a finite number at step {point.step}."
        raise Invalid("not_finite", detail, "Leave that point out.")
    if not -_INT64 <= point.step < _INT64:
        raise Invalid("bad_step", "A step does not fit into 64 bits.", "Count steps from 0.")


def _check_texts(texts: Mapping[str, str], kind: str, most: int) -> None:
    check_count(len(texts), kind, most)
    for name, value in texts.items():
        _check_name(name, kind)
        if len(value) > LONGEST_VALUE or "\0" in value:
            detail = f"The value of {name} in {kind} has more than {LONGEST_VALUE:,} characters, or a NUL."
            raise Invalid("bad_value", detail, "Keep long texts in a file under /artifacts.")


def check_count(count: int, kind: str, most: int) -> None:
    if count > most:
        raise TooLarge(f"too_many_{kind}", f"A run has at most {most:,} {kind}.", "Use fewer names.")


def _check_name(name: str, kind: str) -> None:
    if not 1 <= len(name) <= LONGEST_NAME or not name.isprintable():
        detail = f"A name in {kind} has 1 to {LONGEST_NAME} printable characters."
        raise Invalid("bad_name", detail, "Choose a shorter name, such as `loss`.")


def writing_attempt(asked: int, known: int) -> int:
    """The number of the attempt that writes; 0 asks for the present one.

    Raises:
        Conflict: a newer attempt has begun, so this one's writes no longer count.
    """
    attempt = asked or known
    if attempt < known:
        detail = f"Attempt {attempt} was replaced by attempt {known}; what it still logs is not kept."
        raise Conflict("attempt_superseded", detail, "Stop this attempt.", attempt=known)
    return attempt


def latest(points: Iterable[Point]) -> list[Point]:
    """The points with one left for each name and step: of two, the later in the call counts."""
    return list({(point.name, point.step): point for point in points}.values())


def last_values(points: Iterable[Point]) -> dict[str, Point]:
    """Name -> the point with the highest step."""
    last: dict[str, Point] = {}
    for point in points:
        if point.name not in last or point.step >= last[point.name].step:
            last[point.name] = point
    return last


def as_utc(moment: datetime) -> datetime:
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def spliced(points: Sequence[Measured]) -> list[Measured]:
    """One line out of several attempts: each goes on where it began, and what an older one did past that is dropped.

    Args:
        points: ordered by attempt, then step.
    """
    kept: list[Measured] = []
    begin = _INT64
    attempt = None
    bound = _INT64
    for point in reversed(points):
        if point.attempt != attempt:
            attempt, bound = point.attempt, begin
        if point.step < bound:
            kept.append(point)
            begin = min(begin, point.step)
    kept.reverse()
    return kept


def thinned(points: Sequence[Measured], most: int) -> list[Measured]:
    """At most `most` (at least 4) of the points, evenly; the first, the last and both extremes are always there."""
    count = len(points)
    if count <= most:
        return list(points)
    lowest = min(range(count), key=lambda index: points[index].value)
    highest = max(range(count), key=lambda index: points[index].value)
    chosen = {0, count - 1, lowest, highest}
    left = most - len(chosen)
    chosen |= {round((index + 1) * (count - 1) / (left + 1)) for index in range(left)}
    return [points[index] for index in sorted(chosen)]


class Stretch(NamedTuple):
    """The points of one attempt in one series: how many, and at which step they begin."""

    attempt: int
    point_count: int
    first_step: int


def bounds(stretches: Sequence[Stretch]) -> dict[int, int]:
    """Attempt -> the last step at which its points count; the same choice as `spliced`.

    Args:
        stretches: ordered by attempt.
    """
    found: dict[int, int] = {}
    last = _INT64 - 1
    for stretch in reversed(stretches):
        found[stretch.attempt] = last
        last = max(-_INT64, min(last, stretch.first_step - 1))
    return found


def even_places(count: int, most: int) -> set[int]:
    """At most `most` places of `count`, evenly; the first and the last are there."""
    return {0, count - 1} | {round((index + 1) * (count - 1) / (most - 1)) for index in range(most - 2)}


def check_usage(entry: RecordUsage) -> None:
    """Raises Invalid or TooLarge unless the whole of `entry` can be kept."""
    for usage in entry.usages:
        check_log(LogRun(points=usage.points))
        if not all(point.name.startswith(SYSTEM) for point in usage.points):
            raise Invalid("bad_name", f"What a node says of a job's usage is named {SYSTEM}...")


def thinnings(points: Iterable[Point]) -> list[tuple[int, int]]:
    """(before this step, only every so manieth one stays), when it is time again to thin what was sampled."""
    steps = [point.step for point in points]
    if not steps or max(steps) // _THIN_EVERY_S == (min(steps) - 1) // _THIN_EVERY_S:
        return []
    return [(max(steps) - age_s, every) for age_s, every in THINNING if max(steps) > age_s]


def points_each(asked: int, series_count: int) -> int:
    """How many points each of `series_count` series may show so that the answer fits the bus."""
    wanted = asked if asked > 0 else DEFAULT_POINTS
    return max(FEWEST_POINTS, min(wanted, MOST_ANSWERED_POINTS // max(1, series_count)))


def series(name: str, points: Sequence[Measured], most: int) -> Series:
    """The series as shown; minimum, maximum, last value and count are of all its points.

    Args:
        points: ordered by attempt, then step; at least one.
    """
    line = spliced(points)
    values = [point.value for point in line]
    return Series(
        name=name,
        points=tuple(Point(value=each.value, step=each.step, at=from_us(each.at_us)) for each in thinned(line, most)),
        min=min(values),
        max=max(values),
        last=values[-1],
        point_count=len(line),
    )
