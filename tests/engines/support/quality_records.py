"""Run as a script, on a folder with a model: a profile of it, and certificates that say what is convenient for a test.

In a process of its own, as users do it: vLLM cannot start beside some of the modules that calibration imports.
"""

import random
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM

from kvloom.blend.method import FUSION, FusionMethod
from kvloom.calibration.certificate import Certificate, Figure
from kvloom.calibration.codec_form import parameters_of
from kvloom.certify.calibrate_model import calibrate
from kvloom.compress.registry import codec_by_name
from kvloom.connectors.hf.model import TransformersModel

MODEL_ID = "tiny"


def main(folder: Path) -> None:
    """`folder/model` gets `profile.safetensors`, `nuq4.json`, and `fusion.json` for a tenth."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    rng = random.Random(8)
    windows = [[rng.randrange(3, model.config.vocab_size) for _ in range(300)] for _ in range(4)]
    profile = calibrate(model, windows, model_id=MODEL_ID)
    profile.save(folder / "profile.safetensors")
    spec, nuq4 = TransformersModel(model, model_id=MODEL_ID).spec, codec_by_name("nuq4", profile)
    figures = {"kl": Figure(0.01, 0.0, 0.02, "nats/token", 0.1)}
    for name, form, parameters in (
        ("nuq4", nuq4.name, parameters_of(nuq4)),
        ("fusion", FUSION, FusionMethod(0.1).parameters),
    ):
        (folder / f"{name}.json").write_text(Certificate(spec, form, parameters, figures).to_json())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
