"""Evaluate an adapter at every rank that is missing from the record of its run."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence

from accelerate import Accelerator
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from matryoshka_lora.config import VALIDATION, Config, wanted_points
from matryoshka_lora.core.adapter import adapter_view
from matryoshka_lora.data.examples import Example
from matryoshka_lora.evaluation.engines import make_engine
from matryoshka_lora.evaluation.engines.protocol import Point
from matryoshka_lora.evaluation.held_out import held_out_rows
from matryoshka_lora.evaluation.own_tasks import flat
from matryoshka_lora.evaluation.readings import plan_points
from matryoshka_lora.evaluation.rows import Row
from matryoshka_lora.evaluation.sweep import Source, run_sweep
from matryoshka_lora.evaluation.tasks import EvalTask
from matryoshka_lora.processes import is_sharded
from matryoshka_lora.runs.folder import RunFolder
from matryoshka_lora.runs.progress import Additions, has_points
from matryoshka_lora.runs.provenance import new_phase
from matryoshka_lora.runs.record import Record

logger = logging.getLogger(__name__)


def evaluate(
    config: Config,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Sequence[EvalTask]],
    held_out: Sequence[Example],
    fingerprints: Mapping[str, str],
    record: Record,
    folder: RunFolder,
    accelerator: Accelerator,
    lm: HFLM | None = None,
) -> None:
    """Add the rows of every point that is missing to `record`, saving it after each point.

    fingerprints: of the content behind `tasks` and `held_out`, as `wanted_points` takes them.
    lm: what `check_model` returned.
    """
    main = accelerator.is_main_process
    plan = plan_points(
        adapter_view(model), config.eval_ranks, config.eval.rules, config.train_ranks
    )
    settings = dataclasses.asdict(config.eval)
    phase = new_phase("evaluation", accelerator.num_processes, settings=settings)
    own = {key: value for key, value in fingerprints.items() if key == VALIDATION}
    measured = has_points(record, wanted_points(config, own))
    additions = Additions(record, folder, phase)

    def on_point(source: Source, point: Point, rows: list[Row], computed: bool) -> None:
        additions.add(rows, computed)
        shown = [
            f"{row.metric}{f' ({row.filter})' if row.filter else ''} {row.value:.4f}"
            for row in rows
            if (row.rank, row.rule) == (point.rank, point.rule) and row.value is not None
        ]
        logger.info(
            "%s %d-shot  rank %d %s: %s",
            *(source.name, source.shots, point.rank, point.rule, ", ".join(shown)),
        )

    if held_out and not measured:
        rows = held_out_rows(
            *(model, held_out, plan, config.trainer.packed, accelerator), fingerprints[VALIDATION]
        )
        if main:
            additions.add(rows, computed=True)
    if tasks:
        run_sweep(
            model,
            tokenizer,
            flat(tasks),
            plan,
            make_engine(
                config.eval.engine,
                model,
                tokenizer,
                batch_size=config.eval.batch_size,
                cuda_graphs=config.eval.cuda_graphs,
                lockstep=is_sharded(accelerator),
            ),
            folder.samples,
            identity=record.run_hash,
            lm=lm,
            processes=accelerator,
            on_point=on_point,
        )
    if main:
        truncated = dict((record.evaluation or {}).get("truncated_prompts", {}))
        truncated |= {f"{task.name}:{task.shots}": task.truncated for task in flat(tasks)}
        additions.finish(wanted_points(config, fingerprints), truncated_prompts=truncated)
