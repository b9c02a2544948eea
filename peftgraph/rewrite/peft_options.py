"""The options of peft's configurations, and what they are here: for the messages about unknown options and for the
tables of the manual."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Counterpart:
    """What an option of a peft configuration is here.

    Attributes:
        theirs: its name in peft.
        option: the option of the pass with its meaning; "" where it is no option.
        meaning: what to write, or why nothing is to be written.
    """

    theirs: str
    option: str
    meaning: str


@dataclass(frozen=True)
class PeftConfig:
    """One configuration class of peft.

    Attributes:
        name: of the class.
        word: of the pass that corresponds to it.
        options: those that are its own, in peft's order.
    """

    name: str
    word: str
    options: tuple[Counterpart, ...]


SELECTOR: Final = 'by structure, at="attention.q|attention.v"; by name, at=\'weight.where(path=".*q_proj")\''
EXCLUDED: Final = '`~` in the selector: at="linear & ~ffn.down"'
OTHERS_TRAIN: Final = "a pass of its own: `lora; train{at=head}` trains the head too"
NO_SIZES: Final = "nothing: sizes are read from the model"
NONE: Final = "no counterpart"
LAYOUT: Final = "nothing: the layout of a weight is read from the model"

COMMON: Final = (
    Counterpart("task_type", "", "nothing: the class of the model says it, and its signature is kept"),
    Counterpart("peft_type", "", "the word of the pass"),
    Counterpart("base_model_name_or_path", "", "nothing: an adapter keeps the class and all shapes of its base"),
    Counterpart("revision", "", "nothing: an adapter keeps the class and all shapes of its base"),
    Counterpart("inference_mode", "", "net.eval(), and net.requires_grad_(False)"),
    Counterpart("auto_mapping", "", "nothing: the model is an argument of pg.trace"),
    Counterpart("peft_version", "", "nothing: directories name the version of their format"),
)

LORA: Final = (
    Counterpart("r", "rank", "the same, such as rank=8"),
    Counterpart("target_modules", "at", f'{SELECTOR}; "all-linear" is at="linear"'),
    Counterpart("exclude_modules", "at", EXCLUDED),
    Counterpart("lora_alpha", "alpha", "the same; the default is 16, peft's is 8"),
    Counterpart("lora_dropout", "dropout", "the same"),
    Counterpart("fan_in_fan_out", "", LAYOUT),
    Counterpart("bias", "bias", "the same words"),
    Counterpart("use_rslora", "rank_stabilised", "the same"),
    Counterpart("modules_to_save", "", OTHERS_TRAIN),
    Counterpart("init_lora_weights", "init", '"gaussian", "pissa", "olora", "eva", "loftq"; True is "kaiming"'),
    Counterpart("layers_to_transform", "at", 'at="attention.q & layers(0, 4)"'),
    Counterpart("layers_pattern", "", "nothing: blocks are found by structure"),
    Counterpart("rank_pattern", "", "a pass for each rank: `lora{at=attention.* rank=8}; lora{at=ffn.* rank=4}`"),
    Counterpart("alpha_pattern", "", "a pass for each alpha: `lora{at=attention.* alpha=16}; lora{at=ffn.* alpha=8}`"),
    Counterpart("megatron_config", "", NONE),
    Counterpart("megatron_core", "", NONE),
    Counterpart("trainable_token_indices", "", "a pass of its own: `lora; trainable_tokens{tokens=[5, 6]}`"),
    Counterpart("loftq_config", "init", 'init="loftq" and iterations=, after quantise'),
    Counterpart("eva_config", "init", 'init="eva", after program.calibrate(batches, ...)'),
    Counterpart("corda_config", "", NONE),
    Counterpart("lora_ga_config", "", NONE),
    Counterpart("use_dora", "", "the pass dora: `dora{rank=8}`"),
    Counterpart("velora_config", "", NONE),
    Counterpart("alora_invocation_tokens", "", NONE),
    Counterpart("use_qalora", "", NONE),
    Counterpart("qalora_group_size", "", NONE),
    Counterpart("monteclora_config", "", NONE),
    Counterpart("layer_replication", "", NONE),
    Counterpart("runtime_config", "", NONE),
    Counterpart("lora_bias", "bias", 'bias="lora_only" where the projections have biases, else `bitfit{zero=true}`'),
    Counterpart("target_parameters", "at", 'experts are sites: at="ffn.up|ffn.down"'),
    Counterpart("use_bdlora", "", NONE),
    Counterpart("arrow_config", "", NONE),
    Counterpart("kasa_config", "", NONE),
    Counterpart("ensure_weight_tying", "", "nothing: ties are kept, and a change of one side alone is refused"),
)

SHARED: Final = ("", "at", "alpha", "dropout")  # the options of LoRA that AdaLoRA has too
ADALORA: Final = (
    *(one if one.option in SHARED else Counterpart(one.theirs, "", NONE) for one in LORA[1:]),
    Counterpart("r", "", "nothing: peft does not use it either; see init_r"),
    Counterpart("target_r", "target_rank", "the mean rank at the end"),
    Counterpart("init_r", "rank", "the rank at the start"),
    Counterpart("tinit", "warmup", "steps before ranks are reduced"),
    Counterpart("tfinal", "final", "steps after the last reduction"),
    Counterpart("deltaT", "interval", "steps between two reductions"),
    Counterpart("beta1", "beta1", "the same"),
    Counterpart("beta2", "beta2", "the same"),
    Counterpart("orth_reg_weight", "orthogonality", "the weight of the penalty"),
    Counterpart("total_step", "", "an argument of the training: tuned.training(net, steps=...)"),
)

IA3: Final = (
    Counterpart("target_modules", "at", 'by structure, at="attention.k|attention.v|ffn.hidden"'),
    Counterpart("exclude_modules", "at", EXCLUDED),
    Counterpart("feedforward_modules", "side", 'at="ffn.hidden", or side="input" for other projections'),
    Counterpart("fan_in_fan_out", "", LAYOUT),
    Counterpart("modules_to_save", "", OTHERS_TRAIN.replace("lora", "ia3")),
    Counterpart("init_ia3_weights", "", "nothing: the vectors start at one"),
)

PROMPT_LEARNING: Final = (
    Counterpart("num_virtual_tokens", "length", "the number of rows"),
    Counterpart("token_dim", "", NO_SIZES),
    Counterpart("num_transformer_submodules", "", 'at="..." with stack("encoder") or stack("decoder")'),
    Counterpart("num_attention_heads", "", NO_SIZES),
    Counterpart("num_layers", "", NO_SIZES),
    Counterpart("modules_to_save", "", OTHERS_TRAIN.replace("lora", "prompt")),
)

CONFIGS: Final = (
    PeftConfig("LoraConfig", "lora", LORA),
    PeftConfig("AdaLoraConfig", "adalora", ADALORA),
    PeftConfig("IA3Config", "ia3", IA3),
    PeftConfig(
        "PrefixTuningConfig",
        "prefix",
        (
            *PROMPT_LEARNING,
            Counterpart("init_weights", "", "nothing: rows start random"),
            Counterpart("encoder_hidden_size", "hidden", "the width of the MLP"),
            Counterpart("prefix_projection", "hidden", "hidden=512 has the MLP, hidden=none has not"),
        ),
    ),
    PeftConfig(
        "PromptTuningConfig",
        "prompt",
        (
            *PROMPT_LEARNING,
            Counterpart("prompt_tuning_init", "init", '"uniform", "code", "normal", "vocabulary" or "classes"'),
            Counterpart("prompt_tuning_init_text", "classes", 'init="classes" and the ids of the text\'s tokens'),
            Counterpart("tokenizer_name_or_path", "", "nothing: token ids are given"),
            Counterpart("tokenizer_kwargs", "", "nothing: token ids are given"),
        ),
    ),
    PeftConfig(
        "PromptEncoderConfig",
        "ptuning",
        (
            *PROMPT_LEARNING,
            Counterpart("encoder_reparameterization_type", "encoder", '"lstm", "mlp" or "none"'),
            Counterpart("encoder_hidden_size", "hidden", "the same"),
            Counterpart("encoder_num_layers", "", "nothing: the paper's two layers"),
            Counterpart("encoder_dropout", "", NONE),
        ),
    ),
    PeftConfig(
        "AdaptionPromptConfig",
        "zero_init_prefix",
        (
            Counterpart("target_modules", "at", 'at="attention.core"'),
            Counterpart("adapter_len", "length", "the number of rows"),
            Counterpart("adapter_layers", "at", 'at="attention.core & layers(-4, end)", the uppermost four'),
        ),
    ),
    PeftConfig(
        "TrainableTokensConfig",
        "trainable_tokens",
        (
            Counterpart("token_indices", "tokens", "the same"),
            Counterpart("target_modules", "at", 'at="embedding"'),
            Counterpart("init_weights", "", "nothing: rows start as they are"),
        ),
    ),
    PeftConfig(
        "LNTuningConfig",
        "train",
        (
            Counterpart("target_modules", "at", 'at="norm"'),
            Counterpart("exclude_modules", "at", 'at="norm & layers(0, 4)" and the like'),
            Counterpart("modules_to_save", "head", 'head=true, or more in the selector: at="norm|head"'),
        ),
    ),
)


def counterpart(word: str, name: str, known: Collection[str]) -> str:
    """Return what an unknown option of a pass is, if it is one of peft's; "" otherwise.

    Args:
        word: of the pass.
        name: of the option.
        known: the options that the pass has.
    """
    ordered = sorted(CONFIGS, key=lambda config: config.word != word)
    found = [one for config in ordered for one in (*config.options, *COMMON) if one.theirs == name]
    if not found:
        return ""
    one = next((one for one in found if one.option in known), found[0])
    if one.option in known:
        return f" Write {one.option}= in the place of peft's {name}: {one.meaning}."
    if one.meaning == NONE:
        return f" peft's {name} has no counterpart."
    reason = one.meaning.removeprefix("nothing: ")
    return f" peft's {name} is not needed: {reason}." if reason != one.meaning else f" In its place: {reason}."
