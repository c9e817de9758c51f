"""Every YAML composes and validates; every wrong value gives one clear error."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from matryoshka_lora.cli import settings
from matryoshka_lora.config import Config, build_config, run_folder, run_hash
from matryoshka_lora.methods import METHODS

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
        ("method.weights=[nan,1,1,1,1,1]", "positive sum"),
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
        ("method.weights=[1,2]", "2 values for the 6 trained sub-ranks"),
        ("method.weights=[0,0,0,0,0,0]", "positive sum"),
        ("method.draw=epoch", "method.draw=epoch is unknown"),
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
        composed(tmp_path, override)


def test_a_file_in_the_folders_place(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written.*choose another folder"):
        composed(tmp_path, f"output_dir={tmp_path / 'file'}")


def test_the_hash_covers_what_changes_the_adapter_and_nothing_else(tmp_path):
    def hash_of(*overrides):
        return run_hash(composed(tmp_path, *overrides), {"name": "m"}, "data")

    reference = hash_of()
    for same in (
        "eval.limit=3",
        "eval.engine=hf",
        "tracking=wandb",
        "trainer.micro_batch=4",
        "trainer.save_every=7",
        "trainer.compile=true",
        "dataset.path=elsewhere",
        "method.draw=sample",  # means nothing to MatryoshkaLoRA
    ):
        assert hash_of(same) == reference, same
    changes = [
        *("seed=1", "trainer.lr=1e-5", "trainer.epochs=1", "trainer.effective_batch=16"),
        *("adapter.rank=16", "adapter.scaling=rank", "adapter.init=paper", "model.dtype=bfloat16"),
        *("method=lora", "method.normalise=mean", "dataset.prompt=paper", "adapter.dtype=bfloat16"),
    ]
    hashes = {hash_of(change) for change in changes}
    assert len(hashes | {reference}) == len(changes) + 1
    assert run_hash(composed(tmp_path), {"name": "m"}, "other") != reference
    config = composed(tmp_path)
    expected = f"runs/arithmetic/tiny/matryoshka-r32-none/lr0.006-seed42-{reference}"
    assert run_folder(config, reference) == tmp_path / expected


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
