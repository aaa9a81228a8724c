"""Template: a published script with `eval_val_sliding_ttt`, unmodified, on a CPU with a small random model.

Copy it, edit the lines marked with a number, and run  python tools/audit.py --submission COPY.py --seconds 300
"""

import copy

import cpu_standins
import torch

SCRIPT = "path/to/train_gpt.py"  # 1: the submission's script
SETTINGS = dict(  # 2: its environment, cut for a small model; names that it does not read do no harm
    VOCAB_SIZE="32", NUM_LAYERS="2", MODEL_DIM="32", NUM_HEADS="2", NUM_KV_HEADS="1", MLP_MULT="2",
    TRAIN_SEQ_LEN="32", EVAL_SEQ_LEN="32", EVAL_STRIDE="16", MTP_NUM_HEADS="0", XSA_LAST_N="1", ROPE_DIMS="8",
    BIGRAM_VOCAB_SIZE="64", BIGRAM_DIM="16", VE_LAYERS="1", VE_DIM="16",
    TTT_ENABLED="1", TTT_CHUNK_TOKENS="64", TTT_EPOCHS="2", TTT_BATCH_SEQS="2", TTT_LR="0.1", TTT_FREEZE_BLOCKS="0",
)  # fmt: skip
VOCAB_SIZE = 32
LENGTHS = (256, 512)  # whole windows and several chunks, of which the last is never trained on
SPLIT_TARGETS, CUT = 62_021_632, 64  # targets of the real split, and by how much windows are shorter here (2048 / 32)

script = cpu_standins.load(SCRIPT, SETTINGS)
settings = script.Hyperparameters()
model = cpu_standins.small_model(script.GPT, settings)  # 3: what GPT wants besides; .bfloat16() where main() does


def score(tokens):
    with cpu_standins.Tap(tokens, VOCAB_SIZE) as tap:
        val_loss, _ = script.eval_val_sliding_ttt(  # 4: the call, as the script's own main() makes it
            settings, copy.deepcopy(model), 0, 1, torch.device("cpu"), tap.tokens, *tap.byte_tables,
            stride=16, batch_seqs=8,
        )  # fmt: skip
    return tap.scores(val_loss)


# 5: what else must shrink with the stream. A learning rate high enough that a chunk's training shows in the next one
# makes faults easy to see.
