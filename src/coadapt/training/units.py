"""How bytes and seconds are written."""

GIB = 2**30


def size(count: float) -> str:
    """`1.50 GiB`, `12.0 MiB` or `3.4 KiB`."""
    if count >= GIB / 10:
        return f"{count / GIB:.2f} GiB"
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 / 10 else f"{count / 2**10:.1f} KiB"


def duration(seconds: float) -> str:
    """`75` as `1:15`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
