"""Does the way of making experts matter? Seven ways to upcycle, 2 levels of D1 x 4 of D2, 2 seeds. The
largest D2 is four times the smaller D1, since methods trade a head start for what more training gains.

    python sweep.py config/study_methods.py
"""
out_dir = "out/study_methods"

sizes = [{"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}]
_M = 2**20
D1 = [_M / 2, 2 * _M]
D2 = [_M / 4, _M / 2, _M, 2 * _M]
seeds = [0, 1]

# Virtual groups of G slices choose G times as many experts of 1/G the size: the same parameters and FLOPs but
# for the router.
methods = [
    {"method": "copy"},
    {"method": "noise", "noise_std": 0.1},
    {"method": "drop", "drop_ratio": 0.25},
    {"method": "drop", "drop_ratio": 0.5},
    {"method": "drop", "drop_ratio": 1.0},
    {"method": "virtual_groups", "granularity": 2, "num_local_experts": 16, "num_experts_per_tok": 4},
    {"method": "virtual_groups", "granularity": 4, "num_local_experts": 32, "num_experts_per_tok": 8},
]

train = {
    "dataset": "data/pysource", "tokens_per_step": 2048, "max_seq_len": 128, "learning_rate": 8e-3,
    "warmup_steps": 12, "eval_tokens": 2**17, "save_every_seconds": 60,
}
