"""The grid of the paper (arXiv 2502.03009): dense models of 15M to 1B backbone parameters, mixtures of 8
experts of which a token uses 2, upcycled by copying, on SlimPajama. The paper's own shapes, token counts and
learning rates are not at hand: all numbers here are our own, and the learning rates are guesses.

    python sweep.py config/paper/study.py --dry_run       # hours, memory and disk, with the data or without
    python data/prepare.py cerebras/SlimPajama-627B --tokenizer=gpt2 --max_bytes=6e11 \\
        --out_dir=data/slimpajama
    python sweep.py config/paper/study.py                 # on a machine of 8 GPUs
    sbatch config/cluster/study.sh                        # on 10 such machines, in two parts: see there

Nothing of this has run on a GPU. --dry_run says 5,610 GPU-hours on H100s, 47.5 GB a GPU and 5 TB of disk.
"""
out_dir = "out/paper"
launcher = "torchrun --standalone --nproc_per_node=8"

sizes = [  # 14M, 50M, 156M, 397M and 1.0B backbone parameters; the mixture of the last has 5.9B
    {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6,
     "learning_rate": 2e-3, "micro_batch_size": 32},
    {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 10, "num_attention_heads": 10,
     "learning_rate": 1.5e-3, "micro_batch_size": 16},
    {"hidden_size": 896, "intermediate_size": 2432, "num_hidden_layers": 16, "num_attention_heads": 14,
     "learning_rate": 1e-3, "micro_batch_size": 8},
    {"hidden_size": 1280, "intermediate_size": 3456, "num_hidden_layers": 20, "num_attention_heads": 20,
     "learning_rate": 6e-4, "micro_batch_size": 4},
    {"hidden_size": 1792, "intermediate_size": 4864, "num_hidden_layers": 26, "num_attention_heads": 28,
     "learning_rate": 4e-4, "micro_batch_size": 4},
]
_B = 10**9
D1 = [_B, 4 * _B, 16 * _B, 64 * _B]
D2 = [_B, 4 * _B, 16 * _B, 64 * _B]

train = {
    "dataset": "data/slimpajama", "tokens_per_step": 2**19, "max_seq_len": 2048, "warmup_steps": 200,
    "eval_tokens": 2**22, "dtype": "bfloat16", "parallel": "fsdp",
}
