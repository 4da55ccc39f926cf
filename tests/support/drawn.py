"""How many examples hypothesis draws: fewer in the short suite (--hypothesis-profile quick)."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("quick", max_examples=20, deadline=None)
settings.register_profile("thorough", max_examples=100, deadline=None)


def examples(count: int) -> settings:
    """`count` examples of a test in the thorough profile, and as many fewer in others as they draw fewer at all."""
    return settings(max_examples=max(10, count * settings.default.max_examples // 100), deadline=None)
