"""More ways to upcycle the smallest dense models of the reference study, beside its copy and drop 0.5: noise,
drop at other ratios and a matrix at a time, virtual groups, a router of larger rows, AdamW's moments kept.

    python sweep.py config/study_more.py --families="['upcycled']"    # after config/study.py
"""
out_dir = "out/study"

sizes = [{"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 1}]
seeds = [0, 1, 2]
_M = 2**20
D1 = [_M / 2, 4 * _M]
D2 = [_M / 2, 2 * _M, 8 * _M]
D_dense = [_M / 2]  # trained by config/study.py
D_moe = [_M / 2]
methods = [
    {"method": "copy", "router_std": 0.12},
    {"method": "copy", "router_init": "clusters", "router_std": 0.12},
    {"method": "copy", "optimizer": "copy"},
    {"method": "noise", "noise_std": 0.1},
    {"method": "drop", "drop_ratio": 0.25},
    {"method": "drop", "drop_ratio": 0.75},
    {"method": "drop", "drop_ratio": 1.0},
    {"method": "drop_per_matrix", "drop_ratio": 0.5},
    {"method": "virtual_groups", "granularity": 2, "num_local_experts": 16, "num_experts_per_tok": 4},
]

train = {
    "dataset": "data/pysource", "tokens_per_step": 2048, "max_seq_len": 128, "learning_rate": 8e-3,
    "warmup_steps": 12, "eval_tokens": 2**19, "save_every_seconds": 300,
}
