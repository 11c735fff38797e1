from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_pd.errors import ConfigError
from vllm_pd.router.addresses import base_url, control_address, host_port, instance_id


@pytest.mark.parametrize(
    "url",
    [
        "http://host:80/",
        "HTTP://Host",
        "http://host:80",
        "http://host//",
    ],
)
def test_one_instance_has_one_address(url: str) -> None:
    assert base_url(url) == "http://host"


@pytest.mark.parametrize(
    ("url", "known_as"),
    [
        ("http://10.0.0.1:8100/", "http://10.0.0.1:8100"),
        ("https://host:443/a/b/", "https://host/a/b"),
        ("http://[::1]:8100", "http://[::1]:8100"),
        ("http://[::1]", "http://[::1]"),
    ],
)
def test_what_tells_instances_apart_stays(url: str, known_as: str) -> None:
    assert base_url(url) == known_as


@pytest.mark.parametrize(
    "url",
    [
        "",
        "host:8100",
        "ftp://host",
        "file:///etc/passwd",
        "http://",
        "http://:8100",
        "http://host:0",
        "http://host:99999",
        "http://host:port",
        "http://[::1",
        "http://user@host",
        "http://user:secret@host",
        "http://host?a=b",
        "http://host?",
        "http://host/#a",
        "http://host/a~b",
        "http://ho st",
        "http://host/\r\nX-Evil: 1",
        "http://h\u00f6st",
        "http://host\\@other",
    ],
)
def test_what_is_no_plain_http_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="instance address"):
        base_url(url)


@given(st.text())
def test_an_address_is_normal_or_refused(text: str) -> None:
    try:
        url = base_url(f"http://{text}")
    except ConfigError:
        return
    assert base_url(url) == url
    assert "/" not in instance_id(url)


def test_an_id_names_host_port_and_path() -> None:
    assert instance_id("http://[::1]:8100") == "[::1]:8100"
    assert instance_id("http://host") == "host:80"
    assert instance_id("https://gateway/model/a") == "gateway:443~model~a"


def test_a_port_serves_one_instance_whatever_the_scheme() -> None:
    assert instance_id("http://host:8100") == instance_id("https://host:8100")


@pytest.mark.parametrize("text", ["10.0.0.1:5600", "[::1]:5600", "host:1"])
def test_a_control_address_is_read_and_written_alike(text: str) -> None:
    assert host_port(control_address(text)) == text


@pytest.mark.parametrize(
    "text", ["", "host", "host:", ":5600", "host:0", "host:70000", "ho st:5", "host:\u0663", "[]:5"]
)
def test_what_is_no_control_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not host:port"):
        control_address(text)
