"""What a file of --trace says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def passes_of(path: Path) -> list[dict[str, Any]]:
    """What was counted of each pass, in the order of their times, none of which overlap."""
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("cat") == "pass"]
    events.sort(key=lambda event: event["ts"])
    ends = [event["ts"] + event["dur"] for event in events]
    assert all(event["ts"] >= end for event, end in zip(events[1:], ends, strict=False))
    return [event["args"] for event in events]
