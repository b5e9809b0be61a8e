"""Settings: files, overrides, messages, round trips, resuming."""

import importlib.util
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from nora_diffusion.config import (
    ConfigError,
    DreamboothConfig,
    UserError,
    fill_prompt,
    load_config,
    load_run,
    save_config,
    shipped_configs,
)
from nora_diffusion.schema import get_key, list_keys
from nora_diffusion.settings import to_toml, validate

ROOT = Path(__file__).parent.parent
REQUIRED = ["--data.subject", "photos", "--data.class_name", "dog"]
KEYS = {key.name: key for key in list_keys(DreamboothConfig)}


@pytest.fixture
def toml(tmp_path):
    """Write a TOML file with the required keys and more."""

    def write(text: str = "") -> Path:
        path = tmp_path / "my.toml"
        path.write_text(f'data.subject = "photos"\ndata.class_name = "dog"\n{text}')
        return path

    return write


def problems(source, overrides=()) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    return list(caught.value.problems)


def test_command_line_goes_before_file_before_defaults(toml):
    config = load_config(toml("[train]\nsteps = 7\nseed = 5"), ["--train.steps", "9"])
    assert (config.train.steps, config.train.seed, config.train.batch_size) == (9, 5, 4)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.steps=300", "train.steps", 300),
        ("--train.learning_rate=1e-4", "train.learning_rate", 1e-4),
        ("--train.learning_rate=1", "train.learning_rate", 1.0),
        ("--data.flip=true", "data.flip", True),
        ("--data.flip=no", "data.flip", False),
        ("--data.trigger=123", "data.trigger", "123"),
        ("--data.class_name=true", "data.class_name", "true"),
        ("--data.trigger=[x]", "data.trigger", "[x]"),
        ("--output.portable=none", "output.portable", None),
        ("--output.portable=false", "output.portable", False),
        ("--adapter.timestep_rank=1.5", "adapter.timestep_rank", 1.5),
        (
            "--adapter.timestep_rank={alpha = 1.0, k_min = 2}",
            "adapter.timestep_rank",
            {"alpha": 1.0, "k_min": 2},
        ),
        (
            "--adapter.targets=attention,feed_forward",
            "adapter.targets",
            ("attention", "feed_forward"),
        ),
        ("--sample.prompts=a cat, a dog", "sample.prompts", ("a cat, a dog",)),
        ('--sample.prompts=["one", "two"]', "sample.prompts", ("one", "two")),
        ("--sample.negative_prompt=--blurry = bad", "sample.negative_prompt", "--blurry = bad"),
        ("--data.resolution_px=none", "data.resolution_px", None),
    ],
)
def test_override_texts_become_the_keys_type(toml, override, key, value):
    found = get_key(load_config(toml(), [override]), key)
    assert found == value and type(found) is type(value)


def test_a_repeated_flag_is_a_list_or_the_last_word(toml):
    overrides = ["--sample.prompts", "a", "--sample.prompts", "b"]
    config = load_config(toml(), [*overrides, "--train.steps", "1", "--train.steps", "2"])
    assert config.sample.prompts == ("a", "b")
    assert config.train.steps == 2


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("lr", "text_encoder.learning_rate or train.learning_rate"),
        ("train.lr", "train.learning_rate"),
        ("rank", "adapter.r or text_encoder.r"),
        ("max_train_steps", "train.steps or sample.steps"),
        ("train.epochs", "train.steps"),
        ("trigger_word", "data.trigger"),
        ("instance_data_dir", "data.subject"),
    ],
)
def test_words_of_other_trainers_lead_to_the_key(toml, word, key):
    (told,) = problems(toml(), [f"--{word}", "1"])
    assert told == f'{word} = "1": unknown; did you mean {key}?'


def test_all_problems_are_reported_at_once_each_naming_key_value_and_cure(toml):
    found = problems(
        toml('[train]\nstpes = 4\nbatch_size = true\n[trane]\nx = 1\n[model]\ndtype = "int8"'),
        ["--adapter.r", "4", "--data.resolution_px", "63", "--train.learning_rate", "fast"],
    )
    assert sorted(found) == sorted(
        [
            "train.stpes = 4: unknown; did you mean train.steps?",
            "train.batch_size = true: must be a whole number >= 1",
            "trane: unknown; did you mean train?",
            'model.dtype = "int8": must be one of auto, fp32, bf16, fp16',
            "adapter.inner_r = 8: must be at most adapter.r = 4",
            "data.resolution_px = 63: must be a whole number >= 32 and <= 4096 and "
            "a multiple of 8, or none",
            'train.learning_rate = "fast": must be a number > 0',
        ]
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["--steps", "3"], 'steps = "3": unknown; did you mean train.steps or sample.steps?'),
        (["--model.lerning_rate", "3"], "text_encoder.learning_rate or train.learning_rate?"),
        (["--train.steps"], "train.steps: needs a value; write --train.steps value"),
        (["--train.steps", "--data.flip=true"], "train.steps: needs a value"),
        (["steps"], "steps: not a setting; write --section.key value"),
        (["--train", "3"], "train = \"3\": a section, not a key; its keys: train.steps"),
        (["--train.qqqq", "3"], "unknown; the keys there: train.steps, train.batch_size"),
        (["--train.learning_rate", "nan"], "train.learning_rate = NaN: must be a number > 0"),
        (["--train.learning_rate", "inf"], "must be a number > 0"),
        (["--train.steps", "1.5"], 'train.steps = "1.5": must be a whole number >= 1'),
        (["--train.steps", "none"], 'train.steps = "none": must be a whole number >= 1'),
        (["--train.ema_decay", "1"], "ema_decay = 1.0: must be a number > 0 and < 1, or none"),
        (["--adapter.targets", "attn"], "must be a non-empty list of attention, feed_forward"),
        (["--adapter.targets", "[]"], "adapter.targets = []: must be a non-empty list"),
        (["--adapter.timestep_rank", "0"], "adapter.timestep_rank = 0.0: must be a number > 0"),
        (
            ["--adapter.timestep_rank", "{alpha = 1.0, k_min = 9}"],
            "adapter.timestep_rank.k_min = 9: must be at most adapter.inner_r = 8",
        ),
        (["--adapter.timestep_rank", "{alpha = 1.0}"], "must be a number > 0, or { alpha"),
        (["--text_encoder.r", "2"], "text_encoder.inner_r = 8: must be at most text_encoder.r = 2"),
        (["--train.seed", "-1"], "train.seed = -1: must be a whole number >= 0"),
        (["--data.trigger", ""], 'data.trigger = "": must be a non-empty text'),
        (["--data.class_name", "  "], 'data.class_name = "  ": must be a non-empty text'),
        (["--data.subjects", '{ path = " " }'], 'data.subjects[0].path = " ": must be a non-empty'),
    ],
)  # fmt: skip
def test_messages_for_overrides(toml, override, message):
    (found,) = problems(toml(), override)
    assert message in found


def test_required_keys_say_what_they_are(tmp_path):
    path = tmp_path / "empty.toml"
    path.write_text("")
    assert problems(path) == ["data: missing; give data.subject, data.class_name"]
    path.write_text("[data]\nflip = true")
    subject, class_name = problems(path)
    assert subject.startswith("data.subject: missing; give it as --data.subject (Folder with 1")
    assert class_name.startswith("data.class_name: missing; give it as --data.class_name")


def test_files_are_strict_about_types(toml):
    assert problems(toml('[train]\nsteps = "3"')) == [
        'train.steps = "3": must be a whole number >= 1, or auto'
    ]
    assert problems(toml("train = 3")) == ["train = 3: must be a section of keys, [train]"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[train\nsteps = 3", "is not valid TOML: Expected"),
        (b"steps = '\xff'", "is not UTF-8 text; save it as UTF-8"),
    ],
)
def test_broken_files_are_named(tmp_path, content, message):
    path = tmp_path / "my.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


def test_a_byte_order_mark_is_no_problem(toml):
    path = toml()
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_config(path).data.class_name == "dog"


def test_unknown_config_names_the_shipped_ones():
    with pytest.raises(UserError, match="no such file, nor one of flux, .*did you mean mini?"):
        load_config("minni")


def test_config_is_frozen(toml):
    config = load_config(toml())
    with pytest.raises(ValidationError, match="frozen"):
        config.train.steps = 3


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_configs_are_valid_short_and_start_with_their_command(name):
    path = ROOT / "configs" / f"{name}.toml"
    lines = path.read_text().splitlines()
    assert len(lines) <= 30
    prefix, _, command = lines[0].partition(f"# nora-dreambooth {name} ")
    assert prefix == "" and command
    config = load_config(name, command.split())
    file = tomllib.loads(path.read_text())
    written = {f"{section}.{key}" for section, keys in file.items() for key in keys}
    assert {key for key in written if get_key(config, key) == KEYS[key].default} <= {
        # said again where they are the subject of the file
        "model.base", "adapter.r", "adapter.inner_r", "train.steps", "train.batch_size",
        "train.learning_rate", "sample.guidance",
    }  # fmt: skip


def test_every_key_has_help_that_is_a_sentence():
    for key in KEYS.values():
        assert key.help[0].isupper() and key.help.endswith("."), key.name
        assert len(key.help) > 15 and "|" not in key.help, key.name


def _values(name: str) -> st.SearchStrategy:
    text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
    special = {
        "train.seed": st.integers(0, 2**32 - 1),
        "train.learning_rate": st.floats(1e-300, 1e300),
        "train.ema_decay": st.none() | st.floats(1e-9, 0.999999),
        "adapter.timestep_rank": st.none()
        | st.floats(0.01, 10)
        | st.fixed_dictionaries({"alpha": st.floats(0.01, 9), "k_min": st.integers(1, 8)}),
        "adapter.target_modules": st.none() | st.lists(text),
        "sample.prompts": st.lists(text, min_size=1),
        "sample.negative_prompt": text,
        "data.trigger": text.filter(lambda given: not given.isspace()),
        "output.portable": st.none() | st.booleans(),
    }
    return special[name]


@given(st.data())
def test_any_config_survives_the_trip_through_toml(data):
    names = [
        "train.seed", "train.learning_rate", "train.ema_decay", "adapter.timestep_rank",
        "adapter.target_modules", "sample.prompts", "sample.negative_prompt", "data.trigger",
        "output.portable",
    ]  # fmt: skip
    values: dict = {"data": {"subject": "photos", "class_name": "dog"}}
    for name in names:
        section, key = name.split(".")
        values.setdefault(section, {})[key] = data.draw(_values(name), label=name)
    config = validate(DreamboothConfig, values, "test")
    text = to_toml(config)
    assert validate(DreamboothConfig, tomllib.loads(text), "test") == config
    assert set(KEYS) == {f"{s}.{k}" for s, keys in tomllib.loads(text).items() for k in keys}


def test_fill_prompt_leaves_other_braces_alone():
    assert fill_prompt("{trigger} {class_name} {x} {", "sks", "{trigger}") == "sks {trigger} {x} {"


@pytest.fixture
def run(toml, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    overrides = ["--output.dir", str(folder), "--adapter.r", "32", "--train.steps", "50"]
    save_config(load_config(toml(), overrides), folder)
    return folder


def test_a_saved_run_loads_as_it_was_and_leaves_no_partial_file(run, toml):
    config = load_run(run)
    assert (config.adapter.r, config.train.steps, config.output.dir) == (32, 50, str(run))
    assert [path.name for path in run.iterdir()] == ["config.toml"]


def test_a_moved_run_takes_its_new_place(run):
    moved = run.rename(run.with_name("moved"))
    assert load_run(moved).output.dir == str(moved)


def test_resume_may_change_what_leaves_done_steps_alone(run):
    config = load_run(run, ["--train.steps", "90", "--sample.prompts", "x", "--adapter.r", "32"])
    assert (config.train.steps, config.sample.prompts) == (90, ("x",))
    assert load_run(run, ["--output.dir", f"{run}/../run"]).train.steps == 50


def test_resume_refuses_every_contradiction_and_says_what_may_change(run):
    with pytest.raises(ConfigError) as caught:
        load_run(run, ["--adapter.r", "16", "--train.seed", "3", "--train.steps", "90"])
    assert caught.value.problems == (
        "adapter.r = 16: this run was started with 32",
        "train.seed = 3: this run was started with 0",
    )
    cure = str(caught.value).splitlines()[-1]
    assert "train.steps" in cure and "adapter.r" not in cure
    with pytest.raises(ConfigError, match="output.dir"):
        load_run(run, ["--output.dir", "elsewhere"])


def test_reference_page_is_up_to_date():
    spec = importlib.util.spec_from_file_location("r", ROOT / "scripts" / "config_reference.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = script.page()
    for name in KEYS:
        assert f"| `{name}` |" in text
    assert script.PAGE.read_text(encoding="utf-8") == text, (
        "run: python scripts/config_reference.py"
    )


# ---- several subjects -----------------------------------------------------------------------

SUBJECTS = """
[[data.subjects]]
path = "a"
trigger = "sks"
class_name = "dog"
[[data.subjects]]
path = "b"
repeats = 3
"""


@pytest.fixture
def several(tmp_path):
    """Write a TOML file with subjects, and keys of [data] before them."""

    def write(text: str = SUBJECTS, data: str = 'class_name = "cat"') -> Path:
        path = tmp_path / "several.toml"
        path.write_text(f"[data]\n{data}\n{text}")
        return path

    return write


def test_subjects_take_what_they_leave_out_from_data(several):
    config = load_config(several(data='class_name = "cat"\ntrigger = "zyx"'))
    named = [(s.key, s.path, s.trigger, s.class_name, s.repeats) for s in config.data.each()]
    assert named == [
        ("data.subjects[0].path", "a", "sks", "dog", 1),
        ("data.subjects[1].path", "b", "zyx", "cat", 3),
    ]
    assert validate(DreamboothConfig, tomllib.loads(to_toml(config)), "test") == config


def test_data_subject_is_the_one_subject_form(toml):
    (one,) = load_config(toml("data.repeats = 2")).data.each()
    assert (one.key, one.path, one.trigger, one.class_name) == (
        "data.subject",
        "photos",
        "sks",
        "dog",
    )
    assert (one.repeats, one.class_images) == (2, None)


def test_subjects_on_the_command_line(several, toml):
    overrides = ["--data.subjects[1].repeats=5", "--data.subjects[0].trigger", "abc"]
    config = load_config(several(), overrides)
    assert [(s.trigger, s.repeats) for s in config.data.each()] == [("abc", 1), ("sks", 5)]
    tables = ["--data.subjects", '{path = "x", trigger = "u"}', "--data.subjects", '{path = "y"}']
    config = load_config(toml(), ["--data.subject=none", *tables])
    assert [(s.path, s.trigger) for s in config.data.each()] == [("x", "u"), ("y", "sks")]
    config = load_config(toml(), ["--data.subject=none", "--data.subjects", '[{path = "x"}]'])
    assert [s.path for s in config.data.each()] == ["x"]


@pytest.mark.parametrize(
    ("text", "data", "overrides", "message"),
    [
        (SUBJECTS, "", [], "data.subjects[1].class_name: missing; give it there"),
        (SUBJECTS, 'subject = "p"\nclass_name = "cat"', [], 'data.subject = "p": data.subjects is'),
        (SUBJECTS, 'class_name = "cat"', [], 'data.subjects[1].trigger = "sks": it already stands'),
        ('[[data.subjects]]\nrepeats = 1', 'class_name = "cat"', [], "data.subjects[0].path: miss"),
        (
            '[[data.subjects]]\npath = "a"\nrepeats = 0', 'class_name = "cat"', [],
            "data.subjects[0].repeats = 0: must be a whole number >= 1",
        ),
        (
            '[[data.subjects]]\npath = "a"\ntriger = "x"', 'class_name = "cat"', [],
            'data.subjects[0].triger = "x": unknown; did you mean trigger?',
        ),
        (
            '[[data.subjects]]\npath = "a"', 'class_name = "cat"', ["--data.subjects[1].path=x"],
            "data.subjects[1].path: there are 1 entries in data.subjects, counted from 0",
        ),
        (
            '[[data.subjects]]\npath = "a"', 'class_name = "cat"', ["--data.subjects[0].pth=x"],
            "data.subjects[0].pth: unknown; did you mean path?",
        ),
        (
            '[[data.subjects]]\npath = "a"\n[[data.subjects]]\npath = "b"\nclass_name = "x"\n'
            'trigger = "t"', 'class_name = "cat"\nclass_images = "c"', [],
            'data.class_images = "c": there are several classes; give class_images in each',
        ),
        ("", 'subjects = ["a"]\nclass_name = "x"', [], "must be a list of tables { path, trigger"),
    ],
)  # fmt: skip
def test_messages_for_subjects(several, text, data, overrides, message):
    found = problems(several(text, data), overrides)
    assert any(message in problem for problem in found), found
