"""Exercises: solutions pass, stubs are not attempted, every wrong answer fails with the hint that fits it."""

import ast
import dataclasses
import importlib
import threading
import time

import pytest
import torch

from course_utils import exercises
from course_utils.exercises.checking import SEED, _Outcome, _same, _short, judge
from course_utils.exercises.compare import difference, show
from course_utils.exercises.exercise import DIFFICULTIES

EVERY = exercises.every()
ANSWERS = [importlib.import_module(f"tests.wrong_answers.{name}") for name in exercises.MODULES.values()]
WRONG = {id: answers for module in ANSWERS for id, answers in module.WRONG.items()}
ELSE = {id: answers for module in ANSWERS for id, answers in module.ELSE.items()}


def written(source, name):
    """Return the function `name` of `source` as a notebook would have it: with torch, and nothing else of ours."""
    names = {"torch": torch}
    exec(compile(source, "<cell>", "exec"), names)
    return names[name]


def first_case(exercise):
    """Return the case that a check tries first."""
    return next(iter(exercise.cases(torch.Generator().manual_seed(SEED))))


@pytest.mark.parametrize("id", EVERY)
def test_solution_as_shown_passes(id):
    exercise = EVERY[id]
    verdict = judge(exercise, written(exercise.source(), exercise.solution.__name__))
    assert verdict.passed is True, verdict.text


@pytest.mark.parametrize("id", EVERY)
def test_stub_is_not_attempted(id):
    exercise = EVERY[id]
    stub = exercise.stub()
    assert judge(exercise, written(stub, exercise.solution.__name__)).passed is None
    assert exercise.solution.__doc__ in stub and exercise.source().rstrip() not in stub
    (function,) = ast.parse(stub).body
    assert [type(statement) for statement in function.body] == [ast.Expr, ast.Raise], "nothing of the solution is left"
    assert exercise.fill(stub) == exercise.source().rstrip()


@pytest.mark.parametrize("id, name", [(id, name) for id in EVERY for name in WRONG.get(id, ())])
def test_wrong_answer_fails_with_the_hint_that_fits(id, name):
    verdict = judge(EVERY[id], WRONG[id][name])
    assert verdict.passed is False
    assert verdict.mistake == name, verdict.text
    mistake = next(each for each in EVERY[id].mistakes if each.name == name)
    assert mistake.says in verdict.text and mistake.hint in verdict.text


@pytest.mark.parametrize("id, text", [(id, text) for id in EVERY for text in ELSE.get(id, ())])
def test_other_wrong_answers_fail_too(id, text):
    verdict = judge(EVERY[id], ELSE[id][text])
    assert verdict.passed is False and text in verdict.text, verdict.text


@pytest.mark.parametrize("id", EVERY)
def test_every_mistake_has_a_wrong_answer_of_its_own(id):
    exercise = EVERY[id]
    assert sorted(WRONG[id]) == sorted(mistake.name for mistake in exercise.mistakes)
    assert len(exercise.mistakes) >= 4


@pytest.mark.parametrize("id", EVERY)
def test_constants_do_not_pass(id):
    """An answer that ignores its input and returns what the first case expects is found out."""
    exercise = EVERY[id]
    case = first_case(exercise)
    constant = exercise.solution(*case.args)
    assert judge(exercise, lambda *args: constant).passed is False


@pytest.mark.parametrize("id", EVERY)
def test_cases_are_the_same_each_time_and_of_several_kinds(id):
    exercise = EVERY[id]
    first, second = (list(exercise.cases(torch.Generator().manual_seed(0))) for _ in range(2))
    assert [case.label for case in first] == [case.label for case in second]
    assert repr([case.args for case in first]) == repr([case.args for case in second])
    assert len(first) >= 5 and len({case.label for case in first}) >= 4


@pytest.mark.parametrize("id", EVERY)
def test_described(id):
    exercise = EVERY[id]
    assert exercise.notebook in exercises.MODULES and exercise.difficulty in DIFFICULTIES
    assert 5 <= exercise.minutes <= 45 and len(exercise.hints) >= 3 and exercise.objective and exercise.title
    assert exercise.solution.__doc__ and not exercise.solution.__name__.startswith("_")
    assert len({hint for hint in exercise.hints}) == len(exercise.hints)


def test_enough_of_them_with_ids_and_titles_of_their_own():
    assert len(EVERY) >= 24
    assert len({exercise.title for exercise in EVERY.values()}) == len(EVERY)
    assert len({exercise.solution.__name__ for exercise in EVERY.values()}) == len(EVERY)
    listed = [exercise.id for name in exercises.MODULES for exercise in EVERY.values() if exercise.notebook == name]
    assert listed == list(EVERY)
    assert {exercise.notebook for exercise in EVERY.values()} == set(exercises.MODULES)
    with pytest.raises(ValueError, match="did you mean 'zero-point'"):
        exercises.get("zero-pont")
    with pytest.raises(ValueError, match="there is no exercise 7"):
        exercises.get(7)


def test_an_endless_loop_ends():
    threads = []

    def endless(*args):
        threads.append(threading.current_thread())
        while True:
            try:
                while True:
                    pass
            except Exception:
                pass

    impatient = dataclasses.replace(EVERY["zero-point"], seconds=0.2)
    start = time.perf_counter()
    verdict = judge(impatient, endless)
    assert verdict.passed is False and "had not returned after 0.2 seconds" in verdict.text
    assert time.perf_counter() - start < 10
    threads[0].join(10)
    assert not threads[0].is_alive(), "it does not go on in the background"


def test_a_loop_that_swallows_everything_does_not_hang_the_check():
    stop = []

    def stubborn(*args):
        while not stop:
            try:
                time.sleep(0.01)
            except BaseException:
                pass

    verdict = judge(dataclasses.replace(EVERY["zero-point"], seconds=0.1), stubborn)
    stop.append(True)
    assert verdict.passed is False and "had not returned" in verdict.text


def test_an_answer_that_nothing_can_stop_does_not_keep_the_process():
    threads = []
    verdict = judge(EVERY["zero-point"], lambda *args: threads.append(threading.current_thread()))
    assert verdict.passed is False and threads and all(thread.daemon for thread in threads)


def test_a_check_leaves_the_learners_random_numbers_alone():
    before = torch.get_rng_state()
    assert all(judge(exercise, exercise.solution).passed for exercise in EVERY.values())
    assert judge(EVERY["zero-point"], lambda *args: None).passed is False
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), KeyboardInterrupt(), RecursionError("deep")])
def test_what_an_answer_raises_is_shown_short_and_as_its_own(error):
    def mine(low, high, bits=8):
        raise error

    verdict = judge(EVERY["zero-point"], mine)
    assert verdict.passed is False
    line = next(line for line in verdict.text.splitlines() if "raised" in line)
    assert type(error).__name__ in line and "in mine" in line and "raise error" in line
    assert "course_utils" not in verdict.text
    expected = EVERY["zero-point"].solution(*first_case(EVERY["zero-point"]).args)
    assert f"\n  expected  {show(expected)}\n" in f"{verdict.text}\n"


def test_of_an_error_within_a_package_the_line_of_the_answer_is_shown():
    def mine(low, high, bits=8):
        return torch.nn.functional.interpolate(torch.zeros(1, 1, 4), scale_factor=2, mode="nonsense")

    assert ", in mine, line " in judge(EVERY["zero-point"], mine).text


def test_an_answer_that_raises_is_not_one_that_returns_nothing():
    raised, nothing, one = _Outcome(error=ValueError()), _Outcome(), _Outcome(1)
    pairs = ((raised, nothing), (nothing, raised), (one, nothing), (nothing, nothing), (one, one))
    assert [_same(EVERY["zero-point"], *pair) for pair in pairs] == [False, False, False, True, True]


def test_a_mistake_that_is_right_where_the_answer_went_wrong_is_not_the_answers():
    exercise = dataclasses.replace(EVERY["speed-up"], rtol=0.01, atol=0.0)
    right = exercise.solution
    first = right(*first_case(exercise).args)
    mistake = exercises.Mistake("late", lambda *args: right(*args) * (1.008 if right(*args) == first else 5), "", "")
    verdict = judge(dataclasses.replace(exercise, mistakes=(mistake,)), lambda *args: 1.016 * right(*args))
    assert verdict.text.startswith("case 1 of ")
    assert verdict.passed is False and verdict.mistake is None


@pytest.mark.parametrize(
    "value, text",
    [
        (torch.tensor([0.5, 3.0]), "float32 (2,) [0.5, 3]"),
        (torch.arange(9), "int64 (9,) [0, 1, 2, 3, 4, 5, 6, 7, …]"),
        (0.25, "0.25"),
        ([1, 2.0], "[1, 2]"),
        (list(range(9)), "[0, 1, 2, 3, 4, 5, 6, 7, …]"),
        (list(range(8)), "[0, 1, 2, 3, 4, 5, 6, 7]"),
        (torch.arange(8), "int64 (8,) [0, 1, 2, 3, 4, 5, 6, 7]"),
        ((1, 2), "(1, 2)"),
        ((1,), "(1,)"),
        (["a" * 60], "['" + "a" * 58 + "…]"),
        ({"a": 1, "b": [2]}, "{'a': 1, 'b': [2]}"),
        ("b" * 158, "'" + "b" * 158 + "'"),
        ("b" * 159, "'" + "b" * 158 + "…"),
    ],
)
def test_values_are_shown_short(value, text):
    assert show(value) == text


@pytest.mark.parametrize(
    "got, expected, said",
    [
        (3, torch.tensor([1, 2]), "a tensor was asked for, this is of type int"),
        (torch.zeros(2), torch.zeros(3), "its shape is (2,), not (3,)"),
        (torch.zeros(2), torch.zeros(2).int(), "its dtype is torch.float32, not torch.int32"),
        (torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 2], [5, 6]]), "2 of 4 values differ; at [1, 0] 3, not 5"),
        (torch.tensor(1.0), torch.tensor(2.0), "it is another value"),
        ("a", "b", "it is another value"),
        (1, True, "it is another value"),
        ("2", 2, "a number was asked for, this is of type str"),
        (True, 1, "a number was asked for, this is of type bool"),
        (2.0, 2, "an integer was asked for"),
        (2.5, 2, "it is 2.5, not 2"),
        (3, 2, "it is 3, not 2"),
        (1.5, 1.0, "it is 1.5, not 1"),
        ({"a": 1}, {"b": 1, "a": 1}, "a dict with the keys ['a', 'b'] was asked for"),
        ({"a": 1, "b": 3}, {"a": 1, "b": 2}, "under 'b': it is 3, not 2"),
        ((1, 2, 3), (1, 2), "2 values were asked for, in a tuple; this is a tuple of 3"),
        (7, (1, 2), "2 values were asked for, in a tuple; this is of type int"),
        ([1, 4], (1, 2), "value 2 of 2: it is 4, not 2"),
    ],
)
def test_what_differs_is_said(got, expected, said):
    assert difference(got, expected, rtol=0.1, atol=0.0) == said


def test_equal_enough_is_equal():
    for got, expected in (
        (torch.tensor([torch.nan, 1.0]), torch.tensor([torch.nan, 1.05])),
        (None, None),
        (2, 2),
        (torch.tensor([2]), 2),
        (1.05, 1.0),
        (float("nan"), float("nan")),
        ([1, 2], (1, 2)),
    ):
        assert difference(got, expected, rtol=0.1, atol=0.0) is None
        assert difference((got, 1), (expected, 2), rtol=0.1, atol=0.0) == "value 2 of 2: it is 1, not 2"


def test_numbers_that_look_the_same_are_told_apart_by_how_much():
    assert difference(10.0**9 + 512, 10.0**9, rtol=0.0, atol=0.0) == "it is off by 5e+02"


@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_what_is_off_by_less_than_atol_is_the_same(kind):
    assert difference(kind(0.001), kind(0.0), rtol=0.0, atol=0.002) is None
    assert difference(kind(0.001), kind(0.0), rtol=0.0, atol=0.0005)
    assert difference(kind(1e-9), kind(0.0), rtol=0.0, atol=0.0)


def test_a_wrong_value_is_shown_with_what_was_expected():
    verdict = judge(EVERY["honest-size"], lambda *args: (0, 4.5))
    case = first_case(EVERY["honest-size"])
    size, bits = EVERY["honest-size"].solution(*case.args)
    said = f"  got       (0, 4.5)\n  expected  ({size}, {bits})\n  that is   value 1 of 2: it is 0, not {size}"
    assert said in verdict.text


def test_not_attempted_is_what_the_first_case_says():
    calls = []

    def unfinished(*args):
        calls.append(args)
        if len(calls) == 2:
            raise NotImplementedError
        return EVERY["zero-point"].solution(*args)

    verdict = judge(EVERY["zero-point"], unfinished)
    assert verdict.passed is False and verdict.text.startswith("case 2 of ")


def test_an_error_without_words_is_its_name():
    assert (_short(LookupError()), _short(LookupError("a:\nb"))) == ("LookupError", "LookupError: a:")


def test_a_wrong_case_is_shown_with_all_its_arguments():
    verdict = judge(EVERY["zero-point"], lambda low, high, bits=8: (low, high))
    first = first_case(EVERY["zero-point"])
    assert len(first.args) > 1
    assert f"input     {', '.join(show(argument, 80) for argument in first.args)}\n" in verdict.text


def test_an_answer_must_be_a_function():
    verdict = judge(EVERY["zero-point"], (0.5, 3))
    assert verdict.passed is False and "hand over `affine_range` itself" in verdict.text


def test_not_implemented_later_on_counts_as_attempted():
    def half(low, high, bits=8):
        if low > 0:
            raise NotImplementedError
        return EVERY["zero-point"].solution(low, high, bits)

    assert judge(EVERY["zero-point"], half).passed is False


def test_right_on_the_first_case_and_wrong_on_an_edge():
    def brittle(low, high, bits=8):
        scale = (high - low) / (2**bits - 1)
        return scale, round(-low / scale)

    verdict = judge(EVERY["zero-point"], brittle)
    assert verdict.passed is False and "all positive" in verdict.text


def test_arguments_are_copies():
    kept = []

    def keeps(x, scale, zero_point, bits=8):
        kept.append(x)
        x.mul_(0)
        return x

    first = judge(EVERY["fake-quantize"], keeps)
    second = judge(EVERY["fake-quantize"], EVERY["fake-quantize"].solution)
    assert first.passed is False and second.passed is True


def test_right_values_with_the_input_changed_do_not_pass():
    def messy(x):
        found = EVERY["round-half-even"].solution(x)
        x.zero_()
        return found

    verdict = judge(EVERY["round-half-even"], messy)
    assert verdict.passed is False and "argument 1 was changed in place" in verdict.text


def test_check_prints_the_verdict_and_returns_it(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_PROGRESS", str(tmp_path / "mine.json"))
    exercise = EVERY["zero-point"]
    result = exercises.check("zero-point", exercise.solution)
    assert result.passed is True and capsys.readouterr().out.startswith("✔ Scale and zero point: all 13 cases")
    result = exercises.check("zero-point", exercise.mistakes[0].function)
    printed = capsys.readouterr().out
    assert result.passed is False and result.mistake == exercise.mistakes[0].name
    assert printed.startswith("✘ Scale and zero point: case 1 of 13") and exercise.mistakes[0].says in printed
    result = exercises.check("zero-point", written(exercise.stub(), "affine_range"))
    assert result.passed is None and "not attempted" in capsys.readouterr().out
    assert result._ipython_display_() is None
    written_down = importlib.import_module("course_utils.exercises.progress").read()
    assert written_down["zero-point"]["tries"] == 2  # a stub is none


def test_hints_rise_and_start_again(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_PROGRESS", str(tmp_path / "mine.json"))
    exercises.reset()
    for _ in range(4):
        exercises.hint("zero-point")
    exercises.reset()
    exercises.hint("zero-point")
    lines = capsys.readouterr().out.splitlines()
    assert [line[:11] for line in lines] == [f"hint {n} of 3" for n in (1, 2, 3, 1, 1)]
    assert EVERY["zero-point"].hints[2] in lines[2]


def test_solution_is_the_tested_one(capsys):
    for id in ("zero-point", "gptq"):
        exercises.solution(id)
        assert ast.dump(ast.parse(capsys.readouterr().out)) == ast.dump(ast.parse(EVERY[id].source()))
        assert exercises.get(id) is EVERY[id]


def test_fill_keeps_what_stands_around_the_function():
    exercise = EVERY["zero-point"]
    cell = f"import math\n\n{exercise.stub()}\n\n\ncheck('zero-point', affine_range)"
    filled = exercise.fill(cell)
    assert filled.startswith("import math\n\ndef affine_range") and filled.endswith("check('zero-point', affine_range)")
    assert "NotImplementedError" not in filled
    with pytest.raises(ValueError, match="defines no affine_range"):
        exercise.fill("x = 1")
