"""F12: virtual tokens, against a base whose input is longer by as many."""

from .measuring import interleaved
from .report import Row, ratio
from .setting import LIBRARIES, Setting, Step, adapted, limit, llama, tokens

N = 20


def training(setting: Setting) -> list[Row]:
    rows, length = setting.size(4, 2), setting.size(128, 3)
    ids = tokens(setting, rows, length)
    found: list[Row] = []
    for name, config in (("prefix", "PrefixTuningConfig"), ("prompt", "PromptTuningConfig")):
        steps = {"limit": limit(llama(setting), tokens(setting, rows, length + N))}
        for library in LIBRARIES:
            view = adapted(library, llama(setting), config, num_virtual_tokens=N)
            steps[library] = Step(view, input_ids=ids, labels=ids)
        what = f"{name} of {N}, {rows} x {length} tokens: step / limit at {length + N}"
        found.append(ratio("F12", what, interleaved(steps, setting), 1.05))
    return found
