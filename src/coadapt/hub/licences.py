"""The licence of the data that adapters were trained on: as the data's own source has it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, constants, metadata_load

from coadapt.formats.files import PROVENANCE, read_json

UNKNOWN = "unknown"


def found_licences(folder: Path) -> dict[str, str]:
    """Data set -> licence, of each data set of an adapter folder whose source states one."""
    said = read_json(folder / PROVENANCE) if (folder / PROVENANCE).is_file() else {}
    data: Mapping[str, Any] = said.get("data") or {}
    several = data.get("datasets") or ({"data": data} if data.get("name") else {})
    return {name: licence for name, one in several.items() if (licence := licence_of(str(one["name"])))}


def licence_of(source: str) -> str | None:
    """The licence that a data source states: a folder in its card or its description, the hub in a data set's card.

    None where it states none, or cannot be asked.
    """
    place = Path(source).expanduser()
    if place.is_dir():
        return _in_card(place / "README.md") or _in_description(place)
    if place.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1 or constants.HF_HUB_OFFLINE:
        return None  # a single file states nothing of itself
    try:
        card = HfApi().dataset_info(source, timeout=10).card_data
    except Exception:  # no network, no such data set, no right to see it: then nothing is known
        return None
    return _as_text(card.get("license")) if card else None


def _in_card(file: Path) -> str | None:
    try:
        return _as_text((metadata_load(file) or {}).get("license")) if file.is_file() else None
    except (yaml.YAMLError, ValueError):
        return None


def _in_description(folder: Path) -> str | None:
    for file in (folder / "dataset_info.json", *sorted(folder.glob("*/dataset_info.json"))):
        if file.is_file() and (said := _as_text(read_json(file).get("license"))):
            return said
    return None


def _as_text(licence: Any) -> str | None:
    if isinstance(licence, list):
        return ", ".join(map(str, licence)) or None
    return str(licence) if licence else None
