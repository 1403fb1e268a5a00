"""A pilot on one dense checkpoint: short runs that say whether to upcycle it, for a budget of MoE tokens.

    python sweep.py config/pilot.py --dense=DIR --dataset=DATA --budget=8e6 [--D1=TOKENS]
    python fit_laws.py out/pilot/rows.jsonl --laws=upcycled.head_start --out=out/pilot/laws
    python plan.py --laws=out/pilot/laws/laws.json --checkpoint=DIR --tokens=8e6

DIR is a checkpoint of train.py or of a family that upcycle.py reads; D1, the tokens it has seen, is for the
latter. DATA are of the tokenizer of the checkpoint. The runs: the checkpoint upcycled, with branches at 1/16
and 1/8 of the budget; its architecture as a MoE from scratch, with five branches up to a quarter; the
checkpoint continued, to an eighth. D2, D_moe and D_dense say other tokens. Each of the three has a new
schedule with a warm-up. The settings of `train` suit models of some 50k parameters. For a larger one, take
the learning rate, batch and sequence length with which it was trained.
"""
out_dir = "out/pilot"

train = {
    "dataset": "data/pysource", "tokens_per_step": 2048, "max_seq_len": 128, "learning_rate": 8e-3,
    "warmup_steps": 12, "eval_tokens": 2**17, "save_every_seconds": 60,
}
