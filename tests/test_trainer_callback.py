"""The methods under transformers' Trainer and TRL's SFTTrainer, against this project's own loop."""

import importlib.util

import pytest
import torch
from conftest import ROOT, TARGETS, small_llama
from datasets import Dataset
from peft import PeftModel
from safetensors import safe_open
from test_training import factors, make_config, make_examples, make_model, relative, train
from tiny_lm import tokenizer
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from matryoshka_lora import MethodCallback, add_method, at_rank, load_adapter
from matryoshka_lora.config import build_method
from matryoshka_lora.core.adapter import adapter_importance, adapter_layers, adapter_parameters
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.storage import read_adapter
from matryoshka_lora.models import EMBEDDED
from matryoshka_lora.training.plan import batch_ids

needs_trl = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="trl is not installed (the extra `trl`)"
)
SAMPLES, BATCH, MICRO, STEPS = 29, 8, 2, 8
"""Two epochs of four steps, the last of which has five samples in three forwards."""


def method_config(name, **settings):
    config = make_config(name, max_steps=STEPS, effective_batch=BATCH, micro_batch=MICRO)
    config.method.target_rank, config.method.mask_every = 2, 1
    config.trainer.clip_norm, config.trainer.weight_decay = 0.02, 0.1  # both in use
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


def make_trainer(model, folder, config, examples, **changed):
    return Trainer(
        model,
        arguments(folder, config, **changed),
        train_dataset=ordered_rows(config, examples),
        data_collator=collate,
        callbacks=[MethodCallback(build_method(config))],
    )


def trained_by_trainer(folder, config, examples, **changed):
    model = make_model(config)
    trainer = make_trainer(model, folder, config, examples, **changed)
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


@pytest.mark.parametrize("largest", [None, 0.0])
def test_without_a_largest_norm_nothing_is_clipped(tmp_path, largest):
    """AdaLoRA's gradients are clipped by the callback, where at all."""
    config, examples = method_config("adalora"), make_examples(SAMPLES)
    config.trainer.max_steps, config.trainer.clip_norm = 2, 1e9
    expected, _, _ = train(tmp_path / "loop", config, examples=examples)
    model, trainer = trained_by_trainer(tmp_path, config, examples, max_grad_norm=largest)
    start = make_model(config)
    assert relative(factors(model) - factors(start), factors(expected) - factors(start)) < 1e-5
    assert trainer.args.max_grad_norm == largest


@pytest.mark.parametrize("name", ["nested_matryoshka", "adalora"])
def test_a_checkpoint_holds_the_adapter_alone_and_goes_on_bit_for_bit(tmp_path, name):
    config, examples = method_config(name), make_examples(SAMPLES)
    config.trainer.max_steps = 6
    saving = {"save_strategy": "steps", "save_steps": 5}
    model, trainer = trained_by_trainer(tmp_path, config, examples, **saving)
    checkpoint = tmp_path / "checkpoint-5"
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(adapter_parameters(model))
    assert (checkpoint / "method_state.pt").is_file() == (name == "adalora")
    saved = read_adapter(checkpoint / "adapter.safetensors")
    assert saved.importance.keys() == adapter_importance(model).keys()
    again = make_model(config)
    resumed = make_trainer(again, tmp_path, config, examples, **saving)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(factors(again), factors(model))
    assert losses(resumed) == losses(trainer)
    for layer, values in adapter_importance(model).items():
        assert torch.equal(adapter_importance(again)[layer], values)


def test_a_method_whose_state_is_not_in_the_folder_is_not_resumed(tmp_path):
    config, examples = method_config("adalora"), make_examples(SAMPLES)
    config.trainer.max_steps = 2
    saving = {"save_strategy": "steps", "save_steps": 1}
    trained_by_trainer(tmp_path / "one", config, examples, **saving)
    elsewhere = {"seed": config.seed + 1, "learning_rate": 1e-3}
    trained_by_trainer(tmp_path / "two", config, examples, **saving | elsewhere)
    checkpoint = str(tmp_path / "one" / "checkpoint-1")

    def resume(**changed):
        Trainer(
            make_model(config),
            arguments(tmp_path / "two", config, **saving | changed),
            train_dataset=ordered_rows(config, examples),
            data_collator=collate,
            callbacks=[MethodCallback(build_method(config))],
        ).train(resume_from_checkpoint=checkpoint)

    # The output folder has a checkpoint of this step, too, of another training.
    with pytest.raises(UserError, match="resuming at step 1, but no method_state.pt"):
        resume()
    resume(resume_from_checkpoint=checkpoint)


def test_the_trainer_may_train_in_bf16(tmp_path):
    config, examples = method_config("nested_matryoshka"), make_examples(SAMPLES)
    config.trainer.max_steps = 2
    _, expected = trained_by_trainer(tmp_path, config, examples)
    model, trainer = trained_by_trainer(tmp_path, config, examples, bf16=True)
    assert losses(trainer) == pytest.approx(losses(expected), rel=0.02)
    assert losses(trainer) != losses(expected)
    assert factors(model).isfinite().all()


def test_evaluation_in_training_reads_the_full_rank(tmp_path):
    config, examples = method_config("nested_matryoshka"), make_examples(SAMPLES)
    model = make_model(config)
    trainer = Trainer(
        model,
        arguments(tmp_path, config, eval_strategy="steps", eval_steps=STEPS),
        train_dataset=ordered_rows(config, examples),
        eval_dataset=ordered_rows(config, examples)[:6],
        data_collator=collate,
        callbacks=[MethodCallback(build_method(config))],
    )
    trainer.train()
    inside = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert inside == [pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"fp16": True}, "fp16=True scales gradients"),
        ({"torch_compile": True}, "torch_compile=True would keep the first diagonal"),
        (
            {
                "load_best_model_at_end": True,
                "save_strategy": "steps",
                "eval_strategy": "steps",
                "save_steps": 2,
                "eval_steps": 2,
            },
            "load_adapter the checkpoint that you want",
        ),
    ],
    ids=["fp16", "torch_compile", "load_best_model_at_end"],
)
def test_what_cannot_be_trained_is_refused(tmp_path, changed, reason):
    config = method_config("sora")
    args = arguments(tmp_path, config)
    for key, value in changed.items():
        setattr(args, key, value)  # the Trainer's own checks need a GPU for some
    with pytest.raises(UserError, match=reason):
        MethodCallback(build_method(config))._check(args, make_model(config))


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [("_n_gpu", 2, "CUDA_VISIBLE_DEVICES=0"), ("world_size", 2, "train with train.py")],
)
def test_several_gpus_are_refused(tmp_path, monkeypatch, field, value, reason):
    config = method_config("lora")
    args = arguments(tmp_path, config)
    if field == "_n_gpu":
        args._setup_devices  # noqa: B018 - it counts the GPUs
        args._n_gpu = value
    else:
        monkeypatch.setattr(TrainingArguments, field, value)
    with pytest.raises(UserError, match=reason):
        MethodCallback(build_method(config))._check(args, make_model(config))


def test_models_and_methods_that_do_not_fit_are_refused(tmp_path):
    config = method_config("lora")
    with pytest.raises(UserError, match="what add_method returns, not a str"):
        MethodCallback("lora")
    callback = MethodCallback(build_method(config))

    def begin(model):
        Trainer(model, arguments(tmp_path, config), callbacks=[callback])

    with pytest.raises(UserError, match="call add_adapters on it first"):
        begin(small_llama())
    with pytest.raises(UserError, match="rank 8, were made for method matryoshka"):
        begin(make_model(method_config("matryoshka")))


def test_an_adapted_head_is_refused_under_trl(tmp_path):
    model, config = small_llama(), method_config("lora")
    callback = MethodCallback(add_method(model, "lora", ["lm_head"], rank=4))
    args = arguments(tmp_path, config)
    callback._check(args, model)
    args.completion_only_loss = None  # as SFTConfig has it
    with pytest.raises(UserError, match="past an adapter of the head"):
        callback._check(args, model)


def test_several_samples_in_a_row_need_one_rank_a_step(tmp_path):
    config = method_config("nested_matryoshka")
    rows = ordered_rows(config, make_examples(SAMPLES))

    def packed(batch):
        lengths = [len(row["input_ids"]) for row in batch]
        positions = [i for length in lengths for i in range(length)] * 3
        ids = torch.tensor([[t for row in batch for t in row["input_ids"]] * 3])
        return {"input_ids": ids, "labels": ids, "position_ids": torch.tensor([positions])}

    def packing(config):
        return Trainer(
            make_model(config),
            arguments(tmp_path, config),
            train_dataset=rows,
            data_collator=packed,
            callbacks=[MethodCallback(build_method(config))],
        )

    packing(method_config("dylora")).train()
    trainer = packing(config)
    with pytest.raises(UserError, match="set packing=False"):
        trainer.train()
    assert trainer.args.max_grad_norm == config.trainer.clip_norm


def test_add_method_adapts_as_a_config_does():
    config = method_config("sora", sparsity=0.3)
    expected = make_model(config)
    model = small_llama()
    method = add_method(model, "sora", TARGETS, rank=8, seed=config.seed, sparsity=0.3)
    assert method.fingerprint() == build_method(config).fingerprint()
    assert torch.equal(factors(model), factors(expected))
    assert model.adapter_state.spec == expected.adapter_state.spec
    for changed, reason in {
        ("name", "dylor"): "did you mean dylora",
        ("sparsty", 1): "has no setting sparsty; it has: sparsity",
        ("rank", 0): "rank",
        ("train_ranks", (1, 16)): "16",
    }.items():
        options = {"name": "sora", "targets": TARGETS, "rank": 8} | dict([changed])
        with pytest.raises(UserError, match=reason):
            add_method(small_llama(), **options)


@needs_trl
@pytest.mark.parametrize(
    ("name", "padding_free"),
    [
        ("dylora", False),
        ("nested_matryoshka", False),
        ("nested_matryoshka", True),
        ("adalora", True),
    ],
)
def test_trls_trainer_trains_as_the_loop_does(tmp_path, name, padding_free):
    from trl import SFTConfig, SFTTrainer

    config, examples = method_config(name), make_examples(SAMPLES)
    config.trainer.max_steps = 4
    expected, rows, _ = train(tmp_path / "loop", config, examples=examples)
    model = make_model(config)
    trainer = SFTTrainer(
        model,
        arguments(
            tmp_path / "trl",
            config,
            SFTConfig,
            bf16=False,
            max_length=None,
            padding_free=padding_free,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=Dataset.from_list(ordered_rows(config, examples)),
        processing_class=tokenizer(),
        callbacks=[MethodCallback(build_method(config))],
    )
    trainer.train()
    assert losses(trainer) == pytest.approx([row["loss"] for row in rows], rel=1e-5)
    # Its loss is summed in another order, and Adam's first steps make much of small gradients.
    assert relative(factors(model), factors(expected)) < 1e-5


def run_example(name, output):
    path = ROOT / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(str(output), samples=16)


def test_the_example_for_the_trainer_runs(tmp_path, capsys):
    run_example("hf_trainer", tmp_path)
    printed = capsys.readouterr().out
    assert all(f"rank {rank}: loss " in printed for rank in (0, 1, 2, 4, 8))
    exported = AutoModelForCausalLM.from_pretrained(EMBEDDED)
    exported = PeftModel.from_pretrained(exported, tmp_path / "peft-rank2").eval()
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED).eval()
    add_method(model, "nested_matryoshka", ["q_proj", "v_proj", "up_proj"], rank=8)
    load_adapter(tmp_path / "adapter.safetensors", model)
    tokens = torch.arange(20)[None]
    with torch.no_grad(), at_rank(model, 2):
        assert torch.allclose(exported(tokens).logits, model(tokens).logits, atol=1e-4)


@needs_trl
def test_the_example_for_trl_runs(tmp_path, capsys):
    run_example("trl_sft", tmp_path)
    assert "rank 8: '" in capsys.readouterr().out
    assert read_adapter(tmp_path / "adapter.safetensors").spec.rank == 8
