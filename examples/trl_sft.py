"""Train an adapter by TRL's SFTTrainer, and answer a question at several ranks.

    pip install -e '.[trl]'
    python examples/trl_sft.py [OUTPUT [MODEL]]

MODEL is a causal language model of the hub or a folder; without it, the embedded tiny one (less
than a minute on two CPU cores).
"""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from matryoshka_lora import MethodCallback, add_method, at_rank, save_adapter
from matryoshka_lora.data.arithmetic import generate
from matryoshka_lora.models import EMBEDDED


def main(output: str = "results/trl_sft", base: str = str(EMBEDDED), *, samples: int = 400) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)

    # The adapters, and what the callback has to know of them. No peft_config: TRL trains what it is
    # given.
    method = add_method(model, "nested_matryoshka", ["q_proj", "v_proj", "up_proj"], rank=8)

    def example(problem: dict[str, str]) -> dict[str, str]:
        prompt = f"Question: {problem['question']}\nAnswer:"
        return {"prompt": prompt, "completion": f" {problem['answer']}"}

    trainer = SFTTrainer(
        model,
        SFTConfig(
            output,
            learning_rate=3e-3,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
            num_train_epochs=1,
            bf16=torch.cuda.is_available(),
            report_to="none",
        ),
        train_dataset=Dataset.from_list([example(p) for p in generate("train", samples)]),
        processing_class=tokenizer,
        callbacks=[MethodCallback(method)],
    )
    trainer.train()
    save_adapter(Path(output) / "adapter.safetensors", model)

    model.eval()
    question = example(generate("test", 1)[0])["prompt"]
    tokens = tokenizer(question, return_tensors="pt").to(model.device)
    for rank in (0, 1, 8):
        with at_rank(model, rank), torch.no_grad():
            answer = model.generate(**tokens, max_new_tokens=48, do_sample=False)
        print(f"rank {rank}: {tokenizer.decode(answer[0, tokens['input_ids'].shape[1] :])!r}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
