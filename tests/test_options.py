"""Random command lines and YAML files for both scripts: never a traceback; invalid ones exit with 2 and name the option."""

import contextlib
import io
import os

import golden
import hypothesis
import pytest
import yaml
from hypothesis import strategies as st

import memorizing_associations_task as task
import plot_memorizing_associations_task as plot
from utils.errors import UserError
from utils.options import TASK_GROUPS

PUBLISHED = str(golden.FOLDER / "published_format_checkpoint.pth.tar")
TABLES = {
    "train": {o.name: o for group in TASK_GROUPS.values() for o in group},
    "plot": {o.name: o for group in plot.GROUPS.values() for o in group},
}
EXAMPLES = int(os.environ.get("OPTIONS_EXAMPLES", "40"))
many = hypothesis.settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(hypothesis.HealthCheck), derandomize=True, database=None
)
scripts = pytest.mark.parametrize("script", ["train", "plot"])


@pytest.fixture(autouse=True)
def stop_after_the_options(monkeypatch, tmp_path):
    """Nothing is trained or drawn: what is valid ends with 0 (training) or 1 (plotting)."""

    def stop(*_):
        raise UserError("stopped by the test")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(task.launch, "run", lambda *_: 0)
    monkeypatch.setattr(plot, "record", stop)


def outcome(script: str, arguments: list[str]) -> tuple[int, list[str]]:
    """Exit status of a script and the lines it writes to stderr."""
    out, err = io.StringIO(), io.StringIO()
    command = {"train": task.main, "plot": plot.main}[script]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = command(arguments)
        except SystemExit as end:
            status = end.code
    return status or 0, err.getvalue().splitlines()


def told(script: str, arguments: list[str]) -> tuple[int, str]:
    """The same; an error must be one line."""
    status, lines = outcome(script, arguments)
    assert status in (0, 1, 2)
    errors = [line for line in lines if "error: " in line]
    assert len(errors) == (status != 0), lines
    assert all("error: " in line or line.startswith("warning: ") for line in lines), lines
    return status, errors[0] if errors else ""


def in_yaml(script: str, text: str | bytes) -> tuple[int, str]:
    with open("options.yaml", "wb") as file:
        file.write(text if isinstance(text, bytes) else text.encode(errors="surrogateescape"))
    return told(script, ["--config", "options.yaml", *needed(script)])


def needed(script: str) -> list[str]:
    return ["--checkpoint_path", PUBLISHED] if script == "plot" else []


def one_of(script: str):
    return st.sampled_from(sorted(TABLES[script]))


NUMBER_WORDS = ("ten", "", " ", "1e", "0x10", "--", "1,5", "None", "true", "[1]", "𝟙x", "\x00", "1\n2", "nan", "inf", "-inf")


def wrong_words(option) -> st.SearchStrategy | None:
    """Words that cannot be a value of the option."""
    if option.kind not in (int, float) or option.words:
        return st.sampled_from(["no such", "ALL", ""]) if option.choices else None
    wrong = [st.sampled_from(NUMBER_WORDS)]
    if option.kind is int:
        wrong.append(st.floats(allow_nan=False).filter(lambda x: "." in repr(x) or "e" in repr(x)).map(repr))
    if option.low is not None:
        wrong.append(st.integers(max_value=int(option.low) - 1).map(str))
    if option.above is not None:
        wrong.append(st.floats(max_value=option.above, allow_nan=False, allow_infinity=False).map(repr))
    if option.high is not None:
        wrong.append(st.integers(min_value=int(option.high) + 1).map(str))
    if option.choices:
        wrong.append(st.integers().filter(lambda n: n not in option.choices).map(str))
    return st.one_of(wrong)


def right_values(option) -> st.SearchStrategy:
    if option.choices:
        return st.sampled_from(option.choices)
    if option.kind is bool:
        return st.booleans()
    if option.kind is int:
        low = 0 if option.low is None else int(option.low)
        return st.integers(low, min(low + 10**6, int(option.high or 10**30)))
    if option.kind is float:
        low = option.above if option.above is not None else option.low or 0.0
        return st.floats(low, min(1e6, option.high or 1e6), exclude_min=option.above is not None)
    return st.just(option.default)


@scripts
@many
@hypothesis.given(draws=st.data())
def test_wrong_words_exit_with_2_and_name_the_option(script, draws):
    name = draws.draw(one_of(script).filter(lambda name: wrong_words(TABLES[script][name]) is not None))
    word = draws.draw(wrong_words(TABLES[script][name]))
    spelling = draws.draw(st.sampled_from([f"--{name}", f"--{name.replace('_', '-')}"]))
    status, error = told(script, [f"{spelling}={word}", *needed(script)])
    assert status == 2
    assert name in error.replace("-", "_")


@scripts
@many
@hypothesis.given(draws=st.data())
def test_wrong_yaml_values_exit_with_2_and_name_the_option(script, draws):
    table = TABLES[script]
    name = draws.draw(one_of(script))
    kind, wrong = table[name].kind, [[], {}, {"a": 1}, [[1, [2]]], "2026-11-23", b"bytes"]
    wrong += {int: [True, 1.5, "word", [1]], float: [False, "word", [1.0]], bool: [1, 0, "maybe"], str: [1, 2.5, True]}.get(
        kind, []
    )
    value = draws.draw(st.sampled_from(wrong))
    hypothesis.assume(not (kind is str and isinstance(value, str) and not table[name].choices))
    hypothesis.assume(not table[name].words)
    text = yaml.safe_dump({name: value}) if value != "2026-11-23" else f"{name}: 2026-11-23\n"
    status, error = in_yaml(script, text)
    assert status == 2
    assert name in error


@scripts
@many
@hypothesis.given(draws=st.data())
def test_valid_options_are_taken_from_both_places(script, draws):
    table = TABLES[script]
    model = {"sequence_length", "num_classes", "curriculum_start", "mixed_lengths"}  # these depend on one another
    free = sorted(
        set(table) - model - {"resume", "evaluate", "rank", "world_size", "dist_url", "device", "gpu", "print_options"}
    )
    free = [name for name in free if not table[name].words and not (script == "plot" and name in TABLES["train"])]
    hypothesis.assume(free)
    names = draws.draw(st.lists(st.sampled_from(free), unique=True, max_size=6))
    values = {name: draws.draw(right_values(table[name])) for name in names if name != "checkpoint_path"}
    values.pop("processes_per_node", None)
    values.pop("figure", None)  # some need other files
    status, error = in_yaml(script, yaml.safe_dump(values))
    assert (status, "stopped" in error) == ((0, False) if script == "train" else (1, True)), error
    words = [
        f"--{n}={v}" if not isinstance(v, bool) else f"--{'' if v else 'no-'}{n}" for n, v in values.items() if v is not None
    ]
    assert told(script, [*words, *needed(script)]) == (status, error)


@scripts
@many
@hypothesis.given(draws=st.data())
def test_any_command_line(script, draws):
    spelled = one_of(script).map(lambda name: f"--{name}")
    word = st.one_of(spelled, spelled, st.text(max_size=8), st.integers().map(str), st.floats().map(repr))
    words = draws.draw(st.lists(word, max_size=8))
    hypothesis.assume("--show" not in words)
    told(script, words)


@scripts
@many
@hypothesis.given(draws=st.data())
def test_any_yaml_file(script, draws):
    scalar = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.binary(max_size=8), st.dates()
    )
    value = st.recursive(
        scalar, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3), max_leaves=8
    )
    key = st.one_of(one_of(script), one_of(script), st.text(max_size=8), st.integers(), st.none(), st.dates(), st.booleans())
    told_of = draws.draw(st.dictionaries(key, value, max_size=5))
    in_yaml(script, yaml.safe_dump(told_of))


@scripts
@many
@hypothesis.given(content=st.one_of(st.binary(max_size=60), st.text(max_size=60)))
def test_any_file_as_yaml(script, content):
    in_yaml(script, content)


@scripts
@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("thr: 0.1\nthr: 0.2\n", "thr"),
        ("thr: 1e400\n", "thr"),
        ("thr: .nan\n", "thr"),
        ("memory_size: 1_0.5\n", "memory_size"),
        ("memory_size: 0x\n", "memory_size"),
        ("memory_size: [1, 2]\n", "memory_size"),
        ("memory_size: 12:30:45.5\n", "memory_size"),
        ("memory_size:\n", "memory_size"),
        ("memory_size: " + "9" * 5000 + "\n", "options.yaml"),
        ("perfect_reset: 1\n", "perfect_reset"),
        ("memory_sise: 3\n", "memory_size"),
        ("? [a, b]\n: 3\n", "options.yaml"),
        ("1: 2\n", "1"),
        ("null: 2\n", "None"),
        ("- memory_size\n", "options.yaml"),
        ("just text\n", "options.yaml"),
        ("thr: *nothing\n", "options.yaml"),
        ("thr: !!python/object/apply:os.system ['touch ran']\n", "options.yaml"),
        ("thr: &a [*a]\n", "thr"),
        ("a: 1\n--- \nb: 2\n", "options.yaml"),
        ("[" * 20_000, "options.yaml"),
        ("thr: " + "[" * 3000 + "]" * 3000, "options.yaml"),
        (b"\xff\xfe\x00\x01", "options.yaml"),
        (bytes(range(256)), "options.yaml"),
        ("\t- x: [\n", "options.yaml"),
    ],
    ids=range(25),
)
def test_odd_yaml_files(script, text, named):
    status, error = in_yaml(script, text)
    assert status == 2
    assert named in error
    assert not os.path.exists("ran")


def test_odd_yaml_that_is_valid():
    assert in_yaml("train", "l2: 1e-5\nmemory_size: 010\nlearning_rate: 1\nseed: null\n") == (0, "")
    assert in_yaml("train", "x-size: &size 20\nmemory_size: *size\n")[0] == 2
    assert in_yaml("train", "memory_size: &size 20\nembedding-size: *size\n") == (0, "")
    assert in_yaml("train", "") == (0, "")


@scripts
@pytest.mark.parametrize("path", ["absent.yaml", ".", "/dev/null/x", "a" * 5000, "\x00"])
def test_config_that_cannot_be_read(script, path):
    status, error = told(script, ["--config", path])
    assert status == 2
    assert "--config" in error
