"""Every YAML composes and validates; every wrong value gives one clear error."""

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from matryoshka_lora.cli import settings
from matryoshka_lora.config import (
    COLUMNS,
    Config,
    affecting,
    build_config,
    run_hash,
    variant,
    wanted_points,
)
from matryoshka_lora.methods import METHODS
from matryoshka_lora.runs.folder import run_path

CONFIGS = ROOT / "configs"
ConfigStore.instance().store(name="schema", node=Config)


def composed(tmp_path, *overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return build_config(compose("train", overrides=[f"output_dir={tmp_path}", *overrides]))


CHOICES = [
    f"{path.parent.relative_to(CONFIGS)}={path.stem}"
    for path in sorted(CONFIGS.rglob("*.yaml"))
    if path.parent != CONFIGS and path.parent.name != "accelerate"
]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_file_composes_and_validates(tmp_path, choice):
    composed(tmp_path, choice)


def test_every_method_has_a_file():
    assert {path.stem for path in (CONFIGS / "method").glob("*.yaml")} == set(METHODS)


def test_models_choose_their_data_and_an_explicit_choice_wins(tmp_path):
    config = composed(tmp_path, "model=llama3_8b")
    assert config.dataset.name == "gsm8k" and config.tasks == [("gsm8k", 3), ("gsm8k", 8)]
    assert config.model.dtype == "bfloat16"
    assert composed(tmp_path, "model=llama3_8b", "dataset=platypus").dataset.name == "platypus"


def test_the_papers_recipe(tmp_path):
    config = composed(tmp_path, "recipe=paper", "model=llama3_1b")
    assert (config.adapter.init, config.adapter.dtype) == ("paper", "bfloat16")
    assert (config.dataset.prompt, config.method.draw) == ("paper", "micro_batch")
    assert config.eval.rules == ["prefix"]
    assert composed(tmp_path, "recipe=paper", "adapter.init=lora").adapter.init == "lora"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.rank=0", "adapter.rank=0.*not a positive integer"),
        ("adapter.rank=-4", "not a positive integer"),
        ("adapter.train_ranks=[1,64]", "rank 64 is above the adapter's rank 32"),
        ("adapter.train_ranks=[2,1]", "strictly increasing"),
        ("adapter.train_ranks=[]", "empty"),
        ("adapter.scaling=half", "adapter.scaling=half is unknown; allowed: none, sqrt, rank"),
        ("adapter.init=zero", "adapter.init=zero is unknown"),
        ("adapter.targets=[]", "must name at least one layer"),
        ("adapter.targets=[q_proj,q_proj]", "each once"),
        ("eval.rules=[]", "at least one rule"),
        ("eval.rules=[svd,svd]", "each once"),
        ("eval.ranks=[]", "eval.ranks is empty"),
        ("trainer.weight_decay=nan", "trainer.weight_decay=nan"),
        ("method=nested_dropout method.weights=[nan,1,1,1,1,1]", "positive sum"),
        ("model.dtype=float16", "model.dtype=float16 is unknown"),
        ("trainer.lr=0", "trainer.lr=0"),
        ("trainer.lr=-1", "trainer.lr=-1"),
        ("trainer.lr=inf", "trainer.lr=inf"),
        ("trainer.lr=nan", "trainer.lr=nan"),
        ("trainer.epochs=0", "trainer.epochs=0"),
        ("trainer.effective_batch=0", "trainer.effective_batch=0"),
        ("trainer.micro_batch=0", "trainer.micro_batch=0.*or null"),
        ("trainer.max_steps=0", "trainer.max_steps=0"),
        ("dataset.validation=1", "dataset.validation=1.0 must be in"),
        ("dataset.prompt=chat", "dataset.prompt=chat is unknown"),
        ("method=nested_dropout method.weights=[1,2]", "2 values for the 6 trained sub-ranks"),
        ("method=nested_dropout method.weights=[0,0,0,0,0,0]", "positive sum"),
        ("method=dylora method.draw=epoch", "method.draw=epoch is unknown"),
        ("eval.rules=[best]", "eval.rules=best is unknown"),
        ("eval.ranks=[64]", "eval.ranks: rank 64 is above"),
        ("eval.ranks=[4,2]", "strictly increasing"),
        ("eval.tasks=[gsm8k]", "is not name:shots"),
        ("eval.tasks=['gsm8k:1','gsm8k:1']", "names a task twice"),
        ("eval.limit=0", "eval.limit=0"),
        ("eval.engine=vllm", "eval.engine=vllm is unknown"),
        ("seed=-1", "seed=-1"),
    ],
)
def test_wrong_values_are_refused(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        composed(tmp_path, *override.split())


def test_checking_settings_writes_nothing(tmp_path):
    composed(tmp_path, f"output_dir={tmp_path / 'new'}")
    assert not (tmp_path / "new").exists()


OTHER_VALUES = {
    "model.name": "other/model",
    "model.path": "elsewhere",
    "model.dtype": "bfloat16",
    "dataset.name": "gsm8k",
    "dataset.validation": 0.05,
    "dataset.prompt": "paper",
    "method.name": "lora",
    "method.normalise": "mean",
    "method.draw": "sample",
    "method.weights": [6.0, 1, 1, 1, 1, 1],
    "adapter.rank": 64,
    "adapter.train_ranks": [1, 32],
    "adapter.scaling": "rank",
    "adapter.targets": ["q_proj"],
    "adapter.init": "paper",
    "adapter.dtype": "bfloat16",
    "eval.tasks": ["gsm8k:0"],
    "eval.ranks": [1, 4],
    "eval.rules": ["svd"],
    "eval.engine": "hf",
}
"""Valid values that are not the default, where adding 1, or a text, makes none."""


def other_value(key, value):
    if key in OTHER_VALUES:
        return OTHER_VALUES[key]
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int | float) else 3 if value is None else value + "-other"


def changed(config, key):
    config = copy.deepcopy(config)
    section, _, name = key.rpartition(".")
    node = getattr(config, section) if section else config
    setattr(node, name, other_value(key, getattr(node, name)))
    return config


def points_of(config):
    entries = [*config.eval.tasks, "validation"]
    return wanted_points(config, dict.fromkeys(entries, "content"))


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_changes_what_it_says(tmp_path, method):
    config = composed(tmp_path, f"method={method}", "eval.tasks=['gsm8k:3']")
    identity = ({"name": "m"}, "data")
    seen = set()
    for effect in ("adapter", "evaluation", "fingerprint", "nothing"):
        for key in affecting(config, effect):
            if (key, method) == ("method.name", "lora"):
                continue
            seen.add(key)
            other = changed(config, key)
            hashes = run_hash(config, *identity) != run_hash(other, *identity)
            assert hashes == (effect == "adapter"), key
            # Only these two: R is where the ranks to read end, and validation has points.
            points = points_of(config) != points_of(other)
            also = key in ("adapter.rank", "dataset.validation")
            assert points == (effect == "evaluation" or also), key
            if key not in ("method.name", "adapter.rank"):  # on these other settings depend
                kept_apart = variant(config, *identity) != variant(other, *identity)
                assert kept_apart == (effect == "adapter" and key not in COLUMNS), key
    assert seen | {"method.name"} == {key for key, _, _ in settings()}


def test_content_behind_paths_is_part_of_the_hash_and_of_the_variant(tmp_path):
    config = composed(tmp_path)
    for other in (({"name": "n", "weights": "x"}, "data"), ({"name": "m"}, "other")):
        assert run_hash(config, *other) != run_hash(config, {"name": "m"}, "data")
        assert variant(config, *other) != variant(config, {"name": "m"}, "data")


def test_micro_batches_are_part_of_the_hash_only_where_each_draws_a_rank(tmp_path):
    def hash_of(*overrides):
        return run_hash(composed(tmp_path, *overrides), {"name": "m"}, "data")

    for draw, differ in (("step", False), ("micro_batch", True)):
        given = ("method=dylora", f"method.draw={draw}")
        hashes = {hash_of(*given, f"trainer.micro_batch={n}") for n in (4, 8)}
        assert len(hashes) == 1 + differ


def test_the_folder_of_a_run(tmp_path):
    expected = "runs/arithmetic/tiny/matryoshka-r32-none/lr0.006-seed42-01234567"
    assert run_path(composed(tmp_path), "01234567") == tmp_path / expected


def test_help_lists_every_setting_and_group():
    done = subprocess.run(
        [sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
    for key, _, meaning in settings():
        assert key in done.stdout and meaning in done.stdout
    for group in ("model", "dataset", "method", "recipe", "eval", "sweep", "tracking"):
        for path in (CONFIGS / group).glob("*.yaml"):
            assert path.stem in done.stdout
    for name in (f.name for f in dataclasses.fields(Config)):
        assert name in done.stdout


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method=matroshka", "did you mean matryoshka"),
        ("model=llama3", "allowed: llama3_1b, llama3_8b"),
        ("dataset=gsm", "did you mean gsm8k"),
        ("mehtod=lora", "did you mean method"),
        ("adapter.rnak=3", "did you mean rank"),
        ("adapter.rank=abc", "abc"),
        ("adapter.rank=0", "not a positive integer"),
    ],
)
def test_the_command_line_shows_one_line_and_exits_with_1(tmp_path, override, message):
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), override],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert "Traceback" not in done.stderr
    assert not list(Path(tmp_path).rglob("*.safetensors"))
