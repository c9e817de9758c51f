"""Methods that learn their diagonal, and the reading `global`, against independent truth."""

import copy
import dataclasses
import itertools
import weakref

import pytest
import torch
from conftest import TARGETS, small_llama
from peft import AdaLoraConfig, get_peft_model
from test_pipeline import small_config
from test_training import factors, make_config, make_examples, make_model, train

from matryoshka_lora.config import Config, adapter_spec_of, build_method
from matryoshka_lora.core.adapter import (
    adapter_importance,
    adapter_layers,
    adapter_parameters,
    adapter_view,
    add_adapters,
    at_rank,
    set_importance,
    use_factors,
)
from matryoshka_lora.core.layer import by_layer
from matryoshka_lora.core.rules import AdapterView, Components, evaluated_as, read
from matryoshka_lora.core.spec import AdapterSpec
from matryoshka_lora.core.storage import load_adapter, read_adapter, save_adapter
from matryoshka_lora.data.loss import batch_loss
from matryoshka_lora.evaluation.readings import plan_points
from matryoshka_lora.loading import build_model, load_run
from matryoshka_lora.methods.adalora import RankAllocator, Settings
from matryoshka_lora.methods.hooks import Hooks
from matryoshka_lora.methods.sora import SoftThreshold
from matryoshka_lora.ops.attention import packed_attention
from matryoshka_lora.pipeline import run
from matryoshka_lora.training.gradients import add_penalty

R = 6


def float64_loss(logits, labels, vocab_size, **options):
    """In place of transformers' loss, which is in float32."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def test_adalora_is_pefts():
    """Forward, penalty, gradients, scores and masks, over 20 steps from the same weights."""
    settings = Settings(target_rank=2, warmup=0.15, settle=0.3, mask_every=3, orthogonality=0.3)
    steps, lr = 20, 1e-2
    p = (R / (R + 1e-5),) * R
    model = small_llama(dtype=torch.float64)
    model.loss_function = float64_loss
    peft = get_peft_model(
        copy.deepcopy(model),
        AdaLoraConfig(
            init_r=R,
            target_r=settings.target_rank,
            tinit=3,
            tfinal=6,
            deltaT=settings.mask_every,
            total_step=steps,
            lora_alpha=R,
            orth_reg_weight=settings.orthogonality,
            beta1=settings.beta1,
            beta2=settings.beta2,
            target_modules=TARGETS,
            task_type="CAUSAL_LM",
        ),
    ).double()
    spec = AdapterSpec(R, "none", p, False, gated=True, ordered=False)
    add_adapters(model, spec, TARGETS, dtype=torch.float64)
    hooks = RankAllocator(settings)
    parameters = adapter_parameters(model)
    hooks.initialise(parameters, 0)
    for layer in adapter_layers(model).values():
        layer.lora_gate.data = layer.lora_gate.data.double()
        layer.p = torch.tensor(p, dtype=torch.float64)  # float32 would hide what is compared
    theirs = {}
    for name, ours in parameters.items():
        layer, _, role = name.rpartition(".")
        wanted = f"{layer}.{role.replace('lora_gate', 'lora_E')}.default"
        (theirs[name],) = (q for n, q in peft.named_parameters() if n.endswith(wanted))
        theirs[name].data = ours.data.clone().view_as(theirs[name])
    optimizers = [torch.optim.AdamW(q, lr=lr) for q in (parameters.values(), theirs.values())]
    hooks.start(parameters, optimizers[0], steps)
    allocator, masked = peft.base_model.rankallocator, []
    close = {"rtol": 1e-9, "atol": 1e-9}
    for step in range(steps):
        tokens = torch.arange(24).view(2, 12).mul(step + 3) % 64
        mine, other = model(tokens, labels=tokens), peft(input_ids=tokens, labels=tokens)
        penalty = hooks.penalty()
        torch.testing.assert_close(mine.logits, other.logits, **close)
        torch.testing.assert_close(mine.loss + penalty, other.loss, **close)
        mine.loss.backward()
        penalty.backward()
        other.loss.backward()
        for name, ours in parameters.items():
            torch.testing.assert_close(ours.grad.flatten(), theirs[name].grad.flatten(), **close)
        for optimizer in optimizers:
            optimizer.step()
        hooks.after_update(step, lr)
        peft.base_model.update_and_allocate(step)
        for optimizer in optimizers:
            optimizer.zero_grad()
        for name, ours in parameters.items():
            torch.testing.assert_close(ours.flatten(), theirs[name].flatten(), **close)
            if step < 14:  # PEFT forgets its scores then
                inside = peft.base_model.model.named_parameters()
                key = next(n for n, q in inside if q is theirs[name])
                own = hooks.mean[name] * hooks.uncertainty[name]
                expected = allocator._element_score(key).view_as(own)
                torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-30)
        gates = torch.stack([layer.lora_gate for layer in adapter_layers(model).values()])
        masked.append(int((gates == 0).sum()))
    layers = len(adapter_layers(model))
    assert masked[3] < masked[6] < masked[14] == masked[-1] == (R - 2) * layers
    kept = torch.cat(list(hooks.kept.values()))
    importance = torch.cat(list(hooks.importance().values()))
    assert int(kept.sum()) == 2 * layers and torch.equal(importance > 0, kept)
    assert importance[kept].min() > 0


def test_the_budget_is_kept_however_few_steps_there_are():
    parameters = {"a.lora_gate": torch.ones(4), "a.lora_A": torch.ones(4, 3)}
    for steps, warmup, settle in itertools.product((1, 2, 3, 9), (0.0, 0.4), (0.0, 0.5)):
        hooks = RankAllocator(Settings(target_rank=1, warmup=warmup, settle=settle))
        hooks.start(parameters, None, steps)
        budgets = [hooks.budget(step) for step in range(steps)]
        assert budgets == sorted(budgets, reverse=True) and budgets[-1] == 1
        assert hooks.last < steps


@pytest.mark.parametrize(("steps", "settle"), [(1, 0.0), (2, 0.3), (4, 0.9)])
def test_a_training_of_few_steps_keeps_the_target(tmp_path, steps, settle):
    """Without scores all components would be equal, and all of them masked."""
    config = make_config("adalora", max_steps=steps)
    config.method.target_rank, config.method.warmup, config.method.settle = 2, 0.0, settle
    hooks = build_method(config).hooks
    model, _, _ = train(tmp_path, config, hooks=hooks)
    gates = torch.stack([layer.lora_gate for layer in adapter_layers(model).values()])
    assert hooks.last == (1 if steps == 2 else 0)
    assert int((gates != 0).sum()) == 2 * len(gates)


def test_soras_proximal_step_by_hand():
    gate = torch.nn.Parameter(torch.tensor([0.5, -0.5, 0.02, -0.02, 0.0, 0.031]))
    hooks = SoftThreshold(sparsity=3.0)
    A, B = (torch.arange(1.0, 7)[:, None] * torch.ones(6, 4)), torch.ones(9, 6)
    hooks.start({"x.lora_A": A, "x.lora_B": B, "x.lora_gate": gate}, None, 1)
    hooks.after_update(0, 0.01)  # lr lambda = 0.03
    expected = [0.47, -0.47, 0.0, 0.0, 0.0, 0.001]
    assert gate.tolist() == pytest.approx(expected, abs=1e-7)
    importance = hooks.importance()["x"].tolist()
    assert importance == pytest.approx([abs(g) * 2 * i * 3 for i, g in enumerate(expected, 1)])
    A, B = (torch.sin(torch.arange(n) * 1.7).bfloat16() for n in (24, 54))
    half = {"x.lora_A": A.view(6, 4), "x.lora_B": B.view(9, 6), "x.lora_gate": gate}
    hooks.start(half, None, 1)
    found = hooks.importance()["x"]  # not rounded to half precision, where components become equal
    hooks.start({name: x.float() for name, x in half.items()}, None, 1)
    assert torch.equal(found, hooks.importance()["x"])


@pytest.mark.parametrize("method", ["adalora", "sora"])
def test_the_start_that_a_method_draws(method):
    config = Config()
    config.method.name = method
    models = [build_model(config, torch.device("cpu")) for _ in range(2)]
    first, second = map(adapter_parameters, models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    drawn = {
        role: torch.cat([q.detach().flatten() for n, q in first.items() if n.endswith(role)])
        for role in ("lora_A", "lora_B", "lora_gate")
    }
    if method == "adalora":
        assert not drawn["lora_gate"].any()
        assert drawn["lora_A"].std() == pytest.approx(0.02, rel=0.05)
        assert drawn["lora_B"].std() == pytest.approx(0.02, rel=0.05)
    else:
        assert drawn["lora_gate"].std() == pytest.approx(1, rel=0.2) and not drawn["lora_B"].any()
        plain = dataclasses.replace(config, method=dataclasses.replace(config.method, name="lora"))
        for name, q in adapter_parameters(build_model(plain, torch.device("cpu"))).items():
            assert torch.equal(q, first[name])


def learned_config(method):
    config = make_config(method, max_steps=9)
    config.method.target_rank, config.method.mask_every = 2, 1
    config.method.sparsity = 10.0  # a few steps at a high rate: some gates fall to 0
    return config


@pytest.fixture(scope="module", params=["adalora", "sora"])
def learned(request, tmp_path_factory):
    """(config, trained model with its importance)."""
    config = learned_config(request.param)
    method = build_method(config)
    model, _, _ = train(tmp_path_factory.mktemp("run"), config, hooks=method.hooks)
    set_importance(model, method.hooks.importance())
    return config, model


def effective(model):
    """Layer -> p_full times its gate, whose zeros are components that are gone."""
    p = torch.tensor(adapter_view(model).spec.p_full)
    return {name: p * layer.lora_gate.detach() for name, layer in adapter_layers(model).items()}


def test_learned_methods_are_read_by_what_they_allow(learned):
    config, model = learned
    view = adapter_view(model)
    diagonals = effective(model)
    counts = {name: int((p != 0).sum()) for name, p in diagonals.items()}
    assert 0 < sum(counts.values()) < 8 * len(counts)
    survived = max(counts.values())
    for rank, rule in ((1, "prefix"), (8, "prefix"), (7, "trained")):
        with pytest.raises(ValueError, match=rf"{rule} is refused at rank {rank}: .*no order"):
            read(view, rank, rule)
    plan = plan_points(view, range(1, 9), None, [1, 2, 4, 8])
    for rank in range(1, 9):
        full = survived <= rank < 8
        assert plan.same_as((rank, "svd")) == ("trained@8" if rank >= survived else None), full
    assert plan.same_as((8, "global")) == "trained@8"
    assert plan.same_as((1, "global")) is None
    assert (7, "trained") not in plan.readings and (8, "trained") in plan.readings
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        whole = model(tokens).logits
        for rank, rule in ((survived, "svd"), (8, "global"), (8, "trained")):
            with at_rank(model, rank, rule):
                torch.testing.assert_close(model(tokens).logits, whole, rtol=1e-4, atol=1e-4)
        with at_rank(model, 1, "global"):
            assert (model(tokens).logits - whole).abs().max() > 1e-3


def test_importance_is_saved_and_read_back(learned, tmp_path):
    config, model = learned
    save_adapter(tmp_path / "a", model)
    again = make_model(config)
    load_adapter(tmp_path / "a", again)
    assert torch.equal(factors(again), factors(model))
    saved = adapter_importance(again)
    assert all(torch.equal(x, saved[name]) for name, x in adapter_importance(model).items())
    file = read_adapter(tmp_path / "a")
    assert not file.spec.ordered and file.state.keys() == adapter_parameters(model).keys()
    for rank in (1, 3, 8):
        ours, theirs = (read(view, rank, "global") for view in (adapter_view(model), file.view))
        assert ours.full == theirs.full
        assert all(torch.equal(p, theirs.p[name]) for name, p in ours.p.items())
    set_importance(again, dict(list(saved.items())[1:]))
    save_adapter(tmp_path / "b", again)
    with pytest.raises(ValueError, match="does not hold lora_A.*importance of each of its layers"):
        read_adapter(tmp_path / "b")
    set_importance(again, {name: x[:3] for name, x in saved.items()})
    save_adapter(tmp_path / "c", again)
    with pytest.raises(ValueError, match=r"importance has shape \(3,\)"):
        read_adapter(tmp_path / "c")


def by_hand(layers, rank):
    """{(layer, component)} that `global` takes at a rank, and their parameters."""
    budget = rank * sum(size for size, _, _ in layers.values())
    order = sorted(
        (-importance[i], name, i)
        for name, (_, importance, live) in layers.items()
        for i in range(len(importance))
        if live[i]
    )
    taken, spent = set(), 0
    for _, name, i in order:
        if spent + layers[name][0] > budget:
            break
        taken.add((name, i))
        spent += layers[name][0]
    return taken, spent, budget, len(order)


@pytest.mark.parametrize("ranked", ["svd", "trained"])
@pytest.mark.parametrize("seed", range(5))
def test_global_is_sorting_by_hand(ranked, seed):
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for number in (0, 1, 2, 10, 11):  # names whose order is not that of the numbers
        size = int(torch.randint(5, 40, (), generator=generator))
        # Few values, so that there are ties, and a layer that matters little.
        importance = torch.randint(0, 4, (R,), generator=generator).double() / (1 + number)
        layers[f"layers.{number}"] = (size, importance.tolist(), (importance > 0).tolist())
    components = {
        name: Components(size, torch.tensor(importance).double(), torch.tensor(live))
        for name, (size, importance, live) in layers.items()
    }
    p_full = tuple(float(R - i) for i in range(R))
    spec = AdapterSpec(R, "none", p_full, False, gated=ranked == "trained")
    view = AdapterView(spec, lambda factor_set: components, ranked)
    empty = False
    for rank in range(1, R + 1):
        reading = read(view, rank, "global")
        taken, spent, budget, all_of_them = by_hand(layers, rank)
        found = {(n, i) for n, p in reading.p.items() for i in range(R) if p[i] != 0}
        assert found == taken and spent <= budget
        assert reading.factors == ranked and reading.full == (len(taken) == all_of_them)
        expected = torch.ones(R) if ranked == "svd" else torch.tensor(p_full)
        assert all(reading.p[n][i] == expected[i] for n, i in found)
        empty |= any(not p.any() for p in reading.p.values())
    assert reading.full and evaluated_as(view, R, "global")[1] == "trained"
    assert empty, "no layer had rank 0"


@pytest.fixture
def uneven():
    """A LoRA of rank 6 in float64, some of whose layers matter so little that they have rank 0."""
    config = Config()
    config.method.name, config.adapter.rank = "lora", R
    model = small_llama(dtype=torch.float64)
    add_adapters(model, adapter_spec_of(config), TARGETS, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    for number, layer in enumerate(adapter_layers(model).values()):
        B = torch.randn(layer.lora_B.shape, generator=generator, dtype=torch.float64)
        layer.lora_B.data.copy_(B * 0.6 ** (number % 7))
    return model


def test_global_reads_the_largest_singular_values(uneven):
    layers = {}
    for name, layer in adapter_layers(uneven).items():
        values = torch.linalg.svdvals((layer.lora_B @ layer.lora_A).detach())[:R].tolist()
        layers[name] = (layer.in_features + layer.out_features, values, [True] * R)
    tokens = torch.arange(12)[None]
    for rank in (1, 2, 5):
        reading = read(adapter_view(uneven), rank, "global")
        taken, spent, budget, _ = by_hand(layers, rank)
        ranks = {name: int(p.sum()) for name, p in reading.p.items()}
        assert {(n, i) for n, r in ranks.items() for i in range(r)} == taken
        assert spent <= budget and len(set(ranks.values())) > 1 and not reading.full
        # The same function from the update's own SVD, layer by layer.
        other = small_llama(dtype=torch.float64)
        for name, layer in adapter_layers(uneven).items():
            u, s, vh = torch.linalg.svd((layer.lora_B @ layer.lora_A).detach())
            r = ranks[name]
            other.get_submodule(name).weight.data += (u[:, :r] * s[:r]) @ vh[:r]
        with torch.no_grad(), at_rank(uneven, rank, "global"):
            torch.testing.assert_close(uneven(tokens).logits, other(tokens).logits)
    with use_factors(uneven, "svd"):  # whatever is in place, rules see what training left
        inside = read(adapter_view(uneven), 2, "global")
    outside = read(adapter_view(uneven), 2, "global")
    assert all(torch.equal(p, inside.p[name]) for name, p in outside.p.items())
    assert evaluated_as(adapter_view(uneven), R, "global") == (R, "prefix")
    assert evaluated_as(adapter_view(uneven), 2, "global") == (2, "global")


@torch.no_grad()
def test_losses_with_a_diagonal_for_each_layer(uneven):
    """Packed and padded, as the loop that reads the held-out records takes them."""
    examples = make_examples(5)
    reading = read(adapter_view(uneven), 1, "global")
    with use_factors(uneven, reading.factors):
        with packed_attention(uneven):
            packed = batch_loss(uneven, examples, reading.p)
        padded = batch_loss(uneven, examples, reading.p, packed=False)
        apart = {n: p.expand(5, -1) for n, p in reading.p.items()}
        each = batch_loss(uneven, examples, apart, packed=False)
    expected = 0.0
    with at_rank(uneven, 1, "global"):
        for example in examples:
            tokens = torch.tensor([example.tokens])
            logits = uneven(tokens).logits[0, example.prompt_length - 1 : -1]
            labels = tokens[0, example.prompt_length :]
            expected += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
    for loss in (packed, padded, each):
        assert loss.item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("method", ["nested_matryoshka", "nested_dropout"])
def test_one_rank_and_p_1_is_lora_bit_for_bit(tmp_path, method):
    trained = []
    for name in ("lora", method):
        config = make_config(name)
        config.adapter.train_ranks = [8]
        model, rows, _ = train(tmp_path / name, config)
        trained.append((factors(model), [(row["loss"], row["grad_norm"]) for row in rows]))
    assert torch.equal(trained[0][0], trained[1][0]) and trained[0][1] == trained[1][1]


def test_every_parameter_belongs_to_a_layer(learned):
    _, model = learned
    grouped = by_layer(adapter_parameters(model))
    assert list(grouped) == list(adapter_layers(model))
    assert all(set(roles) == {"lora_A", "lora_B", "lora_gate"} for roles in grouped.values())


@pytest.mark.parametrize("method", ["adalora", "sora"])
def test_a_learned_method_from_training_to_its_table(tmp_path, method):
    config = small_config(tmp_path, method__name=method, method__target_rank=1, eval__tasks=[])
    config.dataset.validation, config.trainer.effective_batch = 0.05, 4
    config.trainer.max_steps = 10
    config.method.mask_every, config.method.sparsity, config.trainer.lr = 1, 300.0, 1e-3
    record = run(config)
    rows = {(row.rank, row.rule): row for row in record.rows}
    assert rows.keys() == {(0, "base"), (4, "trained")} | {
        (rank, rule) for rank in (1, 2, 4) for rule in ("svd", "global")
    }
    assert rows[(4, "svd")].same_as == rows[(4, "global")].same_as == "trained@4"
    (folder,) = tmp_path.rglob("record.json")
    loaded = load_run(folder.parent)
    before = folder.read_bytes()
    run(config)  # it is finished
    assert folder.read_bytes() == before
    survived = adapter_view(loaded.model).survived
    for rank in (1, 2):
        same = rows[(rank, "svd")]
        assert (same.same_as == "trained@4") == (rank >= survived)
        if rank >= survived:
            assert same.value == rows[(4, "trained")].value
    # Read again, from the file, it is what the sweep read in the process that trained it.
    plan = plan_points(adapter_view(loaded.model), [1, 2, 4], None, [1, 2, 4])
    for (rank, rule), point in plan.readings.items():
        assert rows[(rank, rule)].same_as == plan.same_as((rank, rule)), point


def test_nothing_of_a_penalty_outlives_its_gradient():
    """A later CUDA graph would meet the parameters' nodes of the penalty, on another stream."""
    weight = torch.nn.Parameter(torch.ones(2))
    alive = []

    class Penal(Hooks):
        def penalty(self):
            found = weight.square().sum()
            alive.append(weakref.ref(found))
            return found

    add_penalty(Penal())
    assert weight.grad.tolist() == [2.0, 2.0] and alive[0]() is None
    add_penalty(Hooks())
    assert weight.grad.tolist() == [2.0, 2.0]
