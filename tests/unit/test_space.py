"""Space files: what is accepted, and how everything that is wrong with one is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import autoprune
from autoprune.errors import Fault, InputError, SpaceError
from autoprune.space import CRITERIA, DEFAULT_SPACE, Space, default_space_path, json_schema, load_space, parse_space
from autoprune.space.file import write_document

ROOT = Path(__file__).parents[2]
BAD = ROOT / "tests/assets/bad"
SHIPPED = sorted((ROOT / "search_spaces").glob("*.yaml"))
GOOD = "schema: 1\nname: t\nmodel: {name: resnet20}\ndata: {name: digits}\n"  # what follows starts in line 5


def faults_of(text: str, **options: object) -> tuple[Fault, ...]:
    with pytest.raises(SpaceError) as caught:
        parse_space(text, env={}, **options)  # type: ignore[arg-type]
    return caught.value.faults


# (what is wrong, text, line, place, words of the message)
MALFORMED = [
    ("empty", "", None, "", "the file is empty"),
    ("only a comment", "# nothing\n", None, "", "the file is empty"),
    ("null", "~\n", None, "", "the file is empty"),
    ("a list", "- schema: 1\n", 1, "", "a space file is a mapping"),
    ("a text", "resnet20", 1, "", "a space file is a mapping"),
    ("unclosed bracket", GOOD + "budget: {macs: 0.5\nseed: 1\n", 6, "", "not valid YAML"),
    ("unclosed quote", GOOD + 'device: "cpu\n', 6, "", "not valid YAML"),
    ("tab", "schema: 1\nmodel:\n\tname: resnet20\n", 3, "", "a tab is used for indentation"),
    ("colon in a text", GOOD + "device: a: b\n", 5, "", "unexpected `:`"),
    ("two documents", GOOD + "---\nseed: 1\n", 5, "", "more than one document"),
    ("control character", GOOD + "device: \x07\n", 5, "", "a character that YAML does not allow"),
    ("undefined alias", GOOD + "device: *none\n", 5, "", "undefined alias"),
    (
        "alias of its parent",
        GOOD + "groups: &a {include: [*a]}\n",
        5,
        "groups.include[0]",
        "refers to what contains it",
    ),
    ("merge key", GOOD + "groups: {<<: {round_to: 2}}\n", 5, "groups", "merge keys"),
    ("tag", GOOD + "device: !!python/name:os.system\n", 5, "device", "is not supported"),
    ("list as a key", GOOD + "? [a, b]\n: 1\n", 5, "", "a key is a plain text"),
    ("duplicate key", GOOD + "seed: 1\nseed: 2\n", 6, "seed", "occurs twice (first in line 5)"),
    ("duplicate inner key", GOOD + "groups:\n  round_to: 1\n  round_to: 2\n", 7, "groups.round_to", "occurs twice"),
    ("unset variable", GOOD + "checkpoint: ${NOWHERE}/a.pt\n", 5, "checkpoint", "NOWHERE is not set"),
    ("schema missing", GOOD[10:], None, "schema", "this key is needed; write `schema: 1`"),
    ("schema of the future", "schema: 2\n" + GOOD[10:], 1, "schema", "schema 2 is unknown"),
    ("schema as a text", "schema: '1'\n" + GOOD[10:], 1, "schema", "schema '1' is unknown"),
    ("unknown key", GOOD + "divice: cpu\n", 5, "divice", "did you mean 'device'?"),
    ("unknown inner key", GOOD + "recipe:\n  lr: 0.1\n  moment: 0.9\n", 7, "recipe.moment", "did you mean 'momentum'?"),
    (
        "a key like no other",
        GOOD + "budget: {zzz: 1}\n",
        5,
        "budget.zzz",
        "valid: front, latency, latency_ms, macs, memory, params, points, size",
    ),
    ("name missing", "schema: 1\nmodel: {name: a}\ndata: {name: iris}\n", None, "name", "this key is needed"),
    ("name in capitals", GOOD.replace("name: t", "name: Digits"), 2, "name", "lower-case letters"),
    ("name is a number", GOOD.replace("name: t", "name: 5"), 2, "name", "expected a text, got 5"),
    ("name is too long", GOOD.replace("name: t", "name: " + "a" * 101), 2, "name", "at most 100"),
    ("no model at all", "schema: 1\nname: t\ndata: {name: iris}\n", None, "model", "this key is needed"),
    ("model without name", GOOD.replace("{name: resnet20}", "{}"), 3, "model", "either `name` or `factory` is needed"),
    ("name and factory", GOOD.replace("resnet20}", "a, factory: 'b:c'}"), 3, "model.factory", "exclude each other"),
    (
        "factory without colon",
        GOOD.replace("name: resnet20", "factory: a.b"),
        3,
        "model.factory",
        "package.module:func",
    ),
    (
        "model is a text",
        GOOD.replace("{name: resnet20}", "resnet20"),
        3,
        "model",
        "expected a mapping of keys to values",
    ),
    (
        "weights twice",
        GOOD.replace("20}", "20, weights: X}") + "checkpoint: a\n",
        5,
        "checkpoint",
        "exclude each other",
    ),
    ("unknown data", GOOD.replace("digits", "cifar01"), 4, "data.name", "did you mean 'cifar10'?"),
    ("data without name", GOOD.replace("{name: digits}", "{calibration: 5}"), 4, "data", "either `name` or `factory`"),
    ("imagefolder without path", GOOD.replace("digits", "imagefolder"), 4, "data.path", "needed for an imagefolder"),
    ("nothing to download", GOOD.replace("digits", "iris, download: true"), 4, "data.download", "nothing to download"),
    ("data name is a list", GOOD.replace("digits", "[iris], download: true"), 4, "data.name", "expected one of digits"),
    ("calibration of zero", GOOD.replace("digits", "iris, calibration: 0"), 4, "data.calibration", "at least 1, got 0"),
    (
        "test without match",
        GOOD.replace("digits", "imagefolder, path: a, validation: {source: test}"),
        4,
        "data.validation.match",
        "needed",
    ),
    (
        "match from the training data",
        GOOD.replace("digits", "iris, validation: {match: '*'}"),
        4,
        "data.validation.match",
        "belongs to `source: test`",
    ),
    (
        "test source without files",
        GOOD.replace("digits", "iris, validation: {source: test, match: '*'}"),
        4,
        "data.validation.source",
        "needs `name: imagefolder`",
    ),
    (
        "mean without std",
        GOOD.replace("digits", "iris, preprocessing: {mean: [0.5]}"),
        4,
        "data.preprocessing.std",
        "given together",
    ),
    (
        "std of zero",
        GOOD.replace("digits", "iris, preprocessing: {mean: [0], std: [0]}"),
        4,
        "data.preprocessing.std[0]",
        "is positive, got 0",
    ),
    ("unreadable budget", GOOD + "budget: {macs: lots}\n", 5, "budget.macs", "cannot read the budget 'lots'"),
    ("negative budget", GOOD + "budget: {macs: -1}\n", 5, "budget.macs", "positive and finite"),
    ("budget of 120 %", GOOD + "budget: {size: '120%'}\n", 5, "budget.size", "at most 1"),
    ("budget that is no number", GOOD + "budget: {macs: .nan}\n", 5, "budget.macs", "positive and finite"),
    ("budget is a yes", GOOD + "budget: {macs: true}\n", 5, "budget.macs", "a number or a text such as '30M'"),
    ("falling front", GOOD + "budget: {front: [0.6, 0.2]}\n", 5, "budget.front", "rises within (0, 1]"),
    ("front from zero", GOOD + "budget: {front: [0, 0.2]}\n", 5, "budget.front", "rises within (0, 1]"),
    ("front of one number", GOOD + "budget: {front: [0.2]}\n", 5, "budget.front[1]", "a value is missing"),
    ("front of three numbers", GOOD + "budget: {front: [0.2, 0.3, 0.4]}\n", 5, "budget.front", "at most 2"),
    ("points beside a front", GOOD + "budget: {front: [0.2, 0.6], points: [0.5]}\n", 5, "budget.points", "give one"),
    ("a point of zero", GOOD + "budget: {points: [0.5, 0]}\n", 5, "budget.points[1]", "in (0, 1]"),
    (
        "a point above the budget",
        GOOD + "budget: {macs: 0.3, points: [0.4]}\n",
        5,
        "budget.points[0]",
        "above the budget",
    ),
    ("no points", GOOD + "budget: {points: []}\n", 5, "budget.points", "must not be empty"),
    ("front above the budget", GOOD + "budget: {macs: 0.3, front: [0.4, 1]}\n", 5, "budget.front", "above the budget"),
    ("ratio of 1", GOOD + "groups: {max_ratio: 1.0}\n", 5, "groups.max_ratio", "must be below 1, got 1.0"),
    ("negative ratio", GOOD + "groups: {min_ratio: -0.1}\n", 5, "groups.min_ratio", "must be at least 0, got -0.1"),
    ("ratios crossed", GOOD + "groups: {min_ratio: 0.95}\n", 5, "groups.min_ratio", "is above max_ratio"),
    ("empty glob", GOOD + "groups: {exclude: ['']}\n", 5, "groups.exclude[0]", "must not be empty"),
    ("no glob", GOOD + "groups: {include: []}\n", 5, "groups.include", "must not be empty"),
    ("glob is no list", GOOD + "groups: {include: conv1}\n", 5, "groups.include", "expected a list, got the text"),
    ("unknown criterion", GOOD + "criteria:\n  choices:\n  - l2\n  - tailor\n", 8, "criteria.choices[1]", "'taylor'?"),
    ("no criterion", GOOD + "criteria: {choices: []}\n", 5, "criteria.choices", "must not be empty"),
    ("criterion twice", GOOD + "criteria: {choices: [l1, l1]}\n", 5, "criteria.choices[1]", "'l1' occurs twice"),
    ("criterion is a number", GOOD + "criteria: {choices: [1]}\n", 5, "criteria.choices[0]", "expected one of l1, l2"),
    ("unknown scope", GOOD + "criteria: {scope: stages}\n", 5, "criteria.scope", "did you mean 'stage'?"),
    ("batch of 1.5", GOOD + "recipe: {batch_size: 1.5}\n", 5, "recipe.batch_size", "expected a whole number, got 1.5"),
    ("rate as a text", GOOD + "recipe: {lr: 'fast'}\n", 5, "recipe.lr", "expected a number, got the text 'fast'"),
    ("rate of zero", GOOD + "recipe: {lr: 0}\n", 5, "recipe.lr", "must be above 0, got 0"),
    ("rate not a number", GOOD + "recipe: {lr: .nan}\n", 5, "recipe.lr", "must be a finite number, got nan"),
    ("infinite rate", GOOD + "recipe: {lr: .inf}\n", 5, "recipe.lr", "must be a finite number, got inf"),
    ("yes is a text", GOOD + "recipe: {compensation: yes}\n", 5, "recipe.compensation", "expected true or false"),
    (
        "compensation of another name",
        GOOD + "recipe: {compensation: fold}\n",
        5,
        "recipe.compensation",
        "or merge; got the",
    ),
    ("unknown schedule", GOOD + "recipe: {schedule: iterativ}\n", 5, "recipe.schedule", "did you mean 'iterative'?"),
    ("schedule is a number", GOOD + "recipe: {schedule: 3}\n", 5, "recipe.schedule", "expected a mapping"),
    ("one cut", GOOD + "recipe: {schedule: {steps: 1}}\n", 5, "recipe.schedule.steps", "must be at least 2, got 1"),
    (
        "regularisation of no kind",
        GOOD + "recipe: {regularisation: {share: 0.2}}\n",
        5,
        "recipe.regularisation.kind",
        "this key is needed",
    ),
    (
        "unknown regularisation",
        GOOD + "recipe: {regularisation: {kind: group_laso}}\n",
        5,
        "recipe.regularisation.kind",
        "did you mean 'group_lasso'?",
    ),
    (
        "a probability above one",
        GOOD + "recipe: {regularisation: {kind: targeted_dropout, strength: 2}}\n",
        5,
        "recipe.regularisation.strength",
        "is a probability, got 2",
    ),
    (
        "stages that leave nothing",
        GOOD + "recipe: {schedule: {share: 0.6}, regularisation: {kind: bn_l1, share: 0.4}}\n",
        5,
        "recipe.regularisation.share",
        "leaves no epochs for the last cut",
    ),
    (
        "a schedule without epochs",
        GOOD + "recipe: {schedule: iterative}\nsearch: {ladder: [{rung: a}]}\n",
        5,
        "recipe.schedule",
        "needs a rung with epochs",
    ),
    ("unknown optimizer", GOOD + "recipe: {optimizer: adam}\n", 5, "recipe.optimizer", "did you mean 'adamw'?"),
    ("distillation is a number", GOOD + "recipe: {distillation: 3}\n", 5, "recipe.distillation", "expected a mapping"),
    ("recipe is null", GOOD + "recipe:\n", 5, "recipe", "expected a mapping of keys to values, got nothing"),
    ("unknown sampler", GOOD + "search: {sampler: tpee}\n", 5, "search.sampler", "did you mean 'tpe'?"),
    ("no rung", GOOD + "search: {ladder: []}\n", 5, "search.ladder", "must not be empty"),
    ("rung without name", GOOD + "search: {ladder: [{epochs: 1}]}\n", 5, "search.ladder[0].rung", "this key is needed"),
    (
        "two rungs of one name",
        GOOD + "search:\n  ladder:\n  - {rung: a}\n  - {rung: a, trials: 2}\n",
        8,
        "search.ladder[1].rung",
        "two rungs are called 'a'",
    ),
    (
        "trials on the first rung",
        GOOD + "search:\n  ladder:\n  - rung: a\n    trials: 5\n",
        8,
        "search.ladder[0].trials",
        "leave this out",
    ),
    (
        "later rung without trials",
        GOOD + "search:\n  ladder:\n  - rung: a\n  - rung: b\n",
        8,
        "search.ladder[1].trials",
        "how many candidates",
    ),
    (
        "test before the end",
        GOOD + "search:\n  ladder:\n  - {rung: a, test: true}\n  - {rung: b, trials: 2}\n",
        7,
        "search.ladder[0].test",
        "on the last rung only",
    ),
    (
        "negative epochs",
        GOOD + "search: {ladder: [{rung: a, epochs: -1}]}\n",
        5,
        "search.ladder[0].epochs",
        "at least 0",
    ),
    ("unknown device", GOOD + "device: gpu\n", 5, "device", "auto, cpu, cuda or cuda:0"),
    ("negative seed", GOOD + "seed: -1\n", 5, "seed", "must be at least 0, got -1"),
    ("seed that is too large", GOOD + "seed: 4294967296\n", 5, "seed", "must be below 4294967296"),
]


@pytest.mark.parametrize(("text", "line", "place", "words"), [m[1:] for m in MALFORMED], ids=[m[0] for m in MALFORMED])
def test_a_malformed_space_is_told_by_place_line_and_plain_words(
    text: str, line: int | None, place: str, words: str
) -> None:
    (fault,) = faults_of(text)
    assert (fault.place, fault.line) == (place, line)
    assert words in fault.message


def test_the_base_of_the_malformed_texts_is_valid() -> None:
    assert parse_space(GOOD, env={}).name == "t"


def test_all_faults_of_a_file_come_together_in_the_order_of_lines() -> None:
    with pytest.raises(SpaceError) as caught:
        load_space(BAD / "many_faults.yaml", env={})
    found = [(fault.line, fault.place) for fault in caught.value.faults]
    assert found == [
        (3, "name"),
        (6, "model.wieghts"),
        (8, "data.name"),
        (9, "data.validation.fraction"),
        (11, "budget.macs"),
        (12, "groups.min_ratio"),
        (16, "criteria.choices[1]"),
        (18, "search.sampler"),
        (21, "search.ladder[0].epoch"),
        (22, "search.ladder[1].trials"),
    ]
    assert "10 faults" in str(caught.value)
    assert "  line 6: model.wieghts: unknown key; did you mean 'weights'?" in str(caught.value).splitlines()


def test_a_fault_of_reading_and_a_fault_of_meaning_come_together() -> None:
    places = [fault.place for fault in faults_of(GOOD + "checkpoint: ${NOWHERE}\nseed: 1\nseed: 2\ndevice: gpu\n")]
    assert places == ["checkpoint", "seed", "device"]


@pytest.mark.parametrize(
    ("name", "line", "words"),
    [
        ("empty.yaml", None, "is empty"),
        ("tab.yaml", 4, "a tab"),
        ("latin1.yaml", 2, "not UTF-8"),
        ("absent.yaml", None, "there is no such file"),
        ("", None, "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(name: str, line: int | None, words: str) -> None:
    with pytest.raises(SpaceError, match=words) as caught:
        load_space(BAD / name, env={})
    assert caught.value.faults[0].line == line
    assert str(BAD / name) in str(caught.value)


def test_a_short_file_that_expands_without_end_is_refused() -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    for last, name in zip("abcdefg", "bcdefgh", strict=True):
        bomb += f"{name}: &{name} [{', '.join(['*' + last] * 10)}]\n"
    assert any("more than 20000 values" in fault.message for fault in faults_of(GOOD + bomb))


EVERY_KEY = yaml.safe_load((ROOT / "tests/assets/space_schema1.yaml").read_text())
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["test", "l2"])
)
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "rung", "source", "trials", "macs", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


def places(value: object, above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    inner = [place for key, item in items for place in places(item, (*above, str(key)))]
    return [*([above] if above else []), *inner]


@given(st.lists(st.tuples(st.sampled_from(places(EVERY_KEY)), anything), min_size=1, max_size=3))
def test_any_value_at_any_place_is_accepted_or_told_as_a_fault(changes: list[tuple[tuple[str, ...], object]]) -> None:
    text = json.dumps(EVERY_KEY)
    settings = [f"{'.'.join(place)}={json.dumps(value)}" for place, value in changes]
    try:
        told = parse_space(text, overrides=settings, env={}).fingerprint
    except SpaceError as error:
        told = str(error)
    assert told


@given(st.text(alphabet="schema: 1\n-[]{}#&*!|>'\"%@`,?<~.$\t", max_size=60))
def test_any_text_is_read_or_refused_with_faults(text: str) -> None:
    with pytest.raises(SpaceError):
        parse_space(text, env={})


def test_a_deeply_nested_file_is_refused_without_a_traceback() -> None:
    assert "nested too deeply" in faults_of("[" * 5000 + "]" * 5000)[0].message


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_space_is_valid_and_ends_on_the_test_set(path: Path) -> None:
    space = load_space(path, env={})
    assert space.name == path.stem.replace("_", "-")
    assert space.search.ladder[-1].test


def test_the_embedded_default_is_the_shipped_default() -> None:
    embedded = Path(autoprune.__file__).with_name("default_space.yaml")
    assert embedded.read_bytes() == (ROOT / "search_spaces" / DEFAULT_SPACE).read_bytes()


def test_the_default_is_looked_for_in_the_working_directory_first(tmp_path: Path) -> None:
    assert default_space_path(tmp_path) == Path(autoprune.__file__).with_name("default_space.yaml")
    own = tmp_path / "search_spaces" / DEFAULT_SPACE
    own.parent.mkdir()
    own.write_text(GOOD)
    assert default_space_path(tmp_path) == own


def test_the_example_of_schema_1_spells_out_the_defaults() -> None:
    space = load_space(ROOT / "tests/assets/space_schema1.yaml", env={})
    written = yaml.safe_load((ROOT / "tests/assets/space_schema1.yaml").read_text())
    bare = parse_space(
        "schema: 1\nname: every-key\nmodel: {name: resnet20, arguments: {in_channels: 1}}\ndata: {name: digits, "
        "calibration: 512, validation: {fraction: 0.15}}\nbudget: {macs: 0.6, front: [0.2, 0.6]}\n",
        env={},
    )
    assert space == bare
    assert set(written) == {info.alias or name for name, info in Space.model_fields.items()}


def test_an_override_replaces_the_file_before_validation() -> None:
    settings = ["recipe.lr=1e-3", "search.ladder=[{rung: only}]", "model.arguments.in_channels=1", "device=cuda:1"]
    space = parse_space(GOOD + "recipe: {lr: wrong}\n", overrides=settings, env={})
    assert space.recipe.lr == 0.001
    assert [rung.rung for rung in space.search.ladder] == ["only"]
    assert space.model.arguments == {"in_channels": 1}
    assert space.device == "cuda:1"


def test_an_override_reaches_into_lists_by_position() -> None:
    text = GOOD + "search: {ladder: [{rung: a}, {rung: b, trials: 3}]}\n"
    space = parse_space(text, overrides=["search.ladder.1.trials=7"], env={})
    assert space.search.ladder[1].trials == 7


def test_an_override_supplies_what_an_unset_variable_left_out() -> None:
    text = GOOD + "checkpoint: ${NOWHERE}\n"
    assert parse_space(text, overrides=["checkpoint=here.pt"], env={}).checkpoint == "here.pt"


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("seed", "write key.path=value"),
        ("=5", "write key.path=value"),
        ("recipe..lr=5", "write key.path=value"),
        ("seed=[1", "not valid YAML"),
        ("checkpoint=${NOWHERE}", "NOWHERE is not set"),
        ("search.ladder.4.epochs=1", "there is no item '4'"),
        ("recipe.rl=1", "unknown key"),
        ("recipe.lr=fast", "expected a number, got the text 'fast' (from --set)"),
    ],
)
def test_a_bad_override_is_told_without_a_line(setting: str, words: str) -> None:
    text = GOOD + "search: {ladder: [{rung: a}]}\n"
    (fault,) = faults_of(text, overrides=[setting])
    assert fault.line is None
    assert words in fault.message


def test_variables_come_from_the_environment_or_their_default() -> None:
    text = GOOD + 'checkpoint: "${WHERE:-data}/a.pt"\nrecipe: {lr: "${LR}"}\nseed: ${SEED}\n'
    with pytest.raises(SpaceError, match=r"recipe\.lr: expected a number, got the text '0.5'"):
        parse_space(text, env={"LR": "0.5", "SEED": "3"})
    text = text.replace('"${LR}"', "0.5")
    assert parse_space(text, env={"SEED": "3"}).checkpoint == "data/a.pt"
    space = parse_space(text, env={"SEED": "3", "WHERE": "/else/where"})
    assert (space.checkpoint, space.seed) == ("/else/where/a.pt", 3)


def test_plain_values_are_read_as_yaml_1_2_reads_them() -> None:
    text = GOOD.replace("{name: resnet20}", "{name: no, arguments: {a: 010, b: 1e-3, c: on, d: '5', e: 2024-01-01}}")
    model = parse_space(text, env={}).model
    assert model.name == "no"
    assert model.arguments == {"a": 10, "b": 0.001, "c": "on", "d": "5", "e": "2024-01-01"}


@pytest.mark.parametrize("value", ["null", "false"])
def test_distillation_can_be_switched_off(value: str) -> None:
    assert parse_space(GOOD + f"recipe: {{distillation: {value}}}\n", env={}).recipe.distillation is None


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90.0), ("1.5", 1.5), ("90s", 90.0), ("10m", 600.0), ("2h", 7200.0)]
)
def test_a_time_is_seconds_or_a_number_with_its_unit(text: str, seconds: float) -> None:
    search = parse_space(GOOD + f"search: {{trial_timeout: {text}, hang_timeout: null}}\n", env={}).search
    assert search.trial_timeout == seconds
    assert search.hang_timeout is None


@pytest.mark.parametrize("text", ["0", "-5", "5d", ".inf", ".nan", "soon", "true", "[1]", "'-3m'", "1" + "0" * 400])
def test_a_time_without_sense_is_told_with_the_forms_that_it_may_take(text: str) -> None:
    (fault,) = faults_of(GOOD + f"search: {{trial_timeout: {text}}}\n")
    assert fault.place == "search.trial_timeout"
    assert "positive number of seconds, or text such as 90s, 10m or 2h" in fault.message


def test_limits_of_time_leave_the_fingerprint_alone() -> None:
    plain, limited = (
        parse_space(GOOD + text, env={}) for text in ("", "search: {trial_timeout: 5m, hang_timeout: 1m}\n")
    )
    assert plain.fingerprint == limited.fingerprint


def test_distillation_is_on_by_default() -> None:
    default = parse_space(GOOD, env={}).recipe.distillation
    assert default is not None
    assert parse_space(GOOD + "recipe: {distillation: true}\n", env={}).recipe.distillation == default


@pytest.mark.parametrize("value", ["one_shot", "null"])
def test_one_shot_is_the_default_schedule_and_leaves_the_fingerprint_alone(value: str) -> None:
    space = parse_space(GOOD + f"recipe: {{schedule: {value}, regularisation: null}}\n", env={})
    assert space.recipe.schedule is None
    assert space.fingerprint == parse_space(GOOD, env={}).fingerprint


def test_an_iterative_schedule_may_be_named_or_spelt_out() -> None:
    named = parse_space(GOOD + "recipe: {schedule: iterative}\n", env={})
    spelt = parse_space(GOOD + "recipe: {schedule: {kind: iterative, steps: 3, share: 0.5}}\n", env={})
    assert named.recipe.schedule is not None
    assert named.recipe.schedule == spelt.recipe.schedule
    assert named.fingerprint == spelt.fingerprint != parse_space(GOOD, env={}).fingerprint


def test_limits_keep_the_order_in_which_the_primary_cost_is_chosen() -> None:
    space = parse_space(GOOD + "budget: {size: 1.2 MB, macs: 0.5}\n", env={})
    assert list(space.budget.limits.items()) == [("macs", 0.5), ("size", "1.2 MB")]


def test_missing_files_are_faults_only_where_files_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(GOOD.replace("digits", "mnist, path: nowhere") + "checkpoint: absent.pt\ndevice: gpu\n")
    with pytest.raises(SpaceError) as caught:
        load_space(path, env={}, check_files=True)
    assert [(f.place, f.line) for f in caught.value.faults] == [("data.path", 4), ("checkpoint", 5), ("device", 6)]
    with pytest.raises(SpaceError) as caught:
        load_space(path, env={})
    assert [f.place for f in caught.value.faults] == ["device"]


def test_the_fingerprint_ignores_what_does_not_decide_a_result() -> None:
    base = parse_space(GOOD, env={})
    same = ["device=cpu", "search.trials=5", "search.sampler=random", "search.warm_starts=false", "name=other"]
    for setting in same:
        assert parse_space(GOOD, overrides=[setting], env={}).fingerprint == base.fingerprint, setting
    for section, setting in {
        "model": "model.name=resnet32",
        "checkpoint": "checkpoint=a.pt",
        "data": "data.calibration=5",
        "budget": "budget.macs=0.5",
        "groups": "groups.round_to=8",
        "criteria": "criteria.scope=layer",
        "recipe": "recipe.lr=0.5",
        "seed": "seed=1",
        "ladder": "search.ladder=[{rung: screen, epochs: 1}]",
    }.items():
        changed = parse_space(GOOD, overrides=[setting], env={})
        before, after = base.fingerprint_sections(), changed.fingerprint_sections()
        assert [key for key in before if before[key] != after[key]] == [section]
        assert changed.fingerprint != base.fingerprint


def test_the_number_of_promoted_candidates_does_not_change_the_fingerprint() -> None:
    text = GOOD + "search: {ladder: [{rung: a}, {rung: b, trials: 3}]}\n"
    assert (
        parse_space(text, env={}).fingerprint
        == parse_space(text, overrides=["search.ladder.1.trials=9"], env={}).fingerprint
    )


def test_a_space_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse_space(GOOD, env={}).seed = 5  # type: ignore[misc]


def test_plain_values_make_a_space_or_all_their_faults() -> None:
    data = {"schema": 1, "name": "t", "model": {"name": "mlp"}, "data": {"name": "iris"}}
    assert Space.from_mapping(data).model.name == "mlp"
    with pytest.raises(SpaceError) as caught:
        Space.from_mapping({**data, "seed": -1, "device": "gpu"})
    assert {fault.place for fault in caught.value.faults} == {"seed", "device"}


def test_a_space_error_is_bad_input_with_status_2() -> None:
    with pytest.raises(InputError) as caught:
        parse_space("", env={}, source="my.yaml")
    assert caught.value.status == 2
    assert str(caught.value).startswith("my.yaml has 1 fault:")


def test_the_json_schema_describes_every_key() -> None:
    schema = json_schema()
    json.dumps(schema)
    assert schema["$schema"].endswith("2020-12/schema")
    for name, section in {"Space": schema, **schema["$defs"]}.items():
        assert section["additionalProperties"] is False, name
        assert section["description"], name
        for key, value in section["properties"].items():
            described = {**schema["$defs"].get(value.get("$ref", "").rpartition("/")[2], {}), **value}
            assert len(described.get("description", "")) > 10, f"{name}.{key} has no description"
    assert "schema" in schema["required"]
    distillation = schema["$defs"]["RecipeSettings"]["properties"]["distillation"]["anyOf"]
    assert {"type": "boolean"} in distillation
    assert {"$ref": "#/$defs/DistillationSettings"} in distillation
    assert tuple(schema["$defs"]["CriteriaSettings"]["properties"]["choices"]["items"]["anyOf"][0]["enum"]) == CRITERIA


def test_a_space_written_as_yaml_is_the_same_space() -> None:
    space = load_space(default_space_path(Path("/nonexistent")), overrides=["search.trials=7"], env={})
    text = write_document(space.model_dump(mode="json", by_alias=True))
    assert parse_space(text, env={}) == space
    assert text.startswith("schema: 1\nname: digits-resnet20\n")
