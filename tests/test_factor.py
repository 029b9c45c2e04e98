from kvloom.retrieval.factor import FactorIndex, device_key_bytes
from kvloom.retrieval.key_factor import KeyFactor, rebuild_keys
from kvloom.retrieval.selector import LayerShape, Selector

from .retrieval_contracts import SelectorContract


class TestFactorIndex(SelectorContract):
    mass = 0.7

    def make(self, shape: LayerShape, start: int = 0) -> Selector:
        return FactorIndex(shape, start=start, rank=24)

    def ready(self, selector: Selector) -> Selector:
        selector.build()
        return selector
