"""Results in files, and the tables of README.md and docs/ that are made of them."""

import ast
import json
import math

import pytest
from conftest import refusal

from experiments import results, tables

FIGURES = {"policy": {"optimality": 0.5}}


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    return tmp_path


def test_the_tables_are_those_of_the_results():
    """If this is red: python experiments/tables.py"""
    for path in tables.documents():
        text = path.read_text("utf-8")
        assert tables.fill(text) == text, path


def test_a_table_is_filled_between_its_marks(monkeypatch):
    monkeypatch.setattr(tables, "TABLES", {"one": lambda: ["| 1 |", "|---|"]})
    filled = tables.fill("Before\n<!-- one -->\n| 0 |\n<!-- end of one -->\nAfter\n")
    assert filled == "Before\n<!-- one -->\n\n| 1 |\n|---|\n\n<!-- end of one -->\nAfter\n"
    assert tables.fill(filled) == filled and tables.fill("<!-- two -->") == "<!-- two -->"


def test_the_table_of_flipped_labels_by_hand(folder):
    """Two seeds, 0.5 and 0.7: their mean, and the error of that, √(0.03² + 0.04²) / 2."""
    for seed, optimality, error in ((10, 0.5, 0.03), (9, 0.7, 0.04)):
        figures = {"policy": {"optimality": optimality, "optimality_se": error}}
        results.keep("village", seed, "sft", "robust_flip_0.2", figures)
    assert "| robust DPO |  | 60.0% (2.5%) |  |" in tables.noise()
    assert [*results.read("village")] == [9, 10]


def test_the_table_of_mutants_by_hand(folder):
    """A timeout is noticed too, and a folder's files are added up."""
    found = {"dpo": {"killed": 3, "timeout": 1}, "lab/files": {"killed": 2, "no tests": 5}}
    found |= {"lab/own": {"killed": 4, "survived": 1}}
    results.keep("mutants", 0, "", "mutmut", found)
    lines = tables.mutants()
    assert "| dpo.py | 4 | 0 | 0 |" in lines and "| lab/ | 6 | 1 | 5 |" in lines


def test_the_gain_on_own_data_by_hand(folder):
    """ln 2 - 0.5 on two seeds; errors of 0.03 and 0.04, so √(0.03² + 0.04²) / 2."""
    shared = {"held-out/accuracy": 0.75, "fresh/kl": 1.0, "more cut off": 0.02, "judge": 0.5}
    for seed, loss, error in ((10, math.log(2) - 0.4, 0.03), (11, math.log(2) - 0.6, 0.04)):
        figures = {"held-out/loss": loss, "held-out/loss_se": error, "tokens": 20.0} | shared
        results.keep("own_data", seed, "", "styles", figures)
    row = "| styles | 20 | -0.500 (0.025) | 0.750 ± 0.000 | 0.500 ± 0.000 | 1.00 ± 0.00 |"
    assert f"{row} 2.0 ± 0.0 |" in tables.own_data()


def test_the_table_of_the_leaky_reference_by_hand(folder):
    """Two seeds: their means, √(0.01² + 0.01²) / 2, and each of the two."""
    for seed, optimality, garbled in ((0, 0.76, 0.04), (1, 0.80, 0.02)):
        policy = {"optimality": optimality, "optimality_se": 0.01, "garbled": garbled}
        results.keep("leaky", seed, "sft", "sppo", {"policy": policy})
    assert "| SPPO's loss on the pairs | 3.0% | 78.0% (0.7%) | 76.0, 80.0 |" in tables.leaky()


def test_the_table_of_rlhf_by_hand(folder):
    """DPO on two seeds, the others on one: fastest seconds, worst and best, no spread of one."""
    runs = {"dpo": [(0.9, 30.0), (0.8, 20.0)], "rlhf": [(0.7, 60.0)], "ppo_gt": [(0.95, 50.0)]}
    for name, found in runs.items():
        for seed, (optimality, seconds) in enumerate(found):
            policy = {"optimality": optimality, "win_rate": 0.75}
            figures = {"policy": policy, "labels": 24_000, "seconds": seconds}
            results.keep("village", seed, "sft", name, figures)
    lines = tables.rlhf()
    assert "| seconds on one core | 60 | 20 | 50 |" in lines
    assert "| labels | 24k | 24k | 24k |" in lines
    assert "| optimality | 70.0% | 85.0% ± 7.1% | 95.0% |" in lines
    assert "| worst and best seed | 70.0%, 70.0% | 80.0%, 90.0% | 95.0%, 95.0% |" in lines


def test_a_run_is_kept_and_is_stale_once_its_code_has_changed(folder, monkeypatch):
    results.keep("village", 0, "sft", "dpo", FIGURES)
    results.keep("village", 0, "sft", "ipo", FIGURES, ("variants/losses",))
    runs = results.read("village")[0]["runs"]
    assert runs["dpo"]["figures"] == FIGURES and runs["dpo"]["code"] != runs["ipo"]["code"]
    assert not any(map(results.is_stale, runs.values()))
    names = ["dpo", "ipo", "kto"]
    assert results.missing("village", 0, names) == ["kto"]
    assert results.missing("village", 1, names) == names
    monkeypatch.setattr(results, "CORE", results.CORE[1:])
    assert all(map(results.is_stale, runs.values()))
    assert results.missing("village", 0, names) == names


def test_seeds_are_numbers_with_commas_between_them():
    assert results.read_seeds("0,12") == [0, 12]
    for text in ("", "x", "1,", "-1", "1 2"):
        assert refusal(results.read_seeds, text) == (
            f"--seeds: numbers with commas between them, not {text}"
        )


def test_the_hash_is_the_same_for_each_version_of_python():
    """Python 3.12 gave functions a list of type parameters, which is empty in older code."""
    function = ast.parse("def f(x):\n    return x").body[0]
    before = results.plain(function)
    function._fields, function.fresh = (*function._fields, "fresh"), []
    assert results.plain(function) == before
    assert results.plain(function.args) == ["arguments", ("args", [["arg", ("arg", "'x'")]])]


def test_results_of_two_fine_tuned_models_are_not_mixed(folder):
    results.keep("village", 0, "one", "dpo", FIGURES)
    with pytest.raises(SystemExit, match="0.json is of another fine-tuned model"):
        results.keep("village", 0, "another", "ipo", FIGURES)
    assert [*json.loads((folder / "village" / "0.json").read_text())["runs"]] == ["dpo"]


@pytest.mark.parametrize(
    "other, same",
    [
        ('"""Another."""\n\ndef f(x):\n    # why\n    print("y")\n    return x + 1\n', True),
        ('"""A."""\ndef f(x):\n    "Doc."\n    return x + 1\n', True),
        ('"""A."""\ndef f(x):\n    return x + 2\n', False),
        ('"""A."""\ndef f(y):\n    return y + 1\n', False),
    ],
)
def test_what_computes_is_told_from_what_explains(other, same):
    codes = '"""A."""\ndef f(x):\n    print("x")\n    return x + 1\n', other
    dumps = [ast.dump(results.Computing().visit(ast.parse(code))) for code in codes]
    assert (dumps[0] == dumps[1]) == same


def test_help_texts_and_refusals_do_not_compute_but_defaults_and_conditions_do():
    codes = [
        'a: int = flag(1, "one")\nif a: raise SystemExit("no")',
        'a: int = flag(1, "1")\nif a: raise SystemExit("never")',
        'a: int = flag(2, "one")\nif a: raise SystemExit("no")',
        'a: int = flag(1, "one")\nif not a: raise SystemExit("no")',
    ]
    dumps = [ast.dump(results.Computing().visit(ast.parse(code))) for code in codes]
    assert dumps[0] == dumps[1] and len({*dumps[1:]}) == 3


def test_only_the_table_of_files_is_counted():
    count = len((tables.ROOT / "dpo.py").read_text("utf-8").splitlines())
    text = "| `dpo.py` | 1 | maths |\n| a method | `dpo.py` | 1 | 2 |\n"
    assert tables.count_lines(text) == text.replace(
        "| `dpo.py` | 1 | m", f"| `dpo.py` | {count} | m"
    )
