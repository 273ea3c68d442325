"""Every setting: its default and range, what is refused and on which line, and that what is written is read back."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vppipsec.conf import settings as conf
from vppipsec.conf.settings import Range, Settings, SettingsError, load_settings, parse_settings, render_settings

NUMBERS: dict[tuple[str, str], Range] = {
    ("netlink", "rx_buffer_size"): Range(65_536, 1_073_741_824, 268_435_456),
    ("netlink", "batch_size"): Range(1, 1_000_000, 10_000),
    ("netlink", "batch_delay_ms"): Range(0, 60_000, 50),
    ("netlink", "resync_interval_s"): Range(1, 86_400, 60),
    ("offload", "restart_rekey_rate"): Range(1, 10_000, 50),
    ("offload", "statistics_interval_s"): Range(1, 3_600, 10),
    ("metrics", "port"): Range(1, 65_535, 9_477),
}
PATHS = {
    ("vpp", "api_socket"): "/run/vpp/api.sock",
    ("vpp", "stats_socket"): "/run/vpp/stats.sock",
    ("status", "socket"): "/run/vpp-ipsecd/status.sock",
}
CHOICES: dict[tuple[str, str], tuple[Any, ...]] = {
    ("offload", "unsupported"): ("kernel", "drop"),
    ("offload", "selector_enforcement"): (True, False),
    ("metrics", "listen_address"): ("", "127.0.0.1", "::1", "2001:db8::1"),
}
"""The default first."""
DEFAULTS = (
    {key: limits.default for key, limits in NUMBERS.items()}
    | PATHS
    | {key: values[0] for key, values in CHOICES.items()}
)

each_number = pytest.mark.parametrize("key", NUMBERS, ids=".".join)
each_path = pytest.mark.parametrize("key", PATHS, ids=".".join)


def value_of(settings: Settings, key: tuple[str, str]) -> Any:
    return getattr(getattr(settings, key[0]), key[1])


def parsed(key: tuple[str, str], written: str) -> Any:
    """Return what a setting becomes that is written so."""
    return value_of(parse_settings(f"[{key[0]}]\n{key[1]} = {written}\n"), key)


def refused(text: str, name: str = "config.toml") -> str:
    """Return why a text is refused, which is one line."""
    with pytest.raises(SettingsError) as caught:
        parse_settings(text, name)
    complaint = str(caught.value)
    assert "\n" not in complaint
    return complaint


def test_these_are_all_settings_with_their_defaults() -> None:
    found = {
        (section.name, key.name): getattr(getattr(Settings(), section.name), key.name)
        for section in fields(Settings)
        for key in fields(getattr(Settings(), section.name))
    }
    assert found == DEFAULTS
    assert parse_settings("") == Settings()
    assert parse_settings("".join(f"[{section.name}]\n" for section in fields(Settings))) == Settings()


@each_number
def test_number_takes_its_lowest_and_its_highest_value(key: tuple[str, str]) -> None:
    for value in (NUMBERS[key].low, NUMBERS[key].high):
        assert parsed(key, str(value)) == value


@each_number
def test_number_out_of_its_range_is_refused_with_the_range(key: tuple[str, str]) -> None:
    limits = NUMBERS[key]
    for value in (limits.low - 1, limits.high + 1, -5, 1 << 70):
        assert refused(f"[{key[0]}]\n{key[1]} = {value}\n") == (
            f"config.toml, line 2: {key[0]}.{key[1]} must be from {limits.low} to {limits.high}, not {value}"
        )


@each_number
def test_number_that_is_none_is_refused(key: tuple[str, str]) -> None:
    for written, shown in (("true", "True"), ("5.0", "5.0"), ('"5"', "'5'"), ("[5]", "[5]"), ("nan", "nan")):
        complaint = refused(f"[{key[0]}]\n{key[1]} = {written}\n")
        assert complaint == f"config.toml, line 2: {key[0]}.{key[1]} must be a whole number, not {shown}"


@each_path
def test_path_is_absolute_and_fits_into_a_socket_address(key: tuple[str, str]) -> None:
    assert parsed(key, '"/a b/ü"') == "/a b/ü"
    assert parsed(key, f'"/{"x" * 106}"') == "/" + "x" * 106
    where = f"config.toml, line 2: {key[0]}.{key[1]} "
    for written in ("3", '""', '"run/api.sock"', "[]"):
        assert refused(f"[{key[0]}]\n{key[1]} = {written}\n").startswith(where + "must be an absolute path, not ")
    for written in ("x" * 107, "ü" * 54):
        complaint = refused(f'[{key[0]}]\n{key[1]} = "/{written}"\n')
        assert complaint.startswith(where + "must be at most 107 bytes long, not ")
    assert refused(f'[{key[0]}]\n{key[1]} = "/a\\u0000b"\n') == where + "must not contain a zero byte, not '/a\\x00b'"


@pytest.mark.parametrize("key", CHOICES, ids=".".join)
def test_choice_takes_each_of_its_values(key: tuple[str, str]) -> None:
    for value in CHOICES[key]:
        assert parsed(key, str(value).lower() if isinstance(value, bool) else f'"{value}"') == value


@pytest.mark.parametrize(
    ("section", "key", "written", "complaint"),
    [
        ("offload", "unsupported", '"Drop"', "must be 'kernel' or 'drop', not 'Drop'"),
        ("offload", "unsupported", "true", "must be 'kernel' or 'drop', not True"),
        ("offload", "selector_enforcement", '"true"', "must be true or false, not 'true'"),
        ("offload", "selector_enforcement", "1", "must be true or false, not 1"),
        ("metrics", "listen_address", '"localhost"', "must be an IP address, not 'localhost'"),
        ("metrics", "listen_address", '"10.0.0.1:80"', "must be an IP address, not '10.0.0.1:80'"),
        ("metrics", "listen_address", "5", "must be an IP address, not 5"),
        ("metrics", "listen_address", "true", "must be an IP address, not True"),
    ],
)
def test_wrong_choice_is_refused_with_the_choices(section: str, key: str, written: str, complaint: str) -> None:
    assert refused(f"[{section}]\n{key} = {written}\n") == f"config.toml, line 2: {section}.{key} {complaint}"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("\n[vpn]\n", "c, line 2: there is no section or key 'vpn'"),
        ("# where\n\nbatch_size = 3\n", "c, line 3: there is no section or key 'batch_size'"),
        ('[vpp]\napi-socket = "/a"\n', "c, line 2: [vpp] has no key 'api-socket'; it has api_socket, stats_socket"),
        ('[status]\n\n"sock\\"et" = 1\n', "c, line 3: [status] has no key 'sock\"et'; it has socket"),
        ("[metrics]\nhost = 1\n", "c, line 2: [metrics] has no key 'host'; it has listen_address, port"),
        ("\nvpp = 3\n", "c, line 2: 'vpp' must be a section, [vpp]"),
        ('["a\\nb"]\n', "c, line 1: there is no section or key 'a\\nb'"),
        ("[netlink]\n[[vpp]]\n", "c, line 2: 'vpp' must be a section, [vpp]"),
    ],
)
def test_unknown_section_or_key_is_refused_with_its_line(text: str, complaint: str) -> None:
    assert refused(text, "c") == complaint


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[netlink]\n# batch_size = 1\nbatch_delay_ms = 1\nbatch_size = 0\n", 4),
        ("[netlink]\n'batch_size' = 0\n", 2),
        ("\nnetlink.batch_size = 0\n", 2),
        ("\n\nnetlink = { batch_delay_ms = 1, batch_size = 0 }\n", 3),
        ("[netlink]\n\n[netlink.batch_size]\nx = 1\n", 3),
        ('[vpp]\napi_socket = """/a\n[netlink]\nbatch_size = 3"""\n[netlink]\nbatch_size = 0\n', 6),
        ("[netlink]\nbatch_size = [\n 1,\n 2,\n]\n", 2),
        ("[netlink]\r\nbatch_delay_ms = 1\r\nbatch_size = 0\r\n", 3),
    ],
)
def test_wrong_value_is_told_with_its_line_however_it_is_written(text: str, line: int) -> None:
    assert refused(text).startswith(f"config.toml, line {line}: netlink.batch_size must be ")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[netlink\n", "(at line 1, column 9)"),
        ("[vpp]\napi_socket = /run/x\n", "(at line 2, column 14)"),
        ("[vpp]\n[vpp]\n", "(at line 2, column 5)"),
        ("x = " + "[" * 5_000 + "]" * 5_000, "nested too deeply"),
        ("x = " + "9" * 5_000, "limit"),
    ],
)
def test_text_that_is_not_toml_is_refused_with_its_place(text: str, says: str) -> None:
    complaint = refused(text)
    assert complaint.startswith("config.toml: ")
    assert says in complaint


@given(st.text(max_size=200))
def test_any_text_is_taken_or_refused(text: str) -> None:
    for written in (text, f"[netlink]\n{text}", f"[vpp]\napi_socket = {text}"):
        try:
            settings = parse_settings(written)
        except SettingsError as error:
            complaint = str(error)
        else:
            assert parse_settings(render_settings(settings)) == settings
            complaint = "config.toml"
        assert complaint.startswith("config.toml")
        assert "\n" not in complaint


# Files


def test_file_is_read_and_named_in_complaints(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text("[netlink]\nbatch_size = 7\n")
    assert load_settings(file) == replace(Settings(), netlink=replace(Settings().netlink, batch_size=7))
    file.write_text("[netlink]\nbatch_size = 0\n")
    with pytest.raises(SettingsError, match=r"x\.toml, line 2: netlink\.batch_size must be from 1 to 1000000, not 0$"):
        load_settings(file)


def test_file_that_cannot_be_read_is_told_with_the_reason(tmp_path: Path) -> None:
    for path, reason in (
        (tmp_path / "none.toml", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (tmp_path / "none" / "x.toml", "No such file or directory"),
    ):
        with pytest.raises(SettingsError) as caught:
            load_settings(path)
        assert str(caught.value) == f"{path}: cannot be read: {reason}"


def test_file_that_is_not_utf_8_is_told(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_bytes(b'[vpp]\napi_socket = "/\xff"\n')
    with pytest.raises(SettingsError, match=r"x\.toml: cannot be read: it is not UTF-8 text$"):
        load_settings(file)


def test_given_file_goes_before_the_defaults_and_these_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, first, second = (tmp_path / name for name in ("given", "first", "second"))
    monkeypatch.setattr(conf, "DEFAULT_CONFIG", first)
    monkeypatch.setattr(conf, "FALLBACK_CONFIG", second)
    assert conf.find_config(None) is None
    second.touch()
    assert conf.find_config(None) == second
    first.touch()
    assert conf.find_config(None) == first
    assert conf.find_config(given) == given


# Writing


def socket_paths() -> st.SearchStrategy[str]:
    text = st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), max_size=40)
    return text.map(lambda rest: "/" + rest).filter(lambda path: len(path.encode()) <= 107)


def any_settings() -> st.SearchStrategy[Settings]:
    values: dict[tuple[str, str], st.SearchStrategy[Any]] = {
        **{key: st.integers(limits.low, limits.high) for key, limits in NUMBERS.items()},
        **{key: socket_paths() for key in PATHS},
        **{key: st.sampled_from(choices) for key, choices in CHOICES.items()},
    }
    sections = {}
    for section in fields(Settings):
        kind = type(getattr(Settings(), section.name))
        sections[section.name] = st.builds(kind, **{key: s for (of, key), s in values.items() if of == section.name})
    return st.builds(Settings, **sections)


@given(any_settings())
def test_what_is_written_is_read_back(settings: Settings) -> None:
    assert parse_settings(render_settings(settings)) == settings


@pytest.mark.parametrize(
    "path",
    [
        '/a"\nbatch_size = 1\n"',
        "/back\\slash",
        "/tab\tand\rreturn\n",
        "/\x7f\x1b\x01",
        "/ü\N{GRINNING FACE}\u2028",
        "/'''\"\"\"",
    ],
)
def test_path_with_what_toml_gives_a_meaning_stays_a_path(path: str, tmp_path: Path) -> None:
    settings = replace(Settings(), vpp=conf.VppSettings(api_socket=path))
    file = tmp_path / "config.toml"
    file.write_text(render_settings(settings), encoding="utf-8")
    assert load_settings(file) == settings
    assert len(render_settings(settings).splitlines()) >= len(render_settings(Settings()).splitlines())
