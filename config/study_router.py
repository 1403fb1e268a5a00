"""Which router should an upcycled model start with? Rows drawn N(0, std²) with an std that hardly breaks ties
and with three others, and rows of clusters of the dense model's activations at two of them; three seeds.

    python sweep.py config/study_router.py
"""
out_dir = "out/study_router"

sizes = [{"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 1}]
seeds = [0, 1, 2]
_M = 2**20
D1 = [_M]
D2 = [_M / 4, _M, 2 * _M]
D_moe = [_M / 4, _M, 2 * _M]
methods = [
    {"method": "copy", "router_std": 1e-5}, {"method": "copy", "router_std": 0.002}, {"method": "copy"},
    {"method": "copy", "router_std": 0.2},
    {"method": "copy", "router_init": "clusters"},
    {"method": "copy", "router_init": "clusters", "router_std": 0.2},
]

train = {
    "dataset": "data/pysource", "tokens_per_step": 2048, "max_seq_len": 128, "learning_rate": 8e-3,
    "warmup_steps": 12, "eval_tokens": 2**18, "save_every_seconds": 300,
}
