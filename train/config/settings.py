"""From recipes/ and overrides to typed settings.

    defaults  <  recipe  <  scale  <  groups and files that the user names  <  single keys on the command line

A part that is named outranks the whole, as model/llm outranks model, and a scale that is named shrinks its sizes.
Hydra composes, but it cannot express that a preset yields to the user: a recipe and a scale set single keys of all
groups, and would overrule a file that the user names, as in data=mixed.  `ranked` restores the order.
"""

import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast, get_args, get_origin

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)
from yaml.error import MarkedYAMLError

from tandem.train import families
from tandem.train.checkpoints.checkpoint import checkpoints
from tandem.train.config.schema import Config
from tandem.train.families import connectors, encoders

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
PRESETS = ("recipe", "scale")
WHOLE = ("sources",)  # keys of a group of which a user's file replaces all: the sources that it names are all there are


def skeleton(kind: type) -> dict[str, Any]:
    """Names of all settings of a dataclass, with the values that they have by default, ??? for none."""
    node = cast("dict[str, Any]", OmegaConf.to_container(OmegaConf.structured(kind)))
    for each in fields(kind):
        if is_dataclass(each.type) and node[each.name] == MISSING:
            node[each.name] = skeleton(cast(type, each.type))
    return node


# Names alone: `read_config` checks types. A typed dictionary would not take +data.sources.NAME.shards=[...].
ConfigStore.instance().store(name="schema", node=skeleton(Config))


def composed(overrides: Sequence[str], folder: Path = RECIPES) -> DictConfig:
    """The settings of a command line.  Raises Hydra's exceptions for overrides that cannot be composed."""
    with initialize_config_dir(str(folder), version_base="1.3"):
        return ranked(compose("config", overrides=list(overrides)), overrides)


def ranked(settings: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """What Hydra has composed, in the order of precedence above; for use while Hydra is initialized.

    settings.scale: name, values (of every recipe at this scale), most (the largest sizes of a named group) and, by the
    recipe, sizes.<name> (of this recipe).
    """
    loader = GlobalHydra.instance().config_loader()
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(list(overrides))
    named: dict[str, Any] = {
        o.key_or_group: o.value() for o in parsed if loader.get_group_options(o.key_or_group) and not o.is_delete()
    }
    out: Any = OmegaConf.create(OmegaConf.to_container(settings))
    scale = out.scale
    out = OmegaConf.merge(out, scale.get("values", {}), scale.get("sizes", {}).get(scale.name, {}))
    for group in sorted(named.keys() - set(PRESETS)):  # model before model/llm
        place, said = group.replace("/", "."), _said_by(loader, group, named[group])
        for key in set(WHOLE) & set(said):
            OmegaConf.update(out, f"{place}.{key}", {}, merge=False)
        OmegaConf.update(out, place, said)
        for key, most in scale.get("most", {}).get(group, {}).items():
            size = f"{place}.{key}"
            OmegaConf.update(out, size, min(OmegaConf.select(out, size), most))
    for override in parsed:
        key = override.key_or_group
        if key in named or key in PRESETS:
            continue
        if override.is_delete():
            _delete(out, key)
        else:
            OmegaConf.update(out, key, OmegaConf.select(settings, key), merge=False, force_add=True)
    out.scale = {"name": scale.name}
    folders = {part: OmegaConf.select(out, f"model.{part}.folder") for part in ("llm", "encoder", "connector")}
    resumed = resumed_config(out) if any(folders.values()) else None
    saved = OmegaConf.load(resumed) if resumed else OmegaConf.create()
    for part, folder in folders.items():
        if folder:
            said = {f"model.{part}.{key}": value for key, value in _of_folder(out, saved, part, folder).items()}
            for key in said.keys() - {override.key_or_group for override in parsed}:  # contradictions: `open_folder`
                OmegaConf.update(out, key, said[key], merge=False)
    return out


def _of_folder(settings: DictConfig, saved: Any, part: str, folder: str) -> dict[str, Any]:
    """What a folder says of a part of the model; of a run that goes on, what it said when the run began.

    saved: the settings of that run, empty where there is none.
    """
    if OmegaConf.select(saved, f"model.{part}.folder") == folder:
        return cast("dict[str, Any]", OmegaConf.to_container(saved.model[part]))
    if part == "llm":
        return families.settings_of(folder)
    if part == "connector":
        return connectors.settings_of(folder)
    return encoders.settings_of(folder, OmegaConf.select(settings, "model.encoder.feature_layer") or -1)


def resumed_config(settings: DictConfig | Config) -> Path | None:
    """The config.yaml of the run that these settings resume; None where they resume none."""
    if not settings.checkpoint.resume or not settings.run.dir:
        return None
    run_dir = Path(settings.run.dir)
    saved = run_dir / "config.yaml"
    folder = Path(settings.checkpoint.dir or run_dir / "checkpoints")
    return saved if saved.is_file() and checkpoints(folder) else None


def _said_by(loader, group: str, option: str) -> DictConfig:
    """The keys that a file of a group names itself; one of a part (model/llm) has those that it starts from too: with
    keys of the whole among them it would be neither."""
    file = loader.repository.load_config(f"{group}/{option}")
    own = OmegaConf.masked_copy(file.config, [key for key in file.config if key != "defaults"])
    starts = [start.get_name() for start in file.defaults_list] if "/" in group else []
    return cast(DictConfig, OmegaConf.merge(*(_said_by(loader, group, it) for it in starts if it != "_self_"), own))


def _delete(settings: DictConfig, key: str) -> None:
    place, _, name = key.rpartition(".")
    parent = OmegaConf.select(settings, place) if place else settings
    if parent is not None and name in parent:
        del parent[name]


def read_config(settings: DictConfig) -> Config:
    """Typed settings of a composed configuration.

    Raises ValueError where a setting is missing, unknown (Hydra lets +key=value through) or of a wrong type.
    """
    try:
        plain = OmegaConf.to_container(settings, resolve=True)
        return cast(Config, OmegaConf.to_object(OmegaConf.merge(Config, plain)))
    except MissingMandatoryValue as error:
        of_model = str(error.full_key).startswith("model")
        choose = "a model, as in model=toy" if of_model else "a recipe, as in +recipe=stage1"
        raise ValueError(f"{error.full_key} is missing; choose {choose}") from error
    except InterpolationKeyError as error:
        missing = str(error).partition("'")[2].partition("'")[0]
        raise ValueError(f"{missing} is missing: {error.full_key} takes its value") from error
    except ConfigKeyError as error:
        raise ValueError(_no_such(str(error.full_key))) from error
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {str(error).splitlines()[0]}") from error


def _no_such(key: str) -> str:
    near = get_close_matches(key, keys(), n=1, cutoff=0.6)
    return f"{key}: there is no such setting" + (f"; did you mean {near[0]}?" if near else "")


def keys(node: type = Config, prefix: str = "") -> list[str]:
    """Dotted names of all settings; those of a dictionary of parts, such as data.sources, with * for its keys."""
    found = []
    for field in fields(node):
        name, kind = prefix + field.name, cast(type, field.type)
        if get_origin(kind) is dict and is_dataclass(get_args(kind)[1]):
            name, kind = f"{name}.*", get_args(kind)[1]
        found += keys(kind, f"{name}.") if is_dataclass(kind) else [name]
    return found


def one_sentence(error: Exception) -> str:
    """An error of Hydra's or of a YAML file, in one sentence and with the nearest key where one is unknown."""
    if isinstance(error, MarkedYAMLError):
        place = f" in {error.problem_mark.name}, line {error.problem_mark.line + 1}" if error.problem_mark else ""
        return f"broken YAML{place}: {error.problem}"
    cause = error.__cause__
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        named = re.search(r"override '[+~]*([\w.*]+)'", str(error))
        key = named[1] if named else str(cause.full_key)
        return _no_such(key)
    said = f"{error}".partition("Config search path")[0] + "\n" + f"{cause or ''}".partition("full_key")[0]
    lines = [line for line in said.splitlines() if not line.startswith(("To append", "See http"))]
    said = " ".join(" ".join(lines).split())
    if any(sign in said for sign in ("no viable alternative", "mismatched input", "token recognition")):
        said += "; quote braces and brackets twice, as in \"data.sources.main.shards=['a-{0..9}.tar']\""
    return said
