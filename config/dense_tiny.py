"""A dense model of 200k parameters on 2M tokens (bytes) of Python sources.

    python train.py config/dense_tiny.py

It takes about 90 s on one CPU core and ends at a validation loss of 1.48.
"""
out_dir = "out/dense_tiny"
hidden_size = 64
intermediate_size = 176
num_hidden_layers = 4
num_attention_heads = 4
tokens_per_step = 4096
max_tokens = 2 * 2**20
learning_rate = 3e-3
decay_steps = 102
save_at_tokens = [410 * 4096]  # the decay starts here; upcycling or a longer run can start here too
