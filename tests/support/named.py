"""Models whose names are looked at: saved, loaded, and served by a connector that compares itself with them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from kvloom.blend.blender import Blender
from kvloom.connectors.hf.connector import TransformersConnector
from kvloom.connectors.hf.model import TransformersModel
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.host import HostTier

from .models import DOCUMENTS, QUESTION, make_model, make_tokenizer, prefill


def name_of(model: torch.nn.Module, model_id: str | None = None) -> str:
    return TransformersModel(model, model_id=model_id).spec.model_id


def saved(folder: Path, **options: Any) -> Path:
    make_model("llama", **options).save_pretrained(folder)
    return folder


def load(folder: Path, dtype: str = "float32") -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval()


class Rag(TransformersConnector):
    """Fuses exactly, and compares its cache with the model's own forward."""

    def __init__(self, model: torch.nn.Module, **options: Any) -> None:
        store = options.pop("store", None) or KVStore([HostTier(None)])
        super().__init__(model, make_tokenizer(bos=True), store, blender=Blender(recompute_ratio=1.0), **options)

    def error(self) -> float:
        inputs, cache = self.assemble(DOCUMENTS[:2], QUESTION)
        truth = prefill(self.model, inputs["input_ids"][0].tolist())
        keys = torch.cat([layer.keys for layer in cache.layers])
        return float((keys - truth.keys[:, :, : keys.shape[2]]).abs().max())

    def is_renamed(self, change: Callable[[], object], computed: int = 2) -> None:
        """What was stored before is not found, nothing old is served, and what is stored now is found."""
        before = self.spec
        change()
        assert self.precompute(DOCUMENTS[:2]).computed == computed
        assert self.spec != before
        assert self.error() < 1e-4
        assert self.precompute(DOCUMENTS[:2]).stored == 2
