"""Options: what is accepted, and what the errors say."""

import pytest

from vllm_lamina.config import LaminaConfig
from vllm_lamina.errors import ConfigError


def test_defaults_come_from_an_absent_key() -> None:
    assert LaminaConfig.from_additional_config(None) == LaminaConfig()
    assert LaminaConfig.from_additional_config({"other": 1}) == LaminaConfig()


def test_options_are_read() -> None:
    config = LaminaConfig.from_additional_config(
        {"lamina": {"memory": "2GiB", "worker_cpus": "1,3", "timeout": 5}}
    )
    assert config == LaminaConfig(memory="2GiB", worker_cpus="1,3", timeout=5)


def test_workers_are_a_list() -> None:
    assert LaminaConfig().worker_addresses == ()
    assert LaminaConfig(workers="127.0.0.1:7100, b:1").worker_addresses == ("127.0.0.1:7100", "b:1")


def test_a_number_is_accepted_where_text_is_meant() -> None:
    assert LaminaConfig.from_mapping({"worker_cpus": 1, "memory": 4096}) == LaminaConfig(
        worker_cpus="1", memory="4096"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memroy": "1GiB"}, "unknown lamina option 'memroy'; did you mean 'memory'"),
        ({"worker_cpu": "1"}, "did you mean 'worker_cpus'"),
        ({"zzz": 1}, "unknown lamina option 'zzz'; did you mean"),
        ({"memory": "lots"}, "lamina option 'memory': 'lots' is not a size"),
        ({"worker_cpus": "3-1"}, "lamina option 'worker_cpus': '3-1' is not a list of CPUs"),
        ({"batches": 3}, "'batches' must be 1 or 2, not 3"),
        ({"stagger": "sometimes"}, "'stagger' must be 'auto' or 'always', not 'sometimes'"),
        ({"transport": "rdma"}, "'transport' must be one of 'auto', 'shm', 'ucx', not 'rdma'"),
        ({"timeout": 0}, "'timeout' must be a number of seconds above 0, not 0"),
        ({"timeout": "soon"}, "'timeout' must be a number of seconds above 0, not 'soon'"),
        ({"partition": "token"}, "'partition' must be 'auto', 'head', 'sequence' or 'request', not 'token'"),
        (
            {"workers": "a:1,b:1,a:1"},
            "'workers' must name different addresses host:port, separated by commas",
        ),
        ({"workers": "a:1,"}, "'workers' must name different addresses host:port, separated by commas"),
        ({"workers": "127.0.0.1:7100", "memory": "1GiB"}, "give them to `vllm-lamina worker` instead"),
        ({"ray_workers": 3}, "lamina option 'ray_workers' needs 'ray', such as ray='auto'"),
        ({"ray": "yes", "memory": "1GiB"}, "'ray' must be 'auto', host:port or ray://host:port"),
        ({"ray": "auto"}, "'ray' needs 'memory', the memory of each attention worker"),
        ({"ray": "auto", "workers": "a:1"}, "'ray' and 'workers' exclude each other"),
        ({"ray": "auto", "secret_file": "s"}, "'ray' and 'secret_file' exclude each other"),
        ({"ray": "auto", "memory": "1GiB", "worker_cpus": "1"}, "with 'ray' it is 'ray_cpus'"),
        (
            {"ray": "auto", "memory": "1GiB", "ray_workers": 0},
            "'ray_workers' must be a number above 0, not 0",
        ),
        ({"ray": "auto", "memory": "1GiB", "ray_name": "a/b"}, "'ray_name' must be letters, digits"),
        ({"ray": "auto", "memory": "1GiB", "ray_idle_seconds": 0}, "'ray_idle_seconds' must be a number"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        LaminaConfig.from_mapping(options)


def test_a_deployment_on_ray_has_a_secret_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process of an engine finds the same file."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    for address in ("auto", "10.0.0.7:6379", "ray://head.example:10001"):
        config = LaminaConfig.from_mapping({"ray": address, "memory": "1GiB", "ray_name": "m.1"})
        assert config.secret_file == "/cache/vllm-lamina/ray-m.1.secret"
    assert LaminaConfig().secret_file == ""


def test_the_lamina_key_must_hold_options() -> None:
    with pytest.raises(ConfigError, match="must be a mapping of options, not 'yes'"):
        LaminaConfig.from_additional_config({"lamina": "yes"})
