"""Template: a published script with `eval_val_sliding`, unmodified, on a CPU with a small random model.

Copy it, edit the lines marked with a number, and run  python tools/audit.py --submission COPY.py
"""

import copy

import cpu_standins
import torch

SCRIPT = "path/to/train_gpt.py"  # 1: the submission's script
SETTINGS = dict(  # 2: its environment, cut for a small model; names that it does not read do no harm
    VOCAB_SIZE="32", NUM_LAYERS="2", MODEL_DIM="32", NUM_HEADS="2", NUM_KV_HEADS="1", MLP_MULT="2",
    TRAIN_SEQ_LEN="64", EVAL_SEQ_LEN="64", EVAL_STRIDE="32", MTP_NUM_HEADS="0", XSA_LAST_N="1", ROPE_DIMS="8",
    BIGRAM_VOCAB_SIZE="64", BIGRAM_DIM="16", VE_LAYERS="1", VE_DIM="16",
)  # fmt: skip
VOCAB_SIZE = 32
LENGTHS = (256, 512)  # whole windows, as the contest's loader cuts the split
SPLIT_TARGETS, CUT = 62_021_632, 32  # targets of the real split, and by how much windows are shorter here (2048 / 64)

script = cpu_standins.load(SCRIPT, SETTINGS)
settings = script.Hyperparameters()
model = cpu_standins.small_model(script.GPT, settings)  # 3: what GPT wants besides; .bfloat16() where main() does


def score(tokens):
    with cpu_standins.Tap(tokens, VOCAB_SIZE) as tap:
        val_loss, _ = script.eval_val_sliding(  # 4: the call, as the script's own main() makes it
            settings, copy.deepcopy(model), 0, 1, torch.device("cpu"), tap.tokens, *tap.byte_tables,
            stride=32, batch_seqs=4, eval_seq_len=64,
        )  # fmt: skip
    return tap.scores(val_loss)


# 5: what else must shrink with the stream, such as a mixer with its hash tables: make it anew in every score(), with as
# many entries per target as the real one has. DRAW_FROM = 200 draws positions from target 200 on, once counts exist.
