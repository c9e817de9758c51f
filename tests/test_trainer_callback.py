"""The methods under transformers' Trainer and TRL's SFTTrainer, against this project's own loop."""

import importlib.util

import pytest
import torch
from conftest import ROOT, TARGETS, small_llama
from datasets import Dataset
from test_training import factors, make_config, make_examples, make_model, relative, train
from transformers import Trainer, TrainingArguments

from matryoshka_lora import MethodCallback, add_method, load_adapter
from matryoshka_lora.config import build_method
from matryoshka_lora.core.adapter import adapter_importance, adapter_layers, adapter_parameters
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.storage import read_adapter
from matryoshka_lora.training.plan import batch_ids

needs_trl = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="trl is not installed (the extra `trl`)"
)
SAMPLES, BATCH, MICRO, STEPS = 29, 8, 2, 8
"""Two epochs of four steps, the last of which has five samples in three forwards."""


def method_config(name, **settings):
    config = make_config(name, max_steps=STEPS, effective_batch=BATCH, micro_batch=MICRO)
    config.method.target_rank, config.method.mask_every = 2, 1
    for key, value in settings.items():
        setattr(config.method, key, value)
    return config


def collate(rows):
    """Padded on the right; no label where the prompt or the padding is."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(name, value):
        return torch.tensor([r[name] + [value] * (width - len(r[name])) for r in rows])

    ids = padded("input_ids", 0)
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    mask = (torch.arange(width) < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": padded("labels", -100)}


def ordered_rows(config, examples, epoch=None):
    """The examples in the order in which the loop takes them, as rows of a dataset."""
    steps = range(4) if epoch is None else range(4 * epoch, 4 * epoch + 4)
    ids = [i for step in steps for i in batch_ids(config.seed, step, len(examples), BATCH)]
    return [
        {
            "input_ids": list(examples[i].tokens),
            "labels": [-100] * examples[i].prompt_length
            + list(examples[i].tokens[examples[i].prompt_length :]),
        }
        for i in ids
    ]


def arguments(folder, config, kind=TrainingArguments, **changed):
    options = {
        "per_device_train_batch_size": MICRO,
        "gradient_accumulation_steps": BATCH // MICRO,
        "learning_rate": config.trainer.lr,
        "max_steps": config.trainer.max_steps,
        "max_grad_norm": config.trainer.clip_norm,
        "weight_decay": config.trainer.weight_decay,
        "lr_scheduler_type": "linear",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": config.seed,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    return kind(output_dir=str(folder), **options | changed)


def trained_by_trainer(folder, config, examples, **changed):
    model = make_model(config)
    trainer = Trainer(
        model,
        arguments(folder, config, **changed),
        train_dataset=ordered_rows(config, examples),
        data_collator=collate,
        callbacks=[MethodCallback(build_method(config))],
    )
    trainer.train()
    return model, trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("lora", {}),
        ("matryoshka", {}),
        ("dylora", {}),
        ("dylora", {"frozen": True}),
        ("dylora", {"draw": "micro_batch"}),
        ("nested_dropout", {}),
        ("nested_matryoshka", {}),
        ("nested_trials", {"clip_blocks": 0.1, "average": 0.5}),
        ("adalora", {}),
        ("sora", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "default",
)
def test_the_trainer_trains_as_the_loop_does(tmp_path, name, settings):
    config = method_config(name, **settings)
    config.trainer.max_steps = 4  # the loop's second epoch has an order of its own
    examples = make_examples(SAMPLES)
    expected, rows, _ = train(tmp_path / "loop", config, examples=examples)
    model, trainer = trained_by_trainer(tmp_path / "hf", config, examples)
    assert losses(trainer) == pytest.approx([row["loss"] for row in rows], rel=1e-5)
    start = make_model(config)
    assert relative(factors(model) - factors(start), factors(expected) - factors(start)) < 1e-5
    assert trainer.args.max_grad_norm == config.trainer.clip_norm
    for layer in adapter_layers(model).values():
        assert torch.equal(layer.p, build_method(config).p_full)
