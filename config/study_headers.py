"""Does the law that wins on Python source win on another text? C++ headers of torch, 2 sizes, 3 levels of D1
and of D2, copying. The largest D1 and the largest D2 of the larger size are predicted first.

    python data/prepare.py .venv/lib/python3.11/site-packages/torch/include --out_dir=data/headers
    python sweep.py config/study_headers.py
    python sweep.py config/study_headers.py --train_withheld     # once the predictions are committed
"""
out_dir = "out/study_headers"

sizes = [  # as in config/study.py
    {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 1,
     "scratch_seeds": [1]},
    {"hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 1},
]
_M = 2**20
D1 = [_M / 2, 2 * _M, 8 * _M]
D2 = [_M / 2, 2 * _M, 8 * _M]
D_dense = [_M / 2, _M, 2 * _M, 4 * _M, 8 * _M]
D_moe = [_M / 2, _M, 2 * _M, 4 * _M, 8 * _M, 16 * _M]

withheld = [{"N": 55536, "D1": 8 * _M}, {"N": 55536, "D2": 8 * _M}]

train = {
    "dataset": "data/headers", "tokens_per_step": 2048, "max_seq_len": 128, "learning_rate": 8e-3,
    "warmup_steps": 12, "eval_tokens": 2**18, "save_every_seconds": 300,
}
