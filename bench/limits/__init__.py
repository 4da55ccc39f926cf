"""Control groups, which limit a program's memory, processor and disk (groups.py); `python -m bench.limits`."""

from bench.limits.groups import Group, RankGroups, available, remove_groups
from bench.limits.trees import LimitError

__all__ = ["Group", "LimitError", "RankGroups", "available", "remove_groups"]
