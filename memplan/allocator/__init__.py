"""The caching allocator, replayed: from a timeline to what torch allocates and reserves. No torch."""

from memplan.allocator.caching import Allocator, OutOfMemory
from memplan.allocator.conf import AllocConf
from memplan.allocator.layout import LAYOUTS, Layout
from memplan.allocator.replay import Replay, ReplayFailure, live_at, replay

__all__ = [
    "LAYOUTS",
    "AllocConf",
    "Allocator",
    "Layout",
    "OutOfMemory",
    "Replay",
    "ReplayFailure",
    "live_at",
    "replay",
]
