"""From Hydra's nodes, command lines and records to a `Config`."""

import dataclasses
import logging
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from matryoshka_lora import methods
from matryoshka_lora.config.checks import validate
from matryoshka_lora.config.schema import Config, method_settings, method_shape, settings_of
from matryoshka_lora.core.errors import UserError

logger = logging.getLogger(__name__)

_UNREADABLE = object()

RATES = Path(__file__).resolve().parents[2] / "configs" / "rates.yaml"
"""Learning rates by model, method and R, which scripts/rates.py writes."""


def build_config(node: DictConfig) -> Config:
    """The composed Hydra config as a checked `Config`. Raises UserError."""
    config = typed_config(node)
    methods.get(config.method.name)  # knows whether there is such a method
    if config.trainer.lr is None:
        config.trainer.lr = known_rate(config)
    validate(config)
    return config


def known_rate(config: Config) -> float:
    """The learning rate that RATES has for model, method and the nearest R, by their ratio.

    Raises UserError where it has none.
    """
    method, rank = config.method.name, config.adapter.rank
    known = OmegaConf.to_container(OmegaConf.load(RATES)) if RATES.is_file() else {}
    assert isinstance(known, dict)
    of_model = known.get(config.model.name, {})
    rates = of_model.get(method, of_model.get("*"))
    if rates is None:
        what = f"method {method} on " if of_model else ""
        raise UserError(
            f"trainer.lr=null, but {RATES} has no rate for {what}model {config.model.name}; give "
            "trainer.lr, such as trainer.lr=1e-3"
        )
    if isinstance(rates, int | float):
        return float(rates)
    return float(rates[min(rates, key=lambda known: abs(math.log(known / max(rank, 1))))])


def typed_config(node: DictConfig) -> Config:
    """The composed Hydra config as a `Config` that is not checked yet.

    Raises ConfigKeyError for a key that there is not, also one that `+key=` has put into `node`.
    """
    # As a plain container: a merge of two nodes keeps what was added to the second.
    content = OmegaConf.to_container(node)
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), content))
    assert isinstance(config, Config)
    return config


def quote_texts(overrides: Iterable[str]) -> list[str]:
    """Hydra overrides in which what is given for a text is quoted where it would not stay as typed.

    Hydra would read `output_dir=20240101_1200` as 202401011200 and `model.revision=1e5` as
    100000.0, and refuse paths with other letters than English ones, or with = ( [ ~ # &. A comma
    still parts the values of a sweep. Whatever is no override of a setting comes back as it is.
    """
    texts = {key for key, found in settings_of(Config()) if found.type in (str, str | None)}
    parser = OverridesParser.create()

    def value_of(text: str) -> Any:
        try:
            return parser.parse_override(f"key={text}").value()
        except HydraException:
            return _UNREADABLE

    def quoted(text: str, whole: Any) -> str:
        value = value_of(text)
        is_number = re.fullmatch(r"[\w.+-]+", text) and isinstance(value, int | float)  # or bool
        # What begins or refers as Hydra's own syntax does is left to it, and `choice(a,b)`.
        own_syntax = text.startswith(("'", '"', "[", "{")) or "${" in text
        is_foreign = whole is value is _UNREADABLE and not own_syntax
        return QuotedString(text, Quote.single).with_quotes() if is_number or is_foreign else text

    found = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if equals and key.lstrip("+") in texts:
            whole = value_of(text)
            text = ",".join(quoted(part, whole) for part in text.split(","))  # of a sweep, each
        found.append(f"{key}{equals}{text}")
    return found


def check_given(config: Config, overrides: Iterable[str], *, swept: bool = False) -> None:
    """Tell of settings among the overrides, those of a command line, that change nothing.

    A setting of other methods raises UserError that names them, and any other is a warning; so is
    that of other methods in a sweep (`swept`), where it may be meant for them. What files of
    `configs/` set is theirs to set for all methods.
    """
    info, fields = methods.get(config.method.name), dict(settings_of(config))
    own = {found.name: found for found in dataclasses.fields(info.settings)}
    for key in dict.fromkeys(o.lstrip("+").partition("=")[0] for o in overrides):
        section, _, name = key.rpartition(".")
        if key not in fields:
            continue  # a group, or Hydra's own
        reason = fields[key].metadata["idle"](config)
        if section == "method" and name in own:
            settings = method_settings(config)
            reason = own[name].metadata["idle"](method_shape(config), settings)
        elif section == "method" and name != "name":
            readers = [
                other.name
                for other in methods.METHODS.values()
                if name in (f.name for f in dataclasses.fields(other.settings))
            ]
            reason = f"method={info.name} does not read it, only {', '.join(readers)}"
            if not swept:
                raise UserError(f"{key} is given, but {reason}; leave it out, or choose another")
        if reason is not None:
            logger.warning("%s is given, but changes nothing: %s", key, reason)


def recorded(config: Config) -> dict[str, Any]:
    """What a record holds: all settings but those of other methods, whatever becomes of them.

    `read_config` reads it back.
    """
    content = dataclasses.asdict(config)
    own = {found.name for found in dataclasses.fields(methods.get(config.method.name).settings)}
    content["method"] = {k: v for k, v in content["method"].items() if k in own | {"name"}}
    return content


def read_config(content: Mapping[str, Any], source: str) -> Config:
    """The config that a record holds, not checked again.

    Settings that came later have their defaults. Raises UserError naming `source` for settings
    that this version does not know or whose values have another type.
    """
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), content))
    except (OmegaConfBaseException, ValueError) as error:
        raise UserError(
            f"{source}: its config is not one of this version: {str(error).splitlines()[0]}"
        ) from None
    assert isinstance(config, Config)
    return config
