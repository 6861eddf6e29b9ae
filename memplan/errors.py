"""An error as data: what was found, why it matters, and what to do about it.

One class, one display rule. The text that a person reads is made by `memplan.report`; here are only
the fields, so that a program gets the same error as JSON.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import IntEnum

_KEBAB_CASE = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


class ExitCode(IntEnum):
    """What the process answers with; the same for every verb."""

    FITS = 0
    DOES_NOT_FIT = 1
    BAD_INPUT = 2
    UNKNOWN = 3


@dataclass(eq=False)
class MemplanError(Exception):
    """Something that the user can act on; shown without a traceback.

    `reference` is stable and kebab-case, so that an error can be searched for and tested.
    `message` says what was found, in the user's own words and arguments; `context` why it is an
    error; `hint` what to do; `note` whose fault it is, where that is not clear.
    """

    reference: str
    message: str
    context: str | None = None
    hint: str | None = None
    note: str | None = None
    exit_code: ExitCode = field(default=ExitCode.BAD_INPUT)

    def __post_init__(self) -> None:
        if not _KEBAB_CASE.fullmatch(self.reference):
            raise ValueError(f"reference must be kebab-case: {self.reference!r}")
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message

    def to_dict(self) -> dict[str, str | int | None]:
        """The error as a program reads it."""
        return {
            "reference": self.reference,
            "message": self.message,
            "context": self.context,
            "hint": self.hint,
            "note": self.note,
            "exit_code": int(self.exit_code),
        }
