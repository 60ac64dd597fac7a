"""YAML in, typed config out; every complaint names the key."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from fastnst.config import Config, ConfigError, flatten, load_config, parse_config, to_yaml, validate_config


class Inner(Config):
    width: int = Field(32, ge=1)
    rate: float = 1e-3
    side: int | None = None
    kind: Literal["a", "b"] = "a"
    layers: dict[str, float] = {"relu1_2": 1.0, "relu2_2": 2.0}


class Outer(Config):
    name: str = "x"
    flip: bool = True
    path: Path | None = None
    point: tuple[float, float] = (0.0, 1.0)
    inner: Inner = Inner()


class Needy(Config):
    content: Path


@pytest.mark.parametrize(
    "text, value",
    [("1e5", 100000.0), ("1e-3", 0.001), ("1E+2", 100.0), ("-2.5e-1", -0.25), (".5", 0.5), ("3.", 3.0), ("7", 7.0), ("'1e-4'", 0.0001)],
)
def test_every_spelling_of_a_number_is_a_float(text, value):
    assert parse_config(Outer, f"inner: {{rate: {text}}}").inner.rate == value


def test_scientific_integer_is_accepted_where_whole():
    assert parse_config(Outer, "inner: {width: 1e2}").inner.width == 100


def test_fractional_integer_is_refused():
    with pytest.raises(ConfigError, match=r"inner\.width: got 1\.5"):
        parse_config(Outer, "inner: {width: 1.5}")


@pytest.mark.parametrize("word", ["no", "yes", "on", "off", "n", "NO"])
def test_yaml_1_1_booleans_stay_text(word):
    assert parse_config(Outer, f"name: {word}").name == word


@pytest.mark.parametrize("word, value", [("true", True), ("False", False), ("no", False), ("yes", True), ("off", False)])
def test_boolean_fields_take_the_words(word, value):
    assert parse_config(Outer, f"flip: {word}").flip is value


@pytest.mark.parametrize(
    "text, key",
    [
        ("inner: {width: true}", "width"),
        ("inner: {rate: false}", "rate"),
        ("inner: {side: true}", "side"),
        ("inner: {layers: {relu1_2: true}}", "layers"),
        ("point: [true, 0]", "point"),
    ],
)
def test_boolean_is_no_number(text, key):
    with pytest.raises(ConfigError, match=key):
        parse_config(Outer, text)


@pytest.mark.parametrize("number", [".nan", ".inf", "-.inf", "nan", "inf"])
@pytest.mark.parametrize("template", ["inner: {{rate: {}}}", "inner: {{layers: {{relu1_2: {}}}}}", "point: [{}, 0]"])
def test_numbers_are_finite(template, number):
    with pytest.raises(ConfigError, match="finite|number"):
        parse_config(Outer, template.format(number))


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("inner: {widht: 3}", r"unknown key inner\.widht; did you mean inner\.width\?"),
        ("innr: {width: 3}", r"unknown key innr; did you mean inner\?"),
        ("width: 3", r"unknown key width; did you mean inner\.width\?"),
        ("zzzzqq: 3", r"unknown key zzzzqq; known here: name, flip, path, point, inner"),
    ],
)
def test_unknown_key_names_the_nearest_known_one(text, complaint):
    with pytest.raises(ConfigError, match=complaint):
        parse_config(Outer, text)


def test_every_complaint_is_told_at_once():
    with pytest.raises(ConfigError) as raised:
        parse_config(Outer, "inner: {width: 0, kind: c}\nflip: 17", source="my.yaml")
    lines = str(raised.value).splitlines()
    assert len(lines) == 3
    assert all(line.startswith("my.yaml: ") for line in lines)
    assert {line.split(": ")[1] for line in lines} == {"inner.width", "inner.kind", "flip"}


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("inner: {width: 0}", r"inner\.width: got 0, need greater than or equal to 1"),
        ("inner: {width: wide}", r"inner\.width: got 'wide'"),
        ('path: "a\\0b"', r"path: got 'a\\x00b', need no null character"),
        ("inner: {kind: c}", r"inner\.kind: got 'c', need 'a' or 'b'"),
        ("inner: 3", r"inner: got 3, need `key: value` lines"),
        ("name: [1]", r"name: got \[1\]"),
        ("inner: {layers: [relu1_2]}", r"inner\.layers: got \['relu1_2'\]"),
        ("- 1\n- 2", r"config: got list, need `key: value` lines"),
        ("just words", r"config: got str, need `key: value` lines"),
        ("1: 2", "1"),
    ],
)
def test_wrong_value_names_dotted_key_value_and_need(text, complaint):
    with pytest.raises(ConfigError, match=complaint):
        parse_config(Outer, text)


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("name: a\nflip: true\nname: b", "line 3: the key 'name' is given twice"),
        ("inner: {width: 1, width: 2}", "'width' is given twice"),
        ("name: [1", "not valid YAML"),
        ("\tname: a", "not valid YAML"),
        ("name: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("{[1, 2]: 3}", "my.yaml"),
        ("name: {{placeholder}}", "my.yaml"),
        ("name: 2020-99-99", "my.yaml"),
    ],
)
def test_bad_yaml_names_the_source(text, complaint):
    with pytest.raises(ConfigError, match=complaint) as raised:
        parse_config(Outer, text, source="my.yaml")
    assert str(raised.value).startswith("my.yaml: ")


def test_anchors_and_merge_keys_work():
    config = parse_config(Outer, "inner:\n  <<: {width: 5, rate: 2}\n  rate: 3")
    assert (config.inner.width, config.inner.rate) == (5, 3.0)


@pytest.mark.parametrize("text", ["", "# only a comment\n", "null", "---\n"])
def test_empty_file_means_the_defaults(text):
    assert parse_config(Outer, text) == Outer()


def test_missing_value_says_how_to_give_it():
    with pytest.raises(ConfigError, match=r"content: not given; write it in the file or use --set content=VALUE"):
        parse_config(Needy, "")


@pytest.mark.parametrize(
    "override, read",
    [
        ("inner.width=64", lambda c: c.inner.width == 64),
        ("inner.rate=1e-4", lambda c: c.inner.rate == 1e-4),
        (" inner.width =64", lambda c: c.inner.width == 64),
        ("name=a=b", lambda c: c.name == "a=b"),
        ("name=no", lambda c: c.name == "no"),
        ("path=null", lambda c: c.path is None),
        ("path=~/a b", lambda c: c.path == Path("~/a b")),
        ("point=[2, 3]", lambda c: c.point == (2.0, 3.0)),
        ("inner={width: 7}", lambda c: c.inner.width == 7),
        ("inner.layers={conv1_1: 2}", lambda c: c.inner.layers == {"conv1_1": 2.0}),
    ],
)
def test_set_reaches(override, read):
    assert read(parse_config(Outer, "inner: {width: 16}\npath: /somewhere", [override]))


def test_set_keeps_the_siblings_in_the_file():
    config = parse_config(Outer, "inner: {width: 16, kind: b}", ["inner.rate=2"])
    assert (config.inner.width, config.inner.kind, config.inner.rate) == (16, "b", 2.0)


def test_set_of_one_layer_keeps_the_other_defaults():
    assert parse_config(Outer, "", ["inner.layers.relu1_2=5"]).inner.layers == {"relu1_2": 5.0, "relu2_2": 2.0}


def test_set_of_one_layer_keeps_the_others_in_the_file():
    assert parse_config(Outer, "inner: {layers: {conv1_1: 3}}", ["inner.layers.relu1_2=5"]).inner.layers == {"conv1_1": 3.0, "relu1_2": 5.0}


def test_set_does_not_change_the_defaults_themselves():
    parse_config(Outer, "", ["inner.layers.relu1_2=5"])
    assert parse_config(Outer, "").inner.layers == {"relu1_2": 1.0, "relu2_2": 2.0}


def test_set_of_a_layer_whose_name_has_a_dot():
    assert parse_config(Outer, "", ["inner.layers.features.3=4"]).inner.layers == {"relu1_2": 1.0, "relu2_2": 2.0, "features.3": 4.0}


def test_last_set_wins():
    assert parse_config(Outer, "", ["inner.width=5", "inner.width=6"]).inner.width == 6


@pytest.mark.parametrize(
    "override, complaint",
    [
        ("inner.widht=3", r"--set inner\.widht=3: unknown key inner\.widht; did you mean inner\.width\?"),
        ("innr.width=3", r"unknown key innr\.width; did you mean inner\.width\?"),
        ("wolke=3", r"--set wolke=3: unknown key wolke"),
        ("inner.width", r"need key=value, for example"),
        ("=3", r"need key=value"),
        ("inner.width=[", r"--set inner\.width: not valid YAML"),
        ("inner.width.more=3", r"inner\.width"),
        ("inner.width=", r"inner\.width: got None"),
    ],
)
def test_bad_set_names_the_key(override, complaint):
    with pytest.raises(ConfigError, match=complaint):
        parse_config(Outer, "", [override])


def test_a_wrong_value_is_blamed_on_what_gave_it():
    with pytest.raises(ConfigError) as raised:
        parse_config(Outer, "flip: 17\ninner: {rate: many}", ["inner.width=wide", "inner.layers.relu1_2=b", "name=x"], source="my.yaml")
    blamed = [line.split(": got")[0] for line in str(raised.value).splitlines()]
    assert blamed == ["my.yaml: flip", "--set inner.width", "my.yaml: inner.rate", "--set inner.layers.relu1_2"]


def test_yaml_round_trip():
    text = "name: 'no'\nflip: false\npath: some where/é\ninner: {width: 3, rate: 1e-7, kind: b, layers: {features.3: 0.5}}"
    config = parse_config(Outer, text)
    again = parse_config(Outer, to_yaml(config))
    assert again == config
    assert again.inner.rate == 1e-7


def test_to_yaml_shows_the_defaults_in_order():
    assert list(parse_config(Outer, "").model_dump()) == [
        line.split(":")[0] for line in to_yaml(Outer()).splitlines() if line[0] not in " -"
    ]


def test_flatten_gives_dotted_leaves_and_whole_layer_maps():
    flat = flatten(Outer())
    assert flat["inner.width"] == 32
    assert flat["inner.layers"] == {"relu1_2": 1.0, "relu2_2": 2.0}
    assert "inner" not in flat


def test_config_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Outer().name = "y"


def test_load_reads_the_file_as_utf8_and_applies_overrides(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("name: Kandinskÿ\n", encoding="utf-8")
    config = load_config(Outer, path, ["inner.width=2"])
    assert (config.name, config.inner.width) == ("Kandinskÿ", 2)


def test_load_of_a_missing_file_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        load_config(Outer, tmp_path / "nowhere.yaml")


def test_load_of_a_binary_file_names_it(tmp_path):
    path = tmp_path / "picture.yaml"
    path.write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ConfigError, match=r"picture\.yaml: not a text file"):
        load_config(Outer, path)


def test_complaints_name_the_file(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("inner: {width: 0}")
    with pytest.raises(ConfigError, match=r"a\.yaml: inner\.width: got 0"):
        load_config(Outer, path)


def test_validate_config_takes_plain_data():
    assert validate_config(Outer, {"inner": {"width": 9}}).inner.width == 9


class Sections(Config):
    inner: Inner = Inner()
    needy: Needy
    listed: tuple[Annotated[int, Field(ge=32)], ...] = Field((64,), min_length=1)
    parts: tuple[Inner, ...] = ()
    place: Literal["auto", "off"] | Path = "auto"


@pytest.mark.parametrize(
    "text, complaints",
    [
        ("{}", ["needy.content: not given; write it in the file or use --set needy.content=VALUE"]),  # not the section, which is no value
        ("{needy: {content: x}, listed: [16]}", ["listed: entry 1: got 16, need greater than or equal to 32"]),
        ("{needy: {content: x}, listed: []}", ["listed: got [], need 1 entries"]),
        ("{needy: {content: x}, parts: [{}, {width: 0}]}", ["parts: entry 2: width: got 0, need greater than or equal to 1"]),
        ("{needy: {content: x}, place: [off]}", ["place: got ['off'], need 'auto' or 'off', or need a path"]),
        ("{needy: {content: 5}}", ["needy.content: got 5, need a path"]),
        ("{needy: {content: x}, inner: {layers: {1: 1}}}", ["inner.layers: got 1 as a key, need text"]),
        ("{needy: 5, listed: 7}", ["needy: got 5, need `key: value` lines", "listed: got 7, need a valid tuple"]),
    ],
)
def test_a_mistake_is_told_once_in_the_words_of_the_file(text, complaints):
    with pytest.raises(ConfigError) as caught:
        parse_config(Sections, text)
    assert str(caught.value).splitlines() == [f"config: {complaint}" for complaint in complaints]


@pytest.mark.parametrize("text, complaint", [("[]", "got [], need 2 entries"), ("[1]", "got [1], need 2 entries"), ("[1, 2, 3]", "got [1, 2, 3], need 2 entries at most")])
def test_a_list_of_the_wrong_length_is_told_once(text, complaint):
    with pytest.raises(ConfigError) as caught:
        parse_config(Outer, f"point: {text}")
    assert str(caught.value) == f"config: point: {complaint}"
