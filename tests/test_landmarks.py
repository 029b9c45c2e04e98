import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.core import RopeSpec
from kvloom.errors import CodecError
from kvloom.retrieval.landmarks import LandmarkIndex, landmark_scores
from kvloom.retrieval.selector import LayerShape, Selector

from .retrieval_contracts import ROPE, SHAPE, SelectorContract, context


class TestLandmarkIndex(SelectorContract):
    mass = 0.6

    def make(self, shape: LayerShape, start: int = 0) -> Selector:
        return LandmarkIndex(shape, start=start)
