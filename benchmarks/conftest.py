"""Options of the benchmark suite, and what its results say of the machine."""

from dataclasses import asdict

from ffw_fast.benchmarks.machine import Rates, describe, measure_rates
from ffw_fast.benchmarks.operators import PROVIDERS

_rates: list[Rates] = []


def pytest_addoption(parser):
    parser.addoption("--tiny", action="store_true", help="a dry run on tiny shapes, whose times say nothing")
    parser.addoption("--providers", default=",".join(PROVIDERS), help="which sides are measured (default: all)")


def pytest_collection_finish(session):
    """The machine's rates before and after all cases; the best stand."""
    if session.items and not session.config.getoption("collectonly"):
        _rates.append(_measure(session.config))


def _measure(config):
    return measure_rates(1 if config.getoption("--tiny") else 7, bf16=False)


def pytest_benchmark_update_json(config, output_json):
    rates = _rates[0].best(_measure(config))
    output_json["ffw_fast"] = {**describe(), "rates": asdict(rates)}
