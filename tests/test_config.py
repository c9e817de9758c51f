"""Every YAML composes and validates; every wrong value gives one clear error."""

import copy
import dataclasses
import pkgutil
import re
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from matryoshka_lora.cli import LogHandler, exit_with_one_line, one_line, settings
from matryoshka_lora.config import (
    COLUMNS,
    Config,
    adapter_spec_of,
    affecting,
    build_config,
    check_given,
    quote_texts,
    read_config,
    recorded,
    run_hash,
    typed_config,
    variant,
    wanted_points,
)
from matryoshka_lora.config.reading import known_rate
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.inputs import prepare
from matryoshka_lora.methods import TRAINED
from matryoshka_lora.runs.folder import run_path

CONFIGS = ROOT / "configs"
ConfigStore.instance().store(name="schema", node=Config)


def composed(tmp_path, *overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return build_config(compose("train", overrides=[f"output_dir={tmp_path}", *overrides]))


CHOICES = [
    f"{path.parent.relative_to(CONFIGS)}={path.stem}"
    for path in sorted(CONFIGS.rglob("*.yaml"))
    if path.parent != CONFIGS and path.parent.name not in ("accelerate", "evidence")
]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_file_composes_and_validates(tmp_path, choice):
    composed(tmp_path, choice)


def test_every_method_has_a_file():
    assert {path.stem for path in (CONFIGS / "method").glob("*.yaml")} == set(TRAINED)


def test_models_choose_their_data_and_an_explicit_choice_wins(tmp_path):
    config = composed(tmp_path, "model=llama3_8b")
    assert config.dataset.name == "gsm8k" and config.tasks == [("gsm8k", 3), ("gsm8k", 8)]
    assert config.model.dtype == "bfloat16"
    assert composed(tmp_path, "model=llama3_8b", "dataset=platypus").dataset.name == "platypus"


@pytest.mark.parametrize("method", TRAINED)
def test_the_recipes_set_the_same_keys_and_the_default_one_what_is_default(tmp_path, method):
    given = {}
    for name in ("default", "paper"):
        content = OmegaConf.load(CONFIGS / "recipe" / f"{name}.yaml")
        given[name] = {f"{s}.{key}" for s, node in content.items() for key in node}
    assert given["paper"] == given["default"] | {"trainer.micro_batch", "eval.rules"}
    config = composed(tmp_path, f"method={method}")
    plain = Config()
    for key in given["default"]:
        assert attrgetter(key)(config) == attrgetter(key)(plain), key
    # Those that came later leave the hashes of earlier runs as they are.
    for key in ("adapter.float32_diagonal", "dataset.keep_masked", "trainer.round_steps"):
        assert key not in affecting(config, "adapter")
    # Learned methods refuse the paper's rule.
    paper = composed(tmp_path, f"method={method}", "recipe=paper", "eval.rules=null")
    for key in ("method.independent", "method.draw"):
        assert (key in affecting(paper, "adapter")) == (method == "dylora")


def test_the_papers_recipe(tmp_path):
    config = composed(tmp_path, "recipe=paper", "model=llama3_1b")
    assert (config.adapter.init, config.adapter.dtype) == ("paper", "bfloat16")
    assert (config.dataset.prompt, config.method.draw) == ("paper", "micro_batch")
    assert config.eval.rules == ["prefix"]
    assert config.adapter.float32_diagonal and config.dataset.keep_masked
    assert config.method.independent and config.trainer.round_steps == "up"
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
        ("model.quantization=nf3", "model.quantization=nf3 is unknown; allowed: nf4, int8"),
        ("model.quantization=nf4 trainer.compile=true", "nor captured; set trainer.compile=false$"),
        (
            "model.quantization=int8 trainer.cuda_graphs=true eval.cuda_graphs=true",
            "set trainer.cuda_graphs=false eval.cuda_graphs=false$",
        ),
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
        ("method=nested_matryoshka method.weights=[1,2]", "2 values for the 6 trained sub-ranks"),
        ("method=nested_matryoshka method.decay=nan", "method.decay=nan must be 0 or a positive"),
        (
            "method=nested_matryoshka method.decay=100",
            "method.decay=100.0 is too large: .*at adapter.rank=32; choose a smaller",
        ),
        (
            "method=matryoshka method.decay=0.5 method.normalise=mean",
            "with method.decay=0.5 P is none; leave one of the two out",
        ),
        ("method=nested_matryoshka method.decay=-1", "method.decay=-1.0 must be 0 or a positive"),
        ("method=adalora method.target_rank=33", "target_rank=33 must be 1 to adapter.rank=32"),
        ("method=adalora method.target_rank=0", "target_rank=0 must be 1 to adapter.rank=32"),
        ("method=adalora method.warmup=0.7", "leave no steps to mask in"),
        ("method=adalora method.settle=1", r"method.settle=1.0 must be in \[0, 1\)"),
        ("method=adalora method.mask_every=0", "method.mask_every=0"),
        ("method=adalora method.orthogonality=inf", "method.orthogonality=inf"),
        ("method=adalora method.beta2=1", "method.beta2=1.0 must be in"),
        ("method=sora method.sparsity=nan", "method.sparsity=nan must be 0 or a positive number"),
        ("method=sora eval.rules=[prefix]", "prefix is refused at rank 1: it drops the diagonal"),
        (
            "method=adalora eval.rules=[svd,trained]",
            "trained is refused at rank 1.*adalora stand in no order of rank; allowed there: svd",
        ),
        ("method=dylora method.draw=epoch", "method.draw=epoch is unknown"),
        ("eval.rules=[best]", "eval.rules=best is unknown"),
        ("eval.ranks=[64]", "eval.ranks: rank 64 is above"),
        ("eval.ranks=[4,2]", "strictly increasing"),
        ("eval.tasks=[gsm8k]", "is not name:shots"),
        ("eval.tasks=['gsm8k:1','gsm8k:1']", "names a task twice"),
        ("eval.limit=0", "eval.limit=0"),
        ("eval.engine=vllm", "eval.engine=vllm is unknown"),
        ("seed=-1", "seed=-1"),
        ("seed=18446744073709551616", "seed=18446744073709551616 must be from 0 to 2"),
        ("adapter.rank=1000000000000", "adapter.rank=1000000000000 is above 65,536, wider than"),
        ("trainer.lr=1e300", r"trainer.lr=1e\+300 must be a positive number of at most 1,000"),
        ("trainer.epochs=1e300", r"trainer.epochs=1e\+300 .* at most 1,000,000,000"),
        ("trainer.max_steps=1000000000000", "at most 1,000,000,000 or null"),
        (
            "trainer.weight_decay=1e300 trainer.lr=6e-3",
            r"weight_decay=1e\+300 .* of at most 1 / trainer.lr = 166",
        ),
        ("trainer.weight_decay=-1", "trainer.weight_decay=-1.0 must be 0 or"),
        ("trainer.round_steps=down", "trainer.round_steps=down is unknown; allowed: nearest, up"),
    ],
)
def test_wrong_values_are_refused(tmp_path, override, message):
    with pytest.raises(ValueError, match=message):
        composed(tmp_path, *override.split())


def test_a_decay_that_is_no_number_is_refused(tmp_path):
    with pytest.raises(ConfigCompositionException) as error:
        composed(tmp_path, "method=nested_matryoshka", "method.decay=fast")
    assert "'fast' of type 'str' could not be converted to Float" in str(error.value.__cause__)


def test_null_reads_by_every_rule_that_the_method_allows_at_a_rank(tmp_path):
    for method, rules in (
        ("lora", {1: "prefix trained svd global", 32: "prefix trained svd global"}),
        ("sora", {1: "svd global", 32: "trained svd global"}),
    ):
        config = composed(tmp_path, f"method={method}", "eval.ranks=[1,32]", "eval=arithmetic")
        points = [point.rpartition(" ")[2] for point in points_of(config)]
        assert points == [f"{rule}@{r}" for r, of_rank in rules.items() for rule in of_rank.split()]


def test_checking_settings_writes_nothing(tmp_path):
    composed(tmp_path, f"output_dir={tmp_path / 'new'}")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+trainer.learning_rate=0.5", "Key 'learning_rate' not in 'TrainerConfig'"),
        ("++trainer.lr_max=0.5", "Key 'lr_max' not in 'TrainerConfig'"),
        ("+method.frozn=true", "Key 'frozn' not in 'MethodConfig'"),
        ("+epochs=3", "Key 'epochs' not in 'Config'; allowed: model, dataset"),
    ],
)
def test_added_keys_are_refused(tmp_path, override, message):
    with pytest.raises(OmegaConfBaseException) as caught:
        composed(tmp_path, override)
    assert message in one_line(caught.value)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("output_dir=20240101_1200", "output_dir='20240101_1200'"),
        ("++output_dir=1e5", "++output_dir='1e5'"),
        ("model.revision=1e5,main,0012", "model.revision='1e5',main,0012"),
        ("dataset.subset=true", "dataset.subset='true'"),
        ("model.path=/data/дата", "model.path='/data/дата'"),
        ("model.path=a(1)~b=c'd,e&f", "model.path='a(1)~b=c\\'d','e&f'"),
        ("model.path=choice(a,1)", None),
        ("model.path=1e5,a/b", "model.path='1e5',a/b"),
        ("model.path=1e5,a=b", "model.path='1e5','a=b'"),
        ("model.path=[a", None),
        ("model.path='a", None),
        ("model.path=", None),
        ("model.path=null", None),
        ("output_dir='7'", None),
        ("output_dir=${seed}", None),
        ("output_dir=runs/1", None),
        ("trainer.lr=1e5", None),
        ("seed=1_0", None),
        ("model=llama3_8b", None),
        ("-m", None),
    ],
)
def test_a_text_stays_as_typed(given, expected):
    assert quote_texts([given]) == [expected or given]


def test_a_folder_named_like_a_number(tmp_path):
    path = "/tmp/Übung (1)[2]~it's=a#b&c\\"
    given = ["output_dir=20240101_1200", "model.revision=1e5", f"dataset.path={path}"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        node = compose("train", quote_texts(given))
    config = typed_config(node)
    assert (config.output_dir, config.model.revision) == ("20240101_1200", "1e5")
    assert config.dataset.path == path


UNREAD = [
    ("method=lora method.frozen=true", "method.frozen is given, but method=lora", "only dylora"),
    (
        "method=matryoshka method.weights=[1,2]",
        "method=matryoshka does not read it",
        "only dylora, nested_dropout",
    ),
    ("method=nested_dropout +method.normalise=mean", "does not read it", "only matryoshka"),
]


@pytest.mark.parametrize(("overrides", "message", "readers"), UNREAD)
def test_settings_of_other_methods_are_refused(tmp_path, caplog, overrides, message, readers):
    config = composed(tmp_path, *[o.lstrip("+") for o in overrides.split()])
    with pytest.raises(UserError, match=f"{message}.*{readers}"):
        check_given(config, overrides.split())
    check_given(config, overrides.split(), swept=True)  # may be meant for another of the sweep
    assert readers in caplog.text
    check_given(config, ["recipe=paper", "experiment=table2"])  # files may set them for all


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("trainer.max_tokens=9 trainer.micro_batch=8", "trainer.micro_batch=8 sizes the forwards"),
        ("trainer.max_tokens=9", None),
        ("eval.batch_size=8", "it is for eval.engine=hf, not batched"),
        ("eval.batch_size=8 eval.engine=hf", None),
        ("eval.cuda_graphs=true eval.engine=hf", "it is for eval.engine=batched, not hf"),
        (
            "method=nested_dropout adapter.train_ranks=[32] method.weights=[1]",
            "there is one trained sub-rank, 32",
        ),
        (
            "method=nested_matryoshka adapter.train_ranks=[32] method.weights=[1]",
            "there is one trained sub-rank, 32",
        ),
        (
            "method=matryoshka adapter.train_ranks=[16] method.normalise=mean",
            "there is one trained sub-rank, 16",
        ),
        ("method=matryoshka adapter.train_ranks=[8,32] method.normalise=mean", None),
        ("method=adalora method.mask_every=5", None),
        (
            "method=adalora adapter.rank=8 method.mask_every=5",
            "method.target_rank=8 keeps all components",
        ),
        ("method=dylora adapter.train_ranks=[8,32] method.weights=[1,2]", None),
        ("method=dylora method.independent=true", "method.draw=step draws one rank a step"),
        ("method=dylora method.independent=true method.draw=sample", None),
        ("method=lora adapter.train_ranks=[1,32]", "method=lora trains R alone"),
        ("adapter.float32_diagonal=true", "model.dtype=float32 rounds nothing"),
        ("trainer.round_steps=up", "trainer.epochs=3 is whole"),
        ("trainer.round_steps=up trainer.epochs=0.5", None),
        ("tracking.project=mine", "tracking=none tracks nothing"),
        ("tracking=wandb tracking.project=mine", None),
        ("model.revision=v2", "the model is the embedded one"),
        ("dataset.revision=v2 dataset.path=here", "dataset.path=here is read"),
        ("model=llama3_8b model.revision=v2 dataset.revision=v2", None),
        ("hydra.verbose=true +trainer.lr=1", None),
    ],
)
def test_a_given_setting_that_changes_nothing_is_said(tmp_path, caplog, override, reason):
    config = composed(tmp_path, *[o.lstrip("+") for o in override.split()])
    check_given(config, override.split())
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (reason is not None)
    assert reason is None or said[0].endswith(f"is given, but changes nothing: {reason}")


OTHER_VALUES = {
    "model.name": "other/model",
    "model.path": "elsewhere",
    "model.dtype": "bfloat16",
    "model.quantization": "nf4",
    "dataset.name": "gsm8k",
    "dataset.validation": 0.05,
    "dataset.prompt": "paper",
    "method.name": "lora",
    "method.normalise": "mean",
    "method.draw": "sample",
    "method.weights": [6.0, 1, 1, 1, 1, 1],
    "method.decay": 0.5,
    "method.warmup": 0.2,
    "method.settle": 0.2,
    "method.beta1": 0.9,
    "method.beta2": 0.9,
    "adapter.rank": 64,
    "adapter.train_ranks": [1, 32],
    "adapter.scaling": "rank",
    "adapter.targets": ["q_proj"],
    "adapter.init": "paper",
    "adapter.dtype": "bfloat16",
    "trainer.round_steps": "up",
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


def test_a_record_holds_no_settings_of_other_methods(tmp_path):
    config = composed(tmp_path, "method=nested_matryoshka", "method.decay=0.5")
    content = recorded(config)
    assert content["method"]["decay"] == 0.5 and "target_rank" not in content["method"]
    assert read_config(content, "record") == config


def points_of(config):
    entries = [*config.eval.tasks, "validation"]
    return wanted_points(config, dict.fromkeys(entries, "content"))


@pytest.mark.parametrize("method", TRAINED)
def test_every_setting_changes_what_it_says(tmp_path, method):
    config = composed(tmp_path, f"method={method}", "eval.tasks=['gsm8k:3']")
    identity = ({"name": "m"}, "data")
    seen = set()
    for declared in ("adapter", "evaluation", "fingerprint", "nothing"):
        for key in affecting(config, declared):
            if (key, method) == ("method.name", "lora"):
                continue
            seen.add(key)
            other, effect = changed(config, key), declared
            if key in affecting(other, "adapter"):  # a later setting, at its default in `config`
                effect = "adapter"
            hashes = run_hash(config, *identity) != run_hash(other, *identity)
            assert hashes == (effect == "adapter"), key
            # R is where the ranks to read end, validation has points, and where the components of
            # a method stand in no order, fewer rules are allowed.
            points = points_of(config) != points_of(other)
            also = key in ("adapter.rank", "dataset.validation")
            also |= key == "method.name" and not adapter_spec_of(config).ordered
            assert points == (effect == "evaluation" or also), key
            if key not in ("method.name", "adapter.rank"):  # on these other settings depend
                kept_apart = variant(config, *identity) != variant(other, *identity)
                assert kept_apart == (effect == "adapter" and key not in COLUMNS), key
    assert seen | {"method.name"} == {key for key, _, _ in settings(Config())}


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


def test_what_trains_r_alone_has_r_among_its_ranks_whatever_s_is_given(tmp_path):
    """Else its reading at R would be marked as one that training never visited."""
    given = "adapter.train_ranks=[1,4]"
    assert composed(tmp_path, "method=lora", "adapter.rank=8", given).train_ranks == [1, 2, 4, 8]
    assert composed(tmp_path, "method=dylora", "adapter.rank=8", given).train_ranks == [1, 4]


def test_the_folder_of_a_run(tmp_path):
    expected = "runs/arithmetic/tiny/dylora-r32-none/lr0.006-seed42-01234567"
    config = composed(tmp_path, "method=dylora", "trainer.lr=6e-3")
    assert run_path(config, "01234567") == tmp_path / expected


def test_hydra_logs_so_that_a_broken_pipe_ends_the_run():
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        node = compose("train", return_hydra_config=True).hydra
    for logs in (node.job_logging, node.hydra_logging):
        assert pkgutil.resolve_name(logs.handlers.console["class"]) is LogHandler


def test_help_lists_every_setting_and_group(tmp_path):
    done = subprocess.run(
        [sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
    shown = done.stdout
    plain = composed(tmp_path)
    plain.output_dir, plain.trainer.lr = "results", None  # which only `composed` gives
    for key, value, meaning in settings(plain):
        assert re.search(
            rf"^  {re.escape(key)} +{re.escape(meaning)} \[{re.escape(value)}\]$", shown, re.M
        )
    assert plain.method.name == "nested_matryoshka"  # the schema itself has another
    for group in ("model", "dataset", "method", "recipe", "eval", "sweep", "tracking"):
        for path in (CONFIGS / group).glob("*.yaml"):
            assert path.stem in shown
    for name in (f.name for f in dataclasses.fields(Config)):
        assert name in shown


def test_a_method_without_a_known_rate_is_told_to_be_given_one():
    config = Config()
    config.method.name = "mynew"
    expected = (
        r"has no rate for method mynew on model tiny; give trainer.lr, such as trainer.lr=1e-3$"
    )
    with pytest.raises(UserError, match=expected) as raised:
        known_rate(config)
    assert "\n" not in str(raised.value)


def test_a_limit_on_what_is_trained_on_leaves_the_held_out_records(tmp_path):
    config = composed(tmp_path, "dataset.limit=100", "dataset.validation=0.2")
    whole = prepare(config)
    config.dataset.train_limit = 10
    part = prepare(config)
    assert (len(whole.train), len(whole.held_out)) == (80, 20)
    assert part.held_out == whole.held_out and part.train == whole.train[:10]
    assert part.run_hash != whole.run_hash


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=llama3", "allowed: gemma3_270m, llama3_1b, llama3_70b, llama3_8b"),
        ("dataset=gsm", "did you mean gsm8k"),
        ("mehtod=lora", "did you mean method"),
        ("adapter.rnak=3", "did you mean rank"),
        ("adapter.rank=abc", "abc"),
        ("method.frozen=true", "method=nested_matryoshka does not read it, only dylora"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_is_allowed(tmp_path, override, message, capsys):
    with pytest.raises(SystemExit), exit_with_one_line():
        check_given(composed(tmp_path, override), [override])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


@pytest.mark.parametrize(
    ("override", "message"),
    [  # Hydra finds the one, and this project the other.
        ("method=matroshka", "did you mean matryoshka"),
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
