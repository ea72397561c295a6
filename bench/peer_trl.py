"""TRL's RLOOTrainer as a contender of bench_rl_step.py: ``python peer_trl.py FOLDER SETTINGS`` (JSON, as bench_rl_step.py makes it).

Every setting is the trainer's default, but for those that name the task: AdamW's rate and schedule, the shape of a step, no end of
turn, nothing logged or saved, and no gradient checkpointing (which would cost it time). ``checkpointing`` sets it as TRL has it.
"""

import json
import sys
import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import RLOOConfig, RLOOTrainer

from child import Pace, resident
from rl_task import reward, words


def tokenizer(vocab_size):
    """The word ``17`` is token 17. The end of turn is a word that the model has no token for: a text never ends early."""
    table = {word: i for i, word in enumerate([*words(range(vocab_size)), "end"])}
    made = Tokenizer(models.WordLevel(table, unk_token="0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="end", pad_token="0", padding_side="left")


class Steps(TrainerCallback):
    """One turn of the pace for each step, which is ``updates`` of the trainer's."""

    def __init__(self, pace, updates):
        self.pace, self.updates = pace, updates

    def on_train_begin(self, args, state, control, **_):
        self.pace.turn()

    def on_step_end(self, args, state, control, **_):
        if state.global_step % self.updates == 0:
            self.pace.turn()


def arguments(folder, s):
    rows = s["prompts"] * s["samples"]
    return RLOOConfig(
        folder, use_cpu=True, bf16=s["dtype"] == "bfloat16", learning_rate=s["lr"], lr_scheduler_type="constant", adam_beta2=s["beta2"],
        weight_decay=s["weight_decay"], max_grad_norm=s["clip_norm"], beta=s["beta"], epsilon=s["clip"], temperature=1.0,
        num_generations=s["samples"], max_completion_length=s["new"], shuffle_dataset=False,
        per_device_train_batch_size=s["micro"], steps_per_generation=rows // s["micro"],
        gradient_accumulation_steps=rows // s["micro"] // s["updates"], max_steps=10**6, gradient_checkpointing=s["checkpointing"],
        report_to="none", logging_strategy="no", save_strategy="no", disable_tqdm=True)


if __name__ == "__main__":
    folder, s = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(s["threads"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    pace = Pace()
    pace.line.send(loaded_MiB=resident("VmRSS"))
    with tempfile.TemporaryDirectory() as out:
        RLOOTrainer(
            model, lambda completion_ids, **_: [reward(ids) for ids in completion_ids], arguments(out, s),
            Dataset.from_list([{"prompt": " ".join(words(ids))} for ids in s["texts"]]),
            processing_class=tokenizer(s["vocab_size"]), callbacks=[Steps(pace, s["updates"])],
        ).train()
