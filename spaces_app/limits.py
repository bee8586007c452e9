"""What one visitor may ask for, and the words in which more is refused."""

import math

MAX_STEPS = 256
MAX_CANDIDATES = 16
MAX_CHARACTERS = 8192  # of a text before it is tokenized; the model's own length is checked in tokens
MAX_TEMPERATURE = 4.0
MAX_SEED = 2**31 - 1
MAX_QUEUE = 16  # requests that wait; the next one is told so
SECONDS = 60.0  # of one request's work
UNREAD_SECONDS = 15.0  # a run whose results nobody fetches any more stops


class Refused(ValueError):
    """A request that does not fit; the message is for the visitor and names the argument and its value."""


def whole(name: str, value, least: int, most: int) -> int:
    """The value as an integer, else Refused."""
    if not _is_number(value) or value != int(value) or not least <= value <= most:
        raise Refused(f"{name} must be a whole number from {least} to {most}, got {shown(value)}")
    return int(value)


def number(name: str, value, least: float, most: float) -> float:
    """The value as a float, else Refused."""
    if not _is_number(value) or not least <= value <= most:
        raise Refused(f"{name} must be a number from {least:g} to {most:g}, got {shown(value)}")
    return float(value)


def words(name: str, value) -> str:
    """The value as a text of bounded length, else Refused."""
    if not isinstance(value, str):
        raise Refused(f"{name} must be a text, got {shown(value)}")
    if len(value) > MAX_CHARACTERS:
        raise Refused(f"{name} must have at most {MAX_CHARACTERS} characters, got {len(value)}")
    return value


def shown(value) -> str:
    """A value in a message: short, whatever it is."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
