"""A run's log: one JSON object a line. Nothing of training is imported to read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LOG = "log.jsonl"


def read_log(log: Path) -> list[dict[str, Any]]:
    """The records of a run's log; a last line that is under way, or was cut by a kill, is left out."""
    if not log.is_file():
        return []
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def drop_redone(log: Path, step: int) -> None:
    """Forget log lines of steps after ``step``, which a resumed run does again."""
    if log.is_file():
        kept = [json.dumps(record) + "\n" for record in read_log(log) if record["step"] <= step]
        log.write_text("".join(kept), encoding="utf-8")
