"""Train a tiny random GPT-2 with transformers.Trainer, then resume it from its half-way checkpoint in a new Trainer."""

import argparse
import hashlib
import os
from pathlib import Path
from pydoc_data.topics import topics

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed


class Text(Dataset):
    def __init__(self, text, span=32):
        self.rows = torch.tensor(list(text[: len(text) // span * span])).view(-1, span)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    text = "".join(topics[name] for name in sorted(topics)).encode("ascii", "replace")
    half = max(1, args.steps // 2)

    def trainer():
        set_seed(args.seed)
        config = GPT2Config(
            vocab_size=128, n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
        options = TrainingArguments(
            output_dir=str(args.out),
            max_steps=args.steps,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=16,
            gradient_accumulation_steps=2,
            learning_rate=5e-3,
            lr_scheduler_type="cosine",
            warmup_steps=3,
            weight_decay=0.01,
            max_grad_norm=1.0,
            logging_steps=5,
            eval_strategy="steps",
            eval_steps=half,
            save_strategy="steps",
            save_steps=half,
            seed=args.seed,
            use_cpu=True,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            report_to="none",
        )
        train, test = Text(text[:32_000]), Text(text[32_000:34_000])
        return Trainer(model=GPT2LMHeadModel(config), args=options, train_dataset=train, eval_dataset=test)

    whole = trainer()
    whole.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(args.out / f"checkpoint-{half}"))
    same = all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))
    print(f"resumed from step {half}: {'the same' if same else 'other'} weights at the end")
    weights = [*whole.model.parameters(), *resumed.model.parameters()]
    print("digest", hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in weights)).hexdigest())


if __name__ == "__main__":
    main()
