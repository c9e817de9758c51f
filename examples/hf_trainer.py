"""Train an adapter by the Trainer of transformers, read it at several ranks, export one of them.

    python examples/hf_trainer.py [OUTPUT [MODEL]]

MODEL is a causal language model of the hub or a folder; without it, the embedded tiny one (less
than a minute on two CPU cores).
"""

import sys
from pathlib import Path

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from matryoshka_lora import MethodCallback, add_method, at_rank, export_adapter, save_adapter
from matryoshka_lora.data.arithmetic import generate
from matryoshka_lora.models import EMBEDDED


def main(
    output: str = "results/hf_trainer", base: str = str(EMBEDDED), *, samples: int = 400
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)

    # The adapters, and what the callback has to know of them.
    method = add_method(model, "nested_matryoshka", ["q_proj", "v_proj", "up_proj"], rank=8)

    def example(problem: dict[str, str]) -> dict[str, list[int]]:
        prompt = tokenizer(f"Question: {problem['question']}\nAnswer:")["input_ids"]
        answer = tokenizer(f" {problem['answer']}", add_special_tokens=False)["input_ids"]
        answer = [*answer, tokenizer.eos_token_id]
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    trainer = Trainer(
        model,
        TrainingArguments(
            output,
            learning_rate=3e-3,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
            num_train_epochs=1,
            logging_steps=10,
            report_to="none",
        ),
        train_dataset=[example(problem) for problem in generate("train", samples)],
        eval_dataset=[example(problem) for problem in generate("test", max(samples // 10, 1))],
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[MethodCallback(method)],
    )
    trainer.train()

    for rank in (0, 1, 2, 4, 8):
        with at_rank(model, rank):
            print(f"rank {rank}: loss {trainer.evaluate()['eval_loss']:.3f}")

    adapter = Path(output) / "adapter.safetensors"
    save_adapter(adapter, model)
    export_adapter(adapter, 2, "trained", Path(output) / "peft-rank2", base)


if __name__ == "__main__":
    main(*sys.argv[1:3])
