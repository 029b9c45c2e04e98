"""kvloom in Hugging Face transformers."""

from __future__ import annotations

from .connector import FusedContext, Precomputed, TransformersConnector

__all__ = ["FusedContext", "Precomputed", "TransformersConnector"]
