"""What README.md and docs/ say is so: keys and their values, names of the code, files, and command lines."""

import functools
import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

import tandem.parallel  # noqa: F401  (installs the CPU backend before megatron is imported)
from tandem.train.config.checks import check_config
from tandem.train.config.settings import composed as compose
from tandem.train.config.settings import keys, read_config
from tests.support import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STAGES = ("stage0", "stage1", "stage2")
VISION_STAGES = ("vit_mim", "vit_contrastive", "vit_omni")
VISION_SECTION = "\n## The encoder's own stages\n"  # of docs/configuration.md; its table is of these alone
GROUPS = {"recipe", "scale", "model", "objective", "parallel", "optim", "data", "logger"}
OUTPUTS = ("runs/", "shards/", "checkpoints/", "wandb/", "stacks/", "ends/")  # written by a run
OUTPUT_FILES = (
    "config.yaml",
    "metrics.jsonl",
    "history.jsonl",
    "summary.json",
    "evaluation.json",
    "manifest.json",
    "tokenizer.json",
)
SUFFIXES = (".py", ".md", ".yaml", ".sbatch", ".sh", ".json", ".jsonl", ".png", ".toml")
CODE_NAME = re.compile(r"(data|parallel|train)(\.\w+)+")


KEYS = keys()
OF_EXTENSIONS = {"+recipe=colour", "model=wide", "model=shuffled"}  # files of docs/extending.md, see test_extending.py
NEEDS_FOLDER = re.compile(r"model\.(llm|encoder)\.folder=/")  # of the reader's


@functools.cache
def composed(*overrides: str):
    """Settings, not to be changed."""
    return compose(overrides)


def in_backticks(page: Path) -> list[str]:
    """Inline code of a page, code blocks left out."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", text)


def commands(page: Path) -> list[list[str]]:
    """Command lines of a page's sh blocks, as words."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def pairs(command_of) -> list:
    return [
        pytest.param(words, id=f"{page.name}: {' '.join(words)[:60]}")
        for page in PAGES
        for words in commands(page)
        if command_of(words)
    ]


def table_rows(stages: tuple[str, ...] = STAGES) -> dict[str, list[str]]:
    """Cells of every row of docs/configuration.md about these stages, by key."""
    about_all, _, about_vision = (ROOT / "docs/configuration.md").read_text().partition(VISION_SECTION)
    lines = (about_vision if stages == VISION_STAGES else about_all).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| `")]
    return {row[0].strip("` "): [cell.strip("| ") for cell in row[1:]] for row in cells}


def test_every_key_is_documented_once_and_nothing_else_is():
    assert list(table_rows()) == sorted(table_rows(), key=["task", "scale", *KEYS].index)
    assert set(table_rows()) == set(KEYS)


@pytest.mark.parametrize(("column", "scale"), [(0, "full"), (1, "toy")])
@pytest.mark.parametrize("stages", [STAGES, VISION_STAGES], ids=lambda stages: stages[0])
def test_documented_values_are_those_of_the_recipes(stages, column, scale):
    settings = [composed(f"+recipe={stage}", f"scale={scale}") for stage in stages]
    for key, cells in table_rows(stages).items():
        if key == "scale":
            continue
        values = [yaml.safe_load(value.strip("` ")) for value in cells[column].split(" / ")]
        values *= 3 if len(values) == 1 else 1
        for stage, value, found in zip(stages, values, settings, strict=True):
            assert value == setting(found, key), f"{key} in {stage} at scale={scale}"


def test_what_the_encoders_own_stages_set_otherwise_than_stage1_is_documented_in_the_keys_order():
    differ = set()
    for scale in ("full", "toy"):
        stage1, *vision = (composed(f"+recipe={stage}", f"scale={scale}") for stage in ("stage1", *VISION_STAGES))
        differ |= {key for key in KEYS if any(setting(found, key) != setting(stage1, key) for found in vision)}
    assert list(table_rows(VISION_STAGES)) == [key for key in KEYS if key in differ]


def setting(composed_config, key: str):
    """The value of a key, of the one source of the recipes where the key is of sources."""
    value = OmegaConf.select(composed_config, key.replace("*", "main"))
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_of_code_resolve(page):
    for name in filter(CODE_NAME.fullmatch, in_backticks(page)):
        if name not in KEYS:
            resolve(name)


def resolve(name: str) -> None:
    """Imports the longest module path of a dotted name and follows the rest; pages leave `tandem.` out."""
    parts = name.split(".")
    if parts[0] in ("train", "parallel", "data", "launch"):
        parts.insert(0, "tandem")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            assert hasattr(found, part), f"{name}: {found} has no {part}"
            found = getattr(found, part)
        return
    raise AssertionError(f"{name} names nothing")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_exist(page):
    for link, place in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text()):
        linked = page.parent / link if link else page
        assert linked.exists(), f"{page.name} links to {link}"
        assert not place or place in headings(linked), f"{page.name} links to {link}#{place}"
    for word in in_backticks(page):
        path_like = re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", word) and (word.endswith(("/", *SUFFIXES)))
        if path_like and not word.startswith(OUTPUTS) and word not in OUTPUT_FILES:
            added = f"\n# {word}\n" in page.read_text()  # by a code block of the page
            assert added or (ROOT / word).exists(), f"{page.name} names {word}"


def headings(page: Path) -> set[str]:
    """Of a page, as links name them."""
    found = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_overrides_name_settings(page):
    for word in in_backticks(page):
        if override := re.fullmatch(r"\+?([a-z_.]+)=\S+", word):
            key = re.sub(r"^data\.sources\.\w+", "data.sources.*", override[1])
            assert key in {*KEYS, *GROUPS}, f"{page.name}: {word}"


def composes_here(words: list[str]) -> bool:
    return "pretrain." in " ".join(words) and not (set(words) & OF_EXTENSIONS or NEEDS_FOLDER.search(" ".join(words)))


@pytest.mark.parametrize("words", pairs(composes_here))
def test_training_commands_compose(words):
    """Settings of every training command are accepted in a world of the size that the command gives."""
    script = next(place for place, word in enumerate(words) if word.startswith("launch/") and "pretrain." in word)
    assert (ROOT / words[script]).is_file()
    settings = [word for word in words[script + 1 :] if word not in ("--cfg", "job", "--multirun")]
    if "--multirun" in words:  # the first of the runs
        settings = [word.split(",")[0] for word in settings]
    config = read_config(composed(*settings))
    nodes = [int(word.removeprefix("--nodes=")) for word in words if word.startswith("--nodes=")]
    world = 8 * nodes[0] if nodes else 1
    if "--nproc-per-node" in words:
        world = int(words[words.index("--nproc-per-node") + 1])
    check_config(config, world)


@pytest.mark.parametrize("words", pairs(lambda w: w[0] in ("python", "make")))
def test_other_commands_exist(words):
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert set(words[1:]) <= set(targets)
        return
    module = words[1] == "-m"
    place = ROOT / (words[2].replace(".", "/") if module else words[1])
    files = sorted(place.glob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    script = "".join(file.read_text() for file in files)
    for option in (word for word in words[2 + module :] if word.startswith("--")):
        assert f'"{option}"' in script, f"{words[1]} has no {option}"
