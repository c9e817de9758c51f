"""What the user can mend, told apart from what is broken."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake that the user can mend.

    Its message is one line: what was given and where, what is allowed, what to do. Commands show it
    without a traceback.
    """


def nearest(given: str, allowed: Iterable[str]) -> str:
    """` (did you mean ...?)`, or nothing where no allowed name comes close."""
    close = difflib.get_close_matches(given, list(allowed), n=3)
    return f" (did you mean {' or '.join(close)}?)" if close else ""
