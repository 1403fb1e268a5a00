"""A study for one GPU, which `make gpu` runs: 3 sizes from 1M to 20M backbone parameters, 3 levels of D1 x 3
of D2, on bytes of Python source. By counting it takes 30 minutes of an H100 at 5.2 % of its peak in bf16, so
such small models may take longer, and keeps 46.6 GB of checkpoints. It has not run on a GPU.

    python sweep.py config/study_gpu.py
"""
out_dir = "out/study_gpu"

sizes = [  # 1.2M, 4.7M and 18.9M backbone parameters
    {"hidden_size": 160, "intermediate_size": 448, "num_hidden_layers": 4, "num_attention_heads": 5,
     "learning_rate": 3e-3},
    {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8,
     "learning_rate": 2e-3},
    {"hidden_size": 448, "intermediate_size": 1216, "num_hidden_layers": 8, "num_attention_heads": 7,
     "learning_rate": 1.5e-3},
]
_M = 2**20
D1 = [4 * _M, 16 * _M, 64 * _M]
D2 = [4 * _M, 16 * _M, 64 * _M]

train = {
    "dataset": "data/pysource", "tokens_per_step": 2**15, "max_seq_len": 256, "warmup_steps": 20,
    "micro_batch_size": 128, "eval_tokens": 2**20, "save_every_seconds": 120,
}
