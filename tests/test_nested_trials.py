"""The trials of the nested method: each does what its setting says, and resumes bit for bit."""

import numpy as np
import pytest
import torch
from test_training import factors, make_config, make_examples, make_model, train

from matryoshka_lora.config import build_method
from matryoshka_lora.core.adapter import adapter_layers, adapter_parameters, at_rank
from matryoshka_lora.data.loss import batch_loss
from matryoshka_lora.methods.nested_trials import Trials

TRIALS = {
    "odds": {"weights_end": [6.0, 2.0, 1.0, 1.0], "weights_hold": 0.25},
    "rows": {"row_rate_a": 0.5, "row_rate_b": 0.25, "b_ratio": 2.0},
    "schedule": {"hold": 0.5, "warm_steps": 2},
    "average": {"average": 0.5},
    "decay": {"high_decay": 1.0},
    "blocks": {"clip_blocks": 0.1, "adam_beta2": 0.9},
    "lora": {"lora_share": 0.6, "warm_steps": 2},
    "gradient": {"gradient_start": 3},
}


def config_of(max_steps=9, **method):
    config = make_config("nested_trials", max_steps=max_steps, save_every=2)
    for key, value in method.items():
        setattr(config.method, key, value)
    return config


def test_without_a_trial_it_is_the_nested_method_bit_for_bit(tmp_path):
    parent = make_config("nested_matryoshka", max_steps=9)
    expected, rows, _ = train(tmp_path / "parent", parent)
    for name, extra in {
        "off": {},
        # Odds that do not move.
        "same": {"weights_end": [2.0, 1.0, 1.0, 4.0]},
    }.items():
        model, ours, _ = train(tmp_path / name, config_of(**extra))
        assert torch.equal(factors(model), factors(expected))
        assert [row["ranks"] for row in ours] == [row["ranks"] for row in rows]


@pytest.mark.parametrize("trial", TRIALS)
def test_a_trial_changes_the_adapter_and_resumes_bit_for_bit(tmp_path, trial, monkeypatch):
    config = config_of(**TRIALS[trial])
    whole, rows, _ = train(tmp_path / "whole", config)
    plain, _, _ = train(tmp_path / "plain", config_of())
    assert not torch.equal(factors(whole), factors(plain))
    # Killed in step 6, so that it goes on after step 4, in the middle of what a trial gathers.
    original = Trials.after_update

    def killed(self, step, lr):
        if step == 5:
            raise KeyboardInterrupt
        original(self, step, lr)

    monkeypatch.setattr(Trials, "after_update", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", config)
    monkeypatch.setattr(Trials, "after_update", original)
    resumed, again, _ = train(tmp_path / "killed", config)
    assert torch.equal(factors(resumed), factors(whole))
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]


@pytest.mark.parametrize("trial", TRIALS)
def test_parameters_and_gradients_stay_where_they_are(tmp_path, trial):
    config = config_of(**TRIALS[trial])
    model = make_model(config)
    before = {n: p.data_ptr() for n, p in adapter_parameters(model).items()}
    train(tmp_path, config, model)
    assert {n: p.data_ptr() for n, p in adapter_parameters(model).items()} == before


def started(steps, **method):
    built = build_method(config_of(**method))
    model = make_model(config_of(**method), fill_B=True)
    parameters = adapter_parameters(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.0)
    built.hooks.start(parameters, optimizer, steps)
    return built, model, parameters, optimizer


def test_odds_move_from_the_first_to_the_last():
    method, *_ = started(101, weights=[1.0, 1, 1, 1], weights_end=[4.0, 0, 0, 0], weights_hold=0.5)
    assert method.hooks.odds(0) == method.hooks.odds(50) == (0.25,) * 4
    assert method.hooks.odds(75) == pytest.approx((0.625, 0.125, 0.125, 0.125))
    assert method.hooks.odds(100) == (1, 0, 0, 0)
    counts = [np.bincount(method.choose(1, s, 32, None), minlength=4) for s in (0, 75, 100)]
    assert [c.tolist() for c in counts] == [[8, 8, 8, 8], [20, 4, 4, 4], [32, 0, 0, 0]]
    assert (method.choose(1, 75, 32, None) == method.choose(1, 75, 32, None)).all()


def test_rates_of_rows_and_schedule():
    method, _, parameters, optimizer = started(
        10, row_rate_a=1.0, row_rate_b=0.5, b_ratio=4.0, hold=0.5, high_decay=0.0, warm_steps=1
    )
    before = {name: p.detach().clone() for name, p in parameters.items()}
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    method.hooks.after_backward(4, np.zeros(8, int))
    optimizer.step()  # -lr everywhere
    method.hooks.after_update(4, 1e-2)
    places = torch.arange(1.0, 9)
    for name, p in parameters.items():
        moved = before[name] - p.detach()
        rate = 0.01 / 0.6  # the loop's is 0.6 of the peak, held it is the whole
        if name.endswith("lora_A"):
            expected = rate * (8 / places)[:, None].expand_as(p)
        else:
            expected = rate * 4 * (8 / places).sqrt().expand_as(p)
        torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-6)
    hooks = method.hooks
    assert [round(hooks.rate(s) * (1 - s / 10), 6) for s in range(10)] == pytest.approx(
        [0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
    )


def test_blocks_of_rows_are_clipped_apart():
    method, _, parameters, _ = started(10, clip_blocks=0.5)
    generator = torch.Generator().manual_seed(0)
    for name, p in parameters.items():
        p.grad = torch.randn(p.shape, generator=generator)
        p.grad.movedim(0 if name.endswith("lora_A") else 1, 0)[1:2] *= 1e-4
    method.hooks.after_backward(0, np.zeros(8, int))
    for start, end, norm in ((0, 1, 0.5), (1, 2, None), (2, 4, 0.5), (4, 8, 0.5)):
        rows = [
            p.grad.movedim(0 if name.endswith("lora_A") else 1, 0)[start:end].flatten()
            for name, p in parameters.items()
        ]
        found = torch.cat(rows).norm().item()
        assert found == pytest.approx(norm, rel=1e-4) if norm else found < 0.1


def test_the_svd_of_lora_is_the_same_function_in_order():
    method, model, _, _ = started(10, lora_share=0.5)
    tokens = torch.arange(12)[None]
    method = build_method(config_of(lora_share=0.5))
    for layer in adapter_layers(model).values():
        layer.p = method.diagonals[-1]
    assert method.diagonals[-1].tolist() == [1] * 8 and method.weights[-1] == 0
    with torch.no_grad():
        before = model(tokens).logits
    hooks = method.hooks
    parameters = adapter_parameters(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.0)
    hooks.start(parameters, optimizer, 10)
    assert hooks.start_steps == 5
    assert (method.choose(0, 4, 8, None) == 4).all() and (method.choose(0, 5, 8, None) < 4).all()
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    hooks.after_backward(4, np.full(8, 4))
    optimizer.step()
    hooks.after_update(4, 0.0)
    with torch.no_grad(), at_rank(model, 8, "trained"):
        torch.testing.assert_close(model(tokens).logits, before, rtol=1e-4, atol=1e-4)
    for layer in adapter_layers(model).values():
        length = layer.lora_A.norm(dim=1) * layer.lora_B.norm(dim=0) * method.p_full
        assert (length[:-1] >= length[1:] - 1e-6).all()
    moments = [state["exp_avg"] for state in optimizer.state.values()]
    assert not any(m.any() for m in moments)


def test_the_average_is_that_of_the_last_steps(tmp_path, monkeypatch):
    config = config_of(average=0.4)
    seen, original = [], Trials.after_update

    def after(self, step, lr):
        seen.append(torch.cat([t.flatten() for t in self.tensors]).clone())
        original(self, step, lr)

    monkeypatch.setattr(Trials, "after_update", after)
    model, _, _ = train(tmp_path, config)
    expected = torch.stack(seen[-4:]).mean(0)
    torch.testing.assert_close(factors(model).float(), expected, rtol=1e-5, atol=1e-7)


def test_a_gradient_start_leaves_the_base_model_and_finds_its_directions(tmp_path):
    config = config_of(max_steps=20, gradient_start=10)
    # All of them in every step: then the gradient of every step is the same.
    config.trainer.effective_batch, config.trainer.epochs = 50, 20
    model, rows, _ = train(tmp_path, config)
    losses = [row["loss"] for row in rows]
    assert losses == pytest.approx([losses[0]] * 20, rel=1e-5)
    base = make_model(config)
    for layer in adapter_layers(base).values():
        layer.weight.requires_grad_(True)
        layer.p = torch.ones(8)
    batch_loss(base, make_examples(), torch.ones(8), packed=False).backward()
    started = adapter_layers(base)
    with torch.no_grad():
        for name, layer in adapter_layers(model).items():
            G, A = started[name].weight.grad.double(), started[name].lora_A.double()
            U, _ = torch.linalg.qr(G @ A.T)
            _, s, vh = torch.linalg.svd(U.T @ G, full_matrices=False)
            lengths = layer.lora_A.norm(dim=1)
            torch.testing.assert_close(lengths, A.norm(dim=1).mean().float().expand(8))
            found = layer.lora_A / lengths[:, None]
            assert abs(found[0].double() @ vh[0]) > 0.999, name
            # As much of the gradient as the best direction has, or nearly.
            assert (G.float() @ found[0]).norm() > 0.85 * torch.linalg.matrix_norm(G, 2), name
            assert not layer.lora_B.any()


@pytest.mark.parametrize(
    ("key", "value"),
    [("average", 2.0), ("b_ratio", 0.0), ("clip_blocks", 0.0), ("weights_end", [1.0])],
)
def test_wrong_settings_are_refused(key, value):
    with pytest.raises(ValueError, match=f"method.{key if key != 'weights_end' else 'weights'}"):
        build_method(config_of(**{key: value}))
