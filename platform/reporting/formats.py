"""How numbers are shown to people: the same in the console, in tables and in reports."""

import math

DASH = "–"  # noqa: RUF001 (an en dash is meant)


def number(value: float | int | None, digits: int = 4, missing: str = DASH) -> str:
    """A number with so many significant digits, without an exponent where that stays readable.

    Example:
        >>> number(0.98765), number(123456.7), number(3e-7), number(600), number(None)
        ('0.9877', '123457', '3.000e-07', '600', '–')
    """
    if value is None or not math.isfinite(value):
        return missing
    if isinstance(value, int) or value == 0:
        return str(int(value))
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -4 or magnitude >= 9:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(digits - 1 - max(magnitude, -1), 0)}f}"


def signed(value: float | None) -> str:
    """A difference: `number` with its sign, also a plus, and a true minus.

    Example:
        >>> signed(0.5), signed(-0.5), signed(0.0)
        ('+0.5000', '−0.5000', '0')
    """
    text = number(value)
    if value is not None and value > 0:
        return f"+{text}"
    return text.replace("-", "−", 1) if text.startswith("-") else text  # noqa: RUF001


def with_decimals(value: float | None, like: float | None, digits: int = 4) -> str:
    """A number with as many decimals as `number` gives another one: a spread beside its mean."""
    text = number(like, digits)
    if value is None or not math.isfinite(value):
        return DASH
    if "e" in text or like is None:
        return number(value, digits)
    decimals = len(text.partition(".")[2])
    rounded = f"{value:.{decimals}f}"
    # a spread that would show as zero is shown as itself
    return number(value, 2) if value != 0 and float(rounded) == 0 else rounded


def compact(value: float) -> str:
    """A quantity in three digits with k, M, G.

    Example:
        >>> compact(12345.0), compact(999.9), compact(3.14159), compact(2.5e6)
        ('12.3k', '1k', '3.14', '2.5M')
    """
    for limit, divisor, unit in ((999.5, 1, ""), (999.5e3, 1e3, "k"), (999.5e6, 1e6, "M")):
        if abs(value) < limit:
            return f"{value / divisor:.3g}{unit}"
    return f"{value / 1e9:.3g}G"


def duration(seconds: float | None) -> str:
    """A time span in words of two units at most.

    Example:
        >>> duration(0.42), duration(75), duration(7384), duration(200000)
        ('0.42 s', '1 min 15 s', '2 h 3 min', '2 d 7 h')
    """
    if seconds is None or not math.isfinite(seconds):
        return DASH
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 9.95 else f"{min(round(seconds), 59)} s"
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    whole = round(seconds)
    for place, (unit, size) in enumerate(units[:-1]):
        if whole >= size:
            rest_unit, rest_size = units[place + 1]
            rest = whole % size // rest_size
            return f"{whole // size} {unit}" + (f" {rest} {rest_unit}" if rest else "")
    return f"{whole} s"


def size(count: float) -> str:
    """Bytes in binary units.

    Example:
        >>> size(512), size(1536), size(5 * 2**30)
        ('512 B', '1.5 KiB', '5 GiB')
    """
    for limit, unit in ((2**10, "B"), (2**20, "KiB"), (2**30, "MiB"), (2**40, "GiB")):
        if count < limit:
            return f"{count / (limit / 2**10):.3g} {unit}"
    return f"{count / 2**40:.3g} TiB"
