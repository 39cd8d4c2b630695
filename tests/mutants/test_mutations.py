"""Every mutation still fits the tree, and the runner tells those that tests catch from those that survive."""

import datetime
import re
import subprocess

import pytest

from tests.mutants import run
from tests.mutants.mutations import MUTATIONS, SURVIVORS
from tests.mutants.source import Mutation, NotFoundError, apply

ONCE_UNNOTICED = {
    "joint_norm_is_the_encoders",
    "clip_norm_is_0",
    "schedule_never_reaches_llm",
    "betas_not_passed_to_llm",
    "betas_not_passed_to_encoder",
    "decay_not_passed_to_llm",
    "decay_not_passed_to_encoder",
    "decay_on_norms_of_llm",
    "decay_on_norms_of_encoder",
    "z_loss_ignored",
    "aux_loss_times_10",
    "norm_eps_of_llm_hard_wired",
    "rope_base_of_llm_hard_wired",
    "rope_base_of_encoder_hard_wired",
    "residual_init_dropped",
    "losses_booked_to_first_domain",
    "tokens_per_s_times_2",
    "mfu_without_world",
    "effective_time_constant",
    "evaluation_never_exchanges_images",
    "answer_with_wrong_token_is_exact",
    "same_mask_in_every_step",
    "same_drop_path_in_every_step",
    "layer_decay_off_by_one",
}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_fits_the_tree_and_its_tests_exist(mutation):
    path, changed = apply(mutation, run.ROOT)
    compile(changed, str(path), "exec")
    assert mutation.tests
    for test in mutation.tests:
        file, _, function = test.partition("::")
        assert (run.ROOT / file).is_file(), test
        assert not function or f"def {function.partition('[')[0]}(" in (run.ROOT / file).read_text(), test


def test_the_list_is_long_enough_and_excuses_few():
    names = [mutation.name for mutation in MUTATIONS]
    assert len(names) == len(set(names)) >= 80
    assert {mutation.name for mutation in SURVIVORS} == ONCE_UNNOTICED
    assert len(ONCE_UNNOTICED) == 24
    assert all(re.fullmatch(r"[a-z0-9_]+", name) for name in names)
    assert sum(bool(mutation.survives) for mutation in MUTATIONS) <= (1 - run.AT_LEAST) * len(MUTATIONS)


def test_ten_days_in_a_row_draw_every_mutation_once():
    for first in (datetime.date(2024, 2, 25), datetime.date(2025, 12, 28)):
        days = [first + datetime.timedelta(days=day) for day in range(10)]
        drawn = [mutation for day in days for mutation in run.tenth(MUTATIONS, day)]
        assert sorted(drawn, key=MUTATIONS.index) == list(MUTATIONS)
        assert all(run.tenth(MUTATIONS, day) == run.tenth(MUTATIONS, day) for day in days)


# ---- on a tree of its own -------------------------------------------------------------------------------------------

TREE = {
    "data/__init__.py": "",
    "data/sums.py": (
        "class Mean:\n    def of(self, values):\n        total = sum(values)\n"
        "        return total / max(\n            len(values), 1)\n\n\ndef double(x):\n    return x + x\n"
    ),
    "tests/test_sums.py": (
        "import time\n\nfrom data.sums import Mean, double\n\n\n"
        "def test_mean():\n    assert Mean().of([1, 3]) == 2\n\n\n"
        "def test_double():\n    assert double(2) == 4\n\n\ndef test_wrong():\n    assert False\n\n\n"
        "def test_slow():\n    time.sleep(60 * (double(1) == 0))\n"
    ),
}
MEAN = Mutation(
    "mean", "data/sums.py", "Mean.of", "total / max(len(values), 1)", "total", ("tests/test_sums.py::test_mean",)
)


@pytest.fixture
def tree(tmp_path):
    for name, text in TREE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def mutated(old="max( len(values), 1)", new="1", function="Mean.of", file="data/sums.py", tests=("test_mean",)):
    return Mutation("m", file, function, old, new, tuple(f"tests/test_sums.py::{test}" for test in tests))


def test_an_expression_is_found_over_lines_and_after_a_move(tree):
    path, text = apply(mutated(), tree)
    assert path == tree / "data/sums.py"
    assert "return total / 1\n" in text
    (tree / "train").mkdir()
    path.rename(tree / "train/means.py")
    assert apply(mutated(), tree) == (tree / "train/means.py", text)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"old": "len(rows)"}, "is 0 times in Mean.of"),
        ({"old": "values"}, "is 3 times in Mean.of"),
        ({"old": "total", "function": "Median.of"}, "is 0 times in Median.of"),
        ({"new": "("}, "does not compile"),
        ({"new": "max(len(values), (1))"}, "means the same"),
    ],
)
def test_what_does_not_fit_is_named(tree, changes, words):
    with pytest.raises(NotFoundError, match=re.escape(words)):
        apply(mutated(**changes), tree)


def test_verdicts(tree):
    wanted = {
        run.CAUGHT: mutated(),
        run.SURVIVED: mutated(tests=("test_double",)),
        run.BROKEN: mutated(tests=("test_wrong",)),
        run.NO_TEST: mutated(tests=("test_that_is_not_there",)),
    }
    before = (tree / "data/sums.py").read_text()
    outcomes = run.run(tree, list(wanted.values()), jobs=2, minutes=5)
    assert [outcome.verdict for outcome in outcomes] == list(wanted)
    assert outcomes[0].failed == "tests/test_sums.py::test_mean"
    assert (tree / "data/sums.py").read_text() == before


def test_no_mutation_takes_longer_than_it_may(tree):
    slow = mutated("x + x", "0", "double", tests=("test_slow",))
    assert [outcome.verdict for outcome in run.run(tree, [slow], 1, 5, timeout_s=2)] == [run.TIMEOUT]
    assert [outcome.verdict for outcome in run.run(tree, [slow], 1, minutes=-1)] == [run.NOT_RUN]


def test_a_copy_runs_its_own_modules_whatever_is_installed(tmp_path):
    copy = run.Copy(run.ROOT, tmp_path / "copy")
    imports = "from tandem.data.planning import mixture\nfrom tandem.train import schedule\n"
    here = f"[m.__file__.startswith({str(copy.folder)!r}) for m in (mixture, schedule)]"
    (copy.folder / "tests/test_here.py").write_text(f"{imports}\n\ndef test_here():\n    assert all({here})\n")
    assert copy.test(["tests/test_here.py"], "", 120, "--noconftest")[0] == 0
    copy.environment["PYTHONPATH"] = str(run.ROOT)  # what an editable installation alone would give
    with pytest.raises(RuntimeError, match="and not the copy"):
        copy.check_imports()


def outcomes_of(caught, survived, reason=""):
    excused = Mutation("m", "f", "g", "a", "b", ("t",), survives=reason)
    return [run.Outcome(MEAN, run.CAUGHT)] * caught + [run.Outcome(excused, run.SURVIVED)] * survived


def test_what_is_good_enough():
    assert run.good_enough(outcomes_of(95, 5, "no number depends on it"), whole=True)
    assert not run.good_enough(outcomes_of(94, 6, "no number depends on it"), whole=True)
    assert not run.good_enough(outcomes_of(99, 1), whole=True)
    assert run.good_enough(outcomes_of(8, 1, "no number depends on it"), whole=False)
    for verdict in (run.TIMEOUT, run.NO_TEST, run.BROKEN, run.NOT_RUN):
        assert not run.good_enough([*outcomes_of(99, 0), run.Outcome(MEAN, verdict)], whole=True)


def test_names_and_dates_choose(monkeypatch, capsys):
    chosen = []
    monkeypatch.setattr(run, "run", lambda root, mutations, jobs, minutes: chosen.extend(mutations) or [])
    first = MUTATIONS[0]
    run.main(["--name", first.name])
    assert chosen == [first]
    chosen.clear()
    run.main(["--tenth", "2025-12-28"])
    assert chosen == run.tenth(MUTATIONS, datetime.date(2025, 12, 28))
    with pytest.raises(SystemExit):
        run.main(["--name", "nothing"])
    assert "no mutation is named nothing" in capsys.readouterr().err
