"""The dense model of 56k parameters of the quick study on 1M tokens, for `make pilot` without that study.

    python train.py config/pilot_dense.py

It takes about 20 s on one CPU core. It does not decay, as the dense trunk of a study.
"""
out_dir = "out/pilot/dense"
rows = None
hidden_size = 48
intermediate_size = 128
num_hidden_layers = 2
num_attention_heads = 3
tokens_per_step = 2048
max_seq_len = 128
max_tokens = 2**20
learning_rate = 8e-3
warmup_steps = 12
decay_steps = 0
eval_tokens = 2**17
