"""The methods under the Trainer of transformers and those built on it, such as TRL's SFTTrainer.

    method = add_method(model, "nested_matryoshka", ["q_proj", "v_proj"], rank=8)
    Trainer(model, args, train_dataset=..., callbacks=[MethodCallback(method)]).train()

The Trainer keeps its own data, batch order, loss, optimizer and schedule. The callback gives every
sample its diagonal, runs the method's hooks in the order of `methods.hooks`, and makes saving write
the adapter alone. With this project's batches, rate and optimizer the training is that of
`training.loop.fit`.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from matryoshka_lora.core.adapter import (
    adapter_parameters,
    adapter_spec,
    set_diagonal,
    set_importance,
)
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.files import write_atomically
from matryoshka_lora.core.layer import AdapterLinear
from matryoshka_lora.core.storage import read_adapter, save_adapter
from matryoshka_lora.methods import Hooks, Method
from matryoshka_lora.training.gradients import add_penalty, clip, gradients_of, rank_square_norms

ADAPTER_FILE = "adapter.safetensors"
"""In each checkpoint of the Trainer, for `load_adapter`."""
STATE_FILE = "method_state.pt"
"""Beside it, what a method has to know to go on, where it has to know anything."""
HELD = "_held_max_grad_norm"
"""Attribute of TrainingArguments with their `max_grad_norm`, while the Trainer must not clip. It is
theirs, so that no training that is broken off leaves them without."""


class MethodCallback(TrainerCallback):
    """Trains the adapters of a model by a method, in one process.

    The draws follow `TrainingArguments.seed`. Where the method changes gradients before they are
    clipped, clipping to `max_grad_norm` happens here: the Trainer has no event before its own.
    """

    def __init__(self, method: Method) -> None:
        """method: the one that the model's adapters were made for, as `add_method` returns it."""
        if not isinstance(method, Method):
            raise UserError(
                f"MethodCallback takes what add_method returns, not a {type(method).__name__}"
            )
        self.method = method
        self._choice: np.ndarray | None = None
        """The choice of each sample of the step that runs; None between steps."""
        self._taken = 0
        """How many of them had their forward."""
        changes = ("penalty", "after_backward")
        kind = type(method.hooks)
        self._clips = any(getattr(kind, name) is not getattr(Hooks, name) for name in changes)
        self._hook: torch.utils.hooks.RemovableHandle | None = None

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Raises UserError where the method cannot be trained so."""
        self._end(args)  # what a training that was broken off has left
        self._check(args, kwargs["model"])
        save_adapter_only(kwargs["model"])

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Raises UserError as `on_init_end` does, which a callback added later has missed."""
        self.on_init_end(args, state, control, **kwargs)
        model = kwargs["model"]
        self._parameters = adapter_parameters(model)
        self._table = self.method.diagonals.to(model.device)
        self.method.hooks.start(self._parameters, kwargs["optimizer"], state.max_steps)
        if state.global_step:
            self._resume(args, state)
        self._hook = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        samples = _samples_of_step(args, state, kwargs["train_dataloader"])
        self._choice = self.method.choose(
            args.seed, state.global_step, samples, state.train_batch_size
        )
        self._taken = 0
        if self._clips:
            vars(args)[HELD], args.max_grad_norm = args.max_grad_norm, 0.0

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        assert self._choice is not None
        hooks = self.method.hooks
        gradients_of(self._parameters)  # zeros where there are none, as hooks and clipping need it
        add_penalty(hooks)
        hooks.after_backward(state.global_step, self._choice)
        if (largest := vars(args).get(HELD) or 0) > 0:  # None and 0: no clipping
            clip(self._parameters, rank_square_norms(self._parameters).sum().sqrt(), largest)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        # The rate that the update had: the schedule moves on after this event.
        lr = kwargs["optimizer"].param_groups[0]["lr"]
        self.method.hooks.after_update(state.global_step, float(lr))
        self._end_step(args)
        set_diagonal(kwargs["model"], self.method.p_full)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        folder = _checkpoint(args, state)
        if not state.is_world_process_zero or not folder.is_dir():
            return
        set_importance(kwargs["model"], self.method.hooks.importance())
        save_adapter(folder / ADAPTER_FILE, kwargs["model"])
        if saved := self.method.hooks.state_dict():
            content = io.BytesIO()
            torch.save(saved, content)
            write_atomically(folder / STATE_FILE, content.getvalue())

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Leaves the model read at full rank, with what the method says of its components."""
        self._end(args)
        set_importance(kwargs["model"], self.method.hooks.importance())

    def _check(self, args: TrainingArguments, model: nn.Module) -> None:
        spec = adapter_spec(model)
        if spec.p_full != tuple(self.method.p_full.tolist()) or spec.gated != self.method.gated:
            raise UserError(
                f"the adapters of the model, of rank {spec.rank}, were made for method "
                f"{spec.method}, not for the one of MethodCallback; use what add_method returned"
            )
        refused = {
            "DataParallel would copy the layers without their diagonals: show the process one GPU "
            "by CUDA_VISIBLE_DEVICES=0": args.n_gpu > 1,
            "draws and hooks are of a whole batch, which several processes split: start one "
            "process, or train with train.py, which takes several": args.world_size > 1,
            "DeepSpeed and FSDP keep gradients where no method can see them": bool(
                args.deepspeed or args.fsdp
            ),
            "fp16=True scales gradients, which methods read: use bf16=True": args.fp16,
            "torch_compile=True would keep the first diagonal: compile nothing": args.torch_compile,
            "load_best_model_at_end=True would mix the best factors with the last importances; "
            "load_adapter the checkpoint that you want": (
                args.load_best_model_at_end
                and type(self.method.hooks).importance is not Hooks.importance
            ),
        }
        for reason, applies in refused.items():
            if applies:
                raise UserError(f"MethodCallback cannot train so: {reason}")
        head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        if isinstance(head, AdapterLinear) and hasattr(args, "completion_only_loss"):
            raise UserError(
                "MethodCallback cannot train so: TRL computes the loss from the head's weight, "
                "past an adapter of the head; leave the head out of the targets"
            )

    def _before_forward(
        self, model: PreTrainedModel, inputs: tuple[Any, ...], named: Mapping[str, Any]
    ) -> None:
        """Give the samples of a training forward their diagonals."""
        if self._choice is None or not model.training or not torch.is_grad_enabled():
            return
        if (self._choice == self._choice[0]).all():
            set_diagonal(model, self._table[self._choice[0]])
            return
        number, shape = _samples_of_forward(inputs, named)
        samples = int(number.max()) + 1
        own = self._choice[self._taken : self._taken + samples]
        if len(own) < samples:
            raise UserError(
                f"a step of {len(self._choice)} rows has more samples than rows, each of which "
                "needs a rank of its own: set packing=False, or use a method that draws one rank "
                "a step"
            )
        self._taken += samples
        choice = torch.from_numpy(own).to(number.device)[number]
        set_diagonal(model, self._table[choice.to(self._table.device)].view(*shape, -1))

    def _resume(self, args: TrainingArguments, state: TrainerState) -> None:
        """Load the method's state from the checkpoint whose adapter the Trainer has loaded.

        The Trainer does not say which one that was.
        """
        if not self.method.hooks.state_dict():
            return
        given = args.resume_from_checkpoint
        folders = [Path(given)] if isinstance(given, str) else []
        folders.append(_checkpoint(args, state))
        for folder in folders:
            if (folder / STATE_FILE).is_file() and self._holds(folder / ADAPTER_FILE):
                content = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
                self.method.hooks.load_state_dict(content)
                return
        raise UserError(
            f"resuming at step {state.global_step}, but no {STATE_FILE} of this adapter lies in "
            f"{' or '.join(map(str, folders))}; name the folder that you resume from in "
            "TrainingArguments(resume_from_checkpoint=FOLDER) too"
        )

    def _holds(self, path: Path) -> bool:
        """Whether a file holds the adapter that the model has now."""
        saved = read_adapter(path).state
        return saved.keys() == self._parameters.keys() and all(
            torch.equal(saved[name], parameter.detach().float().cpu())
            for name, parameter in self._parameters.items()
        )

    def _end_step(self, args: TrainingArguments) -> None:
        self._choice = None
        if HELD in vars(args):
            args.max_grad_norm = vars(args).pop(HELD)

    def _end(self, args: TrainingArguments) -> None:
        self._end_step(args)
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def save_adapter_only(model: PreTrainedModel) -> None:
    """Make `save_pretrained`, and with it the Trainer's checkpoints, leave out the base's weights.

    The Trainer reads such a file back when it resumes; for everything else there is `save_adapter`.
    """
    trained = adapter_parameters(model).keys()
    model._keys_to_ignore_on_save = {name for name in model.state_dict() if name not in trained}


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _samples_of_step(args: TrainingArguments, state: TrainerState, loader: Any) -> int:
    """Samples of the step that begins: all that it may have, or what is left of the epoch."""
    rows = state.train_batch_size
    assert rows is not None
    whole = rows * args.gradient_accumulation_steps
    try:
        batches = len(loader)
        samples = batches * rows if args.dataloader_drop_last else len(loader.dataset)
    except TypeError:  # a stream, whose length nobody knows
        return whole
    done = state.global_step % max(-(-batches // args.gradient_accumulation_steps), 1)
    return min(whole, samples - done * whole)


def _samples_of_forward(
    inputs: tuple[Any, ...], named: Mapping[str, Any]
) -> tuple[Tensor, tuple[int, int]]:
    """(number of the sample of each row or token, counted from 0; the shape (batch, tokens)).

    The second is (rows, 1) for padded rows, and (1, tokens) for one row of several samples without
    padding, each of which starts at position 0.
    """
    tokens = named.get("input_ids", inputs[0] if inputs else named.get("inputs_embeds"))
    positions = named.get("position_ids")
    assert isinstance(tokens, Tensor), "a forward without input"
    if len(tokens) == 1 and isinstance(positions, Tensor):
        return (positions[0] == 0).cumsum(0) - 1, (1, positions.shape[1])
    return torch.arange(len(tokens)), (len(tokens), 1)
