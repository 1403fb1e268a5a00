"""What do more experts, or more of them a token, do to a MoE from scratch and to an upcycled one? N = 24k,
three seeds, D1 = 4M: 2 to 16 experts, top-1 to top-4, each in a study of its own, 4 and 16, top-2, longer.

    for experts in "2 1" "2 2" "4 1" "4 2" "4 4" "8 1" "8 4" "16 1" "16 2" "16 4"; do
        set -- $experts
        levels="[524288,2097152]"; [ $1 -gt 2 -a $2 = 2 ] && levels="[524288,2097152,8388608]"
        python sweep.py config/study_sparsity.py --num_local_experts=$1 --num_experts_per_tok=$2 \\
            --families="['moe','upcycled']" --D2=$levels --D_moe=$levels --out_dir=out/sparsity/$1-$2
    done

8 experts, top-2, are in config/study.py. The rows of all go into one file, to which fit_laws.py fits the laws
of sparsity.
"""
out_dir = "out/sparsity"

sizes = [{"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 1}]
seeds = [0, 1, 2]
_M = 2**20
D1 = [4 * _M]
D2 = [_M / 2, 2 * _M]
D_moe = [_M / 2, 2 * _M]

train = {
    "dataset": "data/pysource", "tokens_per_step": 2048, "max_seq_len": 128, "learning_rate": 8e-3,
    "warmup_steps": 12, "eval_tokens": 2**19, "save_every_seconds": 300,
}
