"""One answer to whether an approximation may be used for a model."""

import json
import threading
from dataclasses import replace

import pytest

from kvloom.calibration.certificate import Certificate, Figure
from kvloom.calibration.certificate_gate import CertificateGate
from kvloom.errors import JudgedWithoutTasksWarning, UncertifiedError, UncertifiedWarning
from kvloom.retrieval.settings import Retrieval, require_certificate
from kvloom.testing import SPEC

FIGURE = Figure(0.01, 0.0, 0.02, limit=0.03)
CERTIFICATE = Certificate(SPEC, "coarse", {"bits": 4}, {"kl": FIGURE, "needle_loss": FIGURE})
FORM = CERTIFICATE.form
OTHER = ("coarse", '{"bits":3}')


def test_what_a_certificate_covers_is_permitted_and_no_use_without_one() -> None:
    gate = CertificateGate([replace(CERTIFICATE, parameters={"bits": 2}), CERTIFICATE])
    for _ in range(2):  # the second answer is remembered
        assert gate.covering(FORM, SPEC) is CERTIFICATE and gate.permits(FORM, SPEC) and gate.use(FORM, SPEC, "it")
        gate.require(FORM, SPEC, "the lossy codec 'coarse'", "--codec coarse")
    assert gate.uncertified_uses == 0


@pytest.mark.parametrize(
    ("form", "spec"), [(OTHER, SPEC), (FORM, replace(SPEC, model_id="another")), (FORM, replace(SPEC, num_layers=4))]
)
def test_what_none_covers_is_refused(form: tuple[str, str], spec: object) -> None:
    gate = CertificateGate([CERTIFICATE, replace(CERTIFICATE, parameters={"bits": 3}, figures={})])
    assert gate.covering(form, spec) is None and not gate.permits(form, spec) and not gate.use(form, spec, "it")
    expected = (
        rf"the lossy codec 'coarse' may not be used for {spec.model_id}: .* `kvloom certify MODEL --codec coarse`"
    )
    with pytest.raises(UncertifiedError, match=expected):
        gate.require(form, spec, "the lossy codec 'coarse'", "--codec coarse")
    assert gate.uncertified_uses == 0


def test_a_certificate_that_no_task_was_judged_for_says_so_and_warns_once() -> None:
    assert CERTIFICATE.tasks == ("needle",) and CERTIFICATE.title == "coarse on tiny@1"
    by_text = replace(CERTIFICATE, figures={"kl": FIGURE})
    assert by_text.tasks == () and by_text.title == "coarse on tiny@1, judged without tasks"
    assert json.loads(by_text.to_json())["title"] == by_text.title
    assert Certificate.from_json(by_text.to_json()) == by_text
    gate = CertificateGate([by_text])
    with pytest.warns(JudgedWithoutTasksWarning, match="whether it keeps answers was not judged") as caught:
        assert gate.use(FORM, SPEC, "it") and gate.use(FORM, SPEC, "it")
    assert len(caught) == 1


def test_an_unknown_model_is_covered_by_nothing() -> None:
    assert not CertificateGate([CERTIFICATE]).use(FORM, None, "it")


def test_an_override_is_counted_and_warned_of_once() -> None:
    gate = CertificateGate([CERTIFICATE], allow_uncertified=True)
    assert gate.permits(OTHER, SPEC) and gate.use(FORM, SPEC, "it") and gate.uncertified_uses == 0
    with pytest.warns(UncertifiedWarning, match=r"the lossy codec 'coarse' is used for tiny@1 without") as caught:
        gate.require(OTHER, SPEC, "the lossy codec 'coarse'", "--codec coarse")
        assert gate.use(OTHER, SPEC, "it") and gate.use(FORM, None, "it")
    assert len(caught) == 1 and gate.uncertified_uses == 3


def test_more_questions_than_are_remembered_from_several_threads() -> None:
    gate = CertificateGate([CERTIFICATE])
    answers: list[bool] = []

    def ask() -> None:
        answers.extend(gate.permits(("coarse", f'{{"bits":{n}}}'), SPEC) for n in range(600))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(answers) == 4 and len(answers) == 2400


def test_certificates_of_retrieval_from_before_the_rest_was_estimated_cover_it_no_longer() -> None:
    retrieval, alone = Retrieval(budget_ratio=0.06), Retrieval(budget_ratio=0.06, parameters={"value_bits": 0})
    figures = {"kl": FIGURE, "needle_loss": FIGURE}
    before = Certificate(SPEC, retrieval.form[0], {**retrieval.fields, "parameters": {}}, figures)
    with pytest.raises(UncertifiedError, match="retrieval 'quantized'"):
        require_certificate(CertificateGate([before]), retrieval, SPEC)
    now = Certificate(SPEC, retrieval.form[0], retrieval.fields, figures)
    assert require_certificate(CertificateGate([before, now]), retrieval, SPEC) is now
    with pytest.raises(UncertifiedError, match="retrieval 'quantized'"):
        require_certificate(CertificateGate([before, now]), alone, SPEC)
    assert '"value_bits":1' in retrieval.form[1].replace(" ", "")
