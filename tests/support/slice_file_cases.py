"""What tests of slice file share."""

from __future__ import annotations

SHARES = [2, 1, 1]
