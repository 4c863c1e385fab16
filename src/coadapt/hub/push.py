"""An adapter folder goes to a hub: looked at first, then sent in one commit."""

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from coadapt.formats.facts import read_facts
from coadapt.formats.files import COMPOSITION, WEIGHTS, read_json
from coadapt.formats.hub import check_name
from coadapt.formats.package import CARD, Package, pack
from coadapt.hub.card import Made, Said, is_made_here, make_card, write_card
from coadapt.hub.licences import UNKNOWN


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """What a push is going to send."""

    package: Package
    repo: str
    card_is_theirs: bool
    """Whether the card was written by somebody else, and goes as it is."""


def prepare(folder: Path, repo: str, said: Said, base: str | None = None, write: bool = True) -> Parcel:
    """Looks at everything that could be wrong with a folder, makes its card, and packs what belongs to it.

    Args:
        base: the model of the hub that the adapters are for, in place of what the folder names.
        write: whether the card is written into the folder; otherwise it is only packed.

    Raises:
        FileNotFoundError, ValueError: it is no adapter, or not a whole one, or it names things that nobody else has,
            or the licence of its data is unknown and nobody said that it is.
    """
    check_name(repo)
    pack(folder, base)
    check_whole(folder)
    theirs = not is_made_here(folder / CARD)
    if theirs:
        return Parcel(package=pack(folder, base), repo=repo, card_is_theirs=True)
    made = make_card(folder, said, repo, base)
    _ask_for_licence(made)
    if write:
        write_card(folder, said, repo, base)
        return Parcel(package=pack(folder, base), repo=repo, card_is_theirs=False)
    package = pack(folder, base)
    files = {CARD: made.text.encode(), **{k: v for k, v in package.files.items() if k != CARD}}
    stays = [name for name in package.stays if name != CARD]
    return Parcel(package=Package(files=files, stays=stays), repo=repo, card_is_theirs=False)


def _ask_for_licence(made: Made) -> None:
    if made.data_licence is None:
        raise ValueError(
            "The licence of the data that this was trained on is not known, and whoever uses the adapter will ask. Say "
            f"it with --data-license (cc-by-4.0, apache-2.0 …), or --data-license {UNKNOWN} if nobody knows."
        )


def check_whole(folder: Path) -> None:
    """Reads every tensor of every adapter.

    Raises:
        ValueError: a file is cut off or damaged, holds nothing or numbers that are not finite, or a composition names
            an adapter that is not there.
    """
    found = read_facts(folder).adapters
    for facts in found:
        _check_tensors(facts.folder / WEIGHTS)
    if (file := folder / COMPOSITION).is_file():
        missing = [name for name in read_json(file).get("adapters", []) if name not in {one.name for one in found}]
        if missing:
            raise ValueError(f"{folder} is incomplete: {file.name} names {', '.join(missing)}, which is not there.")


def _check_tensors(file: Path) -> None:
    try:
        with safe_open(str(file), "pt") as tensors:
            names = list(tensors.keys())
            spoilt = [n for n in names if (t := tensors.get_tensor(n)).is_floating_point() and not t.isfinite().all()]
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not names or spoilt:
        said = f"{spoilt[0]} is not finite" if spoilt else "it holds no tensor"
        raise ValueError(f"{file} is of no use to anybody: {said}.")
