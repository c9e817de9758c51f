"""Work on fixed sizes equals work on the real ones. On CPUs a replay calls the function again."""

import numpy as np
import pytest
import torch
from test_model_checks import OPT, random_model
from test_training import factors, make_config, make_examples, make_model, relative, train

from matryoshka_lora.config import build_method
from matryoshka_lora.core.adapter import adapter_parameters
from matryoshka_lora.data.examples import Example
from matryoshka_lora.data.loss import packed_batch, packed_loss
from matryoshka_lora.data.packing import pack
from matryoshka_lora.ops.attention import packed_attention
from matryoshka_lora.ops.graphs import Graphs, cuda_capture
from matryoshka_lora.training import forwards
from matryoshka_lora.training.forwards import packed_backward


def test_a_row_is_filled_up_behind_its_documents():
    examples = [Example((5, 6, 7, 8, 9), 2), Example((1, 2, 3), 1)]
    batch = pack(examples, 8, 4)
    # Eight tokens are a multiple already; the document of padding is never empty.
    assert batch.lengths == (5, 3, 8)
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9, 1, 2, 3] + [0] * 8]
    assert batch.label_rows.tolist() == [1, 2, 3, 5, 6, 0, 1, 2]
    assert batch.labels.tolist() == [7, 8, 9, 2, 3, -100, -100, -100]
    filled = packed_batch(examples, np.array([3, 1]), (8, 4))
    assert filled["choice"].tolist() == [3] * 5 + [1] * 3 + [1] * 8
    assert filled["bounds"].tolist() == [0, 5, 8, 16]


@pytest.mark.parametrize("method", ["matryoshka", "nested_dropout"])
def test_filling_up_changes_neither_loss_nor_gradients(method):
    config = make_config(method)
    chosen = build_method(config)
    model = make_model(config, torch.float64, fill_B=True)
    examples = make_examples(8)
    choice = chosen.choose(0, 0, 8, None) if method == "nested_dropout" else np.zeros(1, int)
    results = []
    for sizes in ((1, 1), (64, 32)):
        batch = packed_batch(examples, choice, sizes)
        with packed_attention(model):
            loss = packed_loss(model, batch, chosen.diagonals, 64)
            grads = torch.autograd.grad(loss, list(adapter_parameters(model).values()))
        results.append((loss.item(), torch.cat([g.flatten() for g in grads])))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-12)
    assert relative(results[1][1], results[0][1]) < 1e-12


def test_filling_up_stays_within_the_positions_that_the_model_embeds():
    model = random_model("opt", ["q_proj"], **OPT)  # 32 of them
    examples = [Example(tuple(range(3, 23)), 2), Example(tuple(range(9, 40)), 3)]
    losses = []
    for sizes in ((1, 1), (256, 512)):
        batch = packed_batch(examples, np.zeros(1, int), sizes, 256)
        with packed_attention(model), torch.no_grad():
            losses.append(float(packed_loss(model, batch, torch.ones(1, 4), 256)))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize("method", ["matryoshka", "nested_dropout"])
def test_replays_read_the_new_batch_and_add_up_gradients(method):
    config = make_config(method)
    bank = build_method(config).diagonals
    model = make_model(config, torch.float64, fill_B=True)
    captured = []

    def capture(function, pool):
        captured.append(function)
        return function

    ours = packed_backward(model, bank, config, Graphs(capture))
    plain = packed_backward(model, bank, config, None)
    results = []
    for backward in (ours, plain):
        for parameter in adapter_parameters(model).values():
            parameter.grad = torch.zeros_like(parameter)
        losses = []
        with packed_attention(model):
            for step in range(6):
                choice = np.arange(4) % len(bank) if len(bank) > 1 else np.zeros(1, int)
                losses.append(backward(make_examples(4, seed=step), choice, 0.25).item())
        results.append((losses, [p.grad.clone() for p in adapter_parameters(model).values()]))
    # All of these examples fit one size, which is captured once.
    assert len(captured) == 1
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-12)
    for found, expected in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_what_cannot_be_captured_is_an_error_that_names_the_cause():
    def refuse(function, pool):
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        finally:
            raise RuntimeError("the end of the capture fails, too")

    graphs = Graphs(refuse)
    assert int(graphs("a", 1, lambda: torch.tensor(7))) == 7
    with pytest.raises(ValueError, match=r"\(operation not permitted.*capturing\); set trainer"):
        graphs("a", 1, lambda: torch.tensor(7))


def test_running_out_of_memory_stays_what_it_is():
    def refuse(function, pool):
        raise torch.OutOfMemoryError("none left")

    graphs = Graphs(refuse)
    graphs("a", 1, lambda: torch.tensor(7))
    with pytest.raises(torch.OutOfMemoryError):
        graphs("a", 1, lambda: torch.tensor(7))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", ["matryoshka", "nested_dropout", "adalora", "sora"])
@pytest.mark.parametrize("compiled", [False, True])
def test_cuda_graphs_train_the_same(tmp_path, method, compiled, monkeypatch):
    replays = []

    def counting(function, pool):
        replays.append(function)
        return cuda_capture(function, pool)

    class Counting(Graphs):
        def __init__(self):
            super().__init__()
            self._capture = counting

    monkeypatch.setattr(forwards, "Graphs", Counting)
    losses, trained = [], []
    for graphs in (False, True):
        config = make_config(method, max_steps=12, cuda_graphs=graphs, compile=compiled)
        model = make_model(config, torch.bfloat16).cuda()
        for parameter in adapter_parameters(model).values():
            parameter.data = parameter.data.float()
        # Of one and of two sizes of a forward: what a step leaves behind must not be in the way of
        # the next capture. Held-out records, which are read between the replays, leave them as
        # they are.
        examples = make_examples(24) + [Example(tuple(range(2, 60)), 3) for _ in range(24)]
        folder = tmp_path / str(graphs)
        model, rows, _ = train(folder, config, model, examples, validates=graphs)
        losses.append([row["loss"] for row in rows])
        trained.append(factors(model))
    assert replays, "nothing was captured"
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-2)
    assert relative(trained[1], trained[0]) < 5e-2
