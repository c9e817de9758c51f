"""The loop: cutting a batch, packing it, resuming and freezing do not change the mathematics."""

import copy
import dataclasses
import itertools
import json
import os
import random

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import TARGETS, small_llama
from transformers import AttentionInterface, Gemma3ForCausalLM, Gemma3TextConfig

from matryoshka_lora.config import Config, TrainerConfig, adapter_spec_of, build_method
from matryoshka_lora.core.adapter import adapter_layers, adapter_parameters, add_adapters, at_rank
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.data.examples import Example
from matryoshka_lora.data.loss import batch_loss
from matryoshka_lora.data.packing import pack
from matryoshka_lora.evaluation.held_out import loss_at_full_rank
from matryoshka_lora.methods import TRAINED, Hooks
from matryoshka_lora.methods.dylora import FrozenRows
from matryoshka_lora.ops.attention import packed_attention
from matryoshka_lora.ops.device import ALLOCATOR, let_segments_grow, to_host
from matryoshka_lora.training import gradients
from matryoshka_lora.training.checkpoints import (
    OPTIMIZER_STATE,
    TrainingState,
    newest_checkpoint,
    save_checkpoint,
)
from matryoshka_lora.training.loop import fit
from matryoshka_lora.training.plan import (
    batch_ids,
    check_effective_batch,
    is_validated,
    share_of_tokens,
    split_into_forwards,
    total_steps,
    validation_sample,
)


def make_examples(count=50, seed=0):
    draw = random.Random(seed)
    return [
        Example(tuple(draw.randrange(64) for _ in range(draw.randrange(5, 20))), 3)
        for _ in range(count)
    ]


def make_config(method="matryoshka", **trainer):
    config = Config()
    config.adapter.rank, config.method.name = 8, method
    config.trainer.lr, config.trainer.max_steps, config.trainer.effective_batch = 1e-2, 6, 8
    for key, value in trainer.items():
        setattr(config.trainer, key, value)
    return config


def eventful(method):
    """Nine steps in which rows are frozen and components masked, where the method does so."""
    config = make_config(method, max_steps=9, save_every=2)
    config.method.frozen, config.method.target_rank, config.method.mask_every = True, 2, 1
    return config


def make_model(config, dtype=torch.float32, fill_B=False, base=None):
    model = small_llama(dtype=dtype) if base is None else base
    add_adapters(model, adapter_spec_of(config), TARGETS, dtype=dtype, seed=config.seed)
    build_method(config).hooks.initialise(adapter_parameters(model), config.seed)
    if fill_B:
        generator = torch.Generator().manual_seed(1)
        for layer in adapter_layers(model).values():
            B = torch.randn(layer.lora_B.shape, generator=generator, dtype=torch.float64)
            layer.lora_B.data.copy_(0.1 * B)
    return model


def reading(model, config):
    """What `fit` takes to read held-out records on its way."""
    accelerator, packed = Accelerator(cpu=True), config.trainer.packed
    return {
        "held_out": make_examples(70, seed=1),
        "loss_on": lambda found: loss_at_full_rank(model, found, packed, accelerator),
    }


def train(folder, config, model=None, examples=None, hooks=None, validates=False):
    model = make_model(config) if model is None else model
    method = build_method(config)
    if hooks is not None:
        method = dataclasses.replace(method, hooks=hooks)
    folder.mkdir(parents=True, exist_ok=True)
    summary = fit(
        model,
        examples or make_examples(),
        method,
        config,
        folder,
        Accelerator(cpu=True),
        **(reading(model, config) if validates else {}),
    )
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    return model, rows, summary


def factors(model):
    return torch.cat([p.detach().flatten().double() for p in adapter_parameters(model).values()])


def relative(ours, reference):
    return ((ours - reference).norm() / reference.norm()).item()


def loss_and_gradients(model, examples, diagonals, micro, packed):
    for parameter in adapter_parameters(model).values():
        parameter.grad = None
    total = 0.0
    for start in range(0, len(examples), micro):
        p = diagonals if diagonals.dim() == 1 else diagonals[start : start + micro]
        part = examples[start : start + micro]
        if packed:
            with packed_attention(model):
                loss = batch_loss(model, part, p)
        else:
            loss = batch_loss(model, part, p, packed=False)
        loss.backward()
        total += loss.item()
    grads = [p.grad.flatten().double() for p in adapter_parameters(model).values()]
    return total, torch.cat(grads)


@pytest.mark.parametrize("method", ["matryoshka", "nested_dropout", "nested_matryoshka"])
@pytest.mark.parametrize(
    ("dtype", "loss_bound", "grad_bound"),
    [(torch.float64, 1e-9, 1e-9), (torch.float32, 1e-5, 1e-4)],
)
@pytest.mark.parametrize(("micro", "packed"), [(1, True), (4, True), (8, False), (2, False)])
def test_loss_and_gradients_do_not_depend_on_cut_or_packing(
    method, dtype, loss_bound, grad_bound, micro, packed
):
    config = make_config(method)
    chosen = build_method(config)
    examples = make_examples(8)
    choice = chosen.choose(0, 0, 8, None)
    p = chosen.diagonals[choice] if chosen.draw == "sample" else chosen.diagonals[0]
    model = make_model(config, dtype, fill_B=True)
    # The reference runs each sample alone, with nothing of ours around the model.
    reference, expected = 0.0, None
    for parameter in adapter_parameters(model).values():
        parameter.grad = None
    for index, example in enumerate(examples):
        for layer in adapter_layers(model).values():
            layer.p = p[index] if p.dim() == 2 else p
        tokens = torch.tensor([example.tokens])
        logits = model(tokens).logits[0, example.prompt_length - 1 : -1]
        labels = tokens[0, example.prompt_length :]
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        loss.backward()
        reference += loss.item()
    expected = torch.cat([q.grad.flatten().double() for q in adapter_parameters(model).values()])
    loss, grads = loss_and_gradients(model, examples, p, micro, packed)
    assert abs(loss - reference) / reference < loss_bound
    assert relative(grads, expected) < grad_bound


def test_packing_keeps_the_windows_of_each_document():
    shape = Gemma3TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=4,
    )
    config, examples = make_config("nested_matryoshka"), make_examples(8)
    method = build_method(config)
    p = method.diagonals[method.choose(0, 0, 8, None)]
    assert len(p.unique(dim=0)) > 1 and max(len(e.tokens) for e in examples) > 2 * 4
    torch.manual_seed(0)
    model = make_model(config, fill_B=True, base=Gemma3ForCausalLM(shape).eval())
    windows = [layer.self_attn.sliding_window for layer in model.model.layers]
    assert windows == [4, None]
    expected, gradients = loss_and_gradients(model, examples, p, 1, packed=False)
    for micro in (2, 8):
        loss, found = loss_and_gradients(model, examples, p, micro, packed=True)
        assert loss == pytest.approx(expected, rel=1e-5)
        assert relative(found, gradients) < 1e-4


@pytest.mark.parametrize("method", ["matryoshka", "nested_dropout"])
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
            ],
        ),
    ],
)
def test_bfloat16_gradients_point_where_float32_ones_do(method, device):
    """On a GPU by flash attention. The factors are float32 in both, as in training."""
    config = make_config(method)
    chosen = build_method(config)
    examples = make_examples(32)
    choice = chosen.choose(0, 0, 32, None)
    p = chosen.diagonals[choice] if method == "nested_dropout" else chosen.diagonals[0]
    half = make_model(config, torch.bfloat16, fill_B=True).to(device)
    for parameter in adapter_parameters(half).values():
        parameter.data = parameter.data.float()
    exact = copy.deepcopy(half).float()
    found = loss_and_gradients(half, examples, p, 32, True)[1]
    expected = loss_and_gradients(exact, examples, p, 1, True)[1]
    assert torch.nn.functional.cosine_similarity(found, expected, dim=0) >= 0.999


def test_the_loops_own_gradients_do_not_depend_on_the_cut(tmp_path):
    seen = []

    class Recorder(Hooks):
        def start(self, parameters, optimizer, steps):
            self.parameters = parameters

        def after_backward(self, step, choice):
            seen.append(torch.cat([p.grad.flatten().clone() for p in self.parameters.values()]))

    for index, options in enumerate(
        [{}, {"micro_batch": 1}, {"micro_batch": 2}, {"micro_batch": 4, "packed": False}]
    ):
        config = make_config("nested_dropout", max_steps=1, clip_norm=1e9, **options)
        model = make_model(config, torch.float64, fill_B=True)
        train(tmp_path / str(index), config, model, hooks=Recorder())
    assert len(seen) == 4
    for grads in seen[1:]:
        assert relative(grads, seen[0]) < 1e-9


@pytest.mark.parametrize("method", ["lora", "dylora", "nested_dropout"])
def test_training_does_not_depend_on_how_the_batch_is_cut(tmp_path, method):
    results = {}
    for name, options in {
        "whole": {},
        "1x8": {"micro_batch": 1},
        "4x2": {"micro_batch": 4},
        "tokens": {"max_tokens": 30},
        "padded": {"micro_batch": 4, "packed": False},
    }.items():
        config = make_config(method, **options)
        model, rows, _ = train(tmp_path / name, config, make_model(config, torch.float64))
        results[name] = factors(model), [row["loss"] for row in rows]
    reference, losses = results.pop("whole")
    for ours, our_losses in results.values():
        assert relative(ours, reference) < 1e-6
        np.testing.assert_allclose(our_losses, losses, rtol=1e-5)


def test_another_documents_tokens_leave_a_documents_loss_bit_identical():
    config = make_config()
    model = make_model(config, fill_B=True)
    first, second = make_examples(2)
    other = Example(tuple((t + 1) % 64 for t in second.tokens), second.prompt_length)
    p = build_method(config).p_full
    losses = []
    for neighbour in (second, other):
        for layer in adapter_layers(model).values():
            layer.p = p
        with packed_attention(model), torch.no_grad():
            both = batch_loss_per_document(model, [first, neighbour])
        losses.append(both)
    assert losses[0][0] == losses[1][0]
    assert losses[0][1] != losses[1][1]


def batch_loss_per_document(model, examples):
    """Sum of each document's label losses in one packed row."""
    from matryoshka_lora.ops.attention import packed_inputs

    batch = pack(examples)
    logits = model(
        input_ids=batch.tokens,
        use_cache=False,
        logits_to_keep=batch.label_rows,
        **packed_inputs(batch.lengths, "cpu"),
    ).logits[0]
    losses = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none")
    return [part.sum().item() for part in losses.split([e.labels for e in examples])]


@pytest.mark.parametrize(
    ("method", "settle"),
    [*((method, 0.3) for method in TRAINED), ("adalora", 0.7)],  # the last: after all masking
)
def test_resume_equals_an_uninterrupted_run_bit_for_bit(tmp_path, method, settle):
    config = eventful(method)
    config.method.settle = settle
    hooks = build_method(config).hooks
    reference, rows, whole = train(tmp_path / "whole", config, hooks=hooks, validates=True)

    class Killed(BaseException):
        pass

    seen = []

    def kill(row):
        seen.append(row)
        if len(seen) == 6:
            raise Killed

    folder = tmp_path / "killed"
    folder.mkdir()
    with pytest.raises(Killed):
        fit(
            model := make_model(config),
            make_examples(),
            build_method(config),
            config,
            folder,
            Accelerator(cpu=True),
            on_step=kill,
            **reading(model, config),
        )
    assert len(list((folder / "checkpoints").glob("*.pt"))) == 2
    resumed_hooks = build_method(config).hooks
    resumed, resumed_rows, summary = train(folder, config, hooks=resumed_hooks, validates=True)
    assert torch.equal(factors(resumed), factors(reference))
    for name in ("epochs", "losses"):
        assert summary["validation"][name] == whole["validation"][name]
    importance = resumed_hooks.importance()
    assert all(torch.equal(x, importance[name]) for name, x in hooks.importance().items())
    assert [row["loss"] for row in resumed_rows] == [row["loss"] for row in rows]
    assert [row["step"] for row in resumed_rows] == list(range(9))
    assert summary["steps"] == 9


def test_a_process_that_dies_at_once_can_be_resumed(tmp_path):
    """Nothing that a checkpoint stands on may wait in a buffer when the process is killed."""
    config = make_config(max_steps=9, save_every=3)
    reference, rows, _ = train(tmp_path / "whole", config)
    folder = tmp_path / "killed"
    folder.mkdir()
    child = os.fork()
    if child == 0:
        method, accelerator = build_method(config), Accelerator(cpu=True)
        die = lambda row: os._exit(9) if row["step"] == 4 else None  # noqa: E731
        fit(make_model(config), make_examples(), method, config, folder, accelerator, die)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    with (folder / "train.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # half a line, as a full disk or a kill leaves it
    resumed, resumed_rows, _ = train(folder, config)
    assert torch.equal(factors(resumed), factors(reference))
    assert [row["loss"] for row in resumed_rows] == [row["loss"] for row in rows]
    (folder / "train.jsonl").write_text("")
    with pytest.raises(ValueError, match="has 0 rows, its checkpoint is of step 6"):
        train(folder, config)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path):
    config = make_config(max_steps=9, save_every=2)
    reference, _, _ = train(tmp_path / "whole", config)
    newest = sorted((tmp_path / "whole" / "checkpoints").glob("*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[:50])
    again, rows, _ = train(tmp_path / "whole", config)
    assert torch.equal(factors(again), factors(reference))
    assert len(rows) == 9


def test_unreadable_checkpoints_never_crowd_out_readable_ones(tmp_path):
    """A training that goes on from an old checkpoint keeps its own, though newer ones are there."""
    config = make_config(max_steps=9, save_every=2)
    reference, _, _ = train(tmp_path / "whole", config)
    folder = tmp_path / "whole" / "checkpoints"
    good = folder / "step-00000006.pt"
    (folder / "step-00000008.pt").write_bytes(b"damaged")
    for step in (20, 30):
        (folder / f"step-{step:08d}.pt").write_bytes(good.read_bytes()[:50])
    _, content = newest_checkpoint(folder, set_aside=False)
    assert content["step"] == 6 and len(list(folder.glob("step-*.pt"))) == 4
    path, content = newest_checkpoint(folder, set_aside=True)
    assert path == good and content["step"] == 6
    assert list(folder.glob("step-*.pt")) == [good]
    assert len(list(folder.glob("*.unreadable"))) == 3
    again, _, _ = train(tmp_path / "whole", config)
    assert torch.equal(factors(again), factors(reference))
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["step-00000006.pt", "step-00000008.pt"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_running_out_of_memory_is_not_taken_for_damage(tmp_path, monkeypatch, error):
    save_checkpoint(tmp_path, 1, {"step": 1})

    def load(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(type(error)):
        newest_checkpoint(tmp_path, set_aside=True)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.pt"]


def stepped(parameters):
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    optimizer.step()
    return TrainingState(parameters, optimizer, Hooks())


def test_a_checkpoint_is_restored_by_name(tmp_path):
    """Also of parameters of shape (R,), and into an optimizer that has them in another order."""
    saved = stepped(gated(make_model(make_config())))
    save_checkpoint(tmp_path, 3, saved.content(3, 1.5))
    fresh = gated(make_model(make_config(seed=7)), seed=3)
    target = stepped(dict(reversed(fresh.items())))
    assert target.restore(*newest_checkpoint(tmp_path, set_aside=True)) == (3, 1.5)
    for name, parameter in saved.parameters.items():
        assert torch.equal(target.parameters[name], parameter)
        found, expected = target.optimizer.state[fresh[name]], saved.optimizer.state[parameter]
        assert found.keys() == expected.keys() == set(OPTIMIZER_STATE)
        assert all(torch.equal(found[key], expected[key]) for key in found)


NAME = "model.layers.0.self_attn.q_proj.lora_A"


def old_layout(content):
    content["parameters"] = list(content["parameters"].values())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (old_layout, "of an earlier version.*set force=true"),
        (lambda c: c.pop("optimizer"), "lacks 'optimizer'"),
        (lambda c: c.pop("hooks"), "lacks 'hooks'"),
        (lambda c: c["parameters"].pop(NAME), f"lacks {NAME} in 'parameters'"),
        (lambda c: c["optimizer"].pop(NAME), f"lacks {NAME} in 'optimizer'"),
        (lambda c: c["parameters"].update(x=torch.ones(1)), "has x in 'parameters'"),
        (lambda c: c["optimizer"][NAME].clear(), f"lacks the optimizer's step of {NAME}"),
        (lambda c: c["parameters"].update({NAME: torch.ones(1, 32)}), rf"{NAME} is \(1, 32\) fl"),
        (
            lambda c: c["parameters"].update({NAME: c["parameters"][NAME].bfloat16()}),
            rf"{NAME} is \(8, 32\) bfloat16, the model needs \(8, 32\) float32",
        ),
        (
            lambda c: c["optimizer"][NAME].update(exp_avg_sq=torch.ones(8, 1)),
            rf"exp_avg_sq of {NAME} is \(8, 1\) float32",
        ),
    ],
)
def test_a_checkpoint_of_other_parameters_is_refused(tmp_path, damage, message):
    config = make_config(max_steps=4, save_every=2)
    train(tmp_path, config)
    path = tmp_path / "checkpoints" / "step-00000002.pt"
    content = torch.load(path)
    damage(content)
    torch.save(content, path)
    model = make_model(config)
    before = factors(model)
    with pytest.raises(ValueError, match=f"step-00000002.pt.*{message}"):
        train(tmp_path, config, model)
    assert torch.equal(factors(model), before)


@pytest.mark.parametrize("packed", [True, False])
def test_examples_without_a_label_take_places_and_change_no_loss(tmp_path, packed):
    """As the released code keeps them: a batch has fewer labels, a forward may have none."""
    masked = [Example(tuple(range(10 + n)), 10 + n) for n in range(4)]
    labelled = make_examples(4)
    config = make_config(packed=packed, effective_batch=8, micro_batch=1, max_steps=1)
    _, (mixed,), _ = train(tmp_path / "mixed", config, examples=[*labelled, *masked])
    config = make_config(packed=packed, effective_batch=4, micro_batch=1, max_steps=1)
    _, (alone,), _ = train(tmp_path / "alone", config, examples=labelled)
    assert mixed["label_tokens"] == alone["label_tokens"]
    assert mixed["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert mixed["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-5)
    config = make_config(effective_batch=1)
    with pytest.raises(UserError, match="no sample of step 1 has a label; raise trainer.effect"):
        train(tmp_path / "none", config, examples=masked)


def test_the_base_is_untouched_and_the_loss_falls(tmp_path):
    config = make_config(max_steps=40, epochs=40, lr=0.03)
    model, rows, summary = train(tmp_path, config, examples=make_examples(8))
    base = small_llama().state_dict()
    assert all(torch.equal(base[name], model.state_dict()[name]) for name in base)
    assert summary["final_loss"] < 0.9 * summary["first_loss"]
    assert summary["tokens"] == sum(row["tokens"] for row in rows)
    assert rows[0]["lr"] == 0.03 and rows[-1]["lr"] == pytest.approx(0.03 / 40)
    norms = np.array([row["block_grad_norms"] for row in rows])
    np.testing.assert_allclose(
        np.sqrt((norms**2).sum(1)), [row["grad_norm"] for row in rows], rtol=1e-5
    )


def test_updates_equal_torchs_adamw_and_clipping(tmp_path):
    config = make_config(max_steps=3, clip_norm=0.05)
    ours, rows, _ = train(tmp_path, config)
    model, examples = make_model(config), make_examples()
    parameters = list(adapter_parameters(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    for step in range(3):
        ids = batch_ids(config.seed, step, len(examples), 8)
        batch = [examples[i] for i in ids]
        loss = batch_loss(model, batch, build_method(config).p_full, packed=False)
        (loss / sum(e.labels for e in batch)).backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 0.05)
        assert rows[step]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 3)
        optimizer.step()
        optimizer.zero_grad()
    assert relative(factors(ours), factors(model)) < 1e-4


def test_frozen_dylora_moves_only_the_rows_of_its_rank(tmp_path):
    """Values and moments of the other rows stay, though AdamW would decay and carry them on."""
    config = make_config("dylora", max_steps=12, weight_decay=0.5)
    config.method.frozen = True
    method = build_method(config)
    ranks, seen = (0, *method.ranks), []

    class Checked(FrozenRows):
        def values(self):
            empty = {"exp_avg": torch.tensor(0.0), "exp_avg_sq": torch.tensor(0.0)}
            return {
                name: [p.detach().clone()]
                + [(self.optimizer.state[p] or empty)[k].expand_as(p).clone() for k in empty]
                for name, p in self.parameters.items()
            }

        def after_backward(self, step, choice):
            self.before = self.values()
            super().after_backward(step, choice)
            self.live = ranks[choice[0]], ranks[choice[0] + 1]

        def after_update(self, step, lr):
            super().after_update(step, lr)
            seen.append(self.live)
            for name, values in self.values().items():
                for earlier, later in zip(self.before[name], values, strict=True):
                    moved = (earlier != later).any(1 if name.endswith("lora_A") else 0)
                    assert not moved[: self.live[0]].any() and not moved[self.live[1] :].any()
                    assert moved[self.live[0] : self.live[1]].any()

    model = make_model(config, fill_B=True)
    train(tmp_path, config, model, hooks=Checked(method.ranks))
    expected = [method.choose(config.seed, step, 8, None)[0] for step in range(12)]
    assert seen == [(ranks[chosen], ranks[chosen + 1]) for chosen in expected]
    assert len(set(seen)) > 1


def test_hooks_are_called_in_order_and_resume_with_their_state(tmp_path):
    """A penalty, and a state that grows with every step, are bitwise those of one training."""

    class Decay(Hooks):
        def __init__(self, die_after=None):
            self.die_after, self.calls = die_after, []
            self.total = torch.zeros(())

        def start(self, parameters, optimizer, steps):
            self.parameters, self.optimizer, self.steps = parameters, optimizer, steps

        def penalty(self):
            self.calls.append("penalty")
            self.grads = [p.grad.clone() for p in self.parameters.values()]
            return 0.5 * self.total * sum(p.square().sum() for p in self.parameters.values())

        def after_backward(self, step, choice):
            self.calls.append("after_backward")
            for grad, p in zip(self.grads, self.parameters.values(), strict=True):
                torch.testing.assert_close(p.grad, grad + self.total * p.detach())
            self.norm = torch.cat([p.grad.flatten() for p in self.parameters.values()]).norm()
            assert len(choice) in (2, 8)  # the last batch of an epoch has two samples
            self.total += 0.01 * choice.sum()

        def after_update(self, step, lr):
            self.calls.append("after_update")
            assert lr == 1e-2 * (1 - step / self.steps)
            clipped = torch.cat([p.grad.flatten() for p in self.parameters.values()]).norm()
            torch.testing.assert_close(clipped, self.norm.clamp(max=0.5))
            if step == self.die_after:
                raise KeyboardInterrupt

        def state_dict(self):
            return {"total": self.total}

        def load_state_dict(self, state):
            self.total = state["total"]

    config = make_config("nested_dropout", max_steps=9, save_every=2, clip_norm=0.5)
    whole, killed, resumed = Decay(), Decay(die_after=5), Decay()
    reference, rows, _ = train(tmp_path / "whole", config, hooks=whole)
    assert whole.calls == ["penalty", "after_backward", "after_update"] * 9 and whole.total > 0
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", config, hooks=killed)
    again, again_rows, _ = train(tmp_path / "killed", config, hooks=resumed)
    assert len(resumed.calls) == 3 * (9 - 4)
    assert torch.equal(factors(again), factors(reference))
    assert torch.equal(resumed.total, whole.total)
    assert [row["loss"] for row in again_rows] == [row["loss"] for row in rows]


def gated(model, seed=2):
    """Parameters by name, as those of an adapter whose layers learn a factor of their diagonal."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {}
    for name, parameter in adapter_parameters(model).items():
        parameters[name] = parameter
        if name.endswith("lora_A"):
            gate = name.replace("lora_A", "lora_gate")
            parameters[gate] = torch.nn.Parameter(torch.ones(8))
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return parameters


def test_norms_by_rank_know_parameters_by_their_role(monkeypatch):
    parameters = gated(make_model(make_config()))
    expected = torch.zeros(8)
    for name, parameter in parameters.items():
        by_rank = parameter.grad.T if name.endswith("lora_B") else parameter.grad
        expected += by_rank.reshape(8, -1).square().sum(1)
    for limit in (gradients.STACKED_BYTES, 1):
        monkeypatch.setattr(gradients, "STACKED_BYTES", limit)
        torch.testing.assert_close(gradients.rank_square_norms(parameters), expected)
    reordered = dict(reversed(parameters.items()))
    torch.testing.assert_close(gradients.rank_square_norms(reordered), expected)
    blocks = gradients.block_norms(expected, [1, 4, 8])
    ends = (expected[:1], expected[1:4], expected[4:])
    torch.testing.assert_close(blocks, torch.stack([part.sum().sqrt() for part in ends]))


@pytest.mark.parametrize("limit", [4, 100, 4000, 2**28])
def test_messages_between_processes_are_small_and_carry_everything(limit, monkeypatch):
    """As if each of two processes had the same gradients."""
    sizes = []

    class Two:
        num_processes = 2

        def reduce(self, tensor, reduction):
            assert reduction == "sum" and tensor.dtype == torch.float32
            sizes.append(4 * tensor.numel())
            return 2 * tensor

    monkeypatch.setattr(gradients, "MESSAGE_BYTES", limit)
    parameters = gated(make_model(make_config()))
    before = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    absent = next(iter(parameters))
    parameters[absent].grad, before[absent] = None, torch.zeros_like(before[absent])
    loss = torch.tensor(3.0)
    gradients.sum_over_processes(parameters, loss, Two())
    assert loss.item() == 6
    assert all(torch.equal(p.grad, 2 * before[name]) for name, p in parameters.items())
    assert max(sizes) <= limit
    assert sum(sizes) == 4 * (1 + sum(p.numel() for p in parameters.values()))
    assert len(sizes) == -(-sum(sizes) // limit)


def test_a_non_finite_loss_names_step_and_samples(tmp_path):
    config = make_config(lr=1e30)
    with pytest.raises(FloatingPointError, match=r"step \d+: loss .*counted from 1: \["):
        train(tmp_path, config)


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    config = make_config(max_steps=9, save_every=2)
    reference, _, _ = train(tmp_path / "whole", config)
    save, calls = torch.save, []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left.*run the same command again"):
        train(tmp_path / "full", config)
    monkeypatch.undo()
    names = sorted(path.name for path in (tmp_path / "full" / "checkpoints").iterdir())
    assert names == ["step-00000002.pt", "step-00000004.pt"]
    resumed, _, _ = train(tmp_path / "full", config)
    assert torch.equal(factors(resumed), factors(reference))


def test_gradient_checkpointing_changes_nothing(tmp_path):
    reference, _, _ = train(tmp_path / "plain", make_config())
    ours, _, _ = train(tmp_path / "saved", make_config(gradient_checkpointing=True))
    assert torch.equal(factors(ours), factors(reference))


@pytest.mark.parametrize("method", ["dylora", "sora", "nested_matryoshka"])
@pytest.mark.parametrize("options", [{}, {"packed": False}, {"gradient_checkpointing": True}])
def test_reading_held_out_records_on_the_way_changes_no_bit(tmp_path, method, options):
    config = make_config(method, max_steps=11, **options)
    plain, _, summary = train(tmp_path / "plain", config)
    assert "validation" not in summary
    ours, rows, summary = train(tmp_path / "read", config, validates=True)
    assert torch.equal(factors(ours), factors(plain))
    # An epoch has 7 steps: half epochs end within the 4th, with the 7th and within the 11th.
    losses = {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}
    assert list(losses) == [3, 6, 10]
    found = summary["validation"]
    assert found["records"] == 70 and found["losses"] == list(losses.values())
    assert found["epochs"] == [4 / 7, 1, 11 / 7] and 0 < found["seconds"] < summary["seconds"]
    held_out = make_examples(70, seed=1)
    with torch.no_grad(), at_rank(ours, 8):
        p = next(iter(adapter_layers(ours).values())).p
        total = batch_loss(ours, held_out, p, packed=False)
    assert losses[10] == pytest.approx(total.item() / sum(e.labels for e in held_out), rel=1e-5)
    config.trainer.validate_every = None
    assert "validation" not in train(tmp_path / "never", config, validates=True)[2]


def test_validation_comes_at_each_multiple_of_its_interval():
    """Though 0.07 of 100 steps is more than 7 in floating point."""
    settings = TrainerConfig(validate_every=0.07, effective_batch=1)
    assert [done for done in range(1, 36) if is_validated(done, 100, settings)] == [
        7,
        14,
        21,
        28,
        35,
    ]
    settings.validate_every = 0.25
    assert [done for done in range(1, 8) if is_validated(done, 10, settings)] == [3, 5]


def test_a_large_vocabulary_makes_held_out_forwards_smaller(monkeypatch):
    examples, config = make_examples(70), make_config()
    model = make_model(config, fill_B=True)
    vocabulary = len(model.get_input_embeddings().weight)
    labels, read, sizes = sum(e.labels for e in examples), reading(model, config), []
    model.register_forward_pre_hook(
        lambda _module, _args, kwargs: sizes.append(len(kwargs["logits_to_keep"])),
        with_kwargs=True,
    )
    expected = read["loss_on"](examples)
    assert len(sizes) == 2  # 64 and 6 examples
    monkeypatch.setattr("matryoshka_lora.evaluation.held_out.LOGITS", labels * vocabulary // 7)
    sizes.clear()
    assert read["loss_on"](examples) == pytest.approx(expected, rel=1e-6)
    assert len(sizes) == 7 and sum(sizes) == labels
    monkeypatch.setattr("matryoshka_lora.evaluation.held_out.LOGITS", 1)
    assert read["loss_on"](examples) == pytest.approx(expected, rel=1e-6)


def test_few_held_out_records_are_read_at_equal_distances():
    assert validation_sample(range(5)) == [0, 1, 2, 3, 4] and validation_sample([]) == []
    found = validation_sample(range(374))
    assert len(found) == 128 and {b - a for a, b in itertools.pairwise(found)} == {2, 3}


def test_a_non_finite_loss_on_held_out_records_is_an_error(tmp_path):
    config = make_config(max_steps=4)
    with pytest.raises(FloatingPointError, match=r"step 4: .*, loss on held-out records nan; tra"):
        fit(
            *(make_model(config), make_examples(), build_method(config), config, tmp_path),
            Accelerator(cpu=True),
            held_out=make_examples(3),
            loss_on=lambda found: float("nan"),
        )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["matryoshka", "nested_dropout"])
def test_compiled_layers_train_the_same_and_compile_once(tmp_path, method, monkeypatch):
    """On CPUs the packed attention cannot be traced; a stand-in shows what compiles again."""
    counters = torch._dynamo.utils.counters
    results = {}
    for compiled in (False, True):
        torch._dynamo.reset()
        config = make_config(method, compile=compiled, packed=False, max_steps=5)
        model, rows, _ = train(tmp_path / str(compiled), config)
        results[compiled] = factors(model), [row["loss"] for row in rows]
    assert relative(results[True][0], results[False][0]) < 1e-4
    np.testing.assert_allclose(results[True][1], results[False][1], rtol=1e-5)

    def whole_row(module, q, k, v, mask, cu_seq_lens_q=None, **kwargs):
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )
        return out.transpose(1, 2) + 0 * cu_seq_lens_q.sum(), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "packed", whole_row)
    torch._dynamo.reset()
    graphs = []
    for steps in (1, 5):
        counters.clear()
        config = make_config(method, compile=True, max_steps=steps, validate_every=0.25)
        train(tmp_path / f"packed{steps}", config, validates=True)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs[1] == 0, "five steps of other lengths compiled again"


def test_every_sample_is_used_once_an_epoch():
    for epoch in range(2):
        steps = range(epoch * 7, epoch * 7 + 7)
        seen = np.concatenate([batch_ids(3, step, 50, 8) for step in steps])
        assert sorted(seen) == list(range(50))
    assert not np.array_equal(batch_ids(3, 0, 50, 8), batch_ids(3, 7, 50, 8))

    def steps(epochs, max_steps=None, round_steps="nearest"):
        given = {"epochs": epochs, "max_steps": max_steps, "round_steps": round_steps}
        return total_steps(50, TrainerConfig(effective_batch=8, **given))

    assert (steps(3), steps(3, 5)) == (21, 5)
    # An epoch is 7 steps, a third of it 2.33, for which transformers' Trainer takes 3.
    assert (steps(1 / 3), steps(1 / 3, round_steps="up"), steps(3, round_steps="up")) == (2, 3, 21)
    assert (steps(0.01), steps(0.01, round_steps="up")) == (1, 1)


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("micro_batch", [None, 1, 3])
def test_cuts_cover_the_batch_once(processes, micro_batch):
    lengths = [random.Random(i).randrange(1, 40) for i in range(17)]
    forwards = [
        forward
        for process in range(processes)
        for forward in split_into_forwards(lengths, process, processes, micro_batch, 50)
    ]
    assert sorted(sum(forwards, [])) == list(range(17))
    for forward in forwards:
        assert len(forward) <= (micro_batch or 17)
        assert micro_batch or sum(lengths[i] for i in forward) <= 50
    for forward in split_into_forwards(lengths, 0, 1, None, 50, padded=True):
        assert len(forward) == 1 or len(forward) * max(lengths[i] for i in forward) <= 50


def test_processes_have_about_as_many_tokens():
    draw = random.Random(0)
    for _ in range(20):
        lengths = [draw.randrange(1, 400) for _ in range(9)]
        shares = [share_of_tokens(lengths, process, 2) for process in range(2)]
        assert sorted(sum(shares, [])) == list(range(9))
        most = max(sum(lengths[i] for i in share) for share in shares)
        halves = (sum(itertools.compress(lengths, chosen)) for chosen in SUBSETS)
        best = min(max(half, sum(lengths) - half) for half in halves)
        assert most <= best * 7 / 6  # Graham's bound of this rule on two processes
    assert share_of_tokens([3, 1, 2], 0, 1) == [0, 1, 2]


SUBSETS = list(itertools.product((0, 1), repeat=9))


@pytest.mark.parametrize(
    ("batch", "processes", "micro", "message"),
    [(32, 3, None, r"process counts that fit: \[1, 2, 4"), (32, 2, 5, r"that fit: \[1, 2, 4, 8")],
)
def test_a_batch_that_cannot_be_made_lists_what_fits(batch, processes, micro, message):
    with pytest.raises(ValueError, match=message):
        check_effective_batch(batch, processes, micro)


def test_values_are_those_of_the_time_they_were_asked_for():
    tensor = torch.arange(3.0)
    values = to_host({"a": tensor})
    tensor.zero_()
    assert values()["a"].tolist() == [0.0, 1.0, 2.0]


def test_the_allocator_is_configured_unless_the_user_did(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # A copy, so that nothing of it stays.
    environ = {key: value for key, value in os.environ.items() if key not in ALLOCATOR}
    monkeypatch.setattr(os, "environ", environ)
    let_segments_grow()
    assert environ.pop(ALLOCATOR[0]) == "expandable_segments:True"
    environ[ALLOCATOR[1]] = "max_split_size_mb:64"
    let_segments_grow()
    assert ALLOCATOR[0] not in environ
    del environ[ALLOCATOR[1]]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    let_segments_grow()
    assert ALLOCATOR[0] not in environ
