"""Lines that load and ask an adapter: they stand in its card, and run as they stand."""

from collections.abc import Iterator

from coadapt.formats.programs import PROGRAMS
from coadapt.hub.story import Story
from coadapt.training.folder import AUTO_NAMES

PROMPT = "Your prompt"
BASE, FOLDER = "path/to/the/base", "path/to/this/folder"


def snippets(story: Story) -> Iterator[tuple[str, str]]:
    """(language, text): with coadapt, with peft where that reads the folder, and on the command line."""
    yield "python", python(story, "coadapt")
    if read_by_peft(story):
        yield "python", python(story, "peft")
    yield "console", _command(story)


def read_by_peft(story: Story) -> bool:
    """Whether peft loads all that the folder holds."""
    [peft] = [program for program in PROGRAMS if program.name == "peft"]
    [first, *more] = story.facts
    return not more and not story.is_composition and first.folder == story.folder and peft.judge(first).loads


def python(story: Story, library: str) -> str:
    """A whole script."""
    auto = AUTO_NAMES[story.task]
    maker = "AutoImageProcessor" if story.task == "image-classification" else "AutoTokenizer"
    where, base = story.repo, story.base or BASE
    head = f", num_labels={len(story.classes)}" if story.classes else ""
    head += ", ignore_mismatched_sizes=True" if head and story.task == "image-classification" else ""
    named = sorted([auto, maker])
    of = where if story.has_processor else base
    lines = [
        *(("from PIL import Image",) if story.task == "image-classification" else ()),
        f"from {library} import PeftModel",
        f"from transformers import {', '.join(named)}",
        "",
        f'base = {auto}.from_pretrained("{base}"{head})',
        f'model = PeftModel.from_pretrained(base, "{where}")',
        f'{"processor" if maker == "AutoImageProcessor" else "tokenizer"} = {maker}.from_pretrained("{of}")',
        *_asked(story),
    ]
    return "\n".join(lines) + "\n"


def _asked(story: Story) -> list[str]:
    told = ", task_ids=[0]" if story.provenance.get("tasks") else ""
    match story.task:
        case "image-classification":
            return [
                'inputs = processor(Image.open("image.png").convert("RGB"), return_tensors="pt")',
                f"print(int(model(**inputs{told}).logits.argmax()))",
            ]
        case "sequence-classification" | "token-classification":
            return [
                f'inputs = tokenizer("{PROMPT}", return_tensors="pt")',
                f"print(model(**inputs{told}).logits.argmax(-1).tolist())",
            ]
        case _:
            skip = "" if story.task == "seq2seq" else "[inputs.input_ids.shape[1] :]"
            return [
                *_inputs(story),
                f"out = model.generate(**inputs{told}, max_new_tokens=64)",
                f"print(tokenizer.decode(out[0]{skip}, skip_special_tokens=True))",
            ]


def _inputs(story: Story) -> list[str]:
    """The prompt as it was put to the model in training."""
    framing = story.provenance.get("prompt") or {}
    if framing.get("style") == "chat":
        return [
            f'messages = [{{"role": "user", "content": "{PROMPT}"}}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ")",
        ]
    text = f"user: {PROMPT}\nassistant:" if framing.get("style") == "roles" else PROMPT + framing.get("separator", "")
    return [f'inputs = tokenizer({_quoted(text)}, return_tensors="pt")']


def _quoted(text: str) -> str:
    """As a Python string in double quotes."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return f'"{escaped}"'


def _command(story: Story) -> str:
    asked = "--image image.png" if story.task == "image-classification" else f'--prompt "{PROMPT}"'
    task = " --task 0" if story.provenance.get("tasks") else ""
    base = "" if story.base_is_on_hub else f" --model {story.base or BASE}"
    return f"$ coadapt generate --adapter {story.repo}{base}{task} {asked}\n"
