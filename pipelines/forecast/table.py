"""A forecast for people."""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.forecast.estimates import Estimate, Forecast
from pipelines.job.eta import duration

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def lines(forecast: Forecast) -> Iterator[str]:
    """One line for each thing that is asked of a plan, of each kind of models; intervals are 80 %."""
    yield from _lines_of_kind(forecast)
    generators = forecast.generators
    if generators is not None:
        yield ""
        yield "generators"
        yield from _lines_of_kind(generators)
        if forecast.left.models and generators.left.models:
            walls = forecast.left.wall.total.value, generators.left.wall.total.value
            yield f"both       {duration(sum(walls))}, one kind after the other"


def _lines_of_kind(forecast: Forecast) -> Iterator[str]:
    basis, left, done = forecast.basis, forecast.left, forecast.done
    devices = ", ".join(f"{count:,} on {device}" for device, count in sorted(basis.devices.items()))
    yield f"fitted on  {basis.models:,} models ({devices}) and {basis.failures:,} failures of {basis.source}"
    yield f"catalogue  {forecast.catalogue:,} models: {done.models:,} indexed, {sum(done.failed.values()):,} failed, {left.models:,} to do"
    if left.models:
        yield from _lines_of_work(forecast)
    whole = forecast.whole
    rows = "logits" if "logits" in whole else "samples"
    yield (
        f"the whole  {_count(whole['models indexed'])} models, {_bytes(whole['download bytes'])}, "
        f"{_count(whole['file requests'])} files, {_count(whole[rows])} {rows}"
    )
    for name, chosen in left.chosen.items():
        error = (
            "" if chosen.left_out_error is None else f", {chosen.left_out_error:.0%} error on models left out"
        )
        yield f"model      {name}: {' + '.join(chosen.features)}{error}"
    for note in basis.notes:
        yield f"note       {note}"


def _lines_of_work(forecast: Forecast) -> Iterator[str]:
    """What is still to do, and what it takes."""
    left = forecast.left
    yield f"to index   {_count(left.indexed)}"
    for reason, count in left.failures.items():
        yield f"           {count:,.1f} to fail: {reason}"
    sources = ", ".join(f"{count:,} from {source}" for source, count in left.sizes.items() if count)
    yield f"download   {_bytes(left.bytes)}" + (f" (sizes: {sources})" if sources else "")
    hours = ", ".join(f"{account} {_hours(value)}" for account, value in left.limit_hours.items())
    yield f"requests   {_count(left.file_requests)} files, {left.api_requests:,} API; by the Hub's limits at least: {hours}"
    yield f"disk       {_size(sum(left.disk_bytes.values()))} a node: " + ", ".join(
        f"{what} {_size(size)}" for what, size in left.disk_bytes.items() if size
    )
    yield f"work       {_time(left.worker_hours)} of worker time" + (
        f" ({left.wall.overlap:.2f} busy seconds a second, measured)" if left.wall.overlap else ""
    )
    parts = ", ".join(f"{part} {duration(value.value)}" for part, value in left.seconds.items())
    yield f"           summed over models: {parts}"
    yield "           parameters      models  size estimated      download      worker time"
    for item in left.classes:
        if item.models:
            yield (
                f"           {item.name:<12} {item.models:>9,} {item.size_estimated:>15,} "
                f"{_size(item.download_bytes):>13} {_hours(item.worker_hours):>16}"
            )
    wall = left.wall
    yield f"wall time  {_time(wall.total.times(1 / 3600))} with {wall.workers:,} workers; {wall.bound} decides ({', '.join(f'{name} {duration(getattr(wall, name).value)}' for name in ('compute', 'requests', 'download'))})"
    total = sum(value.value for value in left.store_bytes.values())
    yield f"store      {_size(total)}: " + ", ".join(
        f"{kind} {_bytes(value)}" for kind, value in left.store_bytes.items() if value.value
    )
    cost = left.cost
    if cost.total is None or cost.price is None:
        yield f"cost       {_time(cost.hours)} of {cost.unit} time to pay; --price says for how much"
    else:
        low = "" if cost.total.low is None else f" ({cost.total.low:,.2f} to {cost.total.high:,.2f})"
        yield f"cost       {cost.total.value:,.2f}{low}: {_time(cost.hours)} of {cost.unit} time at {cost.price:g} an hour"


def _count(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None or round(estimate.high) == round(estimate.low):
        return f"{estimate.value:,.0f}"
    return f"{estimate.value:,.0f} ({estimate.low:,.0f} to {estimate.high:,.0f})"


def _bytes(estimate: Estimate) -> str:
    if estimate.low is None or estimate.high is None or _size(estimate.low) == _size(estimate.high):
        return _size(estimate.value)
    return f"{_size(estimate.value)} ({_size(estimate.low)} to {_size(estimate.high)})"


def _time(hours: Estimate) -> str:
    if hours.low is None or hours.high is None:
        return _hours(hours.value)
    return f"{_hours(hours.value)} ({_hours(hours.low)} to {_hours(hours.high)})"


def _hours(hours: float) -> str:
    return duration(hours * 3600)


def _size(count: float) -> str:
    place = 0
    while count >= 999.5 and place < len(_UNITS) - 1:
        count, place = count / 1000, place + 1
    return f"{count:.3g} {_UNITS[place]}" if place else f"{count:.0f} B"
