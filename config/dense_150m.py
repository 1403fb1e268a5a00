"""A dense model of 113M backbone parameters on 10B tokens of FineWeb-Edu. It has not yet run on a GPU.

    python data/prepare.py HuggingFaceFW/fineweb-edu --dataset_config=sample-10BT \\
        --tokenizer=gpt2 --out_dir=data/fineweb_edu
    torchrun --nproc_per_node=8 train.py config/dense_150m.py
"""
out_dir = "out/dense_150m"
dataset = "data/fineweb_edu"
hidden_size = 768
intermediate_size = 2048
num_hidden_layers = 16
num_attention_heads = 12
max_seq_len = 1024
tokens_per_step = 512 * 1024
micro_batch_size = 32
max_tokens = 19_000 * 512 * 1024
learning_rate = 1e-3
warmup_steps = 500
decay_start = 15_200
decay_steps = 3_800
save_at_tokens = [1_900 * 512 * 1024, 3_800 * 512 * 1024, 7_600 * 512 * 1024, 15_200 * 512 * 1024]
eval_tokens = 4 * 2**20
eval_every_steps = 500
dtype = "bfloat16"
compile = True
