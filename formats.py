"""The architectures of checkpoints: what each calls its keys and tensors, and what it has beside a Llama.

FORMATS has an entry for each model_type of config.json:

    architecture  the class of transformers that opens what we write
    keys          {field of ModelConfig: key of config.json}
    constants     {key: value} written beside those
    assumed       {key: value} that transformers takes for a missing key, where ModelConfig takes another
    only          {key: values that this model can express}; any other value is refused
    sets          {field of ModelConfig: value} that the model_type alone says
    tensors       {parameter or buffer: names of its tensors} of layer i; with {e}: of each expert e
    idle          {name of a tensor that is zero and computes nothing: its shape, numbers or fields}
    rope_types    the rope_type that the architecture takes, where it does not take every one

A model is written as the first entry that has its features (`written_as`). Equal experts compute what one of
them does only where the weights of a token's experts sum to 1: hence norm_topk_prob.
"""
from configurator import ConfigError
from files import LIMITS

LAYER = "model.layers.{i}."
MOE_KEYS = {key: key for key in ("num_local_experts", "num_experts_per_tok", "router_aux_loss_coef")}
KEYS = {key: key for key in LIMITS if key not in MOE_KEYS}
WINDOW = {"sliding_window": "sliding_window"}
ONLY = {"hidden_act": ("silu", "swish"), "attention_bias": (False, None), "mlp_bias": (False, None),
        "use_qk_norm": (False, None), "pretraining_tp": (1, None), "attention_dropout": (0, None),
        "partial_rotary_factor": (1, None)}
CONSTANTS = {"hidden_act": "silu", "attention_dropout": 0.0}
# If output_router_logits is false, transformers trains without the balance loss.
ROUTED = CONSTANTS | {"output_router_logits": True}

SHARED_TENSORS = {name: ["model." + name] for name in (
    "embed_tokens.weight", "norm.weight", "layers.{i}.self_attn.o_proj.weight")} | {
    "lm_head.weight": ["lm_head.weight"],
    "layers.{i}.self_attn.qkv_proj.weight": [LAYER + f"self_attn.{part}_proj.weight" for part in "qkv"]}
ATTENTION_NORM, MLP_NORM = "layers.{i}.input_layernorm.weight", "layers.{i}.post_attention_layernorm.weight"
NORMS = {ATTENTION_NORM: ["model." + ATTENTION_NORM], MLP_NORM: ["model." + MLP_NORM]}
NORMS_AFTER = {ATTENTION_NORM: ["model." + MLP_NORM],
               MLP_NORM: [LAYER + "post_feedforward_layernorm.weight"]}
QK_NORMS = {f"layers.{{i}}.self_attn.{part}_norm.weight": [LAYER + f"self_attn.{part}_norm.weight"]
            for part in "qk"}
BIASES = {"layers.{i}.self_attn.qkv_proj.bias": [LAYER + f"self_attn.{part}_proj.bias" for part in "qkv"]}
MLP = {"layers.{i}.mlp.gate_up_proj.weight": [LAYER + f"mlp.{part}_proj.weight" for part in ("gate", "up")],
       "layers.{i}.mlp.down_proj.weight": [LAYER + "mlp.down_proj.weight"]}
FUSED = {f"layers.{{i}}.{name}": [LAYER + name]
         for name in ("self_attn.qkv_proj.weight", "mlp.gate_up_proj.weight")}


def experts(mlp, gate, up, down):
    """The tensors of a router and of experts, called `gate`, `up` and `down` in the module `mlp`."""
    prefix = LAYER + mlp
    return {"layers.{i}.mlp.gate.weight": [prefix + ".gate.weight"],
            "layers.{i}.mlp.gate_up_proj": [prefix + f".experts.{{e}}.{part}.weight" for part in (gate, up)],
            "layers.{i}.mlp.down_proj": [prefix + f".experts.{{e}}.{down}.weight"]}


QWEN_EXPERTS = experts("mlp", "gate_proj", "up_proj", "down_proj")
SHARED_SIZE = 64  # channels of Qwen2-MoE's shared expert, which is zero and stays zero in training
EXPERT_KEYS = KEYS | MOE_KEYS | {"num_local_experts": "num_experts"}

LLAMA = {
    "architecture": "LlamaForCausalLM",
    "keys": KEYS,
    "constants": CONSTANTS | {"attention_bias": False, "mlp_bias": False},
    "assumed": {"rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2},
    "only": ONLY | {"sliding_window": (None,)},
    "sets": {},
    "tensors": SHARED_TENSORS | NORMS | MLP}
MISTRAL = LLAMA | {  # written for models with a sliding window alone
    "architecture": "MistralForCausalLM",
    "keys": KEYS | WINDOW,
    "constants": CONSTANTS,
    "assumed": {"rms_norm_eps": 1e-6, "num_key_value_heads": 8, "max_position_embeddings": 131072,
                "sliding_window": 4096, "bos_token_id": 1, "eos_token_id": 2},
    "only": ONLY}
QWEN2 = LLAMA | {
    "architecture": "Qwen2ForCausalLM",
    "constants": CONSTANTS | {"use_sliding_window": False},
    "assumed": {"rms_norm_eps": 1e-6, "num_key_value_heads": 32, "max_position_embeddings": 32768},
    "only": ONLY | {"use_sliding_window": (False, None)},
    "sets": {"attention_bias": True},
    "tensors": LLAMA["tensors"] | BIASES}
QWEN3 = QWEN2 | {
    "architecture": "Qwen3ForCausalLM",
    "assumed": QWEN2["assumed"] | {"head_dim": 128},
    "sets": {"qk_norm": "head"},
    "tensors": LLAMA["tensors"] | QK_NORMS}
OLMO2 = LLAMA | {
    "architecture": "Olmo2ForCausalLM",
    "constants": CONSTANTS,
    "assumed": {"eos_token_id": 50279, "pad_token_id": 1},
    "sets": {"qk_norm": "vector", "norm_after": True},
    "tensors": SHARED_TENSORS | NORMS_AFTER | QK_NORMS | MLP}
PHI3 = MISTRAL | {  # for reading alone: a Llama or Mistral with two tensors where those have five
    "assumed": {"max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 32000,
                "pad_token_id": 32000},
    "tensors": LLAMA["tensors"] | FUSED,
    "rope_types": ("default", "longrope")}
MIXTRAL = MISTRAL | {
    "architecture": "MixtralForCausalLM",
    "keys": KEYS | WINDOW | MOE_KEYS,
    "constants": ROUTED,
    "assumed": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "rope_theta": 1e6,
                "bos_token_id": 1, "eos_token_id": 2, "num_local_experts": 8, "router_aux_loss_coef": 0.001},
    "tensors": SHARED_TENSORS | NORMS | experts("block_sparse_moe", "w1", "w3", "w2")}
QWEN3_MOE = QWEN3 | {
    "architecture": "Qwen3MoeForCausalLM",
    "keys": EXPERT_KEYS | {"intermediate_size": "moe_intermediate_size"},
    "constants": ROUTED | {"norm_topk_prob": True, "use_sliding_window": False, "decoder_sparse_step": 1,
                           "mlp_only_layers": []},
    "assumed": {"rms_norm_eps": 1e-6, "num_key_value_heads": 4, "max_position_embeddings": 32768,
                "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
                "router_aux_loss_coef": 0.001, "norm_topk_prob": False},
    "only": QWEN3["only"] | {"norm_topk_prob": (True,), "decoder_sparse_step": (1,),
                             "mlp_only_layers": ([], None)},
    "tensors": SHARED_TENSORS | NORMS | QK_NORMS | QWEN_EXPERTS}
QWEN2_MOE = QWEN3_MOE | {
    "architecture": "Qwen2MoeForCausalLM",
    "constants": QWEN3_MOE["constants"] | {"qkv_bias": True, "shared_expert_intermediate_size": SHARED_SIZE},
    "assumed": QWEN3_MOE["assumed"] | {
        "num_key_value_heads": 16, "num_experts": 60, "num_experts_per_tok": 4, "qkv_bias": True,
        "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
    "only": QWEN3_MOE["only"] | {"qkv_bias": (True,), "shared_expert_intermediate_size": (SHARED_SIZE,)},
    "sets": QWEN2["sets"],
    "tensors": SHARED_TENSORS | NORMS | BIASES | QWEN_EXPERTS,
    "idle": {LAYER + "mlp.shared_expert.gate_proj.weight": (SHARED_SIZE, "hidden_size"),
             LAYER + "mlp.shared_expert.up_proj.weight": (SHARED_SIZE, "hidden_size"),
             LAYER + "mlp.shared_expert.down_proj.weight": ("hidden_size", SHARED_SIZE),
             LAYER + "mlp.shared_expert_gate.weight": (1, "hidden_size")}}
FLEX_OLMO = OLMO2 | {
    "architecture": "FlexOlmoForCausalLM",
    "keys": EXPERT_KEYS,
    "constants": ROUTED | {"norm_topk_prob": True},
    "assumed": {"rms_norm_eps": 1e-6, "max_position_embeddings": 4096, "rope_theta": 5e5,
                "eos_token_id": 100257, "pad_token_id": 100277, "num_experts": 7, "num_experts_per_tok": 5,
                "norm_topk_prob": False},
    "only": OLMO2["only"] | {"norm_topk_prob": (True,)},
    "tensors": SHARED_TENSORS | NORMS_AFTER | QK_NORMS | QWEN_EXPERTS}
MIXTURES = {"mixtral": MIXTRAL, "qwen3_moe": QWEN3_MOE, "qwen2_moe": QWEN2_MOE, "flex_olmo": FLEX_OLMO}
FORMATS = {"llama": LLAMA, "mistral": MISTRAL, "qwen3": QWEN3, "qwen2": QWEN2, "olmo2": OLMO2, "phi3": PHI3,
           **MIXTURES}
# These mixtures have no slot for a selection bias on the experts. A model with one names an architecture of
# ours, so that no other tool opens it and computes something else.
for model_type, entry in MIXTURES.items():
    router = entry["tensors"]["layers.{i}.mlp.gate.weight"][0]
    FORMATS[model_type + "_with_router_bias"] = entry | {
        "architecture": entry["architecture"].replace("For", "WithRouterBiasFor"),
        "sets": entry["sets"] | {"router_bias": True},
        "tensors": entry["tensors"] | {"layers.{i}.mlp.bias": [router.replace("weight", "bias")]}}

SANDWICH = "it has norms before and after attention and MLP, GELU and scaled embeddings"
NO_MIXTURE = {  # {model_type: why no mixture of transformers computes the same}
    "gemma": "it has GELU and scaled embeddings",
    "gemma2": SANDWICH + ", and its logits are capped",
    "gemma3": SANDWICH, "gemma3_text": SANDWICH,
    "smollm3": "every fourth of its layers has no RoPE",
    "olmo": "its LayerNorms subtract the mean and have no weights",
    "olmo3": "three of four of its layers have a sliding window, which FlexOlmo has not",
    "phi": "its attention and MLP run side by side, its norms are LayerNorms, and its MLP has no gate"}


def written_as(c):
    """The model_type under which a ModelConfig is written. Raises ConfigError if none has its features."""
    features = {key: getattr(c, key) for key in ("qk_norm", "attention_bias", "norm_after", "router_bias")
                if getattr(c, key)}
    for model_type, entry in FORMATS.items():
        is_mixture = "num_local_experts" in entry["keys"]
        if (entry["sets"] == features and is_mixture == (c.num_local_experts > 0)
                and (c.sliding_window is None or "sliding_window" in entry["keys"])):
            return model_type
    raise ConfigError(f"no architecture of FORMATS has sliding_window = {c.sliding_window} and {features}")


def idle_tensors(c, model_type=None):
    """{name: shape} of the tensors of zeros that a file of ModelConfig c has beside its parameters.
    model_type: the format of the file; None: the one in which c is written."""
    idle = FORMATS[model_type or written_as(c)].get("idle", {})
    return {name.format(i=i): tuple(getattr(c, n) if isinstance(n, str) else n for n in shape)
            for i in range(c.num_hidden_layers) for name, shape in idle.items()}
