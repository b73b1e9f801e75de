"""Sizes and CPU lists as people write them."""

import pytest

from vllm_lamina.units import format_bytes, format_cpus, parse_bytes, parse_cpus


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("4096", 4096),
        ("512 MiB", 512 << 20),
        ("4GiB", 4 << 30),
        ("4g", 4 << 30),
        ("4GB", 4 * 10**9),
        ("1.5TiB", 3 << 39),
        ("0", 0),
    ],
)
def test_parse_bytes(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "4 XiB", "1e9", "4GiB8"])
def test_parse_bytes_names_the_text(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1000, "1000 B"),
        (4 << 30, "4 GiB"),
        (3 << 19, "1.5 MiB"),
        (1023 << 20, "1023 MiB"),
        (5 << 40, "5 TiB"),
    ],
)
def test_format_bytes(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


def test_cpus() -> None:
    assert parse_cpus("0-3,6") == [0, 1, 2, 3, 6]
    assert parse_cpus("5, 1-2") == [5, 1, 2]
    assert format_cpus([6, 3, 0, 1, 2]) == "0-3,6"
    assert format_cpus([]) == ""


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,,2", "-1"])
def test_parse_cpus_names_the_text(text: str) -> None:
    with pytest.raises(ValueError, match="is not a list of CPUs"):
        parse_cpus(text)


def test_parse_cpus_refuses_duplicates() -> None:
    with pytest.raises(ValueError, match="twice"):
        parse_cpus("0-2,1")
