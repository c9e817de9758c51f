"""One task of the harness on data of the hub or of a local folder, checked before it is used."""

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import jinja2
from lm_eval.api.task import ConfigurableTask

from matryoshka_lora.core.errors import UserError
from matryoshka_lora.evaluation.definitions import is_own
from matryoshka_lora.evaluation.local_data import read_splits


class HarnessTask(ConfigurableTask):
    """A task of the harness whose documents may come from files and are rendered once."""

    def __init__(
        self,
        config: dict[str, Any],
        splits: dict[str, datasets.Dataset] | None,
        folder: Path | None,
    ) -> None:
        self.folder = folder
        """Where `splits` were read; None for data of the hub."""
        self._splits = splits
        self._rendered: dict[tuple[str, int, int], tuple[Any, Any]] = {}
        super().__init__(config=config)

    @property
    def task_name(self) -> str:
        # The harness's own makes up a name each time it is read, from the global random state.
        return self.config.task

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self._splits is None:
            super().download(dataset_kwargs, **kwargs)
        else:
            self.dataset = self._splits

    def fewshot_docs(self) -> Any:
        """Without shots no examples are drawn, so their split need not be there."""
        return super().fewshot_docs() if self.config.num_fewshot else None

    def doc_to_text(self, doc: Any, doc_to_text: Any = None) -> Any:
        return self._once("text", super().doc_to_text, doc, doc_to_text)

    def doc_to_target(self, doc: Any, doc_to_target: Any = None) -> Any:
        return self._once("target", super().doc_to_target, doc, doc_to_target)

    def doc_to_choice(self, doc: Any, doc_to_choice: Any = None) -> Any:
        return self._once("choice", super().doc_to_choice, doc, doc_to_choice)

    def _once(self, what: str, render: Callable[..., Any], doc: Any, template: Any) -> Any:
        """The harness compiles a template anew for every use, and few-shot examples recur."""
        key = (what, id(doc), id(template))
        if key not in self._rendered:
            # The document is kept, so that its id cannot become that of another one.
            self._rendered[key] = (render(doc, template), doc)
        return self._rendered[key][0]


def make_task(config: dict[str, Any], shots: int, data_path: Path | None) -> HarnessTask:
    """The task that `config` defines, with its data. Changes `config`.

    data_path: see `load_tasks`. Raises UserError for a task that is not supported, for shots that
    it cannot give, and for data that is missing or does not fit.
    """
    name = config["task"]
    for key in ("tag", "group", "task_list", "include"):
        config.pop(key, None)
    _check_kind(name, config, shots)
    config["num_fewshot"] = shots
    splits, folder = None, None
    if data_path is not None:
        splits, folder = read_splits(name, config, shots, data_path)
    elif is_own(name):
        raise UserError(f"task {name} has no data of its own: name a folder by eval.data_path")
    try:
        with without_progress_bars():
            task = HarnessTask(config, splits, folder)
    except ImportError as error:
        raise UserError(
            f"task {name} needs a package that is not installed: {str(error).splitlines()[0]}"
        ) from None
    except Exception as error:  # of the hub, of datasets, or of a template of the task
        raise UserError(_load_failure(name, config, folder, error)) from error
    _check_shots(task, shots)
    return task


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """The harness and datasets show a bar or more a task, which would hide the sweep's lines."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def reason(error: Exception) -> str:
    """What a task's template, function or data failed with, in a few words."""
    if isinstance(error, jinja2.UndefinedError | KeyError):
        return f"it lacks a field ({error})"
    return f"{type(error).__name__}: {error}"


def _check_kind(name: str, config: dict[str, Any], shots: int) -> None:
    """Raises UserError for tasks that cannot be asked greedily, one request at a time."""
    generation = config.get("generation_kwargs") or {}
    plain = {"do_sample", "temperature", "until", "max_gen_toks", "max_new_tokens", "max_tokens"}
    problem = None
    if "class" in config:
        problem = "is written in Python, not YAML"
    elif config.get("output_type") == "loglikelihood_rolling":
        problem = "asks for the likelihood of whole documents"
    elif config.get("doc_to_image") or config.get("doc_to_audio"):
        problem = "needs images or sound"
    elif config.get("unsafe_code"):
        problem = "runs code that the model wrote"
    elif config.get("repeats", 1) != 1:
        problem = f"asks for {config['repeats']} answers a document"
    elif generation.get("do_sample") or generation.get("temperature"):
        problem = "samples its answers"
    elif extra := sorted(generation.keys() - plain - {"top_p", "top_k"}):
        problem = f"sets generation options {extra}"
    if problem:
        raise UserError(f"task {name} {problem}; this is not supported, choose another task")
    if config.get("num_fewshot") == 0 and shots:
        raise UserError(
            f"task {name} fixes its number of shots at 0 (the harness ignores any other); "
            f"got {shots}"
        )


def _check_shots(task: HarnessTask, shots: int) -> None:
    """Raises UserError where the few-shot split has too few examples."""
    if not shots:
        return
    available = len(task.sampler.df)
    # Drawn from the evaluated split itself, one more is needed: the document may be among them.
    own_split = task.fewshot_cfg.split == task.config.test_split
    if shots > available - own_split:
        raise UserError(
            f"task {task.task_name}: {shots} shots are more than its few-shot split can give "
            f"({available - own_split} examples)"
        )


def _load_failure(name: str, config: dict[str, Any], folder: Path | None, error: Exception) -> str:
    if folder is not None:
        return f"task {name} cannot use the data in {folder}: {reason(error)}"
    return (
        f"the data of task {name} ({config.get('dataset_path')}) cannot be loaded: "
        f"{reason(error)}. Without network use a local copy: eval.data_path=FOLDER"
    )
