"""What every replica tells Prometheus, as one text: each series with the replica it is of."""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector


class _Together(Collector):
    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = texts

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        families: dict[str, Metric] = {}
        for replica, text in self._texts.items():
            for family in text_string_to_metric_families(text):
                one = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    one.add_sample(sample.name, sample.labels | {"replica": replica}, sample.value)
        yield from families.values()


def merged(texts: Mapping[str, str], own: CollectorRegistry) -> bytes:
    """`texts` by replica; `own` is of who asks them."""
    every = CollectorRegistry()
    every.register(_Together(texts))
    return generate_latest(own) + generate_latest(every)
