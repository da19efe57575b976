"""What stands in the screen's table and below it, as text of given widths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cfe_hpc.launch.occupancy import Occupancy
from cfe_hpc.screen.feed import Line, Picture
from cfe_hpc.units import format_duration

__all__ = ["STYLES", "Column", "age", "columns", "count", "head", "partition", "short_name", "sparkline", "state"]

_BARS = "▁▂▃▄▅▆▇█"
_MARGIN = 3
"""Behind the last columns, the scroll bar among them."""

STYLES: Mapping[str, str] = {
    "STALLED": "bold white on red",
    "RUNNING": "green",
    "PENDING": "yellow",
    "HELD": "bold magenta",
    "FAILED": "bold red",
    "CANCELLED": "dim",
    "COMPLETED": "cyan",
}
"""How a state looks."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the table: `text` gives a run's cell, no longer than `width`."""

    title: str
    width: int
    text: Callable[[Line], str]


def columns(width: int) -> list[Column]:
    """The columns that fit a screen so wide, a blank between two; what is left is for names and reasons."""
    fixed = [
        Column("STATE", 9, state),
        Column("STEP", 11, lambda line: _steps(line, 11)),
        Column("LOSS", 8, lambda line: sparkline(line.losses, 8)),
        Column("GOOD", 4, _goodput),
        Column("BEAT", 4, lambda line: age(line.status.heartbeat_age_s) if line.status.state == "RUNNING" else "-"),
    ]
    if width >= 100:
        fixed.insert(2, Column("NOW", 8, lambda line: _loss(line, 8)))
    if width >= 120:
        fixed += [Column("JOB", 10, lambda line: (line.status.job_id or "-")[-10:]), Column("TRY", 3, _attempt)]
    if width >= 140:
        fixed.append(Column("NODES", 18, lambda line: cut(line.nodes, 18)))
    rest = max(16, width - sum(column.width + 1 for column in fixed) - _MARGIN)
    name = min(40, max(14, rest // 2))
    reason = max(0, rest - name)
    found = [Column("RUN", name, lambda line: short_name(line.status.run_id, name)), *fixed]
    nodes = width < 140
    return [*found, Column("REASON", reason, lambda line: cut(_reason(line, nodes), reason))] if reason >= 6 else found


def state(line: Line) -> str:
    """The run's state, or that it is stalled."""
    return "STALLED" if line.stalled else line.status.state


def _reason(line: Line, nodes: bool) -> str:
    """Why a run is where it is; with `nodes`, where it runs when that needs no reason."""
    if line.stalled:
        return f"no step for {age(line.status.heartbeat_age_s)}"
    return " ".join((line.status.reason or (line.nodes if nodes else "")).split())


def _steps(line: Line, width: int) -> str:
    step, total = line.status.step, line.status.total_steps
    if step is None:
        return "-"
    plain = str(step) if total is None else f"{step}/{total}"
    return plain if len(plain) <= width else f"{count(step)}/{count(total or 0)}"


def _loss(line: Line, width: int) -> str:
    return f"{line.losses[-1]:.4g}"[:width] if line.losses else "-"


def _goodput(line: Line) -> str:
    return "-" if line.status.goodput is None else f"{line.status.goodput:.0%}"


def _attempt(line: Line) -> str:
    return "-" if line.status.attempt is None else str(line.status.attempt)


def cut(text: str, width: int) -> str:
    """`text`, its end left out where it is too long."""
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"


def short_name(run_id: str, width: int) -> str:
    """A run id: where it is too long its job's name is cut, and the time left out; its end tells runs apart."""
    if len(run_id) <= width:
        return run_id
    base, dot, task = run_id.partition(".")
    end = f"-{base[-4:]}{dot}{task}"
    return f"{cut(base[:-21], width - len(end))}{end}"[-width:]


def count(number: float) -> str:
    """A number in at most five characters: 999, 12.3k, 4.56M."""
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= factor:
            return f"{number / factor:.3g}{letter}"
    return f"{number:.0f}"


def age(seconds: float | None) -> str:
    """How long ago, in at most four characters, by its greatest unit."""
    if seconds is None:
        return "-"
    for factor, letter in ((86_400, "d"), (3_600, "h"), (60, "m")):
        if seconds >= factor:
            return f"{min(999, int(seconds // factor))}{letter}"
    return f"{int(seconds)}s"


def sparkline(values: Sequence[float], width: int) -> str:
    """The course of the values in so many bars, the newest last; the lowest is the lowest bar."""
    newest = values[-width * (max(1, len(values) // width)) :] if values else []
    each = max(1, len(newest) // width)
    means = [sum(newest[start : start + each]) / each for start in range(0, len(newest) - each + 1, each)]
    if not means:
        return ""
    low, spread = min(means), (max(means) - min(means)) or 1.0
    return "".join(_BARS[min(7, int((mean - low) / spread * 8))] for mean in means)


def head(picture: Picture) -> str:
    """How many runs there are of each state, and what schedulers have to say."""
    stalled = sum(line.stalled for line in picture.lines)
    order = ("RUNNING", "PENDING", "HELD", "FAILED", "CANCELLED", "COMPLETED")
    parts = [f"{picture.counts[name]} {name.lower()}" for name in order if picture.counts.get(name)]
    parts += [f"{stalled} STALLED"] if stalled else []
    parts += [f"{picture.hidden} older not shown"] if picture.hidden else []
    return "  ".join(parts) or "no runs yet"


def detail(line: Line) -> list[str]:
    """What is worth knowing of one run, in lines."""
    status = line.status
    facts = [f"job {status.job_id or '-'}", f"attempt {'-' if status.attempt is None else status.attempt}"]
    facts += [f"on {line.nodes}"] if line.nodes else []
    facts += [f"lost {status.lost_steps}"] if status.lost_steps else []
    facts += [f"loss {line.losses[-1]:.4g}"] if line.losses else []
    facts += [f"{count(line.tokens_per_s)} tokens/s"] if line.tokens_per_s else []
    if line.left_s is not None:
        unit_s = 60 if line.left_s >= 3600 else 1
        facts.append(f"{format_duration(round(line.left_s / unit_s) * unit_s)} left")
    reason = " ".join(status.reason.split())
    if line.stalled:
        reason = f"no step for {age(status.heartbeat_age_s)}; usually one every {line.beat_every_s or 0:.2g} s"
    return [status.run_id, "  ".join(facts), reason]


def partition(each: Occupancy, width: int) -> str:
    """One partition's nodes as a bar of so many characters, and in numbers."""
    in_use = 0 if each.total == 0 else round(width * each.allocated / each.total)
    useless = 0 if each.total == 0 else min(width - in_use, -(-width * each.other // each.total))
    bar = "█" * in_use + "x" * useless + "·" * (width - in_use - useless)
    down = f", {each.other} down" if each.other else ""
    return f"{bar} {each.allocated}/{each.total} nodes in use{down}{'' if each.up else '; closed'}"
