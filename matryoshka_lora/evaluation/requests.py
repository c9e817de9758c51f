"""A document's requests, tokenised and truncated as lm-eval's HF backend does it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.api.utils import maybe_delimit
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from matryoshka_lora.core.errors import UserError
from matryoshka_lora.evaluation.engines.protocol import Request


@dataclass(frozen=True)
class DocumentRequests:
    """What is asked about one document."""

    requests: tuple[Request, ...]
    """The harness's own, in its order; behind a generation one for the loss, if there is a gold."""
    gold: int | None
    """Which of them holds the gold target; None where there is none."""
    truncated: bool
    """Whether a prompt lost its beginning."""


def document_requests(
    task: ConfigurableTask, doc_id: int, instances: Sequence[Instance], lm: HFLM
) -> DocumentRequests:
    """The requests of a document, from the harness's instances of it.

    Raises UserError for an answer without tokens and for what does not fit the model's window.
    """
    tokenizer = _DocumentTokenizer(f"task {task.task_name}, document {doc_id}", doc_id, lm)
    requests = [tokenizer.request(instance) for instance in instances]
    if any(r.kind == "loglikelihood" and not r.target for r in requests):
        raise UserError(f"task {task.task_name}, document {doc_id}: an answer has no tokens")
    if instances[0].request_type != "generate_until":
        gold = _gold_choice(task, instances[0].doc, len(instances))
    elif (instance := _gold_instance(task, instances[0])) is not None:
        gold = len(requests)
        requests.append(tokenizer.request(instance))
    else:
        gold = None
    return DocumentRequests(tuple(requests), gold, tokenizer.truncated)


def _gold_instance(task: ConfigurableTask, instance: Instance) -> Instance | None:
    """The gold target after the same context, joined as in the few-shot examples."""
    doc, context = instance.doc, instance.args[0]
    target = task.doc_to_target(doc)
    if isinstance(target, list):  # several are right: the first one stands in the examples
        target = target[0] if target else ""
    if isinstance(target, int) and task.config.doc_to_choice is not None:
        target = task.doc_to_choice(doc)[target]
    if str(target) == "":
        return None
    if prefix := task.doc_to_prefix(doc):
        target = maybe_delimit(prefix, str(target))[len(prefix) :]
    else:
        target = f"{task.config.target_delimiter}{target}"
    return Instance(
        request_type="loglikelihood",
        doc=doc,
        arguments=(context, target),
        idx=1,
        metadata=(task.task_name, instance.doc_id, 1),
    )


def _gold_choice(task: ConfigurableTask, doc: Any, choices: int) -> int | None:
    """Which request holds the right answer, found as `process_results` does; None if none."""
    if task.OUTPUT_TYPE == "loglikelihood":
        return 0
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if isinstance(gold, list):
        gold = gold[0] if gold else None
    if isinstance(gold, str):
        options = task.doc_to_choice(doc)
        gold = options.index(gold) if gold in options else None
    return gold if isinstance(gold, int) and 0 <= gold < choices else None


class _DocumentTokenizer:
    """Makes the requests of one document; what they share is tokenised and kept once."""

    def __init__(self, where: str, doc_id: int, lm: HFLM) -> None:
        self.truncated = False
        self._where = where
        self._doc_id = doc_id
        self._lm = lm
        self._encoded: dict[str, list[int]] = {}
        self._contexts: dict[tuple[int, ...], tuple[int, ...]] = {}

    def request(self, instance: Instance) -> Request:
        """The instance, tokenised and truncated as HFLM does it."""
        if instance.request_type == "generate_until":
            return self._generation(instance)
        return self._loglikelihood(instance)

    def _generation(self, instance: Instance) -> Request:
        """As `HFLM.generate_until`: the context makes room for the answer at its beginning."""
        lm, (context, options) = self._lm, instance.args
        options = normalize_gen_kwargs(options, lm.max_gen_toks)
        room = lm.max_length - options["max_gen_toks"]
        if room < 1 or options["max_gen_toks"] < 1:
            raise UserError(
                f"{self._where}: it asks for {options['max_gen_toks']} new tokens; allowed are 1 "
                f"to {lm.max_length - 1}, what the model's window has beside a token of context; "
                "leave the task out of eval.tasks, or use a model with a longer window"
            )
        eos = lm.tok_decode(lm.eot_token_id, skip_special_tokens=False)
        return Request(
            kind="generate",
            doc_id=self._doc_id,
            context=self._last(self._encode(context), room),
            target=(),
            until=tuple(handle_stop_sequences(options["until"], eos=eos)),
            max_new_tokens=options["max_gen_toks"],
            instance=instance,
        )

    def _loglikelihood(self, instance: Instance) -> Request:
        """As `HFLM.loglikelihood`: the pair loses its beginning where the window is too small."""
        lm, (context, continuation) = self._lm, instance.args
        if context:
            # Spaces between the two belong to the continuation, as tokenizers see them.
            stripped = context.rstrip()
            head = self._encode(stripped)
            target = lm.tok_encode(context + continuation)[len(head) :]
        else:
            target = lm.tok_encode(continuation, add_special_tokens=False)
            head = [lm.prefix_token_id]
            if target[:1] == head:
                head, target = target[:1], target[1:]
        if len(target) > lm.max_length:
            raise UserError(
                f"{self._where}: its target has {len(target)} tokens, the model's window is "
                f"{lm.max_length} tokens"
            )
        return Request(
            kind="loglikelihood",
            doc_id=self._doc_id,
            # The last target token is never fed, hence the one more.
            context=self._last(head, lm.max_length + 1 - len(target)),
            target=tuple(target),
            until=(),
            max_new_tokens=0,
            instance=instance,
        )

    def _encode(self, text: str) -> list[int]:
        if text not in self._encoded:
            self._encoded[text] = self._lm.tok_encode(text)
        return self._encoded[text]

    def _last(self, tokens: list[int], room: int) -> tuple[int, ...]:
        """The last `room` tokens, as the one tuple that equal contexts of the document share."""
        self.truncated = self.truncated or len(tokens) > room
        kept = tuple(tokens[-room:])
        return self._contexts.setdefault(kept, kept)
