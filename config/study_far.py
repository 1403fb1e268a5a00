"""The far end of the reference study, withheld whole: at N = 201k, D2 = 64M tokens from the smallest and the
largest D1, and a MoE from scratch of 64M tokens. It tells a lasting handicap from a head start that fades.

    python sweep.py config/study_far.py --train_withheld     # after config/study.py, in the same directory

About 4 core-hours.
"""
out_dir = "out/study"

sizes = [
    {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 2,
     "learning_rate": 3e-3},
]
seeds = [0, 1]
_M = 2**20
D1 = [_M / 2, 32 * _M]
D2 = [64 * _M]
D_dense = [32 * _M]  # trained by config/study.py
D_moe = [64 * _M]
withheld = [{"D2": 64 * _M}, {"D": 64 * _M}]

train = {
    "dataset": "data/pysource", "tokens_per_step": 2048, "max_seq_len": 128, "learning_rate": 3e-3,
    "warmup_steps": 12, "eval_tokens": 2**19, "save_every_seconds": 300,
}
