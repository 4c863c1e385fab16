"""How adapters may be called."""

_TAKEN_WORDS = {
    "__base__": "a row without any adapter",
    "nothing": "a composition without any adapter",
    "gates": "the trained gates of a composition",
    "learned": "a gate that is trained, in a text",
    "learned_per_layer": "gates that are trained, in a text",
}
"""What compositions and options call other things than adapters."""


def check_name(name: object) -> str:
    """`name` if it can name an adapter and its folder.

    Raises:
        ValueError: it is empty, has a path separator or a character that the text form of compositions uses.
    """
    bad = sorted({c for c in str(name) if c in '/\\:*?"<>|+()[],=' or c.isspace() or not c.isprintable()})
    if isinstance(name, str) and name in _TAKEN_WORDS:
        raise ValueError(f"{name!r} cannot name an adapter: it stands for {_TAKEN_WORDS[name]}. Pick another name.")
    if not isinstance(name, str) or not name or bad or name[0] in ".-" or len(name) > 128 or _is_number(name):
        why = f"; {', '.join(map(repr, bad))} cannot be in it" if bad else ""
        raise ValueError(
            f"{name!r} cannot name an adapter{why}. A name is also the name of its folder: letters, digits, '_', '-' "
            "and '.', not starting with '-' or '.', at most 128 characters, and not a number."
        )
    return name


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
