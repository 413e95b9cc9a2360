"""Numbers as people read them: 1.23 GB, 6 min 20 s, 78.1 %, 4.88 M.

Not a unit library. The idea that keeps it short: deltaw puts the unit in a number's name, so `by_name` can format any
entry of a summary from its key alone. Whatever is not a finite number becomes a dash, never an error.
"""

from __future__ import annotations

from typing import Any, TypeGuard

DASH = "–"
# A number and its unit stay on one line.
SPACE = "\N{NO-BREAK SPACE}"
# Beyond all that a 32-bit float can hold; comparing is safe for NaN and for any integer, math.isfinite is not.
LARGEST = 1e39


def is_number(value: Any) -> TypeGuard[float]:
    """Whether `value` is a number that can be shown: finite, no boolean, and no integer beyond the range of a float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST < value < LARGEST


def significant(value: Any, digits: int = 3) -> str:
    """`value` with that many digits: 0.412, 12.3, 1,234; very small and very large ones as 2e-4."""
    if not is_number(value):
        return DASH
    if value == 0:
        return "0"
    # The power of ten after rounding: 0.9999 has the exponent of 1.00.
    mantissa, power = f"{value:.{digits - 1}e}".split("e")
    if not -4 < int(power) < 9:
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(power)}"
    return f"{value:,.{max(digits - 1 - int(power), 0)}f}"


def plain(value: Any) -> str:
    """`value` without zeros at its end, as on an axis: 0.8, 16, 1,234."""
    text = significant(value)
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def whole(value: Any) -> str:
    """A count in full: 134,515,008."""
    return f"{value:,.0f}" if is_number(value) else DASH


def _scaled(value: Any, units: list[tuple[float, str]], smallest: str) -> str:
    """`value` in the largest unit in which it does not round to less than 1."""
    if not is_number(value):
        return DASH
    for size, unit in units:
        if abs(value) >= 0.9995 * size:
            return f"{significant(value / size)}{SPACE}{unit}"
    return f"{significant(value) if value % 1 else whole(value)}{SPACE + smallest if smallest else ''}"


def human_bytes(value: Any) -> str:
    """Decimal units, as on a disk's label: 1.23 GB is 1.23 · 10^9 bytes."""
    return _scaled(value, [(1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")], "B")


def human_count(value: Any) -> str:
    """A count: exact below a million, then 4.88 M or 7.24 B."""
    return _scaled(value, [(1e9, "B"), (1e6, "M")], "")


def human_seconds(value: Any) -> str:
    """A duration in its two largest units: 0.85 s, 6 min 20 s, 1 h 05 min."""
    if not is_number(value):
        return DASH
    if value < 59.95:
        return f"{significant(value)}{SPACE}s"
    minutes, seconds = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes}{SPACE}min{SPACE}{seconds:02d}{SPACE}s"
    hours, minutes = divmod(round(value / 60), 60)
    return f"{hours}{SPACE}h{SPACE}{minutes:02d}{SPACE}min"


def percent(value: Any) -> str:
    """A share as a percentage: 0.781 → 78.1 %, and with more digits where it is small."""
    if not is_number(value):
        return DASH
    return f"{value:.1%}".replace("%", f"{SPACE}%") if abs(value) >= 0.01 else f"{significant(100 * value, 2)}{SPACE}%"


FORMATS = {"bytes": human_bytes, "seconds": human_seconds, "tokens": whole, "parameters": whole, "rows": whole}


def by_name(name: str, value: Any) -> str:
    """`value` formatted by the unit at the end of its name: ("peak_bytes", 1.23e9) → 1.23 GB."""
    unit = name.rsplit("_", 1)[-1]
    if not is_number(value):
        return DASH if value is None else str(value)
    if unit == "gflops":
        return f"{significant(value)}{SPACE}GFLOP/s"
    return FORMATS.get(unit, whole if isinstance(value, int) else significant)(value)


def title(name: str) -> str:
    """A key as words, without a unit that stands beside the number anyway: trained_tokens → trained tokens."""
    return name.removesuffix("_bytes").removesuffix("_seconds").removesuffix("_gflops").replace("_", " ")
