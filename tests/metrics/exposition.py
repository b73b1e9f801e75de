"""What `/metrics` shows, read as Prometheus reads it."""

from __future__ import annotations

import urllib.request
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

PREFIX = "vllm:lamina_"


@dataclass(frozen=True)
class Scrape:
    """Lamina's metrics at one time: the type of each family, and the value of each sample by its name and labels."""

    types: dict[str, str]
    samples: dict[str, dict[frozenset[tuple[str, str]], float]]

    @classmethod
    def of(cls, url: str) -> Scrape:
        """Raises URLError, as long as the server does not answer."""
        with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        ours = [
            family
            for family in families
            if family.name.startswith(PREFIX) and not family.name.endswith("_created")
        ]
        samples: dict[str, dict[frozenset[tuple[str, str]], float]] = {}
        for family in ours:
            for sample in family.samples:
                samples.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
        return cls({family.name: family.type for family in ours}, samples)

    def value(self, name: str, **labels: str) -> float:
        """The one sample of `vllm:lamina_NAME` whose labels include these; 0 where there is none."""
        found = [
            value
            for key, value in self.samples.get(PREFIX + name, {}).items()
            if set(labels.items()) <= set(key)
        ]
        assert len(found) <= 1, f"{name} with {labels} is ambiguous"
        return found[0] if found else 0.0

    def label_names(self, name: str) -> set[str]:
        """Names of all labels of the samples of `vllm:lamina_NAME`."""
        return {label for key in self.samples.get(PREFIX + name, {}) for label, _ in key}
