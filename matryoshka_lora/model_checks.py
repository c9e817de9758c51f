"""What would go wrong in training or evaluation with this base model, refused before training.

`check_model` looks at the real adapted model: whether tokens and positions are within its
embeddings, what evaluation would refuse, and, by a probe of two short documents, whether packed
rows give what the documents give alone and whether every adapter layer can be given a diagonal for
each document. It takes a few short forwards and leaves model and random states as they were.
"""

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn
from transformers import PreTrainedModel

from matryoshka_lora.config import Config, build_method
from matryoshka_lora.core.adapter import adapter_layers
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.layer import AdapterLinear
from matryoshka_lora.data.examples import Example
from matryoshka_lora.evaluation.engines import make_engine
from matryoshka_lora.evaluation.engines.hf import evaluation_mode, harness_lm
from matryoshka_lora.evaluation.engines.protocol import Request
from matryoshka_lora.evaluation.sweep import unchanged_random_state
from matryoshka_lora.evaluation.tasks import EvalTask
from matryoshka_lora.inputs import Tokens
from matryoshka_lora.ops.attention import packed_attention, packed_inputs
from matryoshka_lora.processes import is_sharded

logger = logging.getLogger(__name__)

TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 0.1, torch.float32: 1e-3, torch.float64: 1e-3}
"""Relative difference allowed between a document alone and packed; bf16 rounds in every layer."""
PADDED = "trainer.packed=false eval.engine=hf"
"""The settings that work where packed rows do not."""
PROBE_TOKENS = (7, 5)
"""Of the probe's two documents, at most."""

Calls = dict[str, list[Tensor]]
"""Adapter layer -> what it made of its input in each of its calls, (rows, R)."""


def check_model(
    config: Config,
    model: PreTrainedModel,
    tokens: Tokens,
    tasks: Sequence[EvalTask],
    accelerator: Accelerator,
) -> HFLM | None:
    """Raise UserError for what training or evaluation as configured would get wrong or refuse.

    tokens: without examples where nothing is trained. Makes the requests of the tasks; returns the
    `harness_lm` that they were made for, None without tasks. All processes must call it with the
    same arguments.
    """
    trains, documents = bool(tokens.train), tokens.train
    with unchanged_random_state(), evaluation_mode(model), torch.no_grad():
        if trains:
            _check_examples(model, [*tokens.train, *tokens.held_out])
        lm = None
        if tasks:
            make_engine(
                config.eval.engine,
                model,
                tokens.tokenizer,
                batch_size=config.eval.batch_size,
                cuda_graphs=False,
                lockstep=is_sharded(accelerator),
            )
            lm = harness_lm(model, tokens.tokenizer)
            _check_requests(config, model, tasks, lm)
            documents = documents or _shown(tasks[0].requests(lm))
        method = build_method(config)
        trains_many = trains and len(method.diagonals) > 1 and method.draw != "step"
        answers_many = bool(tasks) and config.eval.engine == "batched"
        if documents:
            probe(
                model,
                documents,
                packed=(trains and config.trainer.packed) or answers_many,
                many_packed=answers_many or (config.trainer.packed and trains_many),
                many_padded=trains_many and not config.trainer.packed,
                decodes=answers_many,
            )
    return lm


def _shown(requests: Sequence[Request]) -> list[Example]:
    """The ends of the two longest requests: their beginnings may be the same shots."""
    found = sorted(((*r.context, *r.target) for r in requests), key=len)[-2:]
    return [Example(tokens[-max(PROBE_TOKENS) :], 1) for tokens in found]


def _check_examples(model: PreTrainedModel, examples: Sequence[Example]) -> None:
    _check_ids(model, "the tokenizer", max(max(example.tokens) for example in examples))
    longest = max(examples, key=lambda example: len(example.tokens))
    length, record = len(longest.tokens), longest.record
    for what, limit in (
        ("embeds positions up to {limit} only", _embedded_positions(model)),
        (
            "scales the positions of a whole batch by its longest document where that is longer "
            "than the original window of {limit} tokens",
            _original_window(model),
        ),
    ):
        if limit is not None and length > limit:
            raise UserError(
                f"record {record} has {length} tokens, and {type(model).__name__} "
                f"{what.format(limit=limit)}; set dataset.max_length={limit}"
            )


def _check_ids(model: PreTrainedModel, what: str, largest: int) -> None:
    embedding = model.get_input_embeddings()
    assert isinstance(embedding.weight, Tensor)
    rows = len(embedding.weight)
    if largest >= rows:
        raise UserError(
            f"{what} gives token {largest}, but the model's embedding has {rows} rows; use the "
            "tokenizer that belongs to the model, or resize the embedding"
        )


def _check_requests(
    config: Config, model: PreTrainedModel, tasks: Sequence[EvalTask], lm: HFLM
) -> None:
    window = _original_window(model)
    alone = config.eval.engine == "hf" and config.eval.batch_size == 1
    for task in tasks:
        for request in task.requests(lm):
            where = f"task {task.name}, document {request.doc_id}"
            _check_ids(model, where, max((*request.context, *request.target), default=0))
            length = len(request.context) + len(request.target) + request.max_new_tokens
            if window is not None and length > window and not alone:
                raise UserError(
                    f"{where}: prompt and answer may have {length} tokens, and "
                    f"{type(model).__name__} scales the positions of a whole batch by its longest "
                    f"document where that is longer than the original window of {window} tokens; "
                    "set eval.engine=hf eval.batch_size=1, or fewer shots"
                )


def _embedded_positions(model: PreTrainedModel) -> int | None:
    """How many positions have a learned embedding; None where positions are not embedded."""
    embedded = model.get_input_embeddings()
    rows = [
        module.num_embeddings - int(getattr(module, "offset", 0))
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and module is not embedded
        and ("position" in name.rpartition(".")[2] or name.rpartition(".")[2] == "wpe")
    ]
    return min(rows, default=None)


def _original_window(model: PreTrainedModel) -> int | None:
    """From how many tokens on transformers scales positions by the longest document of a batch.

    None where the scaling is the same for all lengths.
    """
    windows: list[int] = []
    for module in model.modules():
        rope: Any = module
        kinds = getattr(rope, "rope_type", None)
        if not isinstance(kinds, dict):
            kinds = {None: kinds}
        for layer_type, kind in kinds.items():
            if not isinstance(kind, str):
                continue
            if kind == "longrope":
                of_all = rope.config.rope_parameters
                settings = of_all if layer_type is None else of_all[layer_type]
                windows.append(settings["original_max_position_embeddings"])
            elif "dynamic" in kind:
                windows.append(rope.original_max_seq_len)
    return min(windows, default=None)


def probe(
    model: PreTrainedModel,
    examples: Sequence[Example],
    *,
    packed: bool,
    many_packed: bool,
    many_padded: bool,
    decodes: bool = False,
) -> None:
    """Raise UserError unless the model does with two short documents what will be asked of it.

    Its logits are finite, and none depends on later tokens.
    packed: a packed row of both gives the logits of each alone. many_packed, many_padded: in such
    rows every adapter layer can apply a diagonal to each document. decodes: and in decoding to each
    answer, for which a layer must see new tokens only, not cached ones. An adapter that is not
    reached is named in a warning.
    """
    # Short ones: what goes wrong goes wrong with two tokens.
    documents = [
        examples[i].tokens[:length] for i, length in zip((0, -1), PROBE_TOKENS, strict=True)
    ]
    device = model.device
    # Opposite signs, so that an entry that is multiplied by the other's is far off.
    p = torch.ones(2, next(iter(adapter_layers(model).values())).rank, device=device)
    p[1] = -1
    alone: list[Calls] = []
    logits = []
    for document, own in zip(documents, p, strict=True):
        with _calls(model, own) as calls:
            ids = torch.tensor([document], device=device)
            mask = torch.ones_like(ids)
            logits.append(model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0])
        alone.append(calls)
    _warn_of_unreached(model, alone)
    for document, found in zip(documents, logits, strict=True):
        _check_logits(model, document, found)
    expected = {
        name: [torch.cat(pair) for pair in zip(*(calls[name] for calls in alone), strict=True)]
        for name in alone[0].keys() & alone[1].keys()
        if len(alone[0][name]) == len(alone[1][name])
    }
    lengths = [len(document) for document in documents]
    if packed:
        found = _check_packed(model, documents, logits, p)
        if many_packed:
            _check_targets(model, expected, found, "packed rows")
    if decodes:
        ids = torch.tensor([documents[0]], device=device)
        cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        with _calls(model, p[0]) as found:
            model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
        last = {name: [rows[-1:] for rows in calls] for name, calls in alone[0].items()}
        _check_targets(model, {name: last.get(name, []) for name in found}, found, "decoding")
    if many_padded:
        mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
        flat = torch.tensor([token for document in documents for token in document])
        ids = torch.zeros(mask.shape, dtype=torch.long).masked_scatter(mask, flat)
        with _calls(model, p[:, None]) as found:
            attended = mask.long().to(device)
            model(input_ids=ids.to(device), attention_mask=attended, use_cache=False)
        kept = mask.flatten().to(device)
        trimmed = {
            name: [rows[kept] if len(rows) == len(kept) else rows[:0] for rows in calls]
            for name, calls in found.items()
        }
        _check_targets(model, expected, trimmed, "padded rows")


def _check_logits(model: PreTrainedModel, document: tuple[int, ...], logits: Tensor) -> None:
    """Raise UserError where the logits of a document are no numbers or depend on later tokens."""
    name = type(model).__name__
    if not bool(logits.isfinite().all()):
        raise UserError(
            f"{name} gives logits that are not finite for the tokens {list(document)} before any "
            "training: its weights are damaged, or too large for model.dtype="
            f"{str(model.dtype).removeprefix('torch.')}; restore the files of the base model"
        )
    if len(document) < 2:
        return
    ids = torch.tensor([document[:-1]], device=model.device)
    before = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    largest = _difference(before, logits[:-1])
    if not float(largest.median()) <= TOLERANCE[model.dtype]:
        raise UserError(
            f"{name} is not causal: what it gives for a token changes with the tokens behind it, "
            "which no answer has while it is generated; use a causal language model"
        )


def _difference(found: Tensor, expected: Tensor) -> Tensor:
    """Relative difference of the logits of each token, (tokens,)."""
    # A number added to all logits of a token changes nothing.
    found, expected = (x - x.mean(-1, keepdim=True) for x in (found.double(), expected.double()))
    return (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-12)


def _check_packed(
    model: PreTrainedModel, documents: Sequence[tuple[int, ...]], alone: Sequence[Tensor], p: Tensor
) -> Calls:
    """Raise UserError unless a packed row gives the logits `alone` of each document.

    p: (2, R). Returns what the adapter layers made of the row.
    """
    device, name = model.device, type(model).__name__
    lengths = [len(document) for document in documents]
    ids = torch.tensor([[token for document in documents for token in document]], device=device)
    # As in training, logits of some tokens only; a layer that sees but those shows it.
    kept = torch.arange(1, sum(lengths), device=device)
    many = p.repeat_interleave(torch.tensor(lengths, device=device), dim=0)[None]
    try:
        with packed_attention(model), _calls(model, many) as calls:
            inputs = packed_inputs(lengths, device)
            found = model(input_ids=ids, use_cache=False, logits_to_keep=kept, **inputs).logits[0]
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        hint = "" if PADDED in reason else f"; set {PADDED}"
        raise UserError(f"{name} does not run on packed rows: {reason}{hint}") from error
    if len(found) != len(kept):
        raise UserError(
            f"{name} gives {len(found)} logits where {len(kept)} are asked for, so it cannot run "
            f"on packed rows; set {PADDED}"
        )
    errors = _difference(found, torch.cat(list(alone))[kept])
    # The median, because where rounding sends a token to another expert it alone differs.
    largest = max(float(part.median()) for part in errors.split([lengths[0] - 1, lengths[1]]))
    if not largest <= TOLERANCE[model.dtype]:
        raise UserError(
            f"{name} gives other logits for a document in a packed row than alone (relative "
            f"difference {largest:.2g}), as models do that ignore position_ids or the documents' "
            f"bounds; set {PADDED}"
        )
    return calls


def _check_targets(model: PreTrainedModel, expected: Calls, found: Calls, rows: str) -> None:
    """Raise UserError, naming targets, where a layer applied other diagonals than its tokens'."""
    wrong = []
    for name in adapter_layers(model):
        if name not in expected and name not in found:
            continue  # not reached
        calls = (expected.get(name, []), found.get(name, []))
        if not (len(calls[0]) == len(calls[1]) and all(map(_alike, *calls))):
            wrong.append(name)
    if wrong:
        targets = sorted({name.rpartition(".")[2] for name in wrong})
        raise UserError(
            f"adapter.targets names {', '.join(targets)}, which cannot be given a diagonal for "
            f"each document of a batch (in {rows}): the layers ({wrong[0]} and {len(wrong) - 1} "
            "more) do not see just the tokens of the batch, in its order. Leave them out of "
            "adapter.targets, or read one rank at a time: eval.engine=hf, and method.draw=step "
            "where the method draws ranks"
        )


def _alike(a: Tensor, b: Tensor) -> bool:
    # Far coarser than rounding, far finer than another token or sign.
    return a.shape == b.shape and float((a - b).norm()) <= 0.5 * float(a.norm())


@contextmanager
def _calls(model: PreTrainedModel, p: Tensor) -> Iterator[Calls]:
    """What `AdapterLinear.scaled` gives with the diagonal `p` for each input in a block.

    p: as `AdapterLinear` takes it. The forwards themselves keep the diagonals that they have, so
    that an input that `p` does not fit is noted (no rows) instead of ending them. Gates are left
    out: where they start at 0, a wrong entry of `p` would not show.
    """
    calls: Calls = defaultdict(list)

    def note(name: str, layer: AdapterLinear, x: Tensor) -> None:
        before, gate = layer.p, layer.lora_gate
        layer.p, layer.lora_gate = p, None
        try:
            scaled = layer.scaled(x).detach().flatten(0, -2).double()
        except (RuntimeError, IndexError):
            scaled = p.new_zeros(0, layer.rank, dtype=torch.float64)
        finally:
            layer.p, layer.lora_gate = before, gate
        calls[name].append(scaled)

    handles = [
        layer.register_forward_pre_hook(lambda layer, args, name=name: note(name, layer, args[0]))
        for name, layer in adapter_layers(model).items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _warn_of_unreached(model: PreTrainedModel, alone: Sequence[Calls]) -> None:
    """Name the adapters that no text reaches; experts that these tokens chose not are left out."""
    reached = set().union(*alone)
    lists = [f"{name}." for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    used = [prefix for prefix in lists if any(name.startswith(prefix) for name in reached)]
    unreached = [
        name
        for name in adapter_layers(model)
        if name not in reached and not any(name.startswith(prefix) for prefix in used)
    ]
    if unreached:
        logger.warning(
            "%d adapters are not reached by text and will not be trained: %s",
            *(len(unreached), ", ".join(unreached[:3])),
        )
