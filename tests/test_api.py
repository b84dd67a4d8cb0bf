"""The HTTP API beside its own description: what schemathesis makes up is answered as the description says."""

import contextlib

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from nin import server
from support.serving import Running, make_run, pictures, png

EXAMPLES = 10  # of each operation; benchmarks/serve/README.md has a longer run

IMAGES = [*pictures(3), png(size=(40, 30)), png((9, 90, 200), mode="RGB")]

# the description says that a part is a file; that it is an image no schema can say
schemathesis.openapi.format("binary", st.sampled_from(IMAGES))
schemathesis.openapi.media_type("image/*", st.sampled_from(IMAGES))


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    served = Running(server.create_app(make_run(folder / "run"), beside=make_run(folder / "beside")))
    for run in served.app.state.service.runs:
        run.samples.thread.join(timeout=60)
    yield schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    served.stop()


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["fitting", "unfitting"])
def test_every_answer_is_as_described(described, mode):
    for found in described.get_all_operations():
        operation = found.ok()

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        def check(case):
            case.call_and_validate()

        with contextlib.suppress(Unsatisfiable):  # nothing can be wrong where nothing is asked for
            check()
