"""The reference study: which law predicts upcycling? 4 sizes x 3 levels of D1 x 4 of D2, copying and dropping
half, with dense and from-scratch runs of 0.5M to 32M tokens. Rows that are `withheld` are predicted first.

    python sweep.py config/study.py --families="['dense','moe']"     # from scratch
    python sweep.py config/study.py                                  # and upcycled, but for the withheld rows
    python sweep.py config/study.py --train_withheld                 # once the predictions are committed

About 20 core-hours. dev/LOG.md has the runs by which the learning rates were chosen.
"""
out_dir = "out/study"

sizes = [  # 24k, 56k, 201k and 554k backbone parameters
    {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 1},
    {"hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 1},
    {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 2,
     "learning_rate": 3e-3, "seeds": [0, 1], "scratch_seeds": [2]},
    {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 5, "num_attention_heads": 3,
     "learning_rate": 2e-3, "seeds": [0], "scratch_seeds": [1]},
]
seeds = [0, 1, 2]
_M = 2**20
D1 = [_M / 2, 4 * _M, 32 * _M]
D2 = [_M / 2, 2 * _M, 8 * _M, 16 * _M]
D_dense = [_M / 2, _M, 2 * _M, 4 * _M, 8 * _M, 16 * _M, 32 * _M]
D_moe = [_M / 2, _M, 2 * _M, 4 * _M, 8 * _M, 16 * _M, 32 * _M]
methods = [{"method": "copy"}, {"method": "drop", "drop_ratio": 0.5}]

withheld = [
    {"N": 55536, "D1": 32 * _M},  # the largest D1 of one size
    {"N": [201280, 554016], "family": "upcycled"},  # all that is upcycled at the two largest sizes
    {"N": 554016, "D": [_M / 2, _M, 2 * _M, 8 * _M, 16 * _M, 32 * _M]},  # and from scratch but for D = 4M
    {"N": 554016, "seed": 1},
]

train = {
    "dataset": "data/pysource", "tokens_per_step": 2048, "max_seq_len": 128, "learning_rate": 8e-3,
    "warmup_steps": 12, "eval_tokens": 2**19, "save_every_seconds": 300,
}
