"""The quick study: does the head start of upcycling fade? 3 sizes x 4 levels of D1 x 4 of D2, and the runs to
compare with. The dense and MoE runs of the smallest size have two seeds, from which the noise is known.

    python sweep.py config/study_quick.py

dev/LOG.md has the runs by which the learning rate was chosen.
"""
out_dir = "out/study_quick"

sizes = [  # 14k, 27k and 56k backbone parameters
    {"hidden_size": 24, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1,
     "scratch_seeds": [1]},
    {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2},
    {"hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 3},
]
_M = 2**20
D1 = [_M / 4, 5 * _M / 8, 13 * _M / 8, 4 * _M]
D2 = [_M / 4, _M / 2, _M, 2 * _M]
D_dense = [_M / 4, _M / 2, _M, 2 * _M, 4 * _M]
D_moe = [_M / 4, _M / 2, _M, 2 * _M, 4 * _M]

train = {
    "dataset": "data/pysource", "tokens_per_step": 2048, "max_seq_len": 128, "learning_rate": 8e-3,
    "warmup_steps": 12, "eval_tokens": 2**17, "save_every_seconds": 60,
}
