"""When a line of a log was written, by what stands at its beginning."""

from __future__ import annotations

import re
import time
from datetime import datetime, timezone
from functools import lru_cache

__all__ = ["stamp_s"]

_LOOKED_AT = 64
"""Characters of a line: what stands further on is what the line is about, not when it was written."""

# Of logging, DeepSpeed, loguru and most others; without a zone it is the nodes' own time, which is this machine's.
_DATE = re.compile(
    r"(?P<minute>\d{4}-\d\d-\d\d[T ]\d\d:\d\d):(?P<second>\d\d)(?:[.,](?P<part>\d{1,9}))?"
    r"\s?(?P<zone>Z|[+-]\d\d:?\d\d)?(?!\d)"
)
# Of glog, which torch and NCCL's process groups write with: month, day, time; no year.
_GLOG = re.compile(
    r"(?:^|[\[:])[IWEF](?P<month>\d\d)(?P<day>\d\d) (?P<time>\d\d:\d\d):(?P<second>\d\d)\.(?P<part>\d{1,9}) "
)


def stamp_s(line: str, *, year: int) -> float | None:
    """Epoch seconds of a line; None when it does not say.

    Args:
        year: of lines that name none.
    """
    head = line[:_LOOKED_AT]
    match = _DATE.search(head)
    if match is not None:
        begin_s = _minute_s(match["minute"].replace("T", " "), match["zone"] or "")
    else:
        match = _GLOG.search(head)
        if match is None:
            return None
        begin_s = _minute_s(f"{year}-{match['month']}-{match['day']} {match['time']}", "")
    return None if begin_s is None else begin_s + int(match["second"]) + float(f"0.{match['part'] or 0}")


@lru_cache(maxsize=1024)
def _minute_s(minute: str, zone: str) -> float | None:
    """Epoch seconds of "YYYY-MM-DD HH:MM": thousands of lines share one."""
    try:
        if not zone:
            return time.mktime(time.strptime(minute, "%Y-%m-%d %H:%M"))
        if zone == "Z":
            return datetime.strptime(minute, "%Y-%m-%d %H:%M").replace(tzinfo=timezone.utc).timestamp()
        return datetime.strptime(minute + zone, "%Y-%m-%d %H:%M%z").timestamp()
    except (ValueError, OverflowError):
        return None
