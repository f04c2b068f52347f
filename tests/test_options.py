"""Options of both scripts, on the command line and in YAML: never a traceback; an error is one line that names the option."""

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
from utils.options import REMOVED, Parser

PUBLISHED = str(golden.PUBLISHED)


@pytest.fixture(autouse=True)
def stop_after_the_options(monkeypatch, tmp_path):
    """Nothing is trained or drawn: valid options end with 0, or with 1 if a checkpoint would be read."""

    def stop(*_, **__):
        raise UserError("stopped by the test")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(task.launch, "run", lambda *_, **__: 0)
    monkeypatch.setattr("utils.checkpoints.load", stop)


def outcome(arguments: list[str], script=task) -> tuple[int, str]:
    """Exit status of a script, and its error, which must be one short line of printable text."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = script.main(arguments)
        except SystemExit as end:
            status = end.code or 0
    lines = err.getvalue().splitlines()
    errors = [line for line in lines if "error: " in line]
    assert status in (0, 1, 2)
    assert len(errors) == (status != 0), lines
    assert all("error: " in line or line.startswith(("warning: ", "--resume auto: ")) for line in lines), lines
    assert all(line.isprintable() and len(line) < 1000 for line in errors), lines
    return status, errors[0] if errors else ""


def in_yaml(text: str | bytes, script=task) -> tuple[int, str]:
    with open("options.yaml", "wb") as file:
        file.write(text if isinstance(text, bytes) else text.encode(errors="surrogateescape"))
    return outcome(["--config", "options.yaml", *(["--checkpoint_path", PUBLISHED] if script is plot else [])], script)


def parser_of(script=task) -> Parser:
    parser = Parser("")
    script.add_options(parser)
    return parser


def table_of(script=task) -> dict:
    """The action of each option, without removed options and --help."""
    return {a.dest: a for a in parser_of(script)._actions if a.dest not in (*REMOVED, "config", "help")}


def given(*words: str) -> dict:
    return parser_of().given(words)


# The command line, frozen

PUBLISHED_DEFAULTS = """{
    sequence_length: 10, num_classes: 10, feature_size: 10, inf_data: 1, num_time_steps: 100, workers: 4, prefetch_factor: 2,
    embedding_size: 80, memory_size: 100, w_max: 1.0, gamma_pos: 0.3, gamma_neg: 0.3, tau_trace: 20.0, readout_delay: 1,
    thr: 0.1, perfect_reset: false, refractory_time_steps: 3, tau_mem: 20.0, dampening_factor: 1.0, epochs: 250,
    batch_size: 512,
    learning_rate: 0.003, learning_rate_decay: 0.85, decay_learning_rate_every: 20, max_grad_norm: 40.0,
    l2: 1.0e-5,
    target_rate: 0.0, start_epoch: 0, resume: "", check_params: 1, evaluate: false, logging: false, print_freq: 1,
    world_size: -1, rank: -1, dist_url: "tcp://127.0.0.1:23456", dist_backend: nccl, seed: null, dataset_seed: 42, gpu: null,
    multiprocessing_distributed: false}"""
NOT_RECORDED = set("resume check_params evaluate world_size rank dist_url dist_backend gpu multiprocessing_distributed".split())


def test_every_option_of_the_original_implementation_has_its_default_and_both_spellings(capsys):
    table = table_of()
    for name, default in yaml.safe_load(PUBLISHED_DEFAULTS).items():
        assert table[name].default == default and type(table[name].default) is type(default)
        for spelling in (name, name.replace("_", "-")):
            value = {"perfect_reset": "", "evaluate": "", "logging": "", "multiprocessing_distributed": ""}.get(name)
            words = [f"--{spelling}"] if value is not None else [f"--{spelling}", "none" if default is None else str(default)]
            assert given(*words) == {name: True if value is not None else default}
    with pytest.raises(SystemExit):
        task.main(["--help"])
    usage, help = capsys.readouterr().out.split("\n\n", 1)
    assert len(usage.splitlines()) <= 2
    assert help.count("--dist_url ") == 1 and "--dist-url" not in help
    assert "(default: none)" in help and "default: )" not in help


def test_flags_override_yaml_and_a_later_file_an_earlier_one(capsys, tmp_path):
    (tmp_path / "a.yaml").write_text("memory_size: 30\nl2: 1e-4\ntau-mem: 15\nperfect_reset: true\nseed: null\n")
    (tmp_path / "b.yaml").write_text("tau_mem: 16\n")
    words = "--config a.yaml --config b.yaml --memory-size 40 --perfect-reset false --print_options".split()
    assert task.main(words) == 0
    options = yaml.safe_load(capsys.readouterr().out)
    assert (options["memory_size"], options["l2"], options["tau_mem"], options["seed"]) == (40, 1e-4, 16.0, None)
    assert options["perfect_reset"] is False


def test_config_reads_printed_options(capsys, tmp_path):
    words = ["--resume", "auto", "--output_dir", str(tmp_path), "--l2", "1e-4", "--seed", "7", "--print_options"]
    assert task.main(words) == 0
    printed = capsys.readouterr().out
    (tmp_path / "a.yaml").write_text(printed)
    recorded = given("--config", "a.yaml")
    assert (recorded["l2"], recorded["seed"], recorded["memory_size"]) == (1e-4, 7, 100)
    assert recorded.keys() == yaml.safe_load(printed).keys() > yaml.safe_load(PUBLISHED_DEFAULTS).keys() - NOT_RECORDED


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("--evaluate False", {"evaluate": False}),
        ("--evaluate --memory-size 3", {"evaluate": True, "memory_size": 3}),
        ("--logging false --perfect-reset=true", {"logging": False, "perfect_reset": True}),
        ("--max_grad_norm -1e-3 --rank -1", {"max_grad_norm": -1e-3, "rank": -1}),
        ("--learning_rate_decay 1 --prefetch_factor 1024", {"learning_rate_decay": 1, "prefetch_factor": 1024}),
        ("--sequence_length 2-4,7", {"sequence_length": (2, 3, 4, 7)}),
        ("--seed none", {"seed": None}),
        ("--output_dir=~/x", {"output_dir": os.path.expanduser("~/x")}),
        ("--network hebbian_snn --mixed-lengths=0", {}),  # removed options at values without effect
    ],
)
def test_words_of_the_command_line_give_these_values(words, values):
    assert given(*words.split()) == values


def test_yaml_values_are_read_like_words_of_the_command_line(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "seed: 010\nsequence_length: [2-4, 7]\noutput_dir:\nmemory_size: &size 20\nembedding-size: *size\n"
        "network: hebbian_snn\n<<: {seed: 1, l2: 2}\n"
    )
    expected = {"seed": 10, "sequence_length": (2, 3, 4, 7), "output_dir": "", "memory_size": 20, "embedding_size": 20, "l2": 2}
    assert given("--config", "a.yaml") == expected
    assert in_yaml("") == (0, "")


# Refusals


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ("--sequence_length 11", "--sequence_length 11 is more than --num_classes 10"),
        ("--sequence_length 0", "--sequence_length: must be one length (10) or several"),
        ("--sequence_length 2-5", "--sequence_length: several lengths are for --evaluate"),
        ("--sequence_length 5-2 --evaluate", "--sequence_length: must be one length (10) or several"),
        ("--curriculum_start 11", "--curriculum_start 11"),
        ("--memory_size 0", "--memory_size: must be at least 1"),
        ("--tau_mem 0", "--tau_mem: must be greater than 0"),
        ("--prefetch_factor 1025", "--prefetch_factor: must be at most 1024"),
        ("--epochs 1" + "0" * 400, "--epochs: must be a 64-bit number"),
        ("--thr " + "9" * 5000, "--thr: must be finite"),
        ("--perfect_reset maybe", "--perfect_reset: must be true or false, not 'maybe'"),
        ("--memory_size", "--memory_size: expected one argument"),
        ("--memory-size=--", "--memory_size: must have a value other than --"),
        ("--network lstm", "--network: removed after v0.3; see CHANGELOG.md"),
        ("--no-logging", "--no_logging: no such option, did you mean --logging?"),
        ("--lr 1", "--lr: no such option, did you mean --learning_rate?"),
        ("--seq_len 5", "--seq_len: no such option, did you mean --sequence_length?"),
        ("word", "'word': not an option"),
        ("-- --thr", "--: no such option"),
        ("--config no.yaml", "--config no.yaml: No such file"),
    ],
)
def test_impossible_command_lines_are_refused(arguments, names):
    status, error = outcome(arguments.split())
    assert status == 2 and names in error


# Expanded, this has 9 to the power of 25 words.
BOMB = "a: &a0 [lol]\n" + "".join(f"b{n}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]\n" for n in range(25))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("tau-mem: 1\ntau_mem: 1\n", "tau_mem is given twice"),
        ("thr: 1e400\n", "thr: must be finite"),
        ("seed: 1:30\n", "seed: must be a whole number, not '1:30'"),
        ("memory_size:\n", "memory_size: must be a whole number, not 'none'"),
        ("network: h_mem\n", "network: removed after v0.3; see CHANGELOG.md"),
        ("memory_sise: 3\n", "memory_sise: no such option, did you mean --memory_size?"),
        ("? [a, b]\n: 3\n", "is not an option"),
        ("<<: [{thr: 1}]\n", "<< must be a mapping"),
        ("null: 2\n", "none: no such option"),
        ("- memory_size\n", "must hold lines like"),
        ("thr: !!python/object/apply:os.system ['touch ran']\n", "options.yaml"),
        ("thr: {a: 0.1}\n", "'thr': must have one value, or a list of values"),
        ("config: other.yaml\n", "a file cannot name another file"),
        ("thr=0.1: 1\n", "thr: must be a number, not '0.1=1'"),
        ('"\\e[31m": 1\n"\\e[31m": 1\n', "is given twice"),
        ("thr: &a [*a]\n", "options.yaml"),
        ("[" * 20_000, "options.yaml"),
        (b"\xff\xfe\x00\x01", "options.yaml"),
        *((BOMB + use, "options.yaml") for use in ("thr: *a25\n", "? *a25\n: 1\n", "? {thr: *a25}\n: 1\n", "<<: *a25\n")),
    ],
    ids=range(22),
)
def test_odd_yaml_is_refused(text, named):
    status, error = in_yaml(text)
    assert status == 2 and "options.yaml" in error and named in error
    assert not os.path.exists("ran")


@pytest.mark.parametrize("script", [task, plot])
def test_a_wrong_value_of_any_option_is_named_on_the_command_line_and_in_a_file(script):
    for name in table_of(script):
        word = "\x1b[31m\n"
        assert f"--{name}: " in outcome([f"--{name.replace('_', '-')}={word}"], script)[1]
        assert f"options.yaml: --{name}: " in in_yaml(yaml.safe_dump({name: word}), script)[1]


@hypothesis.settings(max_examples=25, deadline=None, suppress_health_check=list(hypothesis.HealthCheck), derandomize=True)
@hypothesis.given(draws=st.data())
def test_any_command_line_or_yaml_file_succeeds_or_fails_in_one_line(draws):
    option = st.sampled_from(sorted(table_of()))
    scalar = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.dates())
    word = st.one_of(option.map(lambda name: f"--{name}"), st.text(max_size=8), st.integers().map(str), st.floats().map(repr))
    outcome(draws.draw(st.lists(word, max_size=8)))
    value = scalar | st.lists(scalar, max_size=3) | st.dictionaries(st.text(max_size=3), scalar, max_size=3)
    in_yaml(yaml.safe_dump(draws.draw(st.dictionaries(option | scalar, value, max_size=5))))
    in_yaml(draws.draw(st.one_of(st.binary(max_size=60), st.text(max_size=60))))


def test_the_word_none_is_no_path():
    """An empty path would be the working folder."""
    words = ["--metrics", "none", "--csv", "a.csv", "--output", "none"]
    assert parser_of(plot).given(words) == {"metrics": [], "csv": ["a.csv"], "output": ""}
