"""coadapt under the import name `peft`, for programs that ask for that (transformers, TRL, diffusers ...)."""

import importlib
import importlib.metadata
from typing import Any

__version__ = "0.21.2+coadapt"


def _refuse_two() -> None:
    """Raises ImportError where the library that this stands in for is installed here as well."""
    found = {d.version for d in importlib.metadata.distributions(name="peft")}
    if others := found - {__version__}:
        raise ImportError(
            f"coadapt stands here as peft {__version__}, and peft {', '.join(sorted(others))} is installed as well; "
            "their files would be mixed. Take both off (pip uninstall peft, until there is none), and install one."
        )


_refuse_two()

_COADAPT = """
AdaLoraConfig AdamssConfig AdaptionPromptConfig BOFTConfig BdLoraConfig BeftConfig C3AConfig CPTConfig CartridgeConfig
CordaConfig DeftConfig DeloraConfig EvaConfig FourierFTConfig FrodConfig GloraConfig GraloraConfig HRAConfig HiraConfig
IA3Config KasaConfig LNTuningConfig LilyConfig LoHaConfig LoKrConfig LoftQConfig LoraConfig LoraGAConfig MissConfig
MontecloraConfig MultitaskPromptTuningConfig OFTConfig OSFConfig PeanutConfig PeftConfig PeftType PolyConfig
PrefixTuningConfig PromptEncoderConfig PromptTuningConfig PsoftConfig PveraConfig RandLoraConfig RoadConfig
ShadowConfig ShiraConfig SupertuningConfig TaskType TinyLoraConfig TrainableTokensConfig UniLoraConfig VBLoRAConfig
VeloraConfig VeraConfig WaveFTConfig XLoraConfig get_eva_state_dict initialize_kv_prefix_from_past_key_values
initialize_kv_prefix_from_text initialize_lora_eva_weights prepare_model_for_kbit_training preprocess_loraga
replace_lora_weights_loftq
""".split()
_OWN = {
    "arrow": "ArrowConfig create_arrow_model",
    "calls": "convert_to_lora find_kappa_target_modules get_layer_status get_model_status save_as_lora",
    "cartridges": "compose_cartridge_adapters prompt_embeddings_from_past_key_values",
    "configs": """MultitaskPromptTuningInit PEFT_TYPE_TO_CONFIG_MAPPING PromptEncoderReparameterizationType
        PromptLearningConfig PromptTuningInit get_peft_config""",
    "injection": "inject_adapter_in_model",
    "state": """cast_mixed_precision_params get_base_model_state_dict get_peft_model_state_dict load_peft_weights
        set_base_model_state_dict set_peft_model_state_dict shift_tokens_right""",
    "unserved": """CPTEmbedding CartridgeEncoder LoraRuntimeConfig PrefixEncoder PromptEmbedding PromptEncoder
        TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING XLoraModel
        bloom_model_postprocess_past_key_value""",
    "utils.error": "NoMatchingPeftModuleError PeftError PeftWarning",
    "views": """AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction
        AutoPeftModelForQuestionAnswering AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification
        AutoPeftModelForTokenClassification MODEL_TYPE_TO_PEFT_MODEL_MAPPING PeftMixedModel PeftModel
        PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering PeftModelForSeq2SeqLM
        PeftModelForSequenceClassification PeftModelForTokenClassification get_peft_model""",
    "wrapping": """AdaLoraModel AdamssModel AdaptionPromptModel BOFTModel BeftModel C3AModel DeftModel DeloraModel
        FourierFTModel FrodModel GloraModel GraloraModel HRAModel HiraModel IA3Model LNTuningModel LilyModel
        LoHaModel LoKrModel LoraModel MissModel OFTModel OSFModel PEFT_TYPE_TO_MIXED_MODEL_MAPPING
        PEFT_TYPE_TO_TUNER_MAPPING PeanutModel PolyModel PsoftModel PveraModel RandLoraModel RoadModel ShadowModel
        ShiraModel SupertuningModel TinyLoraModel TrainableTokensModel UniLoraModel VBLoRAModel VeraModel
        WaveFTModel""",
}
_HOMES = {name: f"{__name__}.{home}" for home, names in _OWN.items() for name in names.split()}
_HOMES |= dict.fromkeys(_COADAPT, f"{__name__}.configs")

__all__ = sorted(_HOMES.keys() - {"CordaConfig"})  # pyright: ignore[reportUnsupportedDunderAll]  # as there


def __getattr__(name: str) -> Any:
    """Imports what is asked for, and only that: transformers imports this while it is imported itself."""
    if name not in _HOMES:
        raise AttributeError(f"module 'peft' (coadapt's) has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
