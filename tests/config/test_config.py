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
        ({"timeout": 0}, "'timeout' must be a number of seconds above 0, not 0"),
        ({"timeout": "soon"}, "'timeout' must be a number of seconds above 0, not 'soon'"),
        ({"workers": "127.0.0.1:7100", "memory": "1GiB"}, "give them to `vllm-lamina worker` instead"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        LaminaConfig.from_mapping(options)


def test_the_lamina_key_must_hold_options() -> None:
    with pytest.raises(ConfigError, match="must be a mapping of options, not 'yes'"):
        LaminaConfig.from_additional_config({"lamina": "yes"})
