"""What tests of memory share."""

from __future__ import annotations

MB, GB = 10**6, 10**9


HOST = 32 * GB  # of the host in these tests
