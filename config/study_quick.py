"""Does the head start of upcycling fade? 3 sizes x 4 levels of D1 x 4 of D2, beside dense and MoE runs.

    python sweep.py config/study_quick.py

It takes about 11 minutes on 2 CPU cores. `make study` also prepares the data and fits the laws.
"""
out_dir = "out/study_quick"

sizes = [  # 14k, 27k and 56k backbone parameters
    {"hidden_size": 24, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1},
    {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2},
    {"hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 3},
]
_M = 2**20
D1 = [_M / 4, 5 * _M / 8, 13 * _M / 8, 4 * _M]
D2 = [_M / 4, _M / 2, _M, 2 * _M]
D_dense = [_M / 4, _M / 2, _M, 2 * _M, 4 * _M]
D_moe = [_M / 4, _M / 2, _M, 2 * _M, 4 * _M]

train = {
    "dataset": "data/pysource", "tokens_per_step": 2048, "max_seq_len": 128,
    "learning_rate": 3e-3, "warmup_steps": 50,
    "eval_tokens": 2**17, "save_every_seconds": 60,
}
