"""The dense model of dense_tiny.py, upcycled where its decay starts and trained on 2M tokens more.

    python upcycle.py out/dense_tiny/checkpoint-410 out/upcycled_tiny_start \\
        --num_local_experts=8 --num_experts_per_tok=2
    python train.py config/upcycled_tiny.py

It takes about 2 minutes on one CPU core and ends at a validation loss of 1.32.
"""
out_dir = "out/upcycled_tiny"
init_from = "out/upcycled_tiny_start"
tokens_per_step = 4096
max_tokens = 2 * 2**20
learning_rate = 3e-3
