"""What the user asked: a frozen `Request`, and where each of its values comes from."""

from memplan.request.types import CardSpec, Origin, Request

__all__ = ["CardSpec", "Origin", "Request"]
