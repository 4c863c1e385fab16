"""The names of peft 0.21.2, each of which is served or says that it is not."""

import importlib.metadata
import sys
from pathlib import Path

import peft
import pytest
from peft import unserved

import coadapt

NAMES = """
AdaLoraConfig AdaLoraModel AdamssConfig AdamssModel AdaptionPromptConfig AdaptionPromptModel ArrowConfig AutoPeftModel
AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction AutoPeftModelForQuestionAnswering AutoPeftModelForSeq2SeqLM
AutoPeftModelForSequenceClassification AutoPeftModelForTokenClassification BOFTConfig BOFTModel BdLoraConfig BeftConfig
BeftModel C3AConfig C3AModel CPTConfig CPTEmbedding CartridgeConfig CartridgeEncoder DeftConfig DeftModel DeloraConfig
DeloraModel EvaConfig FourierFTConfig FourierFTModel FrodConfig FrodModel GloraConfig GloraModel GraloraConfig
GraloraModel HRAConfig HRAModel HiraConfig HiraModel IA3Config IA3Model KasaConfig LNTuningConfig LNTuningModel
LilyConfig LilyModel LoHaConfig LoHaModel LoKrConfig LoKrModel LoftQConfig LoraConfig LoraGAConfig LoraModel
LoraRuntimeConfig MODEL_TYPE_TO_PEFT_MODEL_MAPPING MissConfig MissModel MontecloraConfig MultitaskPromptTuningConfig
MultitaskPromptTuningInit NoMatchingPeftModuleError OFTConfig OFTModel OSFConfig OSFModel PEFT_TYPE_TO_CONFIG_MAPPING
PEFT_TYPE_TO_MIXED_MODEL_MAPPING PEFT_TYPE_TO_TUNER_MAPPING PeanutConfig PeanutModel PeftConfig PeftError
PeftMixedModel PeftModel PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering
PeftModelForSeq2SeqLM PeftModelForSequenceClassification PeftModelForTokenClassification PeftType PeftWarning PolyConfig
PolyModel PrefixEncoder PrefixTuningConfig PromptEmbedding PromptEncoder PromptEncoderConfig
PromptEncoderReparameterizationType PromptLearningConfig PromptTuningConfig PromptTuningInit PsoftConfig PsoftModel
PveraConfig PveraModel RandLoraConfig RandLoraModel RoadConfig RoadModel ShadowConfig ShadowModel ShiraConfig
ShiraModel SupertuningConfig SupertuningModel TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING TaskType
TinyLoraConfig TinyLoraModel TrainableTokensConfig TrainableTokensModel UniLoraConfig UniLoraModel VBLoRAConfig
VBLoRAModel VeloraConfig VeraConfig VeraModel WaveFTConfig WaveFTModel XLoraConfig XLoraModel
bloom_model_postprocess_past_key_value cast_mixed_precision_params compose_cartridge_adapters convert_to_lora
create_arrow_model find_kappa_target_modules get_base_model_state_dict get_eva_state_dict get_layer_status
get_model_status get_peft_config get_peft_model get_peft_model_state_dict initialize_kv_prefix_from_past_key_values
initialize_kv_prefix_from_text initialize_lora_eva_weights inject_adapter_in_model load_peft_weights
prepare_model_for_kbit_training preprocess_loraga prompt_embeddings_from_past_key_values replace_lora_weights_loftq
save_as_lora set_base_model_state_dict set_peft_model_state_dict shift_tokens_right
""".split()
UNSERVED = [name for name, home in peft._HOMES.items() if home.endswith(".unserved")]


def test_all_names_of_0_21_2_are_there_and_no_others() -> None:
    assert sorted(peft.__all__) == sorted(NAMES) and len(NAMES) == 154
    assert all(getattr(peft, name) is not None for name in NAMES)
    assert importlib.metadata.version("peft") == peft.__version__ == "0.21.2+coadapt"


@pytest.mark.parametrize("name", UNSERVED)
def test_what_is_not_served_says_so_when_it_is_used(name: str) -> None:
    found = getattr(peft, name)
    with pytest.raises(NotImplementedError, match=f"does not serve {name}"):
        found["LORA"] if isinstance(found, unserved.UnservedMapping) else found()


def test_the_readme_names_all_that_is_not_served() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
    assert [name for name in UNSERVED if f"`{name}`" not in text] == []
    assert f"Of the {len(NAMES)} names of peft 0.21.2 these {len(UNSERVED)} exist" in text


def test_every_method_that_has_a_configuration_there_is_the_one_of_coadapt() -> None:
    for name in NAMES:
        if name.endswith("Config") and name not in (*UNSERVED, "ArrowConfig", "PromptLearningConfig"):
            assert getattr(peft, name) is getattr(coadapt, name)


def test_a_configuration_is_checked_when_a_field_is_assigned() -> None:
    config = peft.LoraConfig(r=4)
    config.r = 8
    config.modules_to_save = ["lm_head"]
    assert (config.r, config.modules_to_save, config.peft_type.value) == (8, ["lm_head"], "LORA")
    with pytest.raises(ValueError, match="r=0"):
        config.r = 0
    with pytest.raises(AttributeError, match="target_modules"):
        config.target_module = ["q_proj"]
    assert config.r == 8


def test_the_real_one_beside_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = tmp_path / "peft-0.21.2.dist-info"
    there.mkdir()
    (there / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.21.2\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    with pytest.raises(ImportError, match=r"peft 0\.21\.2 is installed as well"):
        peft._refuse_two()


def test_the_words_of_prompts_are_taken_by_their_configurations() -> None:
    tokens = {"num_virtual_tokens": 4}
    assert peft.PromptTuningConfig(prompt_tuning_init=peft.PromptTuningInit.RANDOM, **tokens)
    for word in peft.PromptEncoderReparameterizationType:
        assert peft.PromptEncoderConfig(encoder_reparameterization_type=word, **tokens)
    random = peft.MultitaskPromptTuningInit.RANDOM
    assert peft.MultitaskPromptTuningConfig(prompt_tuning_init=random, num_tasks=2, **tokens)
