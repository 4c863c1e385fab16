"""The model card of an adapter folder, made from what the folder recorded; what a person wrote in it stays."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from coadapt.formats.files import aside
from coadapt.formats.package import CARD, PICTURE, is_here
from coadapt.hub import sections
from coadapt.hub.figures import of_what_was_saved
from coadapt.hub.licences import UNKNOWN, found_licences
from coadapt.hub.snippets import read_by_peft
from coadapt.hub.story import Story, read_story
from coadapt.training.picture import draw

BEGIN = "<!-- coadapt: from here to the next such line, `coadapt card` makes everything anew; write outside of it -->"
END = "<!-- /coadapt -->"
PIPELINES = {
    "causal-lm": "text-generation",
    "sequence-classification": "text-classification",
    "token-classification": "token-classification",
    "image-classification": "image-classification",
}
"""Task -> what the hub calls it."""
MADE = ("base_model", "base_model_relation", "library_name", "model-index")
"""Keys of the metadata that always follow from the folder. Others are a person's, once they are there."""
TO_FILL_IN = """## Intended use

*Not filled in yet: what is this for, and for whom?*

## Limits

*Not filled in yet: what does it do badly, and what should it not be used for?*
"""


@dataclass(frozen=True, kw_only=True)
class Said:
    """What no folder can tell, and a person says; None: as the card has it already."""

    license: str | None = None
    data_license: str | None = None
    language: str | None = None


@dataclass(frozen=True, kw_only=True)
class Made:
    """A card."""

    text: str
    data_licence: str | None
    """None where neither a person nor the data's source said it."""


def make_card(folder: Path, said: Said | None = None, repo: str | None = None, base: str | None = None) -> Made:
    """The card of an adapter folder; nothing is written.

    Args:
        repo: the repository that it is for, named in its snippets; else the folder's own name is.
        base: the model of the hub that the adapters are for, in place of what the folder names.

    Raises:
        FileNotFoundError, ValueError: the folder holds no adapter, or a card that somebody else wrote.
    """
    said = said or Said()
    before = _read(folder / CARD)
    story = read_story(folder, repo, base)
    kept = before.data.to_dict() if before else {}
    licence = said.data_license or kept.get("data_license") or _of_data(folder, story)
    own = {"license": said.license, "language": said.language, "data_license": licence}
    data = _metadata(story, {**kept, **{k: v for k, v in own.items() if v is not None}})
    block = f"{BEGIN}\n\n{sections.body(story, licence or UNKNOWN)}\n{END}"
    text = _replaced(before.text, block) if before else f"# {sections.title(story)}\n\n{block}\n\n{TO_FILL_IN}"
    return Made(text=f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n", data_licence=licence)


def write_card(folder: Path, said: Said | None = None, repo: str | None = None, base: str | None = None) -> Made:
    """Writes the card, whole or not at all, and the picture of the loss where a log is there and no picture.

    Raises:
        FileNotFoundError, ValueError: as `make_card`; nothing was written then.
    """
    story = read_story(folder, repo, base)
    if story.log and not story.has_picture:
        with aside(folder / PICTURE) as file:
            draw(story.log, file, sections.title(story))
    made = make_card(folder, said, repo, base)
    with aside(folder / CARD) as file:
        file.write_text(made.text, "utf-8")
    return made


def is_made_here(file: Path) -> bool:
    """Whether a card can be made anew in place: there is none, or it has the two lines."""
    if not file.is_file():
        return True
    text = file.read_text("utf-8", errors="replace")
    return text.count(BEGIN) == 1 and text.count(END) == 1 and text.index(BEGIN) < text.index(END)


def _read(file: Path) -> ModelCard | None:
    if not file.is_file():
        return None
    if not is_made_here(file):
        raise ValueError(
            f"{file} was not made by coadapt, and is left as it is. To have it made anew, move it away; or put these "
            f"two lines where coadapt is to write:\n{BEGIN}\n{END}"
        )
    try:
        return ModelCard(file.read_text("utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"The metadata at the top of {file} is no valid YAML: {error}. Mend it.") from error


def _replaced(text: str, block: str) -> str:
    start, _, rest = text.partition(BEGIN)
    return start + block + rest.partition(END)[2]


def _of_data(folder: Path, story: Story) -> str | None:
    """What the sources of the data state, if all of them do."""
    found = found_licences(folder)
    return ", ".join(dict.fromkeys(found.values())) if found and found.keys() >= story.data.keys() else None


def _metadata(story: Story, kept: Mapping[str, Any]) -> ModelCardData:
    """What hubs read: made anew, but for the keys that are a person's, and for tags that a person added."""
    theirs = {key: value for key, value in kept.items() if key not in (*MADE, "tags") and value is not None}
    tags = [*story.methods, "adapter", "coadapt", *(kept.get("tags") or ())]
    # The hub knows data sets and bases by id only.
    data = [str(one["name"]) for one in story.data.values() if _is_id(str(one["name"]))]
    card: dict[str, Any] = {
        "base_model": story.base if story.base_is_on_hub else None,
        "base_model_relation": "adapter" if story.base_is_on_hub else None,
        "library_name": "peft" if read_by_peft(story) else "coadapt",
        "pipeline_tag": PIPELINES.get(story.task),
        "datasets": data or None,
        "tags": list(dict.fromkeys(tags)),
    }
    if results := _results(story):
        card |= {"model_name": story.repo.rpartition("/")[2], "eval_results": results}
    return ModelCardData(**{**{key: value for key, value in card.items() if value is not None}, **theirs})


def _is_id(name: str) -> bool:
    return name.count("/") == 1 and not is_here(name) and not Path(name).suffix


def _results(story: Story) -> list[EvalResult]:
    data = story.evaluation.get("data") or {}
    tasks = (story.evaluation.get("lm_eval") or {}).get("tasks") or ()
    name = str(data.get("name") or ", ".join(tasks))
    return [
        EvalResult(
            task_type=PIPELINES.get(story.task, "text-generation"),
            dataset_type=name if _is_id(name) else "custom",
            dataset_name=name,
            metric_type=metric,
            metric_value=round(value, 6),
        )
        for metric, value in of_what_was_saved(story).items()
    ]
