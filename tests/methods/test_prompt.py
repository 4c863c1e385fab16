"""A prompt that is made of the embeddings of tokens is those tokens, in every family of models."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    PegasusConfig,
    PegasusForConditionalGeneration,
    RobertaConfig,
    RobertaModel,
)

from coadapt import PromptTuningConfig, get_peft_model
from models import MODELS, VOCABULARY, gemma3, ids

TOKENS = torch.tensor([7, 8, 9])
_SEQ2SEQ = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40}
_SEQ2SEQ |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": VOCABULARY, "dropout": 0.0}
_SEQ2SEQ |= {"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1, "decoder_start_token_id": 1}
_SEQ2SEQ |= {"forced_eos_token_id": None, "max_position_embeddings": 64}


def _opt() -> OPTForCausalLM:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 40, "num_attention_heads": 4, "dropout": 0.0}
    return OPTForCausalLM(OPTConfig(vocab_size=VOCABULARY, max_position_embeddings=64, pad_token_id=1, **sizes))


def _roberta() -> RobertaModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 40, "num_attention_heads": 4}
    return RobertaModel(RobertaConfig(vocab_size=VOCABULARY, pad_token_id=1, max_position_embeddings=64, **sizes))


FAMILIES: dict[str, Callable[[], Any]] = {
    **{name: make for name, make in MODELS.items() if name != "bert"},
    "bart": lambda: BartForConditionalGeneration(BartConfig(scale_embedding=True, **_SEQ2SEQ)),
    "pegasus": lambda: PegasusForConditionalGeneration(PegasusConfig(scale_embedding=True, **_SEQ2SEQ)),
    "gemma3": gemma3,
    "opt": _opt,
    "roberta": _roberta,
}


def _states(model: Any, tokens: Tensor, **options: Any) -> Tensor:
    """Logits, or the last hidden states of a model without a head."""
    if model.config.is_encoder_decoder:
        options["decoder_input_ids"] = ids(3, 5, seed=3)
    out = model(input_ids=tokens, **options)
    return out.logits if "logits" in out else out.last_hidden_state


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
def test_a_prompt_of_token_embeddings_is_those_tokens(family: str, masked: bool) -> None:
    torch.manual_seed(0)
    base = FAMILIES[family]().eval().requires_grad_(False)
    tokens = ids()
    longer = torch.cat([TOKENS.expand(len(tokens), -1), tokens], dim=1)
    mask = {"attention_mask": torch.ones_like(tokens)} if masked else {}
    wider = {"attention_mask": torch.ones_like(longer)} if masked else {}
    wanted = _states(base, longer, **wider)
    view = get_peft_model(base, PromptTuningConfig(num_virtual_tokens=len(TOKENS)))
    method = view.get_adapter("default").parts[0].method
    stack = base.get_encoder() if base.config.is_encoder_decoder else base
    with torch.no_grad():
        # Where the embedding itself scales, a prompt stands in the place of what it gives.
        method.P.copy_(stack.get_input_embeddings()(TOKENS))
    found = _states(view, tokens, **mask)
    torch.testing.assert_close(found, wanted[:, -found.shape[1] :], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "t5", "gemma3", "bart"])
def test_it_starts_from_a_text(family: str, tmp_path: Any) -> None:
    """The tokens of the text, repeated to the length of the prompt; here a tokenizer of letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: i for i, letter in enumerate("_abcdefgh")}
    made = Tokenizer(models.WordLevel(letters, unk_token="_"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(tmp_path)
    text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "cab", "tokenizer_name_or_path": str(tmp_path)}
    base = FAMILIES[family]()
    view = get_peft_model(base, PromptTuningConfig(num_virtual_tokens=5, **text))
    stack = base.get_encoder() if base.config.is_encoder_decoder else base
    wanted = stack.get_input_embeddings()(torch.tensor([3, 1, 2, 3, 1]))  # scaled, where the embedding scales
    torch.testing.assert_close(view.get_adapter("default").parts[0].method.P, wanted, rtol=1e-6, atol=0)
