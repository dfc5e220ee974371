from __future__ import annotations

import ast
import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_wallfacer.kernels.optional import UnavailableError
from megatron_wallfacer.kernels.signatures import LibraryFunction, OptionalArgument, Signature
from megatron_wallfacer.kernels.te import TransformerEngineKernel
from tests.kernels import fakes
from tests.kernels.published import read_signature
from tests.kernels.releases import TE, make

ABOUT = {"name": "attend", "owner": "library 1.2", "needs": "library >= 2"}


def attend(q: int, k: int, scale: float, *, causal: bool, cap: float = 0.0) -> tuple:
    return q, k, scale, causal, cap


def library_function(function: Callable[..., object] | None) -> LibraryFunction:
    return LibraryFunction(function, tensors=("q", "k"), **ABOUT)


def test_an_optional_argument_is_left_out_where_the_function_has_no_such_parameter() -> None:
    values = {"scale": 0.5, "causal": True, "cap": 3.0, "window": OptionalArgument(None)}
    assert library_function(attend).bind(values)(q=1, k=2) == (1, 2, 0.5, True, 3.0)


def test_an_optional_argument_is_passed_where_there_is_such_a_parameter() -> None:
    values = {"scale": 0.5, "causal": True, "cap": OptionalArgument(7.0)}
    assert library_function(attend).bind(values)(q=1, k=2)[-1] == 7.0


def test_a_signature_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    function = library_function(attend)
    monkeypatch.setattr(Signature, "of", None)
    call = function.bind({"scale": 0.5, "causal": True})
    monkeypatch.setattr(Signature, "arguments", None)
    assert call(q=1, k=2) == call(q=1, k=2)


def test_a_missing_parameter_is_rejected_by_name() -> None:
    with pytest.raises(UnavailableError) as error:
        library_function(attend).bind({"scale": 0.5, "causal": True, "window": 4, "sink": 5})
    assert str(error.value) == "library 1.2: attend has no window, sink; needs library >= 2"


def test_a_parameter_that_is_required_and_not_given_is_rejected_by_name() -> None:
    with pytest.raises(UnavailableError) as error:
        library_function(attend).bind({"causal": True})
    assert str(error.value) == "library 1.2: attend requires scale, which the plugin does not pass; needs library >= 2"


def test_a_function_that_is_not_there_is_rejected_by_name() -> None:
    with pytest.raises(UnavailableError, match=r"library 1\.2: there is no attend; needs library >= 2"):
        library_function(None)


def test_a_function_whose_parameters_cannot_be_seen_is_rejected() -> None:
    with pytest.raises(
        UnavailableError, match=r"library 1\.2: attend takes .*, so the plugin cannot check its parameters"
    ):
        library_function(lambda *args, **kwargs: None)


def test_wrapped_functions_are_seen_through() -> None:
    @functools.wraps(attend)
    def wrapped(*args: object, **kwargs: object) -> object:
        return attend(*args, **kwargs)

    assert Signature.of(wrapped, **ABOUT) == Signature.of(attend, **ABOUT)


@pytest.fixture
def operator() -> object:
    """A custom operator, as flash-attn makes its functions: ``(*args, **kwargs)`` to ``inspect``."""

    @torch.library.custom_op("wallfacer_test::attend", mutates_args=("dq",))
    def attend(q: Tensor, scale: float, dq: Tensor | None, cap: float = 0.0) -> Tensor:
        dq.copy_(q)
        return q * scale

    return attend


def test_operators_have_the_signature_of_their_schema(operator: object) -> None:
    signature = Signature.of(operator, **ABOUT)
    assert signature.names == {"q", "scale", "dq", "cap"}
    assert signature.required == {"q", "scale", "dq"}
    assert Signature.of(torch.ops.wallfacer_test.attend, **ABOUT) == signature
    assert Signature.of(torch.ops.wallfacer_test.attend.default, **ABOUT) == signature


def test_operators_are_called_by_keyword(operator: object) -> None:
    q = torch.ones(2)
    dq = torch.zeros(2)
    function = LibraryFunction(operator, tensors=("q", "dq"), **ABOUT)
    found = function.bind({"scale": 2.0, "window": OptionalArgument(-1)})(q=q, dq=dq)
    assert (found.tolist(), dq.tolist()) == ([2.0, 2.0], [1.0, 1.0])


@pytest.mark.parametrize(
    "source",
    [
        "def f(a, b, c=1): ...",
        "def f(a, /, b=2, *, c, d=4): ...",
        "def f(*, a=1): ...",
        "def f(a: int, b: float = 0.5) -> None: ...",
    ],
)
def test_a_definition_that_is_read_says_what_the_function_would(source: str) -> None:
    scope: dict = {}
    exec(source, scope)
    read = read_signature(ast.parse(source).body[0], owner="o", needs="n")
    assert read == Signature.of(scope["f"], name="f", owner="o", needs="n")


def test_a_release_that_does_not_fit_is_rejected_with_what_was_found() -> None:
    with pytest.raises(UnavailableError) as error:
        make("flash-attn 2.5.9")
    assert str(error.value) == "flash-attn 2.5.9: _flash_attn_forward has no softcap; needs flash-attn >= 2.6, < 3"


def test_a_transformer_engine_without_the_backend_is_rejected() -> None:
    module = fakes.transformer_engine(*(fakes.definition(source) for source in TE["transformer-engine 2.20.2"]))
    module.FusedAttnBackend = {"FP8": 1}
    with pytest.raises(UnavailableError) as error:
        TransformerEngineKernel(module, title="transformer-engine 9.9.9")
    reason = "there is no backend F16_arbitrary_seqlen; needs transformer-engine >= 2.1"
    assert str(error.value) == f"transformer-engine 9.9.9: {reason}"
